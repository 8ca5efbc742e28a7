"""Composable Optax transformations for matrix-aware, schedule-free training."""

from fusionopt_jax.iterates import ScheduleFreeState, eval_params, fast_params
from fusionopt_jax.recipes import fusion_opt
from fusionopt_jax.routing import MatrixAxes, Route, Routing, Rule
from fusionopt_jax.transforms.mona import MONAState, mona
from fusionopt_jax.transforms.normuon import NorMuonState, normuon
from fusionopt_jax.transforms.ns5 import NS5State, ns5
from fusionopt_jax.transforms.polyak import PolyakState, polyak
from fusionopt_jax.transforms.schedule_free import schedule_free

__version__ = "0.1.0"

__all__ = [
    "MONAState",
    "MatrixAxes",
    "NS5State",
    "NorMuonState",
    "PolyakState",
    "Route",
    "Routing",
    "Rule",
    "ScheduleFreeState",
    "eval_params",
    "fast_params",
    "fusion_opt",
    "mona",
    "normuon",
    "ns5",
    "polyak",
    "schedule_free",
]
