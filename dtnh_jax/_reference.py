"""What the regularizer's gradient is held against."""

from typing import Any, Literal

import jax
import optax

from dtnh_jax._groups import Groups
from dtnh_jax._tree import PyTree, is_absent, leaves_of

Reference = Literal["batch"] | optax.GradientTransformation


def check_reference(reference: Reference) -> None:
    """Refuses what is no reference."""
    if not (reference == "batch" or isinstance(reference, optax.GradientTransformation)):
        raise TypeError(
            "reference must be 'batch', the loss gradient itself, or an optax transformation that "
            "makes one from it, such as optax.ema(0.99), optax.trace(0.9) or "
            f"optax.scale_by_adam(); got {reference!r}."
        )


def init_reference(reference: Reference, params: PyTree, groups: Groups) -> Any:
    """The state of the reference: nothing for ``"batch"``, or the transformation's own."""
    if isinstance(reference, str):
        return optax.EmptyState()
    return reference.init(only_reached(params, groups))


def reference_leaves(
    reference: Reference, loss_grads: PyTree, state: Any, params: PyTree | None, groups: Groups
) -> tuple[list[Any], Any]:
    """The leaves of the reference, absent where no group is, and its next state."""
    if isinstance(reference, str):
        return leaves_of(loss_grads), state
    if params is not None:
        params = only_reached(params, groups)
    tree, state = reference.update(only_reached(loss_grads, groups), state, params)
    return leaves_of(tree), state


def only_reached(tree: PyTree, groups: Groups) -> PyTree:
    """``tree`` without the leaves that are in no group: what is kept of them needs no state."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_absent)
    kept = zip(leaves, groups.row_of_leaf, strict=True)
    return treedef.unflatten([optax.MaskedNode() if row is None else leaf for leaf, row in kept])
