"""What the regularizer's gradient is compared with."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from dtnh_jax._layout import Layout
from dtnh_jax._tree import PyTree

Reference = Literal["batch"] | optax.GradientTransformation


def check_reference(reference: Reference) -> None:
    """Raises an error for a value that is not a reference."""
    if not (reference == "batch" or isinstance(reference, optax.GradientTransformation)):
        raise TypeError(
            "reference must be 'batch', the loss gradient itself, or an optax transformation that "
            "makes one from it, such as optax.ema(0.99), optax.trace(0.9) or "
            f"optax.scale_by_adam(); got {reference!r}."
        )


def init_reference(reference: Reference, layout: Layout) -> Any:
    """The state of the reference: nothing for ``"batch"``, or the transformation's own."""
    if isinstance(reference, str):
        return optax.EmptyState()
    return reference.init(layout.only_reached(layout.leaves))


def reference_leaves(
    reference: Reference,
    layout: Layout,
    loss_grads: PyTree,
    state: Any,
    params: PyTree | None,
    extra_args: Mapping[str, Any],
) -> tuple[list[Any], Any]:
    """The reference for each leaf of ``layout``, ``None`` where no group is, and its next state."""
    if isinstance(reference, str):
        return layout.leaves, state
    if params is not None:
        leaves = layout.over(params, loss_grads, what="params", over="loss_grads")
        params = layout.only_reached(leaves)
    transformation = optax.with_extra_args_support(reference)
    tree, state = transformation.update(
        layout.only_reached(layout.leaves), state, params, **extra_args
    )
    reached = iter(jax.tree.leaves(tree))
    return [None if row is None else next(reached) for row in layout.rows], state
