"""Regularizers for transfer learning: functions of parameters or outputs that return a scalar."""

from dtnh_jax.regularizers._features import attention_transfer as attention_transfer
from dtnh_jax.regularizers._features import batch_spectral_shrinkage as batch_spectral_shrinkage
from dtnh_jax.regularizers._features import delta as delta
from dtnh_jax.regularizers._features import delta_channel_weights as delta_channel_weights
from dtnh_jax.regularizers._features import feature_distillation as feature_distillation
from dtnh_jax.regularizers._fisher import fisher_diagonal as fisher_diagonal
from dtnh_jax.regularizers._inputs import adversarial as adversarial
from dtnh_jax.regularizers._inputs import virtual_adversarial as virtual_adversarial
from dtnh_jax.regularizers._matching import Match as Match
from dtnh_jax.regularizers._matching import MatchReport as MatchReport
from dtnh_jax.regularizers._matching import match_pretrained as match_pretrained
from dtnh_jax.regularizers._outputs import co_tuning as co_tuning
from dtnh_jax.regularizers._outputs import co_tuning_relationship as co_tuning_relationship
from dtnh_jax.regularizers._outputs import distillation as distillation
from dtnh_jax.regularizers._outputs import kl_to_reference as kl_to_reference
from dtnh_jax.regularizers._outputs import label_smoothing as label_smoothing
from dtnh_jax.regularizers._outputs import logit_matching as logit_matching
from dtnh_jax.regularizers._outputs import sampled_kl as sampled_kl
from dtnh_jax.regularizers._weights import l2 as l2
from dtnh_jax.regularizers._weights import l2_gradient as l2_gradient
from dtnh_jax.regularizers._weights import l2_sp as l2_sp
from dtnh_jax.regularizers._weights import l2_sp_fisher as l2_sp_fisher
from dtnh_jax.regularizers._weights import l2_sp_fisher_gradient as l2_sp_fisher_gradient
from dtnh_jax.regularizers._weights import l2_sp_gradient as l2_sp_gradient
from dtnh_jax.regularizers._weights import l2_sp_lora as l2_sp_lora

__all__ = [
    "Match",
    "MatchReport",
    "adversarial",
    "attention_transfer",
    "batch_spectral_shrinkage",
    "co_tuning",
    "co_tuning_relationship",
    "delta",
    "delta_channel_weights",
    "distillation",
    "feature_distillation",
    "fisher_diagonal",
    "kl_to_reference",
    "l2",
    "l2_gradient",
    "l2_sp",
    "l2_sp_fisher",
    "l2_sp_fisher_gradient",
    "l2_sp_gradient",
    "l2_sp_lora",
    "label_smoothing",
    "logit_matching",
    "match_pretrained",
    "sampled_kl",
    "virtual_adversarial",
]
