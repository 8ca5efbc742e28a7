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

from fusionopt_jax.dit import latents
from fusionopt_jax.dit.cache.build import build_cache, strip_modulators
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.cache.own_model import ModulatorTable
from fusionopt_jax.dit.cache.registry import clear_cache_registry, get_or_build_cache
from fusionopt_jax.dit.cache.size import cache_bytes, modulator_bytes
from fusionopt_jax.dit.cache.table import StaleCacheError
from fusionopt_jax.dit.config import CONFIGS, DiTConfig
from fusionopt_jax.dit.export.sampler import (
    ExportedSampler,
    export_sampler,
    load_sampler,
)
from fusionopt_jax.dit.network.model import DiT, apply, init_params
from fusionopt_jax.dit.network.modulation import CachedModulation, take_rows
from fusionopt_jax.dit.objectives import diffusion_loss, rectified_flow_loss
from fusionopt_jax.dit.sampling.calibrate import calibrate
from fusionopt_jax.dit.sampling.guidance import apply_with_guidance
from fusionopt_jax.dit.sampling.loop import Samples, run_sampler
from fusionopt_jax.dit.sampling.remembering import Remembering
from fusionopt_jax.dit.sampling.sample import sample
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.step_cache import StepCache
from fusionopt_jax.dit.sharding import (
    RULES,
    batch_sharding,
    cache_shardings,
    joined_rules,
    shardings,
    state_shardings,
)
from fusionopt_jax.dit.weights.diffusers import from_diffusers, to_diffusers
from fusionopt_jax.dit.weights.pytorch import from_pytorch, to_pytorch

del _flax

__all__ = [
    "CONFIGS",
    "RULES",
    "CachedModulation",
    "DiT",
    "DiTConfig",
    "ExportedSampler",
    "ModulatorTable",
    "Remembering",
    "Sampler",
    "Samples",
    "StaleCacheError",
    "StepCache",
    "TimeConditioningCache",
    "apply",
    "apply_with_guidance",
    "batch_sharding",
    "build_cache",
    "cache_bytes",
    "cache_shardings",
    "calibrate",
    "clear_cache_registry",
    "diffusion_loss",
    "export_sampler",
    "from_diffusers",
    "from_pytorch",
    "get_or_build_cache",
    "init_params",
    "joined_rules",
    "latents",
    "load_sampler",
    "modulator_bytes",
    "rectified_flow_loss",
    "run_sampler",
    "sample",
    "shardings",
    "state_shardings",
    "strip_modulators",
    "take_rows",
    "to_diffusers",
    "to_pytorch",
]
