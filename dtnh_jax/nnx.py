"""Gradient pairs of Flax NNX modules. Flax is imported when a function of this module is called."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dtnh_jax._gradients import check_positions, checked_terms, pair_of
from dtnh_jax._pair import GradientPair
from dtnh_jax._tree import PyTree

__all__ = ["value_and_gradient_pair"]

_NAME = "dtnh_jax.nnx.value_and_gradient_pair"


def value_and_gradient_pair(
    fun: Callable[..., Any],
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    wrt: Any = None,
) -> Callable[..., Any]:
    r"""Like `nnx.value_and_grad`, of a function that returns loss and regularizer.

    $$\bigl(L(w), \Omega(w)\bigr) \;\mapsto\; \bigl(\nabla L(w), \nabla\Omega(w)\bigr)$$

    The function takes modules. What it changes in them, and in other objects of NNX among its
    arguments, is changed after the call: the statistics of `nnx.BatchNorm`, the counters of
    `nnx.Rngs`, new variables. The forward pass runs once for both gradients, as in
    [`dtnh_jax.value_and_gradient_pair`][dtnh_jax.value_and_gradient_pair].

    Args:
        fun: Returns `(loss, reg)`, two real scalars, or `((loss, reg), aux)` with `has_aux=True`,
            as in [`dtnh_jax.value_and_gradient_pair`][dtnh_jax.value_and_gradient_pair].
        argnums: Which positional arguments to differentiate by: an integer, an `nnx.DiffState`,
            or a sequence of them, as in `nnx.value_and_grad`.
        has_aux: Whether `fun` returns auxiliary data besides.
        wrt: An NNX filter: which variables to differentiate by, where `argnums` is an integer;
            `nnx.Param` by default. Give that of `nnx.Optimizer(model, tx, wrt=...)`.

    Returns:
        A function with the arguments of `fun` that returns `((loss, reg), pair)` or
        `(((loss, reg), aux), pair)`; `pair` is a [`GradientPair`][dtnh_jax.GradientPair] of two
        `nnx.State` (tuples of them for a sequence of `argnums`), for `optimizer.update(model,
        pair)`. Variables that the regularizer does not depend on are `None` in `reg_grads`.

    Raises:
        TypeError: When called, as
            [`dtnh_jax.value_and_gradient_pair`][dtnh_jax.value_and_gradient_pair] does.
        ValueError: When called, if no variable of an argument matches the filter, or `argnums`
            names an argument twice.
        ImportError: When called, if Flax is not installed.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, dtnh_jax
        >>> from flax import nnx
        >>> model = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, dtnh_jax.dtnh_sgd(0.1, 0.01), wrt=nnx.Param)
        >>> @nnx.jit
        ... def step(model, optimizer, x):
        ...     def objective(model):
        ...         loss = jnp.mean(model(x) ** 2)
        ...         return loss, dtnh_jax.regularizers.l2(nnx.state(model, nnx.Param))
        ...     (loss, reg), pair = dtnh_jax.nnx.value_and_gradient_pair(objective)(model)
        ...     optimizer.update(model, pair)
        ...     return loss
        >>> loss = step(model, optimizer, jnp.array([[0.0, 1.0], [2.0, 3.0]]))
        >>> print(model.mean[...])
        [0.5 1. ]

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489), for the two gradients; the state of modules is
        carried as by `nnx.value_and_grad` of Flax.
    """

    @functools.wraps(fun)
    def value_and_pair(*args: Any, **kwargs: Any) -> Any:
        from flax import nnx

        several = isinstance(argnums, Sequence)
        filters = {}
        for each in argnums if several else (argnums,):
            is_diff_state = isinstance(each, nnx.DiffState)
            number = each.argnum if is_diff_state else each
            check_positions([number], args, _NAME)
            number %= len(args)
            if number in filters:
                raise ValueError(f"argnums of {_NAME} must differ; got {number} twice.")
            default = nnx.Param if wrt is None else wrt
            filters[number] = each.filter if is_diff_state else default
        plain = {k: args[k] for k in filters if not _holds_objects(args[k])}
        selects = {k: _predicate(filters[k]) for k in filters if k not in plain}

        def is_selected(path: tuple[Any, ...], value: Any) -> bool:
            return path[0] == 0 and path[1] in selects and selects[path[1]](path[2:], value)

        # Their objects may be shared between arguments, so all of them are split together.
        others = tuple(None if k in plain else arg for k, arg in enumerate(args))
        with nnx.update_context(_NAME):
            with nnx.split_context(_NAME) as context:
                graph, variables, rest = context.split((others, kwargs), is_selected, ...)
            for k in selects:
                if 0 not in variables or k not in variables[0]:
                    raise ValueError(
                        f"{_NAME} found no variable that matches {filters[k]!r} in argument {k}. "
                        "Choose the variables to differentiate by with wrt=."
                    )
            graph_after: Any = None

            def of_variables(of_wrt: tuple[PyTree, PyTree]) -> Any:
                nonlocal graph_after
                variables, plain = of_wrt
                with nnx.merge_context(_NAME, True) as context:
                    merged, kwargs = context.merge(graph, variables, rest)
                result = fun(*[plain.get(k, arg) for k, arg in enumerate(merged)], **kwargs)
                terms, aux = checked_terms(result, has_aux, _NAME)
                with nnx.split_context(_NAME) as context:
                    graph_after, state = context.split((merged, kwargs))
                return terms, (state, aux)

            terms, (state, aux), pair = pair_of(of_variables, (variables, plain))
            with nnx.merge_context(_NAME, False) as context:
                context.merge(graph_after, state)

        def of_arguments(grads: tuple[PyTree, PyTree]) -> PyTree:
            found = tuple(grads[1][k] if k in plain else grads[0][0][k] for k in filters)
            return found if several else found[0]

        loss_grads, reg_grads = pair
        if isinstance(terms[1], tuple):
            of_regs = tuple(map(of_arguments, reg_grads))
        else:
            of_regs = of_arguments(reg_grads)
        pair = GradientPair(of_arguments(loss_grads), of_regs)
        return ((terms, aux) if has_aux else terms), pair

    return value_and_pair


def _predicate(wanted: Any) -> Callable[..., bool]:
    from flax.nnx import filterlib

    return filterlib.to_predicate(wanted)


def _holds_objects(tree: PyTree) -> bool:
    """Whether ``tree`` holds a module or another object of NNX, and not only arrays."""
    from flax import nnx

    kind = getattr(nnx, "Pytree", None) or nnx.Object

    def is_object(node: Any) -> bool:
        return isinstance(node, kind)

    return any(map(is_object, jax.tree.leaves(tree, is_leaf=is_object)))
