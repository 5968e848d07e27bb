"""A pair of gradients: what it is, and the two ways in which it is passed to a transformation."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from dtnh_jax._jax_internals import traced_by
from dtnh_jax._tree import PyTree, is_absent

RIGHT_CALLS = (
    "Call tx.update(dtnh_jax.GradientPair(loss_grads, reg_grads), state, params), "
    "or tx.update(loss_grads, state, params, reg_grads=reg_grads)"
)


class GradientPair(NamedTuple):
    r"""The gradients of both terms of the objective $L(w) + \lambda\,\Omega(w)$.

    One tree is one vector: $a = \nabla L(w)$, $b = \nabla \Omega(w)$. A plain tuple of the two
    serves as well.

    Attributes:
        loss_grads: ``a``, with the structure, shapes and dtypes of params.
        reg_grads: ``b``, likewise, without ``λ``. ``None`` in the place of a leaf or a subtree
            that the regularizer does not reach, such as a new head.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> pair = dtnh_jax.GradientPair(
        ...     loss_grads={"backbone": jnp.ones(3), "head": jnp.ones(2)},
        ...     reg_grads={"backbone": -jnp.ones(3), "head": None},
        ... )
        >>> pair.reg_grads["backbone"].shape
        (3,)

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489), whose derivatives of the empirical loss and
        of the regularizer these are.
    """

    loss_grads: PyTree
    reg_grads: PyTree


_NOT_GIVEN: Any = object()  # None says that the regularizer reaches nothing


def takes_pairs(
    init: optax.TransformInitFn, update: Callable[..., tuple[PyTree, Any]]
) -> optax.GradientTransformationExtraArgs:
    """Makes an optax transformation that accepts a gradient pair in either call style.

    Args:
        init: From params to the state.
        update: ``update(pair, state, params, **extra_args)``, which returns updates and state.

    Returns:
        The transformation. A call without a pair is an error that shows both styles.
    """

    def update_either(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        reg_grads: PyTree = _NOT_GIVEN,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        return update(_as_pair(updates, reg_grads, params), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update_either)


def _as_pair(updates: PyTree, reg_grads: PyTree, params: PyTree | None) -> GradientPair:
    if isinstance(updates, GradientPair):
        # A chain hands reg_grads= to each of its links. Where an earlier link has made a pair of
        # them, that pair counts.
        return updates
    pair = _pair_of(updates)
    if reg_grads is not _NOT_GIVEN and not (reg_grads is None and pair is not None):
        if (
            pair is not None
            and not _same_structure(updates, reg_grads)
            and _same_structure(pair.loss_grads, reg_grads)
        ):
            raise TypeError(
                "reg_grads came twice: in the pair and as reg_grads=. "
                f"{RIGHT_CALLS}; not both at once."
            )
        _check_no_multi_steps(updates, reg_grads)
        return GradientPair(updates, reg_grads)
    is_params_like = params is not None and _same_structure(updates, params)
    if pair is None or is_params_like:
        raise TypeError(
            "A dtnh_jax rule needs the gradients of loss and regularizer as a pair; got one "
            f"tree ({type(updates).__name__}) and no reg_grads=. {RIGHT_CALLS}."
        )
    return pair


def _check_no_multi_steps(loss_grads: PyTree, reg_grads: PyTree) -> None:
    # optax.MultiSteps averages the loss gradients in a function that JAX traces, and closes over
    # keyword arguments: reg_grads would be those of the last micro-batch alone.
    of_loss, of_reg = ({traced_by(x) for x in jax.tree.leaves(t)} for t in (loss_grads, reg_grads))
    if any(_MULTI_STEPS.search(name) for name in of_loss - of_reg):
        raise TypeError(
            "optax.MultiSteps averages the loss gradients of its micro-batches but hands on the "
            "reg_grads of the last one alone. Use dtnh_jax.accumulate_pairs(tx, every_k) in its "
            "place, which averages both; to skip steps that are not finite, use "
            "optax.apply_if_finite."
        )


_MULTI_STEPS = re.compile(r"^_do_update at .*optax.*_accumulation\.py")


def _pair_of(updates: PyTree) -> GradientPair | None:
    if type(updates) is tuple and len(updates) == 2:
        return GradientPair(*updates)
    # nnx.Optimizer.update(model, pair) turns the tuple into an nnx.State by its indices, and a
    # GradientPair into one by its field names. A dict may be params, so it is not a pair.
    if isinstance(updates, Mapping) and not isinstance(updates, dict):
        for keys in ((0, 1), GradientPair._fields):
            if set(updates) == set(keys):
                return GradientPair(*(updates[key] for key in keys))
    return None


def _same_structure(one: PyTree, other: PyTree) -> bool:
    return jax.tree.structure(one, is_leaf=is_absent) == jax.tree.structure(
        other, is_leaf=is_absent
    )
