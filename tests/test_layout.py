"""Groups are made of keys, not of names; trees are trees, also where they can be called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dtnh_jax
from dtnh_jax._layout import unique

# Pairs of layers, or of leaves, that have one name.
A = {
    "a/b": {"w": jnp.array([100.0]), "x/y": jnp.array([1.0])},
    "a": {"b": {"w": jnp.array([1.0]), "x": {"y": jnp.array([-1.0])}}},
}
B = {
    "a/b": {"w": jnp.array([1.0]), "x/y": jnp.array([1.0])},
    "a": {"b": {"w": jnp.array([-10.0]), "x": {"y": jnp.array([1.0])}}},
}


@pytest.mark.parametrize("scope", ["layer", "leaf"])
def test_groups_of_one_name_are_groups_of_their_own(scope):
    tx = dtnh_jax.dtnh(1.0, scope=scope)
    direction, state = tx.update((A, B), tx.init(A))
    names = dtnh_jax.conflict_stats(state).groups
    assert len(set(names)) == len(names) == {"layer": 3, "leaf": 4}[scope]
    assert direction["a"]["b"]["w"] == 1.0  # in conflict in its own group
    assert direction["a"]["b"]["x"]["y"] == -1.0
    assert direction["a/b"]["w"] > 100.0


def test_the_root_is_a_layer_beside_one_of_its_name():
    params = {"w": jnp.ones(1), ".": {"w": jnp.ones(1)}}
    assert tuple(dtnh_jax.dtnh(1.0, scope="layer").init(params).groups) == (".", ".#2")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ("a", "b")),
        (["a", "a", "a"], ("a", "a#2", "a#3")),
        (["a", "a#2", "a"], ("a", "a#2", "a#3")),
        (["a", "a", "a#2"], ("a", "a#2", "a#2#2")),
    ],
)
def test_no_two_groups_have_the_same_name(names, expected):
    assert unique(names) == expected


@jax.tree_util.register_pytree_node_class
class Model:
    """A tree that can be called, as the modules of Equinox are."""

    def __init__(self, w, head):
        self.w, self.head = w, head

    def __call__(self, x):
        raise AssertionError("A tree was called.")

    def tree_flatten(self):
        return (self.w, self.head), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_tree_that_can_be_called_is_a_tree():
    params = Model(jnp.ones(2), jnp.ones(2))
    tx = dtnh_jax.dtnh(1.0, mask=Model(True, False), scope=Model("one", "two"))
    direction, state = tx.update((params, params), tx.init(params), params)
    np.testing.assert_array_equal(direction.w, 2.0)
    np.testing.assert_array_equal(direction.head, 1.0)
    assert dtnh_jax.conflict_stats(state).groups == ("one",)


def test_functions_are_called_whatever_made_them():
    def keep(suffix, path):
        return "kept" if path.endswith(suffix) else "other"

    params = {"w": jnp.ones(1), "v": jnp.ones(1)}
    for make in (functools.partial, jax.tree_util.Partial):
        state = dtnh_jax.dtnh(1.0, scope=make(keep, "w")).init(params)
        assert tuple(state.groups) == ("kept", "other")
    mask = jax.tree_util.Partial(lambda tree: {"w": True, "v": False})
    assert tuple(dtnh_jax.dtnh(1.0, scope="leaf", mask=mask).init(params).groups) == ("w",)


def test_names_of_many_regularizers_are_in_the_order_of_their_rows():
    tx = dtnh_jax.dtnh((1.0,) * 12, diagnostics=True)
    a = jnp.ones(2)
    _, state = tx.update((a, tuple(-a if k == 2 else a for k in range(12))), tx.init(a))
    # jit sorts the keys of a mapping.
    stats = dtnh_jax.conflict_stats(jax.jit(lambda state: state)(state))
    conflicts = zip(stats.groups, stats.per_group.conflict, strict=True)
    assert [name for name, is_in_conflict in conflicts if is_in_conflict] == ["02/global"]
