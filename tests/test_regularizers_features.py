"""Regularizers of the features: value and gradient against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree, relative_error, wide
from regularizer_checks import (
    assert_agrees,
    assert_half_is_close,
    assert_same_on_eight_devices,
    assert_smooth,
    assert_zero_there,
    numerical_gradient,
)

from dtnh_jax import regularizers

SHAPES = {"early": (8, 3, 2, 4), "late": (8, 5)}
STUDENT, TEACHER = random_tree(0, shapes=SHAPES), random_tree(1, shapes=SHAPES)
CHANNELS = {"early": np.float32([0.1, 0.2, 0.0, 0.7]), "late": np.float32([0.2] * 5)}


def per_batch(values, reduction):
    return np.mean(values) if reduction == "mean" else np.sum(values)


def feature_distillation_by_hand(student, teacher, reduction="mean"):
    return sum(
        per_batch(np.sum((student[k] - wide(teacher[k])).reshape(8, -1) ** 2, 1) / 2, reduction)
        for k in student
    )


def attention_by_hand(features, channel_axis):
    q = np.mean(np.square(np.moveaxis(wide(features), channel_axis, -1)), -1).reshape(8, -1)
    norm = np.linalg.norm(q, axis=1, keepdims=True)
    return q / np.where(norm > 0, norm, 1)


def attention_transfer_by_hand(
    student, teacher, channel_axis=-1, reduction="mean", positions="mean"
):
    total = 0.0
    for k in student:
        s, t = (attention_by_hand(x[k], channel_axis) for x in (student, teacher))
        over = np.mean if positions == "mean" else np.sum
        total += per_batch(over((s - t) ** 2, axis=1), reduction)
    return total


def delta_by_hand(student, teacher, weights=None, channel_axis=-1, reduction="sum", scale="none"):
    total = 0.0
    for k in student:
        squares = np.moveaxis((student[k] - wide(teacher[k])) ** 2, channel_axis, -1)
        channels = squares.shape[-1]
        squares = squares.reshape(8, -1, channels)
        omega = np.ones(channels) if weights is None else wide(weights[k])
        of_example = np.sum(omega * squares, axis=(1, 2)) / 2
        if scale != "none":
            of_example = of_example * channels / squares.shape[1]
        total += per_batch(of_example, reduction)
    return total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_feature_distillation_agrees_with_numpy(reduction):
    assert_agrees(
        lambda s: regularizers.feature_distillation(s, TEACHER, reduction=reduction),
        lambda s: feature_distillation_by_hand(s, TEACHER, reduction),
        STUDENT,
    )


MAPS = {"early": (8, 3, 2, 4), "late": (8, 2, 3, 2)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "sum"},
        {"reduction": "sum"},
        {"channel_axis": 1},
        {"channel_axis": -2, "reduction": "sum", "positions": "sum"},
    ],
)
def test_attention_transfer_agrees_with_numpy(options):
    student, teacher = random_tree(0, shapes=MAPS), random_tree(1, shapes=MAPS)
    assert_agrees(
        lambda s: regularizers.attention_transfer(s, teacher, **options),
        lambda s: attention_transfer_by_hand(s, teacher, **options),
        student,
    )


def test_attention_is_the_published_mean_over_all_and_free_of_channels_and_size():
    student, teacher = random_tree(0, shapes=(8, 3, 2, 4)), random_tree(1, shapes=(8, 3, 2, 7))
    value = regularizers.attention_transfer(student, teacher)
    wanted = np.mean((attention_by_hand(student, -1) - attention_by_hand(teacher, -1)) ** 2)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    # Squares of squares of these would under- or overflow.
    for size in (1e-25, 1e15):
        sized = regularizers.attention_transfer(np.float32(size) * student, teacher)
        np.testing.assert_allclose(sized, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        (None, {}),
        (CHANNELS, {}),
        (CHANNELS, {"scale": "channels/positions"}),
        (None, {"reduction": "mean", "scale": "channels/positions"}),
    ],
)
def test_delta_agrees_with_numpy(weights, options):
    assert_agrees(
        lambda s: regularizers.delta(s, TEACHER, weights, **options),
        lambda s: delta_by_hand(s, TEACHER, weights, **options),
        STUDENT,
    )


def test_delta_channels_first_and_a_channel_of_no_weight():
    student, teacher = random_tree(0, shapes=(8, 4, 3)), random_tree(1, shapes=(8, 4, 3))
    fun = functools.partial(
        regularizers.delta, channel_axis=1, scale="channels/positions", reduction="mean"
    )
    _, grad = assert_agrees(
        lambda s: fun(s["a"], teacher, CHANNELS["early"]),
        lambda s: delta_by_hand(
            s,
            {"a": teacher},
            {"a": CHANNELS["early"]},
            channel_axis=1,
            reduction="mean",
            scale="channels/positions",
        ),
        {"a": student},
    )
    assert np.all(np.asarray(grad["a"][:, 2]) == 0)


PAIRS = ["feature_distillation", "attention_transfer", "delta"]


@pytest.mark.parametrize("name", PAIRS)
def test_equal_and_zero_features(name):
    fun = getattr(regularizers, name)
    maps = random_tree(0, shapes=MAPS)
    zeros = jax.tree.map(np.zeros_like, maps)
    assert_zero_there(lambda s: fun(s, maps), maps, atol=1e-8)
    assert_zero_there(lambda s: fun(s, zeros), zeros)
    for student, teacher in ((maps, zeros), (zeros, maps)):
        value, grads = jax.jit(jax.value_and_grad(fun))(student, teacher)
        assert float(value) > 0
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(grads)) is (
        name != "attention_transfer"
    )


@pytest.mark.parametrize("name", PAIRS)
def test_smooth_vmap_half_sharded(name):
    fun = getattr(regularizers, name)
    student, teacher = random_tree(0, shapes=(8, 3, 4)), random_tree(1, shapes=(8, 3, 4))
    assert_smooth(lambda s: fun(s, teacher), student)
    each = jax.vmap(fun)(student[:, None], teacher[:, None])
    over = jnp.sum if name == "delta" else jnp.mean
    np.testing.assert_allclose(over(each), fun(student, teacher), rtol=1e-6)
    assert_half_is_close(lambda s: fun(s, teacher), student)
    assert_same_on_eight_devices(fun, student, teacher)


@pytest.mark.parametrize("name", PAIRS)
def test_layers_that_are_not_kept(name):
    fun = getattr(regularizers, name)
    student, teacher = random_tree(0, shapes=MAPS), random_tree(1, shapes=MAPS)
    got = jax.jit(fun)(student, {**teacher, "late": None})
    np.testing.assert_allclose(got, fun(student["early"], teacher["early"]), rtol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_bad_features(name):
    fun = getattr(regularizers, name)
    with pytest.raises(ValueError, match=r"teacher_features must have the structure.*'late'"):
        fun(STUDENT, {"early": TEACHER["early"]})
    with pytest.raises(ValueError, match=r"\(8, 3.* at 'early'"):
        fun(random_tree(0, shapes=MAPS), random_tree(0, shapes={**MAPS, "early": (8, 3, 5, 4)}))
    with pytest.raises(ValueError, match=r"reduction must be 'mean' or 'sum'; got None"):
        fun(STUDENT, TEACHER, reduction=None)
    with pytest.raises(ValueError, match=r"leading axis of examples; got a scalar at '\.'"):
        fun(jnp.ones(()), jnp.ones(()))
    if name != "feature_distillation":
        with pytest.raises(ValueError, match=r"channel_axis=0 is none of shape \(8, 3, 2, 4\)"):
            fun(STUDENT, TEACHER, channel_axis=0)


def test_delta_bad_weights():
    short = {**CHANNELS, "early": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=r"shape \(3,\) for 4 channels at 'early'"):
        regularizers.delta(STUDENT, TEACHER, short)
    with pytest.raises(ValueError, match=r"channel_weights has None for the layer 'early'"):
        regularizers.delta(STUDENT, TEACHER, {**CHANNELS, "early": None})
    with pytest.raises(ValueError, match=r"scale must be 'none' or 'channels/positions'"):
        regularizers.delta(STUDENT, TEACHER, scale="tllib")


NET = random_tree(2, shapes={"conv": {"kernel": (3, 4)}, "out": {"kernel": (4, 2)}})
BATCHES = list(random_tree(3, shapes=(3, 6, 3)))


def net_loss(params, batch, xp=jnp):
    return xp.mean(xp.tanh(batch @ params["conv"]["kernel"]) @ params["out"]["kernel"]) ** 2


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_channel_weights_agree_with_numpy(chunk_size):
    kernels = {"block": "conv/kernel", "end": {"out": "out/kernel"}}
    got = regularizers.delta_channel_weights(net_loss, NET, BATCHES, kernels, chunk_size=chunk_size)
    for layer, path, channels in ((got["block"], "conv", 4), (got["end"]["out"], "out", 2)):
        increases = []
        for channel in range(channels):
            off = wide(NET)
            off[path]["kernel"][:, channel] = 0
            increases.append(
                np.mean([net_loss(off, b, np) - net_loss(wide(NET), b, np) for b in wide(BATCHES)])
            )
        z = (increases - np.mean(increases)) / np.std(increases)
        wanted = np.exp(z / 5) / np.exp(z / 5).sum()
        np.testing.assert_allclose(layer, wanted, rtol=1e-5)
        assert np.ptp(wanted) > 0.01


def test_channel_weights_of_idle_filters_are_uniform_and_bad_input_is_told():
    weights = functools.partial(regularizers.delta_channel_weights, lambda p, b: jnp.sum(b))
    got = weights(NET, BATCHES, "conv/kernel")
    np.testing.assert_allclose(got, 0.25, rtol=1e-6)
    with pytest.raises(ValueError, match=r"got 'conv'. There are conv/kernel, out/kernel"):
        weights(NET, BATCHES, ["conv"])
    with pytest.raises(ValueError, match=r"at least one batch"):
        weights(NET, [], "conv/kernel")
    with pytest.raises(ValueError, match=r"temperature must be positive; got 0"):
        weights(NET, BATCHES, "conv/kernel", temperature=0)


def bss_by_hand(features, k):
    return np.sum(np.linalg.svd(features, compute_uv=False)[-k:] ** 2)


def conditioned(shape, values, seed=0):
    """A matrix of these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in shape)
    return np.float32(u * np.asarray(values) @ v.T)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (4, 4)])
