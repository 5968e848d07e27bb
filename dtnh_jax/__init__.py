"""Fine-tuning from pre-trained weights that cannot hurt, for JAX and Optax."""

from importlib.metadata import version as _version

from dtnh_jax import regularizers as regularizers
from dtnh_jax._gradients import GradientPair as GradientPair
from dtnh_jax._gradients import value_and_gradient_pair as value_and_gradient_pair
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
    "conflict_stats",
    "dtnh",
    "regularizers",
    "value_and_gradient_pair",
    "weighted_sum",
]
