"""Regularizers of transfer, as plain functions from parameters or outputs to a scalar."""

from dtnh_jax.regularizers._outputs import distillation as distillation
from dtnh_jax.regularizers._weights import l2_sp as l2_sp

__all__ = ["distillation", "l2_sp"]
