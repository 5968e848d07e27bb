"""Gradient pairs of Equinox modules. Equinox is imported when a function of this one is called."""

import functools
from collections.abc import Callable
from typing import Any

from dtnh_jax._gradients import check_positions, checked_terms, pair_of
from dtnh_jax._tree import PyTree

__all__ = ["filter_value_and_gradient_pair"]

_NAME = "dtnh_jax.equinox.filter_value_and_gradient_pair"


def filter_value_and_gradient_pair(
    fun: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Like `eqx.filter_value_and_grad`, of a function that returns loss and regularizer.

    $$\bigl(L(w), \Omega(w)\bigr) \;\mapsto\; \bigl(\nabla L(w), \nabla\Omega(w)\bigr)$$

    It differentiates by the floating-point and complex arrays in the first argument. To
    differentiate by several arguments, or by a part of a module, put them into a tuple, or use
    `eqx.partition` with [`dtnh_jax.value_and_gradient_pair`][dtnh_jax.value_and_gradient_pair].

    Args:
        fun: Returns `(loss, reg)`, two real scalars, or `((loss, reg), aux)` with `has_aux=True`,
            as in [`dtnh_jax.value_and_gradient_pair`][dtnh_jax.value_and_gradient_pair]. The state
            of stateful layers is returned as auxiliary data, as is usual with Equinox.
        has_aux: Whether `fun` returns auxiliary data besides.

    Returns:
        A function with the arguments of `fun` that returns `((loss, reg), pair)` or
        `(((loss, reg), aux), pair)`; `pair` is a [`GradientPair`][dtnh_jax.GradientPair] of trees
        like the first argument, with `None` in place of what is not differentiated; in `reg_grads`
        also where the regularizer does not depend on an array. Give `tx.init` and `tx.update`
        `eqx.filter(model, eqx.is_inexact_array)` for params.

    Raises:
        TypeError: When called, as
            [`dtnh_jax.value_and_gradient_pair`][dtnh_jax.value_and_gradient_pair] does, or without
            a positional argument.
        ImportError: When called, if Equinox is not installed.

    Examples:
        >>> import equinox as eqx, jax, jax.numpy as jnp, dtnh_jax
        >>> model = eqx.nn.MLP(2, 1, width_size=4, depth=1, key=jax.random.key(0))
        >>> pretrained = eqx.filter(model, eqx.is_inexact_array)
        >>> @eqx.filter_jit
        ... @dtnh_jax.equinox.filter_value_and_gradient_pair
        ... def objective(model, x):
        ...     params = eqx.filter(model, eqx.is_inexact_array)
        ...     return jnp.mean(jax.vmap(model)(x) ** 2), dtnh_jax.regularizers.l2_sp(
        ...         params, pretrained
        ...     )
        >>> tx = dtnh_jax.dtnh_sgd(learning_rate=0.1, reg_weight=0.01)
        >>> opt_state = tx.init(pretrained)
        >>> (loss, reg), pair = objective(model, jnp.ones((3, 2)))
        >>> updates, opt_state = tx.update(pair, opt_state, pretrained)
        >>> model = eqx.apply_updates(model, updates)

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489), for the two gradients; the filter is that of
        `eqx.filter_value_and_grad` of Equinox.
    """

    @functools.wraps(fun)
    def value_and_pair(*args: Any, **kwargs: Any) -> Any:
        import equinox as eqx

        check_positions([0], args, _NAME)
        params, static = eqx.partition(args[0], eqx.is_inexact_array)

        def of_params(params: PyTree) -> Any:
            result = fun(eqx.combine(params, static), *args[1:], **kwargs)
            return checked_terms(result, has_aux, _NAME)

        terms, aux, pair = pair_of(of_params, params)
        return ((terms, aux) if has_aux else terms), pair

    return value_and_pair