def test_bss_agrees_with_numpy(shape, k):
    features = conditioned(shape, [4.0, 3.0, 2.0, 1.0])
    assert_agrees(
        lambda f: regularizers.batch_spectral_shrinkage(f, k), lambda f: bss_by_hand(f, k), features
    )


def test_bss_of_a_random_batch():
    features = random_tree(0, shapes=(16, 6))
    value, grad = jax.value_and_grad(regularizers.batch_spectral_shrinkage)(features)
    np.testing.assert_allclose(value, bss_by_hand(wide(features), 1), rtol=1e-6)
    wanted = numerical_gradient(lambda f: bss_by_hand(f, 1), features)
    assert relative_error(grad, wanted) <= 1e-5


@pytest.mark.parametrize(
    "features",
    [np.eye(4, dtype=np.float32), np.zeros((4, 6), np.float32), np.ones((5, 3), np.float32)],
)
@pytest.mark.parametrize("k", [1, 3])
def test_bss_at_repeated_singular_values(features, k):
    value, grad = jax.value_and_grad(regularizers.batch_spectral_shrinkage)(features, k)
    np.testing.assert_allclose(value, bss_by_hand(wide(features), k), rtol=1e-6, atol=1e-10)
    assert np.isfinite(grad).all()
    # Σ‖σ‖² falls by the gradient's squared length.
    np.testing.assert_allclose(np.sum(np.square(grad)), 4 * value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("condition", [1e2, 1e3, 3e3])
@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_bss_of_an_ill_conditioned_batch(shape, condition):
    """It drives the smallest singular value down: float32 must do for what comes of that."""
    features = conditioned(shape, np.geomspace(1, 1 / condition, 16))
    value, grad = jax.value_and_grad(regularizers.batch_spectral_shrinkage)(features)
    u, s, vt = np.linalg.svd(wide(features), full_matrices=False)
    np.testing.assert_allclose(value, s[-1] ** 2, rtol=1e-3)
    assert relative_error(grad, 2 * s[-1] * np.outer(u[:, -1], vt[-1])) <= 1e-3


def test_bss_second_derivative_is_with_fixed_vectors():
    features = conditioned((4, 5), [4.0, 3.0, 2.0, 1.0])
    direction = random_tree(1, shapes=(4, 5))
    grad = jax.grad(regularizers.batch_spectral_shrinkage)
    _, turned = jax.jvp(grad, (features,), (direction,))
    u = np.linalg.svd(wide(features))[0][:, -1:]
    np.testing.assert_allclose(turned, 2 * u @ u.T @ direction, rtol=1e-4, atol=1e-5)


def test_bss_vmap_half_sharded_and_bad_input():
    fun = regularizers.batch_spectral_shrinkage
    stacked = np.stack([conditioned((8, 4), [4.0, 3.0, 2.0, 1.0], seed) for seed in range(2)])
    np.testing.assert_allclose(jax.vmap(fun)(stacked), [fun(x) for x in stacked], rtol=1e-6)
    assert_half_is_close(fun, stacked[0])
    assert_same_on_eight_devices(fun, stacked[0])
    with pytest.raises(ValueError, match=r"k must be at most 4.*\(8, 4\); got 5"):
        fun(stacked[0], 5)
    with pytest.raises(ValueError, match=r"k must be an integer >= 1; got 0"):
        fun(stacked[0], 0)
    with pytest.raises(ValueError, match=r"\(n, features\); got \(2, 8, 4\)"):
        fun(stacked)
