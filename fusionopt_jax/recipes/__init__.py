"""Complete optimisers, built from the components, and what belongs around them."""

from fusionopt_jax.recipes.fusion import COMPONENTS, fusion_opt

__all__ = ["COMPONENTS", "fusion_opt"]
