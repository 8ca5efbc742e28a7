"""A diffusion transformer in Flax whose modulators are computed once per schedule.

Needs the extra `dit`: ``pip install "fusionopt-jax[dit]"``.
"""

try:
    import flax as _flax
except ImportError as error:
    raise ImportError(
        "fusionopt_jax.dit needs Flax, which is not installed; install the extra "
        '`dit`: pip install "fusionopt-jax[dit]".'
    ) from error

from fusionopt_jax.dit.cache import (
    StaleCacheError,
    TimeConditioningCache,
    build_cache,
    cache_bytes,
    distinct_labels,
    modulator_bytes,
    strip_modulators,
)
from fusionopt_jax.dit.cache_use import cache_rows, check_cache, step_modulation
from fusionopt_jax.dit.config import CONFIGS, DiTConfig
from fusionopt_jax.dit.model import DiT, apply, init_params
from fusionopt_jax.dit.modulation import CachedModulation, Modulation
from fusionopt_jax.dit.objectives import rectified_flow_loss
from fusionopt_jax.dit.samplers import Sampler, Samples
from fusionopt_jax.dit.sampling import sample

del _flax

__all__ = [
    "CONFIGS",
    "CachedModulation",
    "DiT",
    "DiTConfig",
    "Modulation",
    "Sampler",
    "Samples",
    "StaleCacheError",
    "TimeConditioningCache",
    "apply",
    "build_cache",
    "cache_bytes",
    "cache_rows",
    "check_cache",
    "distinct_labels",
    "init_params",
    "modulator_bytes",
    "rectified_flow_loss",
    "sample",
    "step_modulation",
    "strip_modulators",
]
