"""One training step of a small ResNet with batch norms, with every regularizer at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dtnh_jax
from dtnh_jax import regularizers

nnx = pytest.importorskip("flax.nnx")

CLASSES, SOURCE_CLASSES = 3, 5


class Block(nnx.Module):
    def __init__(self, channels, rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(x + self.norm(self.conv(x)))


class ResNet(nnx.Module):
    def __init__(self, classes, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.block = Block(4, rngs)
        self.head = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        maps = {"stem": nnx.relu(self.norm(self.stem(x)))}
        maps["block"] = self.block(maps["stem"])
        pooled = maps["block"].mean((1, 2))
        return self.head(pooled), maps, pooled


def apply(graph, params, stats, x, train):
    """What the network returns, and its statistics after it."""
    model = nnx.merge(graph, params, stats, copy=True)
    model.train() if train else model.eval()
    return model(x), nnx.state(model, nnx.BatchStat)


X = jax.random.uniform(jax.random.key(0), (8, 6, 6, 3))
Y = jnp.arange(8) % CLASSES


@pytest.fixture(scope="module")
def task():
    """The parts of a fine-tuning: a target network, and what is kept of the source network."""
    graph, params, stats = nnx.split(ResNet(CLASSES, nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    source_graph, source, _ = nnx.split(
        ResNet(SOURCE_CLASSES, nnx.Rngs(1)), nnx.Param, nnx.BatchStat
    )

    @jax.jit
    def source_outputs(source, x):
        return apply(source_graph, source, stats, x, train=False)[0]

    def logits_fn(source, x):
        return source_outputs(source, x)[0]

    def loss_fn(source, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(source, x), y).mean()

    labels = jnp.arange(8) % SOURCE_CLASSES
    fisher = regularizers.fisher_diagonal(logits_fn, source, [(X, labels)], chunk_size=8)
    fisher = {**nnx.to_pure_dict(fisher), "head": None}
    omega = regularizers.delta_channel_weights(
        loss_fn, source, [(X, labels)], {"stem": "stem/kernel", "block": "block/conv/kernel"}
    )
    logits, maps, _ = source_outputs(source, X)
    relationship = regularizers.co_tuning_relationship(logits, Y, CLASSES)
    match = regularizers.match_pretrained(params, source, new="head", excluded="*norm/*")
    # A target head's distillation needs a teacher of its classes.
    teacher = 3 * jax.nn.one_hot((Y + 1) % CLASSES, CLASSES)
    source_head = source["head"]
    return graph, params, stats, match, fisher, omega, maps, relationship, teacher, source_head


def regularizers_of(task, params, outputs, stats, x, y, key):
    graph, _, _, match, fisher, omega, maps, relationship, teacher, source_head = task
    logits, features, pooled = outputs
    source_logits = pooled @ source_head["kernel"][...] + source_head["bias"][...][None]

    def calm(x):
        return apply(graph, params, stats, x, train=False)[0][0]

    return {
        "l2": regularizers.l2(params),
        "l2_sp": regularizers.l2_sp(params, match.pretrained, mask=match.mask),
        "l2_sp_fisher": regularizers.l2_sp_fisher(
            params, match.pretrained, fisher, beta=0.1, epsilon=1e-3
        ),
        "distillation": regularizers.distillation(logits, teacher, 2.0),
        "logit_matching": regularizers.logit_matching(logits, teacher),
        "label_smoothing": regularizers.label_smoothing(logits, teacher),
        "co_tuning": regularizers.co_tuning(source_logits, y, relationship),
        "feature_distillation": regularizers.feature_distillation(features, maps),
        "attention_transfer": regularizers.attention_transfer(features, maps),
        "delta": regularizers.delta(features, maps, omega),
        "batch_spectral_shrinkage": regularizers.batch_spectral_shrinkage(pooled, 1),
        "adversarial": regularizers.adversarial(
            calm, x, key, epsilon=0.1, step_size=0.05, steps=2, bounds=(0, 1)
        ),
        "virtual_adversarial": regularizers.virtual_adversarial(calm, x, key, epsilon=0.5),
    }


# Which leaves each of them reaches; the backbone's norms are excluded from l2_sp.
ALL, BACKBONE = "all", "backbone"
REACH = {
    "l2": ALL,
    "l2_sp": "backbone's kernels",
    "l2_sp_fisher": ALL,
    "distillation": ALL,
    "logit_matching": ALL,
    "label_smoothing": ALL,
    "co_tuning": BACKBONE,
    "feature_distillation": BACKBONE,
    "attention_transfer": BACKBONE,
    "delta": BACKBONE,
    "batch_spectral_shrinkage": BACKBONE,
    "adversarial": ALL,
    "virtual_adversarial": ALL,
}


def reached(name, path):
    if REACH[name] == ALL:
        return True
    return "head" not in path and (REACH[name] == BACKBONE or "norm" not in path)


def test_every_regularizer_in_one_step(task, standard_promotion):
    graph, params, stats, match, *_ = task
    tx = optax.chain(
        dtnh_jax.dtnh((0.01,) * len(REACH), scope="layer"), optax.sgd(0.05, momentum=0.9)
    )

    @functools.partial(dtnh_jax.value_and_gradient_pair, has_aux=True)
    def objective(params, stats, x, y, key):
        outputs, new_stats = apply(graph, params, stats, x, train=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs[0], y).mean()
        regs = regularizers_of(task, params, outputs, stats, x, y, key)
        assert sorted(regs) == sorted(REACH)
        return (loss, tuple(regs[name] for name in REACH)), new_stats

    @jax.jit
    def step(params, stats, opt_state, x, y, key):
        ((loss, regs), stats), pair = objective(params, stats, x, y, key)
        updates, opt_state = tx.update(pair, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss, regs, pair

    # From the pre-trained weights themselves, as every fine-tuning starts.
    starts = jax.tree.leaves(match.pretrained, is_leaf=lambda node: node is None)
    leaves, treedef = jax.tree.flatten(params)
    params = treedef.unflatten(
        [w if w0 is None else w0 for w, w0 in zip(leaves, starts, strict=True)]
    )
    opt_state = tx.init(params)
    for count in range(2):
        _, wanted_stats = jax.jit(functools.partial(apply, graph, train=True))(params, stats, X)
        before = params
        params, new_stats, opt_state, _, regs, pair = step(
            params, stats, opt_state, X, Y, jax.random.key(count)
        )
        # Once a step, from the pass of the loss: the search in between left them alone.
        for got, want, old in zip(
            *map(jax.tree.leaves, (new_stats, wanted_stats, stats)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
            assert np.any(np.asarray(got) != np.asarray(old))
        stats = new_stats
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, stats, regs, pair)))
        assert all(
            np.any(np.asarray(new) != np.asarray(old))
            for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)
        )
        for name, reg_grads in zip(REACH, pair.reg_grads, strict=True):
            grads = nnx.to_pure_dict(reg_grads)
            paths = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda node: node is None)[
                0
            ]
            for keys, grad in paths:
                path = jax.tree_util.keystr(keys, simple=True, separator="/")
                assert (grad is not None) is reached(name, path), (name, path)
            moved = any(np.any(np.asarray(grad) != 0) for grad in jax.tree.leaves(reg_grads))
            assert moved is not (name == "l2_sp" and count == 0), name
        assert float(regs[list(REACH).index("l2_sp")]) > 0 or count == 0
    groups = dtnh_jax.conflict_stats(opt_state).groups
    assert len(groups) >= len(REACH) * 3
