"""Fine-tuning from pre-trained weights that cannot hurt, for JAX and Optax."""

from importlib.metadata import version as _version

from dtnh_jax import regularizers as regularizers
from dtnh_jax._accumulation import accumulate_pairs as accumulate_pairs
from dtnh_jax._bounded import bounded_dtnh as bounded_dtnh
from dtnh_jax._decoupled import add_l2_sp as add_l2_sp
from dtnh_jax._decoupled import decoupled as decoupled
from dtnh_jax._gradients import GradientPair as GradientPair
from dtnh_jax._gradients import value_and_gradient_pair as value_and_gradient_pair
from dtnh_jax._rivals import agem as agem
from dtnh_jax._rivals import bloop as bloop
from dtnh_jax._rivals import cagrad as cagrad
from dtnh_jax._rivals import config as config
from dtnh_jax._rivals import dynamic_barrier as dynamic_barrier
from dtnh_jax._rivals import gradient_cosine as gradient_cosine
from dtnh_jax._rivals import imtl_g as imtl_g
from dtnh_jax._rivals import mgda as mgda
from dtnh_jax._rivals import pcgrad as pcgrad
from dtnh_jax._rivals import upgrad as upgrad
from dtnh_jax._rules import dtnh as dtnh
from dtnh_jax._rules import weighted_sum as weighted_sum
from dtnh_jax._stats import Conflict as Conflict
from dtnh_jax._stats import ConflictStats as ConflictStats
from dtnh_jax._stats import PairState as PairState
from dtnh_jax._stats import conflict_stats as conflict_stats

__version__ = _version("dtnh_jax")

__all__ = [
    "Conflict",
    "ConflictStats",
    "GradientPair",
    "PairState",
    "accumulate_pairs",
    "add_l2_sp",
    "agem",
    "bloop",
    "bounded_dtnh",
    "cagrad",
    "config",
    "conflict_stats",
    "decoupled",
    "dtnh",
    "dynamic_barrier",
    "gradient_cosine",
    "imtl_g",
    "mgda",
    "pcgrad",
    "regularizers",
    "upgrad",
    "value_and_gradient_pair",
    "weighted_sum",
]
