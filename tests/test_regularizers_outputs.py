"""Regularizers of the outputs: value and gradient against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree
from regularizer_checks import (
    assert_agrees,
    assert_half_is_close,
    assert_same_on_eight_devices,
    assert_smooth,
    assert_zero_there,
)

from dtnh_jax import regularizers


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def per_batch(values, reduction):
    return np.mean(values) if reduction == "mean" else np.sum(values)


def distillation_by_hand(s, t, temperature=1.0, t_squared=True, reduction="mean"):
    ls, lt = log_softmax(s / temperature), log_softmax(np.float64(t) / temperature)
    factor = temperature**2 if t_squared else 1.0
    return factor * per_batch(np.sum(np.exp(lt) * (lt - ls), -1), reduction)


def logit_matching_by_hand(s, t, reduction="mean"):
    return per_batch(np.sum((s - np.float64(t)) ** 2, -1) / 2, reduction)


def kl_to_reference_by_hand(s, t, reduction="mean"):
    ls, lt = log_softmax(s), log_softmax(t)
    return per_batch(np.sum(np.exp(ls) * (ls - lt), -1), reduction)


def label_smoothing_by_hand(s, t, reduction="mean"):
    return per_batch(-np.sum(np.exp(log_softmax(t)) * log_softmax(s), -1), reduction)


def co_tuning_by_hand(z, labels, relationship, reduction="mean"):
    rows = np.float64(relationship)[labels]
    return per_batch(-np.sum(rows * log_softmax(z), -1), reduction)


PAIRS = [
    ("distillation", distillation_by_hand),
    ("logit_matching", logit_matching_by_hand),
    ("label_smoothing", label_smoothing_by_hand),
    ("kl_to_reference", kl_to_reference_by_hand),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(8, 5), (5,), (2, 3, 4)])
@pytest.mark.parametrize(("name", "oracle"), PAIRS)
def test_agrees_with_numpy(name, oracle, shape, reduction):
    s, t = random_tree(0, shapes=shape, scale=3), random_tree(1, shapes=shape, scale=3)
    fun = functools.partial(getattr(regularizers, name), reduction=reduction)
    assert_agrees(lambda s: fun(s, t), lambda s: oracle(s, t, reduction=reduction), s)


@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_distillation_temperatures(temperature, t_squared):
    s, t = random_tree(0, shapes=(8, 5), scale=3), random_tree(1, shapes=(8, 5), scale=3)
    value, grad = assert_agrees(
        lambda s: regularizers.distillation(s, t, temperature, t_squared=t_squared),
        lambda s: distillation_by_hand(s, t, temperature, t_squared),
        s,
    )
    p, q = (np.exp(log_softmax(x / temperature)) for x in (s, t))
    factor = temperature if t_squared else 1 / temperature
    np.testing.assert_allclose(grad, factor * (p - q) / 8, rtol=1e-5, atol=1e-7)
    traced = jax.jit(functools.partial(regularizers.distillation, t_squared=t_squared))
    np.testing.assert_allclose(traced(s, t, jnp.float32(temperature)), value, rtol=1e-6)


def test_equal_student_and_teacher():
    s = random_tree(0, shapes=(8, 5))
    value, grad = jax.value_and_grad(regularizers.distillation)(s, s, 2.0)
    assert float(value) == 0
    np.testing.assert_allclose(grad, 0, atol=1e-8)
    assert_zero_there(lambda x: regularizers.logit_matching(x, s), s)
    assert_zero_there(lambda x: regularizers.kl_to_reference(x, s), s, atol=1e-7)
    value, grad = jax.value_and_grad(regularizers.label_smoothing)(s, s)
    entropy = -np.mean(np.sum(np.exp(log_softmax(s)) * log_softmax(s), -1))
    np.testing.assert_allclose(value, entropy, rtol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-8)


@pytest.mark.parametrize("name", ["distillation", "label_smoothing"])
@pytest.mark.parametrize("ruled_out", [-1e4, -np.inf])
def test_certain_teacher(name, ruled_out):
    """Also where the student is as certain, of another class."""
    t = np.full((2, 3), ruled_out, np.float32)
    t[:, 0] = 1e4
    s = np.float32([[0, 1, 2], [-1e4, 1e4, 0]])
    value, grad = jax.value_and_grad(getattr(regularizers, name))(s, t)
    np.testing.assert_allclose(value, (np.log(1 + np.e + np.e**2) + 2e4) / 2, rtol=1e-6)
    p = np.exp(log_softmax(s))
    np.testing.assert_allclose(grad, (p - [[1, 0, 0]]) / 2, rtol=1e-5, atol=1e-7)
    # A student of whom the same classes are ruled out.
    value, grad = jax.value_and_grad(getattr(regularizers, name))(t, t)
    assert float(value) == 0
    assert np.all(np.asarray(grad) == 0)


def test_distillation_t_squared_keeps_the_gradient():
    """At a high temperature it tends to logit matching over the number of classes."""
    s, t = (random_tree(i, shapes=(4, 5)) for i in (0, 1))
    s, t = (x - x.mean(-1, keepdims=True) for x in (s, t))
    got = jax.grad(regularizers.distillation)(s, t, 1e3)
    wanted = jax.grad(regularizers.logit_matching)(s, t) / 5
    np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-4)


def test_smoothed_labels_are_a_weighted_sum():
    s, t = random_tree(0, shapes=(4, 5)), random_tree(1, shapes=(4, 5))
    labels = np.eye(5)[[0, 3, 1, 1]]
    smoothed = 0.9 * labels + 0.1 * np.exp(log_softmax(t))
    wanted = -np.mean(np.sum(smoothed * log_softmax(s), -1))
    loss = -np.mean(np.sum(labels * log_softmax(s), -1))
    got = 0.9 * loss + 0.1 * float(regularizers.label_smoothing(s, t))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name, _ in PAIRS])
def test_smooth_vmap_half_sharded(name):
    fun = getattr(regularizers, name)
    s, t = random_tree(0, shapes=(8, 5)), random_tree(1, shapes=(8, 5))
    assert_smooth(lambda s: fun(s, t), s)
    each = jax.vmap(fun)(s, t)
    np.testing.assert_allclose(each.mean(), fun(s, t), rtol=1e-6)
    assert_half_is_close(lambda x: fun(x, t), s)
    assert_same_on_eight_devices(fun, s, t)


def test_bad_logits():
    s = jnp.ones((4, 5))
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive; got"):
            regularizers.distillation(s, s, temperature)
    for name, _ in PAIRS:
        fun = getattr(regularizers, name)
        with pytest.raises(ValueError, match=rf"{name}.*same shape.*\(4, 5\) and \(4, 6\)"):
            fun(s, jnp.ones((4, 6)))
        with pytest.raises(ValueError, match=r"\(\.\.\., classes\)"):
            fun(jnp.ones(()), jnp.ones(()))
        with pytest.raises(
            ValueError, match=r"reduction must be 'mean', 'sum' or 'none'; got 'batchm"
        ):
            fun(s, s, reduction="batchmean")


Z = random_tree(2, shapes=(8, 6), scale=2)
LABELS = np.array([0, 1, 2, 0, 1, 1, 0, 2])


def relationship():
    return regularizers.co_tuning_relationship(Z, LABELS, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_co_tuning_agrees_with_numpy(reduction):
    rows = relationship()
    z = random_tree(3, shapes=(8, 6), scale=2)
    assert_agrees(
        lambda z: regularizers.co_tuning(z, LABELS, rows, reduction=reduction),
        lambda z: co_tuning_by_hand(z, LABELS, rows, reduction),
        z,
    )


def test_relationship_agrees_with_numpy():
    p = np.exp(log_softmax(Z))
    wanted = np.stack([p[label == LABELS].mean(0) for label in range(3)])
    np.testing.assert_allclose(relationship(), wanted, rtol=1e-6)
    jitted = jax.jit(regularizers.co_tuning_relationship, static_argnums=2)
    np.testing.assert_allclose(jitted(Z, LABELS, 3), wanted, rtol=1e-6)
    # A class without examples, and one that the task does not have.
    wider = regularizers.co_tuning_relationship(Z, np.where(LABELS == 2, 9, LABELS), 4)
    np.testing.assert_allclose(wider[:2], wanted[:2], rtol=1e-6)
    assert np.all(np.asarray(wider[2:]) == 0)
    assert_half_is_close(
        lambda z: jnp.sum(regularizers.co_tuning_relationship(z, LABELS, 3)[0, :2]), Z
    )


def test_co_tuning_degenerate_smooth_vmap_half_sharded():
    rows = relationship()
    one_hot = np.eye(6, dtype=np.float32)[:3]
    certain = np.float32(2e4 * np.eye(6)[LABELS] - 1e4)
    assert_zero_there(lambda z: regularizers.co_tuning(z, LABELS, one_hot), certain)
    far = jnp.roll(certain, 1, axis=1)
    value, grad = jax.value_and_grad(regularizers.co_tuning)(far, LABELS, one_hot)
    np.testing.assert_allclose(value, 2e4, rtol=1e-6)
    np.testing.assert_allclose(
        grad, (np.roll(certain, 1, 1) > 0) / 8 - one_hot[LABELS] / 8, rtol=1e-6
    )
    z = random_tree(3, shapes=(8, 6))
    assert_smooth(lambda z: regularizers.co_tuning(z, LABELS, rows), z)
    each = jax.vmap(regularizers.co_tuning, in_axes=(0, 0, None))(z, LABELS, rows)
    np.testing.assert_allclose(each.mean(), regularizers.co_tuning(z, LABELS, rows), rtol=1e-6)
    assert_half_is_close(lambda z: regularizers.co_tuning(z, LABELS, rows), z)
    assert_same_on_eight_devices(lambda z, y: regularizers.co_tuning(z, y, rows), z, LABELS)


def test_co_tuning_bad_input():
    rows = relationship()
    with pytest.raises(ValueError, match=r"labels of shape \(\.\.\.\); got \(8, 6\) and \(3,\)"):
        regularizers.co_tuning(Z, LABELS[:3], rows)
    with pytest.raises(ValueError, match=r"integer labels.*float32"):
        regularizers.co_tuning(Z, LABELS.astype(np.float32), rows)
    with pytest.raises(ValueError, match=r"\(target classes, 6\).*got \(6, 3\)"):
        regularizers.co_tuning(Z, LABELS, rows.T)
    with pytest.raises(ValueError, match=r"n_classes must be an integer >= 1; got 0"):
        regularizers.co_tuning_relationship(Z, LABELS, 0)
    with pytest.raises(ValueError, match=r"\(n, source classes\); got \(1, 8, 6\)"):
        regularizers.co_tuning_relationship(Z[None], LABELS[None], 3)
    assert np.isnan(regularizers.co_tuning(Z, LABELS + 1, rows))


@pytest.mark.parametrize("label", [-4, -3, -2, -1, 3, 100])
def test_a_label_out_of_range_is_no_class(label):
    """-1 is what others take for "ignore", and NumPy for the last."""
    labels = np.where(np.arange(len(LABELS)) == 0, label, LABELS)
    assert np.isnan(regularizers.co_tuning(Z, labels, relationship()))
    np.testing.assert_allclose(
        regularizers.co_tuning_relationship(Z, labels, 3),
        regularizers.co_tuning_relationship(Z[1:], LABELS[1:], 3),
        rtol=1e-6,
    )
    params = jnp.ones((6, 3))
    fisher = regularizers.fisher_diagonal(lambda params, x: x @ params, params, [(Z, labels)])
    assert np.isnan(fisher).all()


# Which examples count

KEPT = np.array([[True, True, False], [True, False, False]])


def sampled(estimator):
    """sampled_kl of the numbers that stand for class 1."""

    def fun(s, t, **kwargs):
        own, reference = (jnp.asarray(x)[..., 1] for x in (s, t))
        return regularizers.sampled_kl(own, reference, estimator=estimator, **kwargs)

    return fun


def co_tuned(s, t, **kwargs):
    labels = np.arange(s.size // s.shape[-1]).reshape(s.shape[:-1]) % 2
    if kwargs.get("where") is KEPT:  # what others take for "ignore"
        labels = np.where(KEPT, labels, -100)
    rows = np.float32([[0.5, 0.5, 0, 0, 0], [0, 0, 0.2, 0.3, 0.5]])
    return regularizers.co_tuning(s, labels, rows, **kwargs)


OF_OUTPUTS = {
    **{name: getattr(regularizers, name) for name, _ in PAIRS},
    **{estimator: sampled(estimator) for estimator in ("k1", "k2", "k3")},
    "co_tuning": co_tuned,
}


@pytest.mark.parametrize("compiled", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_padding_does_not_count_whatever_it_holds(name, compiled):
    fun = OF_OUTPUTS[name]
    s, t = random_tree(0, shapes=(2, 3, 5)), random_tree(1, shapes=(2, 3, 5))
    each = fun(s, t, reduction="none")
    assert each.shape == (2, 3)
    np.testing.assert_allclose(fun(s, t), each.mean(), rtol=1e-6)
    np.testing.assert_allclose(fun(s, t, reduction="sum"), each.sum(), rtol=1e-6)
    for filling in (0.0, np.nan, np.inf, -np.inf):
        padded_s, padded_t = (np.where(KEPT[..., None], x, np.float32(filling)) for x in (s, t))
        for reduction, wanted in (
            ("mean", each[KEPT].mean()),
            ("sum", each[KEPT].sum()),
            ("none", np.where(KEPT, each, 0)),
        ):
            masked = compiled(functools.partial(fun, where=KEPT, reduction=reduction))
            got = masked(padded_s, padded_t)
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
        grad = compiled(jax.grad(lambda s, t=padded_t: fun(s, t, where=KEPT)))(padded_s)
        assert np.all(np.asarray(grad)[~KEPT] == 0)
        whole = jax.grad(lambda s: fun(s, t, reduction="none")[KEPT].mean())(s)
        np.testing.assert_allclose(grad, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_no_example_counts(name):
    fun = functools.partial(OF_OUTPUTS[name], where=np.zeros((2, 1), bool))
    s, t = random_tree(0, shapes=(2, 3, 5)), random_tree(1, shapes=(2, 3, 5))
    assert_zero_there(lambda s: fun(s, t), s)


@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_bad_masks(name):
    s, t = random_tree(0, shapes=(2, 3, 5)), random_tree(1, shapes=(2, 3, 5))
    for where in (np.ones((2, 3)), np.ones((3, 2), bool), np.ones((2, 3, 5), bool)):
        with pytest.raises(ValueError, match=r"where to be booleans that broadcast.*\(2, 3\); got"):
            OF_OUTPUTS[name](s, t, where=where)


# Sampled tokens


def expected(values_of, s):
    """The expectation over tokens from the distribution of ``s``, which is not differentiated."""
    weights = jax.lax.stop_gradient(jax.nn.softmax(s))
    return jnp.sum(weights * values_of(jax.nn.log_softmax(s)))


def test_what_the_estimators_estimate():
    """Over all tokens of a vocabulary: their values, and the gradients that training follows."""
    s, t = (jnp.asarray(random_tree(i, shapes=(7,), scale=0.7)) for i in (0, 1))
    log_t = jax.nn.log_softmax(t)

    def value_and_grad(estimator):
        return jax.value_and_grad(
            lambda s: expected(
                lambda log_s: regularizers.sampled_kl(
                    log_s, log_t, estimator=estimator, reduction="none"
                ),
                s,
            )
        )(s)

    reverse, of_reverse = jax.value_and_grad(regularizers.kl_to_reference)(s, t)
    forward, of_forward = jax.value_and_grad(regularizers.distillation)(s, t)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for estimator, grad in (("k1", 0 * s), ("k2", of_reverse), ("k3", of_forward)):
        got, got_grad = value_and_grad(estimator)
        close(got_grad, grad)
        if estimator != "k2":
            close(got, reverse)
    assert abs(float(value_and_grad("k2")[0] - reverse)) > 0.01
    assert abs(float(forward - reverse)) > 0.01


def test_sampled_kl_bad_input_and_dtypes():
    p = np.log(np.float32([0.5, 0.25]))
    with pytest.raises(ValueError, match=r"estimator must be 'k1', 'k2' or 'k3'; got 'k4'"):
        regularizers.sampled_kl(p, p, estimator="k4")
    with pytest.raises(ValueError, match=r"same shape.*\(2,\) and \(1,\)"):
        regularizers.sampled_kl(p, p[:1])
    assert_half_is_close(lambda x: regularizers.sampled_kl(x, p, estimator="k3"), p - 0.5)
