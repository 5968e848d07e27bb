"""Regularizers of the outputs."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dtnh_jax._numerics import compute_dtype


def distillation(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float = 1.0,
    *,
    t_squared: bool = True,
) -> jax.Array:
    r"""Knowledge distillation: keeps the outputs near the pre-trained network's.

    $$\Omega = T^2\,\frac{1}{n}\sum_{i=1}^{n}
    \mathrm{KL}\bigl(\mathrm{softmax}(t_i/T)\,\Vert\,\mathrm{softmax}(s_i/T)\bigr)$$

    with student logits $s$, teacher logits $t$ and temperature $T$: the sum over classes, the
    mean over everything else. The factor $T^2$ keeps the size of the gradient when $T$ grows,
    as Hinton et al. advise; `t_squared=False` leaves it out, as some published transfer code
    does, and is weaker by $T^2$.

    Args:
        student_logits: $s$, shape `(..., classes)`, real floating-point.
        teacher_logits: $t$, likewise. No gradient is stopped: compute them outside the
            objective, or wrap them in `jax.lax.stop_gradient`.
        temperature: $T > 0$, in the units of the logits.
        t_squared: Whether to multiply by $T^2$.

    Returns:
        A scalar, in float32 or the widest dtype of the logits.

    Raises:
        ValueError: If the shapes differ or have no class axis, or $T \le 0$.

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
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature!r}.")
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    if student.shape != teacher.shape or not student.ndim:
        raise ValueError(
            "distillation wants logits of the same shape (..., classes) from student and "
            f"teacher; got {student.shape} and {teacher.shape}."
        )
    dtype = compute_dtype(student.dtype, teacher.dtype)
    t = jnp.asarray(temperature, dtype)
    student_log = jax.nn.log_softmax(student.astype(dtype) / t)
    teacher_log = jax.nn.log_softmax(teacher.astype(dtype) / t)
    probability = jnp.exp(teacher_log)
    # A class that the teacher rules out adds nothing, even where its log-probability is -inf.
    difference = jnp.where(probability > 0, teacher_log - student_log, 0)
    divergence = jnp.mean(jnp.sum(probability * difference, axis=-1))
    return divergence * t**2 if t_squared else divergence
