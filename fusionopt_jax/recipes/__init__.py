"""Complete optimisers, built from the components, and what belongs around them."""

from fusionopt_jax.recipes.accumulate import AccumulateState, accumulate
from fusionopt_jax.recipes.fusion import COMPONENTS, fusion_opt
from fusionopt_jax.recipes.torch_release import RowScaleState, fusion_opt_torch
from fusionopt_jax.recipes.warm_start import (
    WarmStartReport,
    warm_start,
    warm_start_report,
)

__all__ = [
    "COMPONENTS",
    "AccumulateState",
    "RowScaleState",
    "WarmStartReport",
    "accumulate",
    "fusion_opt",
    "fusion_opt_torch",
    "warm_start",
    "warm_start_report",
]
