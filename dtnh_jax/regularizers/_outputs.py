"""Regularizers of outputs."""

import jax
import jax.numpy as jnp

from dtnh_jax._numerics import compute_dtype, ratio
from dtnh_jax.regularizers._batch import Reduction, check_choice, check_positive, reduced


def distillation(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float = 1.0,
    *,
    t_squared: bool = True,
    reduction: Reduction = "mean",
) -> jax.Array:
    r"""Knowledge distillation: keeps the outputs close to those of the pre-trained network.

    $$\Omega = T^2\,\frac{1}{n}\sum_{i=1}^{n}
    \mathrm{KL}\bigl(\mathrm{softmax}(t_i/T)\,\Vert\,\mathrm{softmax}(s_i/T)\bigr)$$

    with student logits $s$, teacher logits $t$ and temperature $T$: the sum over classes and the
    mean over all other axes. The factor $T^2$ keeps the magnitude of the gradient about constant
    in $T$, as recommended by Hinton et al. `t_squared=False` omits it, as tllib does, which is
    smaller by a factor of $T^2$. The default `reduction` equals PyTorch's
    `KLDivLoss(reduction="batchmean")` for logits of shape `(n, classes)`; PyTorch's `"mean"` also
    divides by the number of classes.

    Args:
        student_logits: $s$, shape `(..., classes)`, real floating-point.
        teacher_logits: $t$, with the same shape. Gradients flow through them: compute them outside
            the objective, or wrap them in `jax.lax.stop_gradient`.
        temperature: $T > 0$.
        t_squared: Whether to multiply by $T^2$.
        reduction: `"mean"` or `"sum"` over the examples, that is, over all axes but the last.

    Returns:
        A scalar, in float32 or the widest dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, $T \le 0$, or `reduction` is
            unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
        >>> print(f"{regularizers.distillation(student, teacher, temperature=2.0):.4f}")
        0.4438
        >>> weak = regularizers.distillation(student, teacher, 2.0, t_squared=False)
        >>> print(f"{weak:.4f}")
        0.1109

    References:
        Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015
        (arXiv:1503.02531), section 2.
    """
    check_positive("temperature", temperature)
    check_choice("reduction", reduction)
    student, teacher = _logits("distillation", student_logits, teacher_logits)
    t = jnp.asarray(temperature, student.dtype)
    divergence = reduced(
        kl_divergence(jax.nn.log_softmax(teacher / t), jax.nn.log_softmax(student / t)), reduction
    )
    return divergence * t**2 if t_squared else divergence


def logit_matching(
    student_logits: jax.Array, teacher_logits: jax.Array, *, reduction: Reduction = "mean"
) -> jax.Array:
    r"""Logit matching: keeps the logits close to those of the pre-trained network.

    $$\Omega = \frac{1}{n}\sum_{i=1}^{n} \tfrac{1}{2}\lVert s_i - t_i\rVert^2$$

    For logits with mean zero it is the limit of
    [`distillation`][dtnh_jax.regularizers.distillation] with $T^2$ for high temperatures, times
    the number of classes.

    Args:
        student_logits: $s$, shape `(..., classes)`, real floating-point.
        teacher_logits: $t$, with the same shape. Gradients flow through them.
        reduction: `"mean"`, as in the paper, or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the widest dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, or `reduction` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> student, teacher = jnp.array([[0.0, 1.0]]), jnp.array([[2.0, 1.0]])
        >>> print(regularizers.logit_matching(student, teacher))
        2.0

    References:
        Ba, Caruana, *Do Deep Nets Really Need to be Deep?*, NIPS 2014 (arXiv:1312.6184), eq. 1;
        Hinton, Vinyals, Dean, 2015 (arXiv:1503.02531), section 2.1, for the limit.
    """
    check_choice("reduction", reduction)
    student, teacher = _logits("logit_matching", student_logits, teacher_logits)
    return reduced(0.5 * jnp.sum(jnp.square(student - teacher), axis=-1), reduction)


def label_smoothing(
    student_logits: jax.Array, teacher_logits: jax.Array, *, reduction: Reduction = "mean"
) -> jax.Array:
    r"""Label smoothing with a teacher: the cross-entropy with the teacher's probabilities.

    $$\Omega = -\frac{1}{n}\sum_{i=1}^{n}\sum_y \mathrm{softmax}(t_i)_y\,
    \log\mathrm{softmax}(s_i)_y$$

    Training on smoothed labels $(1-\varepsilon)\,e_y + \varepsilon\,\mathrm{softmax}(t)$ is
    training on $(1-\varepsilon)\,L + \varepsilon\,\Omega$. Teacher logits of zero give the uniform
    smoothing of Szegedy et al. $\Omega$ is [`distillation`][dtnh_jax.regularizers.distillation]
    with $T = 1$ plus the entropy of the teacher, so the gradients with respect to the student are
    equal, but its value is not zero where the two agree.

    Args:
        student_logits: $s$, shape `(..., classes)`, real floating-point.
        teacher_logits: $t$, with the same shape. Gradients flow through them.
        reduction: `"mean"` or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the widest dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, or `reduction` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> logits = jnp.zeros((1, 4))
        >>> print(f"{regularizers.label_smoothing(logits, logits):.4f}")  # log 4
        1.3863

    References:
        Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, CVPR 2016
        (arXiv:1512.00567), section 7; Yuan et al., *Revisiting Knowledge Distillation via Label
        Smoothing Regularization*, CVPR 2020 (arXiv:1909.11723).
    """
    check_choice("reduction", reduction)
    student, teacher = _logits("label_smoothing", student_logits, teacher_logits)
    return reduced(_cross_entropy(jax.nn.softmax(teacher), jax.nn.log_softmax(student)), reduction)


