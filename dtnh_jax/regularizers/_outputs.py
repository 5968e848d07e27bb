"""Regularizers of outputs."""

from typing import Literal

import jax
import jax.numpy as jnp

from dtnh_jax._numerics import compute_dtype, ratio
from dtnh_jax.regularizers._batch import (
    WITH_NONE,
    ReductionOrNone,
    as_mask,
    check_choice,
    check_positive,
    only,
    reduced,
)


def distillation(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float = 1.0,
    *,
    t_squared: bool = True,
    where: jax.typing.ArrayLike | None = None,
    reduction: ReductionOrNone = "mean",
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
        where: Booleans that broadcast to the shape of the examples: which of them count, such as
            tokens that are no padding. The others may hold anything. The mean of none is 0.
        reduction: `"mean"` or `"sum"` over the examples, that is, over all axes but the last, or
            `"none"` for an array with the value of each.

    Returns:
        A scalar, or with `reduction="none"` an array of shape `(...)`, in float32 or the widest
        dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, $T \le 0$, `where` does not
            fit, or `reduction` is unknown.

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
    check_choice("reduction", reduction, WITH_NONE)
    student, teacher, kept = _logits("distillation", student_logits, teacher_logits, where)
    t = jnp.asarray(temperature, student.dtype)
    divergence = reduced(
        kl_divergence(jax.nn.log_softmax(teacher / t), jax.nn.log_softmax(student / t)),
        reduction,
        kept,
    )
    return divergence * t**2 if t_squared else divergence


def logit_matching(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    where: jax.typing.ArrayLike | None = None,
    reduction: ReductionOrNone = "mean",
) -> jax.Array:
    r"""Logit matching: keeps the logits close to those of the pre-trained network.

    $$\Omega = \frac{1}{n}\sum_{i=1}^{n} \tfrac{1}{2}\lVert s_i - t_i\rVert^2$$

    For logits with mean zero it is the limit of
    [`distillation`][dtnh_jax.regularizers.distillation] with $T^2$ for high temperatures, times
    the number of classes.

    Args:
        student_logits: $s$, shape `(..., classes)`, real floating-point.
        teacher_logits: $t$, with the same shape. Gradients flow through them.
        where: As in [`distillation`][dtnh_jax.regularizers.distillation].
        reduction: As in [`distillation`][dtnh_jax.regularizers.distillation]; `"mean"` as in the
            paper.

    Returns:
        A scalar, or an array of shape `(...)`, in float32 or the widest dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, `where` does not fit, or
            `reduction` is unknown.

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
    check_choice("reduction", reduction, WITH_NONE)
    student, teacher, kept = _logits("logit_matching", student_logits, teacher_logits, where)
    return reduced(0.5 * jnp.sum(jnp.square(student - teacher), axis=-1), reduction, kept)


def label_smoothing(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    where: jax.typing.ArrayLike | None = None,
    reduction: ReductionOrNone = "mean",
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
        where: As in [`distillation`][dtnh_jax.regularizers.distillation].
        reduction: As in [`distillation`][dtnh_jax.regularizers.distillation].

    Returns:
        A scalar, or an array of shape `(...)`, in float32 or the widest dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, `where` does not fit, or
            `reduction` is unknown.

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
    check_choice("reduction", reduction, WITH_NONE)
    student, teacher, kept = _logits("label_smoothing", student_logits, teacher_logits, where)
    values = _cross_entropy(jax.nn.softmax(teacher), jax.nn.log_softmax(student))
    return reduced(values, reduction, kept)


def kl_to_reference(
    logits: jax.Array,
    reference_logits: jax.Array,
    *,
    where: jax.typing.ArrayLike | None = None,
    reduction: ReductionOrNone = "mean",
) -> jax.Array:
    r"""The divergence of a model's predictions from those of a frozen reference, for each token.

    $$\Omega = \frac{1}{n}\sum_{i=1}^{n}
    \mathrm{KL}\bigl(\mathrm{softmax}(s_i)\,\Vert\,\mathrm{softmax}(r_i)\bigr)$$

    over the whole vocabulary. This is the divergence of reinforcement learning from human
    feedback. It is large where the model predicts what the reference rules out;
    [`distillation`][dtnh_jax.regularizers.distillation] is the divergence in the other direction,
    large where the model rules out what the reference predicts. Where only the sampled tokens'
    probabilities are at hand, see [`sampled_kl`][dtnh_jax.regularizers.sampled_kl].

    Args:
        logits: $s$, shape `(..., classes)`, real floating-point; of a language model
            `(batch, length, vocabulary)`.
        reference_logits: $r$, with the same shape. Gradients flow through them: compute them
            outside the objective, or wrap them in `jax.lax.stop_gradient`.
        where: As in [`distillation`][dtnh_jax.regularizers.distillation].
        reduction: As in [`distillation`][dtnh_jax.regularizers.distillation].

    Returns:
        A scalar, or an array of shape `(...)`, in float32 or the widest dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, `where` does not fit, or
            `reduction` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 0.0], [9.0, 9.0]]])  # the last is padding
        >>> is_token = jnp.array([[True, True, False]])
        >>> kl = regularizers.kl_to_reference(
        ...     logits, jnp.zeros((1, 3, 2)), where=is_token, reduction="none"
        ... )
        >>> print(kl.round(4))
        [[0.3278 0.     0.    ]]

    References:
        Ziegler et al., *Fine-Tuning Language Models from Human Preferences*, 2019
        (arXiv:1909.08593); Ouyang et al., NeurIPS 2022 (arXiv:2203.02155).
    """
    check_choice("reduction", reduction, WITH_NONE)
    own, reference, kept = _logits("kl_to_reference", logits, reference_logits, where)
    values = kl_divergence(jax.nn.log_softmax(own), jax.nn.log_softmax(reference))
    return reduced(values, reduction, kept)


def sampled_kl(
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k2",
    where: jax.typing.ArrayLike | None = None,
    reduction: ReductionOrNone = "mean",
) -> jax.Array:
    r"""Estimates the divergence from a frozen reference from the sampled tokens alone.

    With the log-probability $\log\pi$ of each token under the model that sampled it, and
    $\log\pi_0$ under the reference:

    $$k_1 = \log\pi - \log\pi_0, \qquad k_2 = \tfrac12\,(\log\pi - \log\pi_0)^2, \qquad
    k_3 = \frac{\pi_0}{\pi} - 1 - \log\frac{\pi_0}{\pi}$$

    As *values*, $k_1$ and $k_3$ are unbiased estimates of
    $\mathrm{KL}(\pi\,\Vert\,\pi_0)$, $k_3$ with less variance and never negative; $k_2$ is biased
    and close where the two are. A rule uses the *gradient*, which is another matter, since the
    tokens were sampled and the gradient does not flow through that. In expectation over tokens
    sampled from $\pi$:

    - that of $k_2$ is the gradient of $\mathrm{KL}(\pi\,\Vert\,\pi_0)$, the divergence of
      [`kl_to_reference`][dtnh_jax.regularizers.kl_to_reference];
    - that of $k_3$ is the gradient of $\mathrm{KL}(\pi_0\,\Vert\,\pi)$;
    - that of $k_1$ is zero: use it to report, not to train.

    Args:
        log_probs: $\log\pi$ of each sampled token, of any shape, real floating-point; such as
            `-optax.softmax_cross_entropy_with_integer_labels(logits, tokens)`.
        reference_log_probs: $\log\pi_0$, with the same shape. Gradients flow through them.
        estimator: Which of the three.
        where: As in [`distillation`][dtnh_jax.regularizers.distillation].
        reduction: As in [`distillation`][dtnh_jax.regularizers.distillation].

    Returns:
        A scalar, or an array of the shape of the log-probabilities, in float32 or their widest
        dtype.

    Raises:
        ValueError: If the shapes differ, `where` does not fit, or `estimator` or `reduction` is
            unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dtnh_jax import regularizers
        >>> log_probs, reference = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.25, 0.25]))
        >>> for estimator in ("k1", "k2", "k3"):
        ...     kl = regularizers.sampled_kl(log_probs, reference, estimator=estimator)
        ...     print(estimator, f"{kl:.4f}")
        k1 0.3466
        k2 0.1201
        k3 0.0966

    References:
        Schulman, *Approximating KL Divergence*, 2020, for the three values; Shao et al.,
        *DeepSeekMath*, 2024 (arXiv:2402.03300), which trains with $k_3$; Tang, Munos, *On a few
        pitfalls in KL divergence gradient estimation for RL*, 2025 (arXiv:2506.09477), for the
        gradients.
    """
    check_choice("estimator", estimator, ("k1", "k2", "k3"))
    check_choice("reduction", reduction, WITH_NONE)
    own, reference = jnp.asarray(log_probs), jnp.asarray(reference_log_probs)
    if own.shape != reference.shape:
        raise ValueError(
            "sampled_kl expects log-probabilities of the same shape from the model and the "
            f"reference; got {own.shape} and {reference.shape}."
        )
    kept = as_mask("sampled_kl", where, own.shape)
    dtype = compute_dtype(own.dtype, reference.dtype)
    log_ratio = only(kept, own.astype(dtype)) - only(kept, reference.astype(dtype))
    if estimator == "k1":
        values = log_ratio
    elif estimator == "k2":
        values = 0.5 * jnp.square(log_ratio)
    else:
        values = jnp.expm1(-log_ratio) + log_ratio
    return reduced(values, reduction, kept)


def co_tuning(
    source_head_logits: jax.Array,
    labels: jax.Array,
    relationship: jax.Array,
    *,
    where: jax.typing.ArrayLike | None = None,
    reduction: ReductionOrNone = "mean",
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
        where: As in [`distillation`][dtnh_jax.regularizers.distillation].
        reduction: As in [`distillation`][dtnh_jax.regularizers.distillation]; `"mean"` as in the
            authors' code.

    Returns:
        A scalar, or an array of shape `(...)`, in float32 or the widest dtype of the logits and the
        relationship. Labels out of range make it NaN.

    Raises:
        ValueError: If the shapes do not match, the labels are not integers, `where` does not fit,
            or `reduction` is unknown.

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
    check_choice("reduction", reduction, WITH_NONE)
    logits, rows, labels = (jnp.asarray(x) for x in (source_head_logits, relationship, labels))
    _check_labels("co_tuning", logits, labels)
    kept = as_mask("co_tuning", where, labels.shape)
    logits, labels = only(kept, logits), only(kept, labels)
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
    values = _cross_entropy(targets, jax.nn.log_softmax(logits.astype(dtype)))
    return reduced(values, reduction, kept)


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


def _logits(
    what: str, student: jax.Array, teacher: jax.Array, where: jax.typing.ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Both logits, in the dtype of the computation, and which of the examples count."""
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    if student.shape != teacher.shape or not student.ndim:
        raise ValueError(
            f"{what} expects logits of the same shape (..., classes) from student and "
            f"teacher; got {student.shape} and {teacher.shape}."
        )
    dtype = compute_dtype(student.dtype, teacher.dtype)
    kept = as_mask(what, where, student.shape[:-1])
    return only(kept, student.astype(dtype)), only(kept, teacher.astype(dtype)), kept


def _check_labels(what: str, logits: jax.Array, labels: jax.Array) -> None:
    if not logits.ndim or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{what} expects logits of shape (..., classes) and labels of shape (...); got "
            f"{logits.shape} and {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{what} expects integer labels, not probabilities; got {labels.dtype}.")
