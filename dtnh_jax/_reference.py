"""What the regularizer's gradient is compared with."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dtnh_jax._layout import Layout
from dtnh_jax._numerics import compute_dtype, widened
from dtnh_jax._tree import PyTree, path_name


class HeldOut(NamedTuple):
    """The reference that :func:`held_out` makes."""

    decay: float
    max_age: int | None


Reference = Literal["batch", "held_out"] | optax.GradientTransformation | HeldOut


class HeldOutGrads(NamedTuple):
    r"""The gradient of the loss of held-out examples, or word that this step has none.

    Attributes:
        grads: $\nabla L_H(w)$, with the structure, shapes and dtypes of `loss_grads`; anything of
            that form, such as zeros, where `is_new` is false.
        is_new: Whether `grads` was computed in this step. A bool, or a boolean scalar.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> none_in_this_step = dtnh_jax.HeldOutGrads(jnp.zeros(2), is_new=jnp.array(False))
        >>> bool(none_in_this_step.is_new)
        False
    """

    grads: PyTree
    is_new: jax.Array | bool = True


class HeldOutState(NamedTuple):
    """State of a held-out reference.

    Attributes:
        average: The decayed sum of the held-out gradients, in float32 or wider.
        age: Steps since the last one, an ``int32`` scalar; -1 before the first.
    """

    average: PyTree
    age: jax.Array


def held_out(decay: float = 0.9, *, max_age: int | None = None) -> HeldOut:
    r"""A reference for rules: the average gradient of examples that are not trained on.

    With the gradient $v_t = \nabla L_H(w)$ of the loss of held-out examples,

    $$r_t = \mu\,r_{t-1} + v_t.$$

    A step along $-d$, $d = a + \lambda b$, changes the held-out loss by
    $-\gamma\langle v, a\rangle - \gamma\lambda\langle v, b\rangle$ to first order. So a rule that
    compares $b$ with $v$ removes the part of the regularizer that raises the loss of examples that
    were not seen. The gradient of training examples cannot tell: once they are learned, a
    regularizer that helps must oppose it.

    Pass the gradient to `update` as an extra argument, `held_out_grads=`: a tree like `loss_grads`,
    or [`HeldOutGrads`][dtnh_jax.HeldOutGrads] where only some steps have one; see
    [`every_k_steps`][dtnh_jax.every_k_steps]. In the other steps the average stays as it is.
    Before the first gradient, and while the last one is older than `max_age`, the regularizer is
    left out.

    Args:
        decay: $\mu$ in [0, 1). 0 is the last gradient alone, which `reference="held_out"` is short
            for.
        max_age: After how many steps without a new gradient the average is too old to be used;
            `None` for never.

    Returns:
        A reference, for the argument of that name of [`dtnh`][dtnh_jax.dtnh],
        [`dtnh_sgd`][dtnh_jax.dtnh_sgd] and others. Its state is one tree of the size of params, in
        float32 or wider.

    Raises:
        ValueError: If `decay` is not in [0, 1) or `max_age` is negative.

    Examples:
        >>> import jax.numpy as jnp, dtnh_jax
        >>> tx = dtnh_jax.dtnh(0.5, on_conflict="gate", reference=dtnh_jax.held_out(0.9))
        >>> params = jnp.zeros(2)
        >>> pair = (jnp.array([1.0, 0.0]), jnp.array([-1.0, 2.0]))  # in conflict with the batch
        >>> state = tx.init(params)
        >>> direction, state = tx.update(pair, state, params, held_out_grads=jnp.array([0.0, 1.0]))
        >>> print(direction)
        [0.5 1. ]

    References:
        The product with a validation gradient is the hypergradient of $\lambda$: Liu et al.,
        *Auto-Lambda*, TMLR 2022 (arXiv:2202.03091); Navon et al., *Auxiliary Learning by Implicit
        Differentiation*, ICLR 2021.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), the share of the old average; got {decay!r}.")
    if max_age is not None and max_age < 0:
        raise ValueError(f"max_age must be None or a number of steps >= 0; got {max_age!r}.")
    return HeldOut(decay, max_age)


