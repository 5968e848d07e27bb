"""From an objective of two terms to the pair of their gradients."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dtnh_jax._jax_internals import depends_on
from dtnh_jax._pair import GradientPair
from dtnh_jax._tree import PyTree, is_array, leaf_paths, path_name


def value_and_gradient_pair(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Like `jax.value_and_grad`, of a function that returns loss and regularizer.

    $$\bigl(L(w), \Omega(w)\bigr) \;\mapsto\; \bigl(\nabla L(w), \nabla\Omega(w)\bigr)$$

    The forward pass runs once, and each gradient pulls back through its own part of it alone:
    a regularizer on the weights costs no second pass through the network. Leaves that ``Ω``
    does not depend on, such as a new head, are ``None`` in ``reg_grads`` (not zeros: a zero
    would put the head's loss gradient into the inner products of its group).

    Args:
        fun: Returns ``(loss, reg)``, two real scalars, or ``((loss, reg), aux)`` with
            ``has_aux=True``. ``reg`` comes without its weight, which the rule multiplies after
            the projection. It may be a tuple of scalars, for a rule of several weights.
        argnums: Which positional arguments to differentiate by, as in `jax.value_and_grad`.
        has_aux: Whether ``fun`` returns auxiliary data, such as batch-norm statistics, besides.

    Returns:
        A function with the arguments of ``fun`` that returns ``((loss, reg), pair)`` or
        ``(((loss, reg), aux), pair)``; ``pair`` is a
        [`GradientPair`][dtnh_jax.GradientPair] of trees like the argument (tuples of trees for
        several ``argnums``); for a tuple of regularizers its ``reg_grads`` is a tuple of those.

    Raises:
        TypeError: When called, if ``fun`` returns something else, ``loss`` or ``reg`` is no real
            floating-point scalar, or the argument to differentiate by holds integers or is a module
            of Flax NNX. For modules, use
            [`dtnh_jax.nnx.value_and_gradient_pair`][dtnh_jax.nnx.value_and_gradient_pair] and
            [`dtnh_jax.equinox.filter_value_and_gradient_pair`][dtnh_jax.equinox.filter_value_and_gradient_pair].

    Examples:
        >>> import jax, jax.numpy as jnp, dtnh_jax
        >>> @jax.jit
        ... @dtnh_jax.value_and_gradient_pair
        ... def objective(w, x, y):
        ...     return jnp.mean((x @ w - y) ** 2), 0.5 * jnp.sum(w**2)
        >>> (loss, reg), pair = objective(jnp.array([1.0, 2.0]), jnp.eye(2), jnp.zeros(2))
        >>> print(loss, pair.loss_grads, pair.reg_grads)
        2.5 [1. 2.] [1. 2.]

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489): the two derivatives are taken apart at every
        iteration.
    """

    @functools.wraps(fun)
    def value_and_pair(*args: Any, **kwargs: Any) -> Any:
        wrt, fun_of_wrt = _split_arguments(fun, argnums, args, kwargs)
        terms, aux, pair = pair_of(lambda wrt: checked_terms(fun_of_wrt(wrt), has_aux), wrt)
        return ((terms, aux) if has_aux else terms), pair

    return value_and_pair


def pair_of(
    terms: Callable[[PyTree], tuple[tuple[jax.Array, Any], Any]], wrt: PyTree
) -> tuple[tuple[jax.Array, Any], Any, GradientPair]:
    """Loss and regularizer at ``wrt``, the auxiliary data, and the pair of gradients.

    Args:
        terms: What :func:`checked_terms` returns, as a function of ``wrt``.
        wrt: A tree of floating-point or complex arrays.
    """
    (loss, reg), tangents, aux = jax.linearize(terms, wrt, has_aux=True)

    def gradient(pick: Callable[[Any], jax.Array]) -> tuple[PyTree, Callable[..., Any]]:
        # A transpose of one linear map for each gradient, not pull-backs with a zero: a zero
        # would be carried through the whole network, which XLA does not simplify away.
        def tangent(wrt: PyTree) -> jax.Array:
            return pick(tangents(wrt))

        (grads,) = jax.linear_transpose(tangent, wrt)(jnp.ones_like(pick((loss, reg))))
        return grads, tangent

    loss_grads, _ = gradient(lambda terms: terms[0])
    if isinstance(reg, tuple):
        reg_grads = tuple(
            _without_unreached(*gradient(lambda terms, k=k: terms[1][k]), wrt)
            for k in range(len(reg))
        )
    else:
        reg_grads = _without_unreached(*gradient(lambda terms: terms[1]), wrt)
    return (loss, reg), aux, GradientPair(loss_grads, reg_grads)


