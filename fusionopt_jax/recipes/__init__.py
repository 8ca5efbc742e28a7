"""Complete optimisers, built from the components, and what belongs around them."""

from fusionopt_jax.recipes.accumulate import accumulate
from fusionopt_jax.recipes.fusion import fusion_opt
from fusionopt_jax.recipes.kl_shampoo_release import kl_shampoo_torch
from fusionopt_jax.recipes.torch_release import fusion_opt_torch
from fusionopt_jax.recipes.warm_start import (
    warm_start,
    warm_start_report,
)

__all__ = [
    "accumulate",
    "fusion_opt",
    "fusion_opt_torch",
    "kl_shampoo_torch",
    "warm_start",
    "warm_start_report",
]