def every_k_steps(k: int, grad_fun: Callable[..., PyTree]) -> Callable[..., HeldOutGrads]:
    r"""Computes a held-out gradient in every `k`-th step only, so that it costs $1/k$.

    On a CPU, XLA runs convolutions inside `jax.lax.cond` slowly. There, jit two steps instead: one
    that passes `HeldOutGrads(grads, True)`, and one that passes `HeldOutGrads(zeros, False)`.

    Args:
        k: Steps from one gradient to the next, at least 1.
        grad_fun: Returns the gradient, a tree of arrays, from any arguments.

    Returns:
        `at_step(step, *args)`, which returns `HeldOutGrads(grad_fun(*args), True)` where `step` is
        a multiple of `k`, and zeros with `False` elsewhere: one `jax.lax.cond` inside jit.

    Raises:
        ValueError: If `k` is less than 1.

    Examples:
        >>> import jax, jax.numpy as jnp, dtnh_jax
        >>> held_out_grads = dtnh_jax.every_k_steps(4, jax.grad(lambda w, x: jnp.sum(w * x)))
        >>> for step in range(5):
        ...     found = held_out_grads(step, jnp.ones(2), jnp.array([1.0, 3.0]))
        ...     print(found.is_new, found.grads)
        True [1. 3.]
        False [0. 0.]
        False [0. 0.]
        False [0. 0.]
        True [1. 3.]

    References:
        The gradient is that of [`held_out`][dtnh_jax.held_out]; computing it in some steps only is
        this project's.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, a number of steps; got {k!r}.")

    def at_step(step: jax.typing.ArrayLike, *args: Any) -> HeldOutGrads:
        def compute() -> PyTree:
            return jax.tree.map(jnp.asarray, grad_fun(*args))

        def skip() -> PyTree:
            shapes = jax.eval_shape(compute)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)

        is_due = jnp.asarray(step) % k == 0
        return HeldOutGrads(jax.lax.cond(is_due, compute, skip), is_due)

    return at_step


def check_reference(reference: Reference) -> None:
    """Raises an error for a value that is not a reference."""
    if isinstance(reference, str) and reference in ("batch", "held_out"):
        return
    if not isinstance(reference, optax.GradientTransformation | HeldOut):
        raise TypeError(
            "reference must be 'batch', the loss gradient itself, or an optax transformation that "
            "makes one from it, such as optax.ema(0.99), optax.trace(0.9) or "
            "optax.scale_by_adam(), or 'held_out' or dtnh_jax.held_out(0.9) for the gradient of "
            f"held-out examples; got {reference!r}."
        )


def as_held_out(reference: Reference) -> HeldOut | None:
    """The held-out reference, or ``None`` if it is made from the loss gradient."""
    if isinstance(reference, HeldOut):
        return reference
    return HeldOut(0.0, None) if isinstance(reference, str) and reference == "held_out" else None


def init_reference(reference: Reference, layout: Layout) -> Any:
    """The state of the reference: nothing for ``"batch"``, or an average or the like."""
    reached = layout.only_reached(layout.leaves)
    if as_held_out(reference):
        average = jax.tree.map(
            lambda x: jnp.zeros_like(widened(jnp.asarray(x), compute_dtype(x.dtype))), reached
        )
        return HeldOutState(average, jnp.full([], -1, jnp.int32))
    if isinstance(reference, optax.GradientTransformation):
        return reference.init(reached)
    return optax.EmptyState()


def reference_leaves(
    reference: Reference,
    layout: Layout,
    loss_grads: PyTree,
    state: Any,
    params: PyTree | None,
    extra_args: Mapping[str, Any],
) -> tuple[list[Any], Any]:
    """The reference for each leaf of ``layout``, ``None`` where no group is, and its next state."""
    if chosen := as_held_out(reference):
        state = _next_held_out(chosen, layout, loss_grads, state, extra_args)
        tree = state.average
    elif isinstance(reference, optax.GradientTransformation):
        if params is not None:
            leaves = layout.over(params, loss_grads, what="params", over="loss_grads")
            params = layout.only_reached(leaves)
        transformation = optax.with_extra_args_support(reference)
        tree, state = transformation.update(
            layout.only_reached(layout.leaves), state, params, **extra_args
        )
    else:
        return layout.leaves, state
    reached = iter(jax.tree.leaves(tree))
    return [None if row is None else next(reached) for row in layout.rows], state


def is_usable(reference: Reference, state: Any) -> jax.Array | None:
    """Whether there is a reference to compare with; ``None`` where there always is."""
    chosen = as_held_out(reference)
    if chosen is None:
        return None
    is_known = state.age >= 0
    return is_known if chosen.max_age is None else is_known & (state.age <= chosen.max_age)


def _next_held_out(
    reference: HeldOut,
    layout: Layout,
    loss_grads: PyTree,
    state: HeldOutState,
    extra_args: Mapping[str, Any],
) -> HeldOutState:
    given = extra_args.get("held_out_grads")
    if given is None:
        raise TypeError(
            "A rule with a held-out reference needs held_out_grads=, the gradient of the loss of "
            "examples that are not trained on: call tx.update(pair, state, params, "
            "held_out_grads=grads). For steps without one, see dtnh_jax.every_k_steps."
        )
    grads, is_new = given if isinstance(given, HeldOutGrads) else (given, True)
    entries = layout.over(grads, loss_grads, what="held_out_grads", over="loss_grads")
    for path, a, v, row in zip(layout.paths, layout.leaves, entries, layout.rows, strict=True):
        if row is not None and (v is None or jnp.shape(v) != jnp.shape(a)):
            got = "nothing" if v is None else f"shape {jnp.shape(v)}"
            raise ValueError(
                f"held_out_grads must have the shapes of loss_grads; got {got} for "
                f"{jnp.shape(a)} at {path_name(path)!r}."
            )
    tree = jax.tree.map(jnp.asarray, layout.only_reached(entries))

    def add(average: PyTree) -> PyTree:
        def sum_of(m: jax.Array, v: jax.Array) -> jax.Array:
            # A number that is not finite starts anew. The rule compares with none in its own step.
            return reference.decay * jnp.where(jnp.isfinite(m), m, 0) + v.astype(m.dtype)

        return jax.tree.map(sum_of, average, tree)

    older = jnp.where(state.age < 0, state.age, optax.safe_increment(state.age))
    if isinstance(is_new, bool):
        return HeldOutState(
            *((add(state.average), 0 * older) if is_new else (state.average, older))
        )
    average = jax.lax.cond(is_new, add, lambda average: average, state.average)
    return HeldOutState(average, jnp.where(is_new, 0, older))
