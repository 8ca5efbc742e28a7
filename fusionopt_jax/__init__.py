"""Composable Optax transformations for matrix-aware, schedule-free training."""

from fusionopt_jax.diagnostics import diagnostics
from fusionopt_jax.iterates import eval_params, fast_params
from fusionopt_jax.recipes import (
    accumulate,
    fusion_opt,
    fusion_opt_torch,
    kl_shampoo_torch,
    warm_start,
    warm_start_report,
)
from fusionopt_jax.routing import MatrixAxes, Routing, Rule, attention_rules
from fusionopt_jax.transforms.autoscale import autoscale
from fusionopt_jax.transforms.cautious import cautious
from fusionopt_jax.transforms.cautious_weight_decay import (
    add_cautious_decayed_weights,
)
from fusionopt_jax.transforms.gain import measure_gain
from fusionopt_jax.transforms.hyperball import hyperball
from fusionopt_jax.transforms.kl_shampoo import kl_shampoo
from fusionopt_jax.transforms.mona import mona
from fusionopt_jax.transforms.normuon import normuon
from fusionopt_jax.transforms.ns5 import ns5
from fusionopt_jax.transforms.polyak import polyak
from fusionopt_jax.transforms.quantize_state import quantize_state
from fusionopt_jax.transforms.schedule_free import schedule_free
from fusionopt_jax.transforms.shampoo import shampoo
from fusionopt_jax.transforms.snr_gate import snr_gate

__version__ = "0.3.0"

__all__ = [
    "MatrixAxes",
    "Routing",
    "Rule",
    "accumulate",
    "add_cautious_decayed_weights",
    "attention_rules",
    "autoscale",
    "cautious",
    "diagnostics",
    "eval_params",
    "fast_params",
    "fusion_opt",
    "fusion_opt_torch",
    "hyperball",
    "kl_shampoo",
    "kl_shampoo_torch",
    "measure_gain",
    "mona",
    "normuon",
    "ns5",
    "polyak",
    "quantize_state",
    "schedule_free",
    "shampoo",
    "snr_gate",
    "warm_start",
    "warm_start_report",
]