def check_positions(
    numbers: Sequence[int], args: Sequence[Any], caller: str = "value_and_gradient_pair"
) -> None:
    """Raises an error if one of ``numbers`` is no position of ``args``."""
    if not all(-len(args) <= number < len(args) for number in numbers):
        by = ", ".join(map(str, numbers))
        raise TypeError(
            f"{caller} differentiates by positional argument {by}, but the function was called "
            f"with {len(args)} positional arguments. Pass params by position, or set argnums."
        )


def _split_arguments(
    fun: Callable[..., Any], argnums: int | Sequence[int], args: Sequence[Any], kwargs: Any
) -> tuple[PyTree, Callable[[PyTree], Any]]:
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    check_positions(numbers, args)

    def fun_of_wrt(wrt: PyTree) -> Any:
        replaced = list(args)
        for number, value in zip(numbers, (wrt,) if isinstance(argnums, int) else wrt, strict=True):
            replaced[number] = value
        return fun(*replaced, **kwargs)

    wrt = tuple(args[number] for number in numbers)
    _check_no_nnx_module(wrt)
    for path, leaf in zip(leaf_paths(wrt, absent=False), jax.tree.leaves(wrt), strict=True):
        dtype = jnp.result_type(leaf) if is_array(leaf) else None
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            name = path_name(path if len(wrt) > 1 else path[1:])
            mend = "Pass what is no such array in another argument."
            if _holds(wrt, "equinox", "Module"):
                mend = (
                    "For an Equinox module use "
                    "dtnh_jax.equinox.filter_value_and_gradient_pair, which takes its "
                    "floating-point arrays, or equinox.partition."
                )
            raise TypeError(
                "value_and_gradient_pair differentiates by floating-point or complex arrays; got "
                f"{dtype or type(leaf).__name__} at {name!r}. {mend}"
            )
    return (wrt[0] if isinstance(argnums, int) else wrt), fun_of_wrt


def _holds(tree: PyTree, framework: str, *names: str) -> bool:
    """Whether ``tree`` holds an object of one of the framework's classes, if that is imported."""
    module = sys.modules.get(framework)
    kinds = tuple(getattr(module, name) for name in names if hasattr(module, name))

    def is_of_kind(node: Any) -> bool:
        return isinstance(node, kinds)

    return bool(kinds) and any(map(is_of_kind, jax.tree.leaves(tree, is_leaf=is_of_kind)))


def _check_no_nnx_module(wrt: PyTree) -> None:
    # As a pytree it would be differentiated like any other, and what the forward pass changes in
    # it, such as the statistics of BatchNorm, would be lost with the copy that JAX traces.
    if _holds(wrt, "flax.nnx", "Pytree", "Object", "Module"):
        raise TypeError(
            "value_and_gradient_pair differentiates by trees of arrays; got a module of Flax NNX, "
            "whose state, such as the statistics of BatchNorm, it would not update. Use "
            "dtnh_jax.nnx.value_and_gradient_pair, which does, or split the module with "
            "nnx.split and pass its parameters."
        )


def checked_terms(
    result: Any, has_aux: bool, caller: str = "value_and_gradient_pair"
) -> tuple[tuple[jax.Array, Any], Any]:
    """``((loss, reg), aux)`` of what the function of ``caller`` returned, checked."""
    wanted = "((loss, reg), aux)" if has_aux else "(loss, reg)"

    def refuse(got: str) -> None:
        hint = "" if has_aux else " If it returns auxiliary data too, set has_aux=True."
        raise TypeError(
            f"{caller} needs a function that returns {wanted}, loss and reg real "
            f"floating-point scalars; got {got}.{hint}"
        )

    terms, aux = result, None
    if has_aux:
        if not isinstance(result, tuple | list) or len(result) != 2:
            refuse(_described(result))
        terms, aux = result
    if not isinstance(terms, tuple | list) or len(terms) != 2:
        refuse(_described(terms))
    loss, reg = terms
    several = isinstance(reg, tuple | list)
    named = [("loss", loss)]
    named += [(f"reg[{k}]", one) for k, one in enumerate(reg)] if several else [("reg", reg)]
    for name, term in named:
        if not is_array(term) or jnp.ndim(term) != 0:
            refuse(f"{name} = {_described(term)}")
        if not jnp.issubdtype(jnp.result_type(term), jnp.floating):
            refuse(f"{name} of dtype {jnp.result_type(term)}")
    return (jnp.asarray(loss), tuple(map(jnp.asarray, reg)) if several else jnp.asarray(reg)), aux


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    if is_array(value):
        return f"an array of shape {jnp.shape(value)}"
    return type(value).__name__


def _without_unreached(reg_grads: PyTree, reg_tangent: Callable[..., Any], wrt: PyTree) -> PyTree:
    """``reg_grads`` with ``None`` at the leaves that the regularizer does not depend on."""
    leaves, treedef = jax.tree.flatten(reg_grads)
    reached = zip(leaves, depends_on(reg_tangent, wrt), strict=True)
    return treedef.unflatten([leaf if is_reached else None for leaf, is_reached in reached])
