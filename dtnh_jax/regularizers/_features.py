"""Regularizers of features."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dtnh_jax._numerics import compute_dtype, ratio, unit
from dtnh_jax._tree import PyTree, is_absent, lay_over, leaf_names, leaves_of
from dtnh_jax.regularizers._batch import (
    Reduction,
    check_choice,
    check_count,
    check_positive,
    reduced,
)


def feature_distillation(
    student_features: PyTree, teacher_features: PyTree, *, reduction: Reduction = "mean"
) -> jax.Array:
    r"""Feature distillation: keeps feature maps close to the pre-trained ones.

    $$\Omega = \sum_{\text{layers}} \frac{1}{n}\sum_{i=1}^{n}
    \tfrac{1}{2}\lVert f_i - f^0_i\rVert^2$$

    The DTNH paper calls it knowledge distillation. With `reduction="sum"` it is
    [`delta`][dtnh_jax.regularizers.delta] without channel weights.

    Args:
        student_features: $f$, an array or a tree of them, one for each layer, of shape
            `(n, ...)`, real floating-point.
        teacher_features: $f^0$, with the structure and shapes of `student_features`; `None` in
            place of a layer to exclude. Gradients flow through them: compute them outside the
            objective, or wrap them in `jax.lax.stop_gradient`.
        reduction: `"mean"` or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the widest dtype of the features.

    Raises:
        ValueError: If the trees or shapes do not match (the message names the layer), if a
            feature map has no batch axis, or if `reduction` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> student, teacher = {"pool": jnp.ones((4, 3))}, {"pool": jnp.zeros((4, 3))}
        >>> print(regularizers.feature_distillation(student, teacher))
        1.5

    References:
        Wan et al., ICDM 2019 (arXiv:1911.07489); Romero et al., *FitNets: Hints for Thin Deep
        Nets*, ICLR 2015 (arXiv:1412.6550), for the distance of feature maps.
    """
    check_choice("reduction", reduction)
    value, of_layers = _layers(student_features, teacher_features)
    for name, student, teacher in of_layers:
        _check_same(name, student, teacher)
        squares = jnp.square(student - teacher).astype(value.dtype)
        value = value + reduced(_per_example(0.5 * squares), reduction)
    return value


def attention_transfer(
    student_features: PyTree,
    teacher_features: PyTree,
    *,
    channel_axis: int = -1,
    reduction: Reduction = "mean",
    positions: Reduction = "mean",
) -> jax.Array:
    r"""Attention transfer: keeps the spatial attention maps close to the pre-trained ones.

    $$\Omega = \sum_{\text{layers}} \frac{1}{n}\sum_{i=1}^{n} \frac{1}{P}\sum_{p=1}^{P}
    \bigl(A(f_i)_p - A(f^0_i)_p\bigr)^2, \qquad
    A(f) = \frac{q}{\lVert q\rVert}, \quad q_p = \frac{1}{C}\sum_{c=1}^{C} f_{pc}^2$$

    over the positions $p$ of a feature map. The defaults are those of the authors' code, which
    uses the weight $10^3$; `positions="sum"` is the squared distance of the two maps as vectors.
    If a feature map is zero everywhere, its attention map and the gradient are zero.

    Args:
        student_features: $f$, an array or a tree of them, one for each layer, of shape
            `(n, ..., channels)`, real floating-point.
        teacher_features: $f^0$, as `student_features`, possibly with another number of channels;
            `None` in place of a layer to exclude. Gradients flow through them.
        channel_axis: The channel axis: `-1` in Flax, `1` in PyTorch's layout.
        reduction: `"mean"` or `"sum"` over the examples.
        positions: `"mean"` or `"sum"` over the positions.

    Returns:
        A scalar, in float32 or the widest dtype of the features.

    Raises:
        ValueError: If the trees or the positions do not match (the message names the layer), if
            there is no channel axis, or if `reduction` or `positions` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> student = jnp.array([[[[2.0], [0.0]]]])  # one image of 1 x 2 pixels, one channel
        >>> teacher = jnp.array([[[[0.0], [5.0]]]])
        >>> print(regularizers.attention_transfer(student, teacher))
        1.0

    References:
        Zagoruyko, Komodakis, *Paying More Attention to Attention*, ICLR 2017 (arXiv:1612.03928),
        section 3.1.
    """
    check_choice("reduction", reduction)
    check_choice("positions", positions)
    value, of_layers = _layers(student_features, teacher_features)
    for name, student, teacher in of_layers:
        student, teacher = (
            _attention(name, features, channel_axis) for features in (student, teacher)
        )
        if student.shape != teacher.shape:
            raise ValueError(
                "attention_transfer expects feature maps with the same examples and positions "
                f"from student and teacher; got {student.shape} and {teacher.shape}, without "
                f"channels, at {name!r}. Resize one of them."
            )
        over = jnp.mean if positions == "mean" else jnp.sum
        squares = jnp.square(student - teacher).astype(value.dtype)
        value = value + reduced(over(squares, axis=tuple(range(1, squares.ndim))), reduction)
    return value


def delta(
    student_features: PyTree,
    teacher_features: PyTree,
    channel_weights: PyTree = None,
    *,
    channel_axis: int = -1,
    reduction: Reduction = "sum",
    scale: Literal["none", "channels/positions"] = "none",
) -> jax.Array:
    r"""DELTA: keeps feature maps close to the pre-trained ones, with a weight for each channel.

    $$\Omega = \sum_{\text{layers}} \sum_{i=1}^{n} \sum_{c=1}^{C} \frac{\omega_c}{2}
    \lVert f_{ic} - f^0_{ic}\rVert^2$$

    Without `channel_weights` every $\omega_c = 1$, the *behavioural* form. With those of
    [`delta_channel_weights`][dtnh_jax.regularizers.delta_channel_weights], which sum to one, it is
    the *attention-weighted* form of the paper. DELTA's code and tllib multiply it by the number
    of channels over the number of positions, which is `scale="channels/positions"`. Both sum
    over the batch, and use a weight of 0.01 for this term and 0.01 for the
    [`l2`][dtnh_jax.regularizers.l2] of the new head: `reg_weight=0.01` for the sum of both.

    Args:
        student_features: $f$, an array or a tree of them, one for each layer, of shape
            `(n, ..., channels)`, real floating-point.
        teacher_features: $f^0$, with the structure and shapes of `student_features`; `None` in
            place of a layer to exclude. Gradients flow through them.
        channel_weights: $\omega$, an array of shape `(channels,)` for each layer, with the
            structure of `student_features`; or `None`.
        channel_axis: The channel axis: `-1` in Flax, `1` in PyTorch's layout.
        reduction: `"sum"` or `"mean"` over the examples; the value of `"mean"` does not grow with
            the batch size.
        scale: `"none"`, or `"channels/positions"`.

    Returns:
        A scalar, in float32 or the widest dtype of the features.

    Raises:
        ValueError: If the trees or shapes do not match (the message names the layer), or if
            `reduction` or `scale` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> student, teacher = jnp.ones((2, 3)), jnp.zeros((2, 3))
        >>> print(regularizers.delta(student, teacher))
        3.0
        >>> print(regularizers.delta(student, teacher, jnp.array([0.5, 0.5, 0.0])))
        1.0

    References:
        Li et al., *DELTA: DEep Learning Transfer using Feature Map with Attention for
        Convolutional Networks*, ICLR 2019 (arXiv:1901.09229).
    """
    check_choice("reduction", reduction)
    check_choice("scale", scale, ("none", "channels/positions"))
    value, of_layers = _layers(student_features, teacher_features)
    weights = [None] * len(of_layers)
    if channel_weights is not None:
        weights = lay_over(
            channel_weights,
            student_features,
            what="channel_weights",
            over="student_features",
            one_for_many=False,
        )
        kept = {name for name, *_ in of_layers}
        names = leaf_names(student_features)
        weights = [w for name, w in zip(names, weights, strict=True) if name in kept]
    for (name, student, teacher), weight in zip(of_layers, weights, strict=True):
        _check_same(name, student, teacher)
        axis = _channel_axis(name, student, channel_axis)
        channels = student.shape[axis]
        squares = jnp.moveaxis(jnp.square(student - teacher).astype(value.dtype), axis, -1)
        if weight is not None:
            if np.shape(weight) != (channels,):
                raise ValueError(
                    "channel_weights must have one number for each channel; got shape "
                    f"{np.shape(weight)} for {channels} channels at {name!r}."
                )
            weight = jnp.asarray(weight).astype(value.dtype)
            squares = squares * weight.reshape((1,) * (squares.ndim - 1) + (channels,))
        elif channel_weights is not None:
            raise ValueError(
                f"channel_weights has None for the layer {name!r}. To exclude the layer, put "
                "None in teacher_features."
            )
        factor = 0.5
        if scale != "none":
            factor = 0.5 * channels / (squares[0].size // channels)
        value = value + factor * reduced(_per_example(squares), reduction)
    return value


def delta_channel_weights(
    loss_fn: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    kernels: PyTree,
    *,
    temperature: float = 5.0,
    chunk_size: int = 1,
) -> PyTree:
    r"""Channel weights of DELTA: the effect on the loss of setting each filter to zero.

    $$\omega = \mathrm{softmax}(z/5), \qquad z_c = \frac{\Delta_c - \bar\Delta}{\sigma_\Delta},
    \qquad \Delta_c = L(w \text{ with filter } c \text{ zero}) - L(w)$$

    with mean and standard deviation over the filters of the layer, as in the authors' code. The
    authors first train a new head on the frozen network, and then compute $L$ on a few batches of
    the target task. The cost is one forward pass for each filter and batch.

    Args:
        loss_fn: A function from `(params, batch)` to the scalar loss, in inference mode.
        params: The parameters of the pre-trained network, with a head for the target task.
        batches: An iterable of batches for `loss_fn`, weighted equally.
        kernels: The path of the kernel in `params` for each layer, such as
            `{"block1": "block1/conv/kernel"}`, with the structure of the features passed to
            [`delta`][dtnh_jax.regularizers.delta]. The last axis of a kernel indexes the filters,
            as in Flax.
        temperature: The divisor of $z$.
        chunk_size: The number of filters that are evaluated at once.

    Returns:
        $\omega$ for each layer: a tree with the structure of `kernels` and arrays of shape
        `(channels,)`, in float32 or the dtype of the kernel. It is uniform if no filter changes
        the loss.

    Raises:
        ValueError: If a path is not in `params`, there are no batches, `temperature` is not
            positive, or `chunk_size` is less than one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> params = {"kernel": jnp.array([[1.0, 0.0]])}  # the second filter has no effect
        >>> def loss_fn(params, batch):
        ...     return -jnp.sum(batch @ params["kernel"])
        >>> weights = regularizers.delta_channel_weights(
        ...     loss_fn, params, [jnp.ones((4, 1))], {"layer": "kernel"}
        ... )
        >>> first, second = weights["layer"]
        >>> print(f"{first:.3f} {second:.3f}")
        0.599 0.401

    References:
        Li et al., ICLR 2019 (arXiv:1901.09229).
    """
    check_positive("temperature", temperature)
    check_count("chunk_size", chunk_size)
    names, leaves = leaf_names(params), leaves_of(params)
    treedef = jax.tree.structure(params, is_leaf=is_absent)
    places = jax.tree.map(functools.partial(_place, names), kernels)

    @jax.jit
    def increases(leaves: list[Any], batch: Any) -> PyTree:
        loss = loss_fn(treedef.unflatten(leaves), batch)

        def of_kernel(place: int) -> jax.Array:
            kernel = leaves[place]
            channels = kernel.shape[-1]

            def switched_off(channel: jax.Array) -> jax.Array:
                off = jnp.arange(channels) == channel
                off = off.reshape((1,) * (kernel.ndim - 1) + (channels,))
                without = list(leaves)
                without[place] = jnp.where(off, jnp.zeros_like(kernel), kernel)
                dtype = compute_dtype(kernel.dtype)
                value = loss_fn(treedef.unflatten(without), batch)
                return value.astype(dtype) - loss.astype(dtype)

            return jax.lax.map(switched_off, jnp.arange(channels), batch_size=chunk_size)

        return jax.tree.map(of_kernel, places)

    total, count = None, 0
    for batch in batches:
        increase = increases(leaves, batch)
        total = increase if total is None else jax.tree.map(jnp.add, total, increase)
        count += 1
    if not count:
        raise ValueError("delta_channel_weights requires at least one batch; batches is empty.")

    def weights(total: jax.Array) -> jax.Array:
        centred = (total - jnp.mean(total)) / count
        deviation = jnp.sqrt(jnp.mean(jnp.square(centred)))
        return jax.nn.softmax(ratio(centred, deviation) / jnp.asarray(temperature, total.dtype))

    return jax.tree.map(weights, total)


def batch_spectral_shrinkage(features: jax.Array, k: int = 1) -> jax.Array:
    r"""Batch spectral shrinkage (BSS): penalizes the smallest singular values of the features.

    $$\Omega = \sum_{i=1}^{k} \sigma_{-i}^2$$

    with the $k$ smallest singular values $\sigma_{-i}$ of the feature matrix, one row per example.
    It does not use a pre-trained network; the assumption is that directions with small singular
    values should not be transferred. The authors use $k = 1$ and the weight $10^{-3}$.

    It is computed as $\sum_i \lVert F^\top v_i\rVert^2$, where the singular vectors $v_i$ of the
    smaller side of $F$ are treated as constants. The gradient $2\sum_i v_i v_i^\top F$ equals that
    of the singular values if they are distinct, and is finite if they are not. Second derivatives
    treat the vectors as constants too, and are not those of the singular values. The vectors are
    those of $F$ itself: those of $FF^\top$ are cheaper, but in float32 they are wrong where $F$ has
    a condition number of a thousand, and the regularizer raises it.

    Args:
        features: $F$, shape `(n, features)`, real floating-point.
        k: The number of singular values, at most the smaller dimension of `features`.

    Returns:
        A scalar, in float32 or the dtype of `features`.

    Raises:
        ValueError: If `features` is not a matrix, or `k` is less than one or too large.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> features = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> print(f"{regularizers.batch_spectral_shrinkage(features, k=2):.4f}")
        5.0000

    References:
        Chen, Wang, Fu, Long, Wang, *Catastrophic Forgetting Meets Negative Transfer: Batch
        Spectral Shrinkage for Safe Transfer Learning*, NeurIPS 2019.
    """
    features = jnp.asarray(features)
    if features.ndim != 2:
        raise ValueError(
            "batch_spectral_shrinkage expects features of shape (n, features); got "
            f"{features.shape}. Pool or flatten feature maps first."
        )
    check_count("k", k)
    if k > min(features.shape):
        raise ValueError(
            f"k must be at most {min(features.shape)}, the number of singular values of features "
            f"of shape {features.shape}; got {k}."
        )
    features = features.astype(compute_dtype(features.dtype))
    if features.shape[0] > features.shape[1]:
        features = features.T
    highest = jax.lax.Precision.HIGHEST
    # Of the triangle of a QR decomposition, whose singular vectors are the same: it is small.
    triangle = jnp.linalg.qr(jax.lax.stop_gradient(features).T, mode="r")
    _, _, vectors = jnp.linalg.svd(triangle)
    return jnp.sum(jnp.square(jnp.matmul(vectors[-k:], features, precision=highest)))


def _layers(student: PyTree, teacher: PyTree) -> tuple[jax.Array, list[tuple[str, Any, Any]]]:
    """A zero of the result's dtype, and the name and both feature maps of each layer."""
    over = lay_over(
        teacher, student, what="teacher_features", over="student_features", one_for_many=False
    )
    layers = []
    for name, of_student, of_teacher in zip(
        leaf_names(student), leaves_of(student), over, strict=True
    ):
        if is_absent(of_student) or is_absent(of_teacher):
            continue
        of_student, of_teacher = jnp.asarray(of_student), jnp.asarray(of_teacher)
        if not of_student.ndim:
            raise ValueError(
                f"features must have a leading axis of examples; got a scalar at {name!r}."
            )
        dtype = compute_dtype(of_student.dtype, of_teacher.dtype)
        layers.append((name, of_student.astype(dtype), of_teacher.astype(dtype)))
    widest = compute_dtype(*(of_student.dtype for _, of_student, _ in layers))
    return jnp.zeros((), widest), layers


def _check_same(name: str, student: jax.Array, teacher: jax.Array) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            "teacher_features must have the shapes of student_features; got "
            f"{teacher.shape} for {student.shape} at {name!r}."
        )


def _channel_axis(name: str, features: jax.Array, channel_axis: int) -> int:
    axis = channel_axis + features.ndim if channel_axis < 0 else channel_axis
    if not 0 < axis < features.ndim:
        raise ValueError(
            "features must have a channel axis in addition to the leading axis of examples; "
            f"channel_axis={channel_axis} is none of shape {features.shape} at {name!r}."
        )
    return axis


def _attention(name: str, features: jax.Array, channel_axis: int) -> jax.Array:
    axis = _channel_axis(name, features, channel_axis)
    # Scaled first, or the fourth powers in the norm would under- or overflow.
    size = jax.lax.stop_gradient(
        jnp.max(jnp.abs(features), axis=tuple(range(1, features.ndim)), keepdims=True)
    )
    return unit(jnp.mean(jnp.square(ratio(features, size)), axis=axis))


def _per_example(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _place(names: list[str], path: str) -> int:
    if path not in names:
        raise ValueError(
            f"kernels must contain paths of params; got {path!r}. There are {', '.join(names)}."
        )
    return names.index(path)