def co_tuning(
    source_head_logits: jax.Array,
    labels: jax.Array,
    relationship: jax.Array,
    *,
    reduction: Reduction = "mean",
) -> jax.Array:
    r"""Co-Tuning: trains the pre-trained head on the source classes related to the label.

    $$\Omega = -\frac{1}{n}\sum_{i=1}^{n}\sum_{y_s} p(y_s \mid y_t = y_i)\,
    \log\mathrm{softmax}(z_i)_{y_s}$$

    with the logits $z$ of the *source* head, computed from the fine-tuned features.

    Args:
        source_head_logits: $z$, shape `(..., source classes)`, real floating-point.
        labels: The target labels $y_t$, integers of shape `(...)`.
        relationship: $p(y_s \mid y_t)$, shape `(target classes, source classes)`, each row a
            distribution; [`co_tuning_relationship`][dtnh_jax.regularizers.co_tuning_relationship]
            estimates it.
        reduction: `"mean"`, as in the authors' code, or `"sum"` over the examples.

    Returns:
        A scalar, in float32 or the widest dtype of the logits and the relationship. Labels out of
        range make it NaN.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, or `reduction` is
            unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> relationship = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
        >>> logits, labels = jnp.zeros((2, 3)), jnp.array([0, 1])
        >>> print(f"{regularizers.co_tuning(logits, labels, relationship):.4f}")  # log 3
        1.0986

    References:
        You, Kou, Long, Wang, *Co-Tuning for Transfer Learning*, NeurIPS 2020.
    """
    check_choice("reduction", reduction)
    logits, rows, labels = (jnp.asarray(x) for x in (source_head_logits, relationship, labels))
    _check_labels("co_tuning", logits, labels)
    if rows.ndim != 2 or rows.shape[1] != logits.shape[-1]:
        raise ValueError(
            f"co_tuning expects a relationship of shape (target classes, {logits.shape[-1]}); got "
            f"{rows.shape}."
        )
    dtype = compute_dtype(logits.dtype, rows.dtype)
    targets = (
        rows.astype(dtype)
        # Out of range, since a negative index counts from the end.
        .at[jnp.where(labels < 0, len(rows), labels.astype(jnp.int32))]
        .get(mode="fill", fill_value=jnp.nan)
    )
    return reduced(_cross_entropy(targets, jax.nn.log_softmax(logits.astype(dtype))), reduction)


def co_tuning_relationship(
    source_logits: jax.Array, labels: jax.Array, n_classes: int
) -> jax.Array:
    r"""The relationship of Co-Tuning: the mean source prediction for each target class.

    $$p(y_s \mid y_t = c) = \frac{1}{n_c}\sum_{i:\,y_i = c} \mathrm{softmax}(z_i)$$

    with the logits $z$ of the pre-trained network on the training set of the target task. This is
    the paper's *direct* estimate. The *reverse* estimate, from a calibrated logistic regression
    and Bayes' rule, is not implemented. The authors' code first divides the logits by a
    temperature, calibrated on the source task.

    Args:
        source_logits: $z$, shape `(n, source classes)`, real floating-point.
        labels: The target labels, integers of shape `(n,)`. Labels out of range are ignored.
        n_classes: The number of target classes.

    Returns:
        An array of shape `(n_classes, source classes)` whose rows are distributions, in float32 or
        the dtype of the logits. A class without examples has a row of zeros, which disables
        the regularizer for it.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, or `n_classes` is less
            than one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> logits = jnp.array([[200.0, 0.0], [0.0, 200.0], [0.0, 200.0]])
        >>> print(regularizers.co_tuning_relationship(logits, jnp.array([0, 0, 1]), 2))
        [[0.5 0.5]
         [0.  1. ]]

    References:
        You, Kou, Long, Wang, *Co-Tuning for Transfer Learning*, NeurIPS 2020.
    """
    if isinstance(n_classes, bool) or n_classes < 1:
        raise ValueError(f"n_classes must be an integer >= 1; got {n_classes!r}.")
    logits, labels = jnp.asarray(source_logits), jnp.asarray(labels)
    _check_labels("co_tuning_relationship", logits, labels)
    if logits.ndim != 2:
        raise ValueError(
            "co_tuning_relationship expects logits of shape (n, source classes); got "
            f"{logits.shape}."
        )
    dtype = compute_dtype(logits.dtype)
    members = jax.nn.one_hot(labels, n_classes, dtype=dtype, axis=0)
    probabilities = jax.nn.softmax(logits.astype(dtype))
    total = jnp.matmul(members, probabilities, precision=jax.lax.Precision.HIGHEST)
    return ratio(total, jnp.sum(members, axis=1, keepdims=True))


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """``KL(p ‖ q)`` over the last axis, from log-probabilities."""
    p = jnp.exp(log_p)
    # A class with p = 0 contributes zero, even if its logarithm is -inf.
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0), axis=-1)


def _cross_entropy(p: jax.Array, log_q: jax.Array) -> jax.Array:
    return -jnp.sum(p * jnp.where(p != 0, log_q, 0), axis=-1)


def _logits(what: str, student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both logits, in the dtype of the computation."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if student.shape != teacher.shape or not student.ndim:
        raise ValueError(
            f"{what} expects logits of the same shape (..., classes) from student and "
            f"teacher; got {student.shape} and {teacher.shape}."
        )
    dtype = compute_dtype(student.dtype, teacher.dtype)
    return student.astype(dtype), teacher.astype(dtype)


def _check_labels(what: str, logits: jax.Array, labels: jax.Array) -> None:
    if not logits.ndim or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{what} expects logits of shape (..., classes) and labels of shape (...); got "
            f"{logits.shape} and {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{what} expects integer labels, not probabilities; got {labels.dtype}.")
