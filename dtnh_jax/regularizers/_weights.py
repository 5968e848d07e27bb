"""Regularizers of the weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dtnh_jax._layout import Mask, reached
from dtnh_jax._numerics import compute_dtype, widened
from dtnh_jax._tree import (
    PyTree,
    check_same_shape,
    is_absent,
    lay_over,
    leaf_names,
    leaf_paths,
    leaves_of,
    path_name,
)


def l2(params: PyTree, *, mask: Mask = None) -> jax.Array:
    r"""L2 regularization: pulls weights towards zero, a baseline without a pre-trained network.

    $$\Omega(w) = \frac{1}{2}\sum\lVert w\rVert^2$$

    Its gradient is $w$. As a term of the loss with SGD it equals the weight decay of PyTorch's
    `SGD` with the same weight.

    Args:
        params: The parameters $w$, a tree of real or complex floating-point arrays.
        mask: `None`, or a tree of booleans, a prefix of `params`, or a function from `params` to
            such a tree. `False` excludes a leaf, such as biases and normalization scales.

    Returns:
        A scalar, in float32 or the widest dtype of `params`.

    Raises:
        ValueError: If the mask does not match `params`.
        TypeError: If an entry of the mask is not a boolean.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
        >>> print(regularizers.l2(params))
        7.0
        >>> print(regularizers.l2(params, mask={"kernel": True, "bias": False}))
        2.5

    References:
        Krogh, Hertz, *A Simple Weight Decay Can Improve Generalization*, NIPS 1991.
    """
    terms = [
        _Term(1.0, leaf, None, None) if kept else None
        for leaf, kept in zip(leaves_of(params), reached(params, mask), strict=True)
    ]
    return _value(params, terms)


def l2_gradient(params: PyTree, *, mask: Mask = None) -> PyTree:
    r"""The gradient of [`l2`][dtnh_jax.regularizers.l2] in closed form.

    $$\nabla\Omega(w) = w$$

    Args:
        params: As in [`l2`][dtnh_jax.regularizers.l2].
        mask: As in [`l2`][dtnh_jax.regularizers.l2].

    Returns:
        A tree with the structure, shapes and dtypes of `params`; `None` where `mask` is `False`.

    Raises:
        ValueError: As [`l2`][dtnh_jax.regularizers.l2] does.
        TypeError: As [`l2`][dtnh_jax.regularizers.l2] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
        >>> grads = regularizers.l2_gradient(params, mask={"kernel": True, "bias": False})
        >>> print(grads["kernel"], grads["bias"])
        [1. 2.] None

    References:
        Krogh, Hertz, *A Simple Weight Decay Can Improve Generalization*, NIPS 1991.
    """
    terms = [
        _Term(1.0, leaf, None, None) if kept else None
        for leaf, kept in zip(leaves_of(params), reached(params, mask), strict=True)
    ]
    return _gradient(params, terms)


def l2_sp(
    params: PyTree,
    pretrained: PyTree,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    mask: Mask = None,
) -> jax.Array:
    r"""L2-SP: pulls weights towards their pre-trained values, the starting point.

    $$\Omega(w) = \frac{\alpha}{2}\sum_{\text{shared}}\lVert w - w_0\rVert^2
    + \frac{\beta}{2}\sum_{\text{new}}\lVert w\rVert^2$$

    A leaf is *new* where `pretrained` has `None`, and *shared* elsewhere. The gradient is
    $\alpha (w - w_0)$ for shared and $\beta w$ for new leaves; at $w = w_0$ it is zero, not NaN.
    With `beta=0` the regularizer does not depend on new leaves, so a new head is in no group of
    the rule.

    The rule multiplies the result by `reg_weight`. The weights in the code of Li et al. (0.1
    shared, 0.01 new, without biases and normalization scales) are `reg_weight=0.1, beta=0.1` with
    a `mask`; those in DELTA's code and in tllib (0.01 for both, all parameters) are
    `reg_weight=0.01, beta=1`.

    Args:
        params: The parameters $w$, a tree of real or complex floating-point arrays.
        pretrained: The pre-trained parameters $w_0$, with the structure and shapes of
            `params`; `None` in place of a leaf or a subtree without pre-trained values.
        alpha: $\alpha$, the weight of the shared leaves.
        beta: $\beta$, the weight of the new leaves.
        mask: `None`, or a tree of booleans, a prefix of `params`, or a function from `params` to
            such a tree. `False` excludes a leaf from both sums, such as biases and normalization
            scales.

    Returns:
        A scalar, in float32 or the widest dtype of `params`.

    Raises:
        ValueError: If the trees or shapes do not match; the message names the leaf.
        TypeError: If an entry of the mask is not a boolean.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> pretrained = {"backbone": jnp.array([1.0, 2.0]), "head": None}
        >>> params = {"backbone": jnp.array([1.0, 4.0]), "head": jnp.array([3.0])}
        >>> print(regularizers.l2_sp(params, pretrained))
        2.0
        >>> print(jax.grad(regularizers.l2_sp)(params, pretrained)["backbone"])
        [0. 2.]

    References:
        Li, Grandvalet, Davoine, *Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks*, ICML 2018 (arXiv:1802.01483), eq. 3.
    """
    return _value(params, _l2_sp_terms(params, pretrained, alpha, beta, mask))


def l2_sp_gradient(
    params: PyTree,
    pretrained: PyTree,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    mask: Mask = None,
) -> PyTree:
    r"""The gradient of [`l2_sp`][dtnh_jax.regularizers.l2_sp] in closed form.

    $$\nabla\Omega(w) = \alpha\,(w - w_0) \text{ (shared)}, \qquad \beta\,w \text{ (new)}$$

    It needs no backward pass, and can be used as `reg_grads` of a pair. For complex leaves it is
    the conjugate, as returned by `jax.grad`.

    Args:
        params: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].
        pretrained: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].
        alpha: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].
        beta: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].
        mask: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].

    Returns:
        A tree with the structure, shapes and dtypes of `params`; `None` where the regularizer
        does not apply: excluded by `mask`, or with weight zero, as new leaves by default.

    Raises:
        ValueError: As [`l2_sp`][dtnh_jax.regularizers.l2_sp] does.
        TypeError: As [`l2_sp`][dtnh_jax.regularizers.l2_sp] does.

    Examples:
        >>> import jax, jax.numpy as jnp, dtnh_jax
        >>> from dtnh_jax import regularizers
        >>> pretrained = {"backbone": jnp.array([1.0, 2.0]), "head": None}
        >>> params = {"backbone": jnp.array([1.0, 4.0]), "head": jnp.array([3.0])}
        >>> loss_grads = jax.tree.map(jnp.ones_like, params)
        >>> reg_grads = regularizers.l2_sp_gradient(params, pretrained)
        >>> print(reg_grads["backbone"], reg_grads["head"])
        [0. 2.] None
        >>> pair = dtnh_jax.GradientPair(loss_grads, reg_grads)

    References:
        Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483), eq. 3.
    """
    return _gradient(params, _l2_sp_terms(params, pretrained, alpha, beta, mask))


def l2_sp_fisher(
    params: PyTree,
    pretrained: PyTree,
    fisher: PyTree,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    epsilon: float = 0.0,
    mask: Mask = None,
) -> jax.Array:
    r"""L2-SP-Fisher: L2-SP weighted by the importance of each parameter for the source task.

    $$\Omega(w) = \frac{\alpha}{2}\sum_{\text{shared}} (F + \varepsilon)\,\lvert w - w_0\rvert^2
    + \frac{\beta}{2}\sum_{\text{new}}\lVert w\rVert^2$$

    with the diagonal $F \ge 0$ of the source task's Fisher information, which
    [`fisher_diagonal`][dtnh_jax.regularizers.fisher_diagonal] estimates. *Elastic weight
    consolidation* (EWC) is the same with `beta=0` and `epsilon=0`; `alpha` is its $\lambda$.

    Args:
        params: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].
        pretrained: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].
        fisher: $F$, real, with the structure and shapes of `params`. It may be `None` for new and
            for excluded leaves.
        alpha: $\alpha$, the weight of the shared leaves.
        beta: $\beta$, the weight of the new leaves.
        epsilon: $\varepsilon$, added to $F$, so that parameters that are unimportant for the source
            task are regularized too.
        mask: As in [`l2_sp`][dtnh_jax.regularizers.l2_sp].

    Returns:
        A scalar, in float32 or the widest dtype of `params`.

    Raises:
        ValueError: If the trees or shapes do not match; the message names the leaf.
        TypeError: If an entry of the mask is not a boolean.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> w, w0, fisher = jnp.array([1.0, 4.0]), jnp.array([0.0, 2.0]), jnp.array([5.0, 0.5])
        >>> print(regularizers.l2_sp_fisher(w, w0, fisher))
        3.5

    References:
        Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483), L2-SP-Fisher; Kirkpatrick et al.,
        *Overcoming Catastrophic Forgetting in Neural Networks*, PNAS 2017 (arXiv:1612.00796),
        EWC.
    """
    return _value(params, _fisher_terms(params, pretrained, fisher, alpha, beta, epsilon, mask))


def l2_sp_fisher_gradient(
    params: PyTree,
    pretrained: PyTree,
    fisher: PyTree,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    epsilon: float = 0.0,
    mask: Mask = None,
) -> PyTree:
    r"""The gradient of [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher] in closed form.

    $$\nabla\Omega(w) = \alpha\,(F + \varepsilon)\,(w - w_0) \text{ (shared)}, \qquad
    \beta\,w \text{ (new)}$$

    Args:
        params: As in [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher].
        pretrained: As in [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher].
        fisher: As in [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher].
        alpha: As in [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher].
        beta: As in [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher].
        epsilon: As in [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher].
        mask: As in [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher].

    Returns:
        A tree with the structure, shapes and dtypes of `params`; `None` where the regularizer
        does not apply, as in [`l2_sp_gradient`][dtnh_jax.regularizers.l2_sp_gradient].

    Raises:
        ValueError: As [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher] does.
        TypeError: As [`l2_sp_fisher`][dtnh_jax.regularizers.l2_sp_fisher] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> w, w0, fisher = jnp.array([1.0, 4.0]), jnp.array([0.0, 2.0]), jnp.array([5.0, 0.5])
        >>> print(regularizers.l2_sp_fisher_gradient(w, w0, fisher))
        [5. 1.]

    References:
        Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483); Kirkpatrick et al., PNAS 2017
        (arXiv:1612.00796).
    """
    return _gradient(params, _fisher_terms(params, pretrained, fisher, alpha, beta, epsilon, mask))


def l2_sp_lora(
    params: PyTree, *, scale: float = 1.0, names: tuple[str, str] = ("lora_a", "lora_b")
) -> jax.Array:
    r"""L2-SP of weights with low-rank adapters (LoRA), without the merged weights.

    $$\Omega = \frac{s^2}{2}\sum\lVert A B\rVert^2 = \frac12\sum\lVert W - W_0\rVert^2, \qquad
    W = W_0 + s\,A B$$

    It is exactly [`l2_sp`][dtnh_jax.regularizers.l2_sp] of the merged weights $W$, value and
    gradient, computed from the Gram matrices of $A$ and $B$, which have the size of the rank. It
    pulls the adapters towards zero without being [`l2`][dtnh_jax.regularizers.l2] of them: that is
    another regularizer, not equal to first order either. Where LoRA begins, at $B = 0$, this one
    has gradient zero, while `l2` shrinks $A$; and the smallest `l2` of any factors of a given $A B$
    is its nuclear norm, which prefers low ranks.

    Args:
        params: A tree in which each adapter is two siblings, $A$ of shape `(..., in, rank)` and $B$
            of shape `(..., rank, out)`, real floating-point; such as `nnx.state(model,
            nnx.LoRAParam)`. Leaves of other names are not regularized.
        scale: $s$, such as $\alpha$ / rank.
        names: The names of $A$ and $B$.

    Returns:
        A scalar, in float32 or the widest dtype of `params`.

    Raises:
        ValueError: If there is no adapter, one of the two is missing, or their shapes do not match.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> a, b = jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 0.0]])
        >>> params = {"query": {"lora_a": a, "lora_b": b}}
        >>> print(regularizers.l2_sp_lora(params, scale=2.0))
        90.0
        >>> print(0.5 * jnp.sum((2.0 * a @ b) ** 2))
        90.0

    References:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022
        (arXiv:2106.09685); Li, Grandvalet, Davoine, ICML 2018 (arXiv:1802.01483), for L2-SP.
    """
    leaves = {
        path: leaf
        for path, leaf in zip(leaf_paths(params), leaves_of(params), strict=True)
        if not is_absent(leaf) and path and path[-1] in names
    }
    places = sorted({path[:-1] for path in leaves})
    if not places:
        raise ValueError(
            f"l2_sp_lora found no leaves named {names[0]!r} and {names[1]!r} in params. Give the "
            "names of the two factors with names=."
        )
    dtype = compute_dtype(*(jnp.result_type(leaf) for leaf in leaves.values()))
    value = jnp.zeros((), dtype)
    for place in places:
        factors = [leaves.get((*place, name)) for name in names]
        shapes = [None if x is None else np.shape(x) for x in factors]
        a, b = shapes
        if a is None or b is None or len(a) < 2 or (*a[:-2], a[-1]) != b[:-1]:
            raise ValueError(
                f"l2_sp_lora needs {names[0]!r} of shape (..., in, rank) and {names[1]!r} of shape "
                f"(..., rank, out); got {a} and {b} at {path_name(place)!r}."
            )
        a, b = (jnp.asarray(x).astype(dtype) for x in factors)
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        of_a, of_b = product("...ir,...is->...rs", a, a), product("...ro,...so->...rs", b, b)
        value = value + jnp.sum(of_a * of_b)
    return 0.5 * jnp.square(jnp.asarray(scale, dtype)) * value


class _Term(NamedTuple):
    """``factor / 2 · Σ importance · |weight − start|²`` of one leaf."""

    factor: Any
    weight: Any
    start: Any
    importance: Callable[[np.dtype], jax.Array] | None


def _l2_sp_terms(
    params: PyTree, pretrained: PyTree, alpha: Any, beta: Any, mask: Mask
) -> list[_Term | None]:
    """The term of each leaf of ``params``, ``None`` where there is none."""
    starts = lay_over(pretrained, params, what="pretrained", over="params", one_for_many=False)
    terms: list[_Term | None] = []
    for name, weight, start, kept in zip(
        leaf_names(params), leaves_of(params), starts, reached(params, mask), strict=True
    ):
        factor = beta if is_absent(start) else alpha
        # A term with weight zero is omitted, so that the result does not depend on the leaf.
        if not kept or not (isinstance(factor, Tracer) or factor != 0):
            terms.append(None)
            continue
        if is_absent(start):
            start = None
        else:
            check_same_shape(name, weight, start)
        terms.append(_Term(factor, weight, start, None))
    return terms


def _fisher_terms(
    params: PyTree,
    pretrained: PyTree,
    fisher: PyTree,
    alpha: Any,
    beta: Any,
    epsilon: Any,
    mask: Mask,
) -> list[_Term | None]:
    fishers = lay_over(fisher, params, what="fisher", over="params", one_for_many=False)
    terms = _l2_sp_terms(params, pretrained, alpha, beta, mask)
    for index, (name, term, of_leaf) in enumerate(
        zip(leaf_names(params), terms, fishers, strict=True)
    ):
        if term is None or term.start is None:
            continue
        if is_absent(of_leaf):
            raise ValueError(
                f"fisher must have a leaf wherever pretrained has one; got None at {name!r}. "
                "Exclude that leaf by mask=, or put None in pretrained too."
            )
        if np.shape(of_leaf) != np.shape(term.weight):
            raise ValueError(
                f"fisher must have the shapes of params; got {np.shape(of_leaf)} for "
                f"{np.shape(term.weight)} at {name!r}."
            )

        def importance(dtype: np.dtype, of_leaf: Any = of_leaf) -> jax.Array:
            return jnp.asarray(of_leaf).astype(dtype) + jnp.asarray(epsilon, dtype)

        terms[index] = term._replace(importance=importance)
    return terms


def _difference(term: _Term, dtype: np.dtype) -> jax.Array:
    difference = widened(jnp.asarray(term.weight), dtype)
    if term.start is not None:
        difference = difference - widened(jnp.asarray(term.start), dtype)
    return difference


def _value(params: PyTree, terms: list[_Term | None]) -> jax.Array:
    dtype = compute_dtype(
        *(jnp.result_type(weight) for weight in leaves_of(params) if not is_absent(weight))
    )
    value = jnp.zeros((), dtype)
    for term in terms:
        if term is None:
            continue
        difference = _difference(term, dtype)
        # Sum of squares, since norm(w - w0)**2 has a NaN gradient at w = w0.
        squares = jnp.square(jnp.real(difference))
        if jnp.iscomplexobj(difference):
            squares = squares + jnp.square(jnp.imag(difference))
        if term.importance is not None:
            squares = term.importance(dtype) * squares
        value = value + 0.5 * jnp.asarray(term.factor, dtype) * jnp.sum(squares)
    return value


def _gradient(params: PyTree, terms: list[_Term | None]) -> PyTree:
    leaves = []
    for term in terms:
        if term is None:
            leaves.append(None)
            continue
        weight = jnp.asarray(term.weight)
        dtype = compute_dtype(weight.dtype)
        grad = jnp.conj(_difference(term, dtype))
        if term.importance is not None:
            grad = term.importance(dtype).astype(grad.dtype) * grad
        leaves.append((jnp.asarray(term.factor, grad.dtype) * grad).astype(weight.dtype))
    return jax.tree.structure(params, is_leaf=is_absent).unflatten(leaves)
