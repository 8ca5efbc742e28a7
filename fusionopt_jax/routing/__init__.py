"""Which leaves of a tree are matrices, along which axes, and which group gets them."""

from fusionopt_jax.routing.routes import Route
from fusionopt_jax.routing.routing import Routing, matrix_views
from fusionopt_jax.routing.rules import (
    SCALAR,
    SPECTRAL,
    MatrixAxes,
    Rule,
    attention_rules,
)

__all__ = [
    "SCALAR",
    "SPECTRAL",
    "MatrixAxes",
    "Route",
    "Routing",
    "Rule",
    "attention_rules",
    "matrix_views",
]
