"""Regularized fine-tuning for JAX and Optax that compares the gradients of loss and regularizer."""

from importlib.metadata import version as _version

from dtnh_jax import equinox, nnx, regularizers, weightings
from dtnh_jax._accumulation import accumulate_pairs
from dtnh_jax._combine import combine_pair
from dtnh_jax._decoupled import add_l2_sp, decoupled
from dtnh_jax._gradients import value_and_gradient_pair
from dtnh_jax._optimizers import bounded_dtnh, dtnh_adamw, dtnh_sgd
from dtnh_jax._pair import GradientPair
from dtnh_jax._reference import HeldOutGrads, every_k_steps, held_out
from dtnh_jax._rivals import (
    agem,
    bloop,
    cagrad,
    config,
    dynamic_barrier,
    gradient_cosine,
    imtl_g,
    mgda,
    pcgrad,
    upgrad,
)
from dtnh_jax._rules import dtnh, weighted_sum
from dtnh_jax._stats import Conflict, ConflictStats, PairState, conflict_stats
from dtnh_jax._transform_pair import transform_pair

__version__ = _version("dtnh_jax")

__all__ = [
    "Conflict",
    "ConflictStats",
    "GradientPair",
    "HeldOutGrads",
    "PairState",
    "accumulate_pairs",
    "add_l2_sp",
    "agem",
    "bloop",
    "bounded_dtnh",
    "cagrad",
    "combine_pair",
    "config",
    "conflict_stats",
    "decoupled",
    "dtnh",
    "dtnh_adamw",
    "dtnh_sgd",
    "dynamic_barrier",
    "equinox",
    "every_k_steps",
    "gradient_cosine",
    "held_out",
    "imtl_g",
    "mgda",
    "nnx",
    "pcgrad",
    "regularizers",
    "transform_pair",
    "upgrad",
    "value_and_gradient_pair",
    "weighted_sum",
    "weightings",
]
