"""Gradient pairs of modules: what nnx.value_and_grad and eqx.filter_value_and_grad give, twice."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_equal, relative_error

import dtnh_jax
from dtnh_jax import regularizers

nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")

X = jax.random.normal(jax.random.key(0), (12, 4))
LABELS = jnp.arange(12) % 3


@pytest.fixture(autouse=True)
def promotion_of_users(standard_promotion):
    with jax.numpy_rank_promotion("allow"):
        yield


class Network(nnx.Module):
    def __init__(self, rngs, rate=0.5):
        self.backbone = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.norm(self.backbone(x)))
        return self.head(self.dropout(x, rngs=rngs))


def network():
    return Network(nnx.Rngs(params=0, dropout=1))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def pull(model, wrt=nnx.Param):
    """L2 on all but the head."""
    params = nnx.state(model, wrt)
    return regularizers.l2(params, mask={**dict.fromkeys(params, True), "head": False})


def both_terms(model):
    return cross_entropy(model(X)), pull(model)


def as_nnx(fun, pick, **options):
    """What nnx.value_and_grad gives for one of the terms, and the state that it leaves."""

    def of_one(*args, **kwargs):
        result = fun(*args, **kwargs)
        return (result[0][pick], result[1]) if options.get("has_aux") else result[pick]

    return nnx.value_and_grad(of_one, **options)


def state_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))


def plain(tree):
    return nnx.to_pure_dict(tree)


def assert_pair_is(pair, loss_grads, reg_grads):
    assert jax.tree.structure(pair.loss_grads) == jax.tree.structure(loss_grads)
    assert relative_error(plain(pair.loss_grads), plain(loss_grads)) <= 1e-6
    for path, wanted in jax.tree_util.tree_leaves_with_path(plain(reg_grads)):
        got = functools.reduce(lambda tree, key: tree[key.key], path, plain(pair.reg_grads))
        if "head" in str(path):
            assert got is None
        else:
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("compiled", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_nnx_pairs_and_state_are_those_of_value_and_grad(compiled):
    model, of_loss, of_reg = network(), network(), network()
    for _ in range(2):
        (loss, reg), pair = compiled(dtnh_jax.nnx.value_and_gradient_pair(both_terms))(model)
        wanted_loss, loss_grads = compiled(as_nnx(both_terms, 0))(of_loss)
        wanted_reg, reg_grads = compiled(as_nnx(both_terms, 1))(of_reg)
        np.testing.assert_allclose([loss, reg], [wanted_loss, wanted_reg], rtol=1e-6)
        assert_pair_is(pair, loss_grads, reg_grads)
    # Statistics of batch norm, counters of dropout and all else.
    if compiled is nnx.jit:
        assert relative_error(state_of(model), state_of(of_loss)) <= 1e-6
    else:
        assert_trees_equal(state_of(model), state_of(of_loss))
    assert int(model.dropout.rngs.count[...]) == 2
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0.01


BACKBONE = nnx.All(nnx.Param, nnx.PathContains("backbone"))


@pytest.mark.parametrize(
    "options", [{"wrt": BACKBONE}, {"argnums": nnx.DiffState(0, BACKBONE)}], ids=["wrt", "diff"]
)
def test_nnx_frozen_parts(options):
    model, other = network(), network()
    _, pair = dtnh_jax.nnx.value_and_gradient_pair(both_terms, **options)(model)
    _, wanted = as_nnx(both_terms, 0, argnums=nnx.DiffState(0, BACKBONE))(other)
    assert list(plain(pair.loss_grads)) == list(plain(pair.reg_grads)) == ["backbone"]
    assert relative_error(plain(pair.loss_grads), plain(wanted)) <= 1e-6
    assert_trees_equal(state_of(model), state_of(other))


def test_nnx_the_rngs_as_an_argument():
    """The step of Flax's own example on MNIST, with the pair in place of the gradient."""

    def loss_fn(model, rngs, batch):
        logits = model(batch["image"], rngs)
        return (cross_entropy(logits), pull(model)), logits

    @nnx.jit
    def train_step(model, optimizer, metrics, rngs, batch):
        grad_fn = dtnh_jax.nnx.value_and_gradient_pair(loss_fn, has_aux=True)
        ((loss, _), logits), pair = grad_fn(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, pair)

    model, rngs = network(), nnx.Rngs(dropout=5)
    optimizer = nnx.Optimizer(model, dtnh_jax.dtnh_adamw(0.05, 0.01), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    losses = []
    for _ in range(20):
        train_step(model, optimizer, metrics, rngs, {"image": X, "label": LABELS})
        losses.append(float(metrics.compute()["loss"]))
        metrics.reset()
    assert losses[-1] < 0.7 * losses[0]
    assert int(rngs.dropout.count[...]) == 20
    assert int(model.dropout.rngs.count[...]) == 0
    assert dtnh_jax.conflict_stats(optimizer.opt_state).groups == ("backbone", "head", "norm")


def test_nnx_arguments_of_all_kinds():
    """Arrays beside modules in argnums, keywords, auxiliary data, several regularizers."""

    def fun(scale, model, name, *, offset):
        assert name == "name"
        logits = scale["by"] * model(X) + offset
        return (cross_entropy(logits), (pull(model), jnp.sum(scale["by"] ** 2))), logits

    model = network()
    get = dtnh_jax.nnx.value_and_gradient_pair(fun, argnums=(1, 0), has_aux=True)
    ((_, regs), logits), pair = get({"by": jnp.array(2.0)}, model, "name", offset=1.0)
    assert logits.shape == (12, 3)
    assert len(regs) == len(pair.reg_grads) == 2
    of_model, of_scale = pair.loss_grads
    assert list(plain(of_model)) == ["backbone", "head", "norm"]
    assert of_scale["by"].shape == ()
    assert pair.reg_grads[0][1]["by"] is None
    np.testing.assert_allclose(pair.reg_grads[1][1]["by"], 4.0)
    assert jax.tree.leaves(pair.reg_grads[1][0]) == []


def test_nnx_objects_that_arguments_share():
    first, second = network(), network()
    second.norm, second.dropout = first.norm, first.dropout

    def fun(first, second):
        return cross_entropy(first(X) + second(X)), pull(first)

    _, pair = dtnh_jax.nnx.value_and_gradient_pair(fun)(first, second)
    assert first.norm is second.norm
    assert int(first.dropout.rngs.count[...]) == 2
    seen = sum(model.backbone(X).mean(0) * 0.1 * by for model, by in ((first, 0.9), (second, 1.0)))
    np.testing.assert_allclose(first.norm.mean[...], seen, rtol=1e-4, atol=1e-6)
    assert list(plain(pair.loss_grads)) == ["backbone", "head", "norm"]


def test_nnx_variables_that_the_forward_pass_makes():
    class Making(Network):
        def __call__(self, x, rngs=None):
            self.seen = nnx.Intermediate(x.mean())
            return super().__call__(x, rngs)

    model = Making(nnx.Rngs(0))
    dtnh_jax.nnx.value_and_gradient_pair(both_terms)(model)
    np.testing.assert_allclose(model.seen[...], X.mean(), rtol=1e-5)


def test_nnx_held_out_gradients():
    """The gradient of unseen examples goes to the optimizer as an extra argument."""
    tx = dtnh_jax.dtnh_sgd(0.1, 0.5, reference=dtnh_jax.held_out(0.9))

    @nnx.jit
    def step(model, optimizer):
        _, pair = dtnh_jax.nnx.value_and_gradient_pair(both_terms)(model)
        unseen = nnx.grad(lambda model: cross_entropy(model(2 * X)))(nnx.view(model))
        optimizer.update(model, pair, held_out_grads=unseen)

    model = network()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step(model, optimizer)
    stats = dtnh_jax.conflict_stats(optimizer.opt_state)
    assert stats.reached.tolist() == [True, False, True]
    assert bool(jnp.isfinite(stats.per_group.cosine).all())


def test_nnx_errors():
    def lone(model):
        return cross_entropy(model(X))

    pair_of = dtnh_jax.nnx.value_and_gradient_pair
    with pytest.raises(TypeError, match=r"dtnh_jax\.nnx\.value_and_gradient_pair needs a function"):
        pair_of(lone)(network())
    with pytest.raises(TypeError, match=r"differentiates by positional argument 1.*with 1 posit"):
        pair_of(both_terms, argnums=1)(network())
    with pytest.raises(ValueError, match="must differ; got 0 twice"):
        pair_of(both_terms, argnums=(0, -1))(network())
    with pytest.raises(ValueError, match=r"found no variable that matches.*in argument 0"):
        pair_of(both_terms, wrt=nnx.LoRAParam)(network())


def eqx_terms(model, x):
    logits = jax.vmap(model)(x)
    return cross_entropy(logits), regularizers.l2(eqx.filter(model, eqx.is_inexact_array).layers[0])


def eqx_network():
    return eqx.nn.MLP(4, 3, width_size=8, depth=1, key=jax.random.key(0))


@pytest.mark.parametrize("compiled", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
def test_equinox_pairs_are_those_of_filter_value_and_grad(compiled):
    model = eqx_network()
    get = compiled(dtnh_jax.equinox.filter_value_and_gradient_pair(eqx_terms))
    (loss, reg), pair = get(model, X)
    for pick, value, grads in ((0, loss, pair.loss_grads), (1, reg, pair.reg_grads)):
        wanted = eqx.filter_value_and_grad(lambda model, pick=pick: eqx_terms(model, X)[pick])
        wanted_value, wanted_grads = wanted(model)
        np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
        if pick:
            assert jax.tree.leaves(grads.layers[1]) == []
            grads, wanted_grads = grads.layers[0], wanted_grads.layers[0]
        assert jax.tree.structure(grads) == jax.tree.structure(wanted_grads)
        assert relative_error(grads, wanted_grads) <= 1e-6
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = dtnh_jax.dtnh_sgd(0.1, 0.01)
    updates, _ = tx.update(pair, tx.init(params), params)
    eqx.apply_updates(model, updates)


def test_equinox_auxiliary_data_and_errors():
    get = dtnh_jax.equinox.filter_value_and_gradient_pair(
        lambda model, x: (eqx_terms(model, x), x.mean()), has_aux=True
    )
    (_, aux), _ = get(eqx_network(), X)
    np.testing.assert_allclose(aux, X.mean())
    without_aux = dtnh_jax.equinox.filter_value_and_gradient_pair(eqx_terms, has_aux=True)
    with pytest.raises(TypeError, match=r"returns \(\(loss, reg\), aux\)"):
        without_aux(eqx_network(), X)
    with pytest.raises(TypeError, match="positional argument 0"):
        get(model=eqx_network(), x=X)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"a": m}, lambda m: (m, jnp.ones(1))])
def test_the_plain_function_refuses_modules(wrap):
    plain_pair = dtnh_jax.value_and_gradient_pair(lambda tree: (1.0, 1.0))
    with pytest.raises(TypeError, match=r"got a module of Flax NNX.*dtnh_jax\.nnx\.value_and_grad"):
        plain_pair(wrap(network()))
    with pytest.raises(TypeError, match=r"dtnh_jax\.equinox\.filter_value_and_gradient_pair"):
        plain_pair(wrap(eqx_network()))


def test_the_plain_function_takes_what_was_split():
    model = network()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @dtnh_jax.value_and_gradient_pair
    def of_state(params):
        return both_terms(nnx.merge(graph, params, rest, copy=True))

    of_state(params)
    params, static = eqx.partition(eqx_network(), eqx.is_inexact_array)
    dtnh_jax.value_and_gradient_pair(lambda p: eqx_terms(eqx.combine(p, static), X))(params)


def test_the_plain_function_imports_no_framework():
    script = (
        "import sys, jax.numpy as jnp, dtnh_jax\n"
        "dtnh_jax.value_and_gradient_pair(lambda w: (w**2, w))(jnp.array(1.0))\n"
        "assert not {'flax', 'equinox'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
