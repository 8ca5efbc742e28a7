"""Composable Optax transformations for matrix-aware, schedule-free training."""

from fusionopt_jax.diagnostics import diagnostics
from fusionopt_jax.iterates import ScheduleFreeState, eval_params, fast_params
from fusionopt_jax.recipes import (
    AccumulateState,
    RowScaleState,
    WarmStartReport,
    accumulate,
    fusion_opt,
    fusion_opt_torch,
    warm_start,
    warm_start_report,
)
from fusionopt_jax.routing import MatrixAxes, Route, Routing, Rule
from fusionopt_jax.transforms.cautious import CautiousState, cautious
from fusionopt_jax.transforms.cautious_weight_decay import (
    CautiousDecayState,
    add_cautious_decayed_weights,
)
from fusionopt_jax.transforms.gain import GainState, measure_gain
from fusionopt_jax.transforms.hyperball import HyperballState, hyperball
from fusionopt_jax.transforms.kl_shampoo import KLShampooState, kl_shampoo
from fusionopt_jax.transforms.mona import MONAState, mona
from fusionopt_jax.transforms.normuon import NorMuonState, normuon
from fusionopt_jax.transforms.ns5 import NS5State, ns5
from fusionopt_jax.transforms.polyak import PolyakState, polyak
from fusionopt_jax.transforms.schedule_free import schedule_free
from fusionopt_jax.transforms.snr_gate import SNRGateState, snr_gate

__version__ = "0.2.0"

__all__ = [
    "AccumulateState",
    "CautiousDecayState",
    "CautiousState",
    "GainState",
    "HyperballState",
    "KLShampooState",
    "MONAState",
    "MatrixAxes",
    "NS5State",
    "NorMuonState",
    "PolyakState",
    "Route",
    "Routing",
    "RowScaleState",
    "Rule",
    "SNRGateState",
    "ScheduleFreeState",
    "WarmStartReport",
    "accumulate",
    "add_cautious_decayed_weights",
    "cautious",
    "diagnostics",
    "eval_params",
    "fast_params",
    "fusion_opt",
    "fusion_opt_torch",
    "hyperball",
    "kl_shampoo",
    "measure_gain",
    "mona",
    "normuon",
    "ns5",
    "polyak",
    "schedule_free",
    "snr_gate",
    "warm_start",
    "warm_start_report",
]
