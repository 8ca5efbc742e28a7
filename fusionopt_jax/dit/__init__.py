"""A diffusion transformer in Flax whose modulators are computed once per schedule.

Needs the extra `dit`: ``pip install "fusionopt-jax[dit]"``.
"""

try:
    import flax as _flax
except ImportError as error:
    # The name tells `python -m fusionopt_jax.dit` that its own package is what can't be
    # imported: it then prints the message in one line, without a traceback.
    raise ImportError(
        "fusionopt_jax.dit needs Flax, which is not installed; install the extra "
        '`dit`: pip install "fusionopt-jax[dit]".',
        name=__name__,
    ) from error

from fusionopt_jax.dit.cache.dit import (
    StaleCacheError,
    TimeConditioningCache,
    build_cache,
    distinct_labels,
    strip_modulators,
)
from fusionopt_jax.dit.cache.size import cache_bytes, modulator_bytes
from fusionopt_jax.dit.cache.store import (
    CacheCounts,
    cache_counts,
    clear_cache_registry,
    get_or_build_cache,
    load_cache,
    save_cache,
)
from fusionopt_jax.dit.cache.use import cache_rows, check_cache, step_modulation
from fusionopt_jax.dit.config import CONFIGS, DiTConfig
from fusionopt_jax.dit.export.sampler import (
    ExportedSampler,
    export_sampler,
    load_sampler,
)
from fusionopt_jax.dit.network.model import DiT, apply, init_params
from fusionopt_jax.dit.network.modulation import CachedModulation, Modulation
from fusionopt_jax.dit.objectives import diffusion_loss, rectified_flow_loss
from fusionopt_jax.dit.sampling.guidance import apply_with_guidance
from fusionopt_jax.dit.sampling.loop import Samples, run_sampler
from fusionopt_jax.dit.sampling.sample import sample
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.weights.pytorch import from_pytorch, to_pytorch

del _flax

__all__ = [
    "CONFIGS",
    "CacheCounts",
    "CachedModulation",
    "DiT",
    "DiTConfig",
    "ExportedSampler",
    "Modulation",
    "Sampler",
    "Samples",
    "StaleCacheError",
    "TimeConditioningCache",
    "apply",
    "apply_with_guidance",
    "build_cache",
    "cache_bytes",
    "cache_counts",
    "cache_rows",
    "check_cache",
    "clear_cache_registry",
    "diffusion_loss",
    "distinct_labels",
    "export_sampler",
    "from_pytorch",
    "get_or_build_cache",
    "init_params",
    "load_cache",
    "load_sampler",
    "modulator_bytes",
    "rectified_flow_loss",
    "run_sampler",
    "sample",
    "save_cache",
    "step_modulation",
    "strip_modulators",
    "to_pytorch",
]
