"""An oracle in NumPy's float64, inputs to try rules on, and what a rule promises."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import dtnh_jax

SHAPES = {
    "block": {"conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "norm": {"scale": (4,)}},
    "dense": {"kernel": (4, 5), "bias": (5,)},
    "temperature": (),
}


def is_shape(node):
    return isinstance(node, tuple)


def random_tree(seed, dtype=np.float32, shapes=SHAPES, scale=1.0):
    """A tree of normal numbers, as NumPy arrays."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        values = scale * rng.standard_normal(shape)
        if np.issubdtype(dtype, np.complexfloating):
            values = values + 1j * scale * rng.standard_normal(shape)
        return np.asarray(values).astype(dtype)

    return jax.tree.map(leaf, shapes, is_leaf=is_shape)


def wide(tree):
    """The tree in float64 or complex128, as NumPy arrays."""

    def leaf(x):
        x = np.asarray(x)
        if x.dtype == ml_dtypes.bfloat16:
            x = x.astype(np.float32)
        return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)

    return jax.tree.map(leaf, tree)


def inner(a, b):
    """⟨a,b⟩ of two trees as real vectors, in float64 and exactly summed."""
    import math

    products = []
    for x, y in zip(jax.tree.leaves(wide(a)), jax.tree.leaves(wide(b)), strict=True):
        products.extend((np.real(x) * np.real(y)).ravel())
        products.extend((np.imag(x) * np.imag(y)).ravel())
    return math.fsum(products)


def norm(a):
    return np.sqrt(inner(a, a))


def oracle_groups(tree, scope):
    """The leaves of each group, written again from the definition of the scopes."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    names = {
        "global": lambda path: "all",
        "layer": lambda path: path[:-1],
        "leaf": lambda path: path,
    }
    groups = {}
    for index, path in enumerate(paths):
        groups.setdefault(names[scope](path), []).append(index)
    return list(groups.values())


def oracle(loss_grads, reg_grads, reg_weight, scope, on_conflict="project"):
    """The direction by METHOD's formula, in float64, one group after the other."""
    a, treedef = jax.tree.flatten(wide(loss_grads))
    b = jax.tree.leaves(wide(reg_grads))
    if scope == "element":
        directions = []
        for x, y in zip(a, b, strict=True):
            product = np.real(np.conj(x) * y)
            size = np.abs(x) ** 2
            c = np.divide(product, size, out=np.zeros_like(size), where=size > 0)
            c = np.minimum(c, 0) if on_conflict == "project" else c
            directions.append(x + reg_weight * (y - c * x))
        return treedef.unflatten(directions)
    directions = list(a)
    for group in oracle_groups(loss_grads, scope):
        loss, reg = [a[i] for i in group], [b[i] for i in group]
        size = inner(loss, loss)
        c = inner(loss, reg) / size if size > 0 else 0.0
        c = min(c, 0.0) if on_conflict == "project" else c
        for i in group:
            directions[i] = a[i] + reg_weight * (b[i] - c * a[i])
    return treedef.unflatten(directions)


def relative_error(got, wanted):
    """The distance of two trees, relative to the norm of the second."""
    difference = jax.tree.map(lambda x, y: x - y, wide(got), wide(wanted))
    return norm(difference) / norm(wanted)


def assert_close_leaves(got, wanted, tolerance):
    """Every leaf's largest error is small beside the leaf's largest number.

    Beside each number for itself it would not be: of two large ones that cancel little is left, and
    the error is theirs.
    """
    for x, y in zip(jax.tree.leaves(wide(got)), jax.tree.leaves(wide(wanted)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.max(np.abs(y)))


def direction_of(tx, loss_grads, reg_grads, **kwargs):
    """The direction of one step from a fresh state, and the state after it."""
    loss_grads, reg_grads = jax.tree.map(jnp.asarray, (loss_grads, reg_grads))
    return jitted_update(tx)((loss_grads, reg_grads), tx.init(loss_grads), **kwargs)


@functools.cache
def rule(name, reg_weight, **kwargs):
    """A rule of the library, made once, so that what is jitted of it is compiled once."""
    return getattr(dtnh_jax, name)(reg_weight, **kwargs)


@functools.cache
def jitted_update(tx):
    return jax.jit(tx.update)


def assert_trees_equal(got, wanted):
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
