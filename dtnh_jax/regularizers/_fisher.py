"""The importance of each parameter for the source task."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dtnh_jax._numerics import compute_dtype
from dtnh_jax._tree import PyTree
from dtnh_jax.regularizers._batch import check_choice, check_count


def fisher_diagonal(
    logits_fn: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[tuple[Any, Any]],
    *,
    kind: Literal["empirical", "true"] = "empirical",
    chunk_size: int = 32,
) -> PyTree:
    r"""Estimates the diagonal of the Fisher information of a classifier from batches.

    $$F = \frac{1}{N}\sum_{i=1}^{N}\sum_y q_i(y)\,
    \bigl\lvert\nabla_w \log p(y \mid x_i, w)\bigr\rvert^2$$

    The gradients are squared for each example; the square of the mean gradient of a batch is
    smaller. For the *empirical* Fisher, $q_i$ is one for the label $y_i$ and zero for other
    classes. For the *true* Fisher, $q_i = p(\cdot\mid x_i, w)$ is the exact expectation over the
    predicted classes: it needs no labels, but one backward pass for each class.

    `chunk_size` gradients are in memory at once. If the examples are sharded over devices,
    `chunk_size` and the batch size should be multiples of the number of devices.

    Args:
        logits_fn: A function from `(params, inputs)` to logits of shape `(n, classes)`, in
            inference mode: examples must not depend on each other, so batch normalization must
            use running averages. It is called with one example at a time, `n = 1`.
        params: The parameters of the *source* network including its own head, a tree of real or
            complex floating-point arrays.
        batches: An iterable of pairs `(inputs, labels)`: a tree of arrays with a leading axis of
            examples, and integers of shape `(n,)`. `"true"` ignores the labels.
        kind: `"empirical"` or `"true"`.
        chunk_size: The number of examples that are differentiated at once.

    Returns:
        $F$, a tree with the structure and shapes of `params`, in float32 or the real dtype of
        the leaf, whichever is wider. Labels out of range make it NaN.

    Raises:
        ValueError: If `kind` is unknown, `chunk_size` is less than one, there are no examples, or
            the logits or labels have a wrong shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> w = jnp.zeros((2, 2))
        >>> batches = [(jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([0, 1]))]
        >>> print(regularizers.fisher_diagonal(lambda w, x: x @ w, w, batches))
        [[0.25 0.25]
         [0.5  0.5 ]]

    References:
        Kirkpatrick et al., PNAS 2017 (arXiv:1612.00796); Kunstner, Balles, Hennig, *Limitations
        of the Empirical Fisher Approximation*, NeurIPS 2019 (arXiv:1905.12558), for the two kinds.
    """
    check_choice("kind", kind, ("empirical", "true"))
    check_count("chunk_size", chunk_size)

    @jax.jit
    def sum_of_batch(params: PyTree, inputs: PyTree, labels: Any) -> PyTree:
        def of_example(inputs: PyTree, label: Any) -> PyTree:
            return _squared_gradient(logits_fn, params, inputs, label)

        def of_chunk(total: PyTree, inputs: PyTree, labels: Any) -> PyTree:
            squares = jax.vmap(of_example)(inputs, labels)
            return jax.tree.map(lambda t, s: t + jnp.sum(s, axis=0), total, squares)

        examples = jax.tree.leaves(inputs)[0].shape[0]
        size = min(chunk_size, examples)
        chunks = examples // size
        whole, rest = chunks * size, examples % size
        # Split the axis of examples such that the sharded part remains the first axis; chunks
        # are slices of the second.
        by_chunk = jax.tree.map(
            lambda x: x[:whole].reshape(size, chunks, *x.shape[1:]), (inputs, labels)
        )

        def body(index: jax.Array, total: PyTree) -> PyTree:
            chunk = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), by_chunk
            )
            return of_chunk(total, *chunk)

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, compute_dtype(w.dtype)), params)
        total = jax.lax.fori_loop(0, chunks, body, zeros)
        if rest:
            total = of_chunk(total, *jax.tree.map(lambda x: x[whole:], (inputs, labels)))
        return total

    params = jax.tree.map(jnp.asarray, params)
    total, count = None, 0
    for inputs, labels in batches:
        inputs = jax.tree.map(jnp.asarray, inputs)
        labels = None if kind == "true" else jnp.asarray(labels)
        count += _count_examples(inputs, labels)
        of_batch = sum_of_batch(params, inputs, labels)
        total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
    if not count:
        raise ValueError("fisher_diagonal requires at least one example; batches has none.")
    return jax.tree.map(lambda t: t / jnp.asarray(count, t.dtype), total)


def _count_examples(inputs: PyTree, labels: Any) -> int:
    shapes = [x.shape for x in jax.tree.leaves(inputs)]
    if not shapes or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            "fisher_diagonal expects inputs with one leading axis of examples; got the shapes "
            f"{shapes}."
        )
    examples = shapes[0][0]
    if labels is not None and (
        labels.shape != (examples,) or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise ValueError(
            f"fisher_diagonal expects an integer label for each example, shape ({examples},); "
            f"got {labels.dtype} of shape {labels.shape}. Without labels, use kind='true'."
        )
    return examples


def _squared_gradient(
    logits_fn: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: PyTree, label: Any
) -> PyTree:
    """``Σ_y q(y) |∇ log p(y)|²`` of one example, with ``q`` one at ``label`` or ``q = p``."""

    def log_probabilities(params: PyTree) -> jax.Array:
        logits = logits_fn(params, jax.tree.map(lambda x: x[None], inputs))
        if logits.ndim != 2 or logits.shape[0] != 1:
            raise ValueError(
                "logits_fn must return logits of shape (n, classes) for n examples; got "
                f"{logits.shape} for one."
            )
        return jax.nn.log_softmax(logits[0].astype(compute_dtype(logits.dtype)))

    log_p, pull_back = jax.vjp(log_probabilities, params)

    def squares(cotangent: jax.Array) -> PyTree:
        (grads,) = pull_back(cotangent)

        def square(grad: jax.Array) -> jax.Array:
            real = jnp.real(grad).astype(compute_dtype(grad.dtype))
            imag = jnp.imag(grad).astype(real.dtype)
            return jnp.square(real) + jnp.square(imag) if jnp.iscomplexobj(grad) else real**2

        return jax.tree.map(square, grads)

    classes = log_p.shape[0]
    if label is not None:
        # NaN, since a row of zeros would go unnoticed.
        known = (label >= 0) & (label < classes)
        return squares(jnp.where(known, jax.nn.one_hot(label, classes, dtype=log_p.dtype), jnp.nan))

    def add_class(index: jax.Array, total: PyTree) -> PyTree:
        weight = jnp.exp(log_p[index])
        of_class = squares(jax.nn.one_hot(index, classes, dtype=log_p.dtype))
        return jax.tree.map(lambda t, s: t + weight.astype(s.dtype) * s, total, of_class)

    shapes = jax.eval_shape(squares, log_p)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.fori_loop(0, classes, add_class, zeros)
