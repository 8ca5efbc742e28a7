"""Complete optimisers, built from the components, and what belongs around them."""

from fusionopt_jax.recipes.accumulate import AccumulateState, accumulate
from fusionopt_jax.recipes.fusion import COMPONENTS, fusion_opt
from fusionopt_jax.recipes.warm_start import (
    WarmStartReport,
    warm_start,
    warm_start_report,
)

__all__ = [
    "COMPONENTS",
    "AccumulateState",
    "WarmStartReport",
    "accumulate",
    "fusion_opt",
    "warm_start",
    "warm_start_report",
]
