"""The four optimizers to compare, on one split of a DiT's weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo
from fusionopt_jax.dit.routing import ROUTING

NAMES = ("fusion", "adamw", "muon", "sf-adamw")

LEARNING_RATES = {"fusion": 8e-3, "adamw": 5e-3, "muon": 8e-3, "sf-adamw": 5e-3}
"""Peak learning rates; for fusion and muon, that of the matrices."""

SCALAR_RATIO = 0.625
"""Learning rate of biases and embeddings over that of the matrices (fusion, muon)."""

WEIGHT_DECAY = 0.05
WARMUP_STEPS = 100

NEEDS_HORIZON = ("adamw", "muon")
"""Optimizers whose schedule depends on the total number of steps."""


def build(
    name: str, learning_rate: float | jax.Array, steps: int, params: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of that name for a model's `params`, or their shapes.

    Only `adamw` and `muon` look at `steps`.
    """
    factor = schedule(name, steps)

    def scheduled(scale: float) -> Callable[[Any], Any]:
        return lambda count: scale * learning_rate * factor(count)

    if name == "fusion":
        return fo.fusion_opt(
            learning_rate,
            components={"ns5", "normuon", "sf"},
            routing=ROUTING,
            scalar_learning_rate=SCALAR_RATIO * learning_rate,
            weight_decay=WEIGHT_DECAY,
        )
    if name == "adamw":
        tx = optax.adamw(scheduled(1.0), b2=0.99, weight_decay=WEIGHT_DECAY)
    elif name == "muon":
        tx = optax.contrib.muon(
            scheduled(1.0),
            beta=0.9,
            weight_decay=WEIGHT_DECAY,
            adam_b2=0.99,
            adam_learning_rate=scheduled(SCALAR_RATIO),
            muon_weight_dimension_numbers=muon_dimensions(params),
            consistent_rms=0.2,
        )
    elif name == "sf-adamw":
        tx = fo.schedule_free(
            optax.chain(
                optax.scale_by_adam(b1=0.0, b2=0.99),
                optax.add_decayed_weights(WEIGHT_DECAY),
            ),
            scheduled(1.0),
        )
    else:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}; got {name!r}.")
    return optax.with_extra_args_support(tx)


def horizon(name: str, steps: int) -> int:
    """The number of steps that the optimizer has to know in advance, or 0."""
    return steps if name in NEEDS_HORIZON else 0


def schedule(name: str, steps: int) -> Callable[[Any], Any]:
    """The factor on the learning rate at each step: warm-up, then cosine to zero."""
    warmup = min(WARMUP_STEPS, max(steps // 10, 1))
    if name == "fusion":
        return optax.constant_schedule(1.0)
    if name == "sf-adamw":
        return optax.warmup_constant_schedule(0.0, 1.0, WARMUP_STEPS)
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(steps, warmup + 1))


def step_size(name: str, steps: int, opt_state: Any, step: jax.Array) -> jax.Array:
    """The factor that this step put on the learning rate."""
    return jnp.asarray(
        optax.tree.get(opt_state, "step_size", schedule(name, steps)(step)), jnp.float32
    )


@partial(jax.jit, static_argnums=0)
def deployed(name: str, opt_state: Any, params: Any) -> Any:
    """The weights to evaluate and to keep: for the schedule-free ones, the average."""
    return params if name in NEEDS_HORIZON else fo.eval_params(opt_state, params)


def muon_dimensions(params: Any) -> Any:
    """The same split in Optax's words, which know stacks but no chunks.

    A tree for the whole model: Optax would call a function again with what is left of
    the tree without the scalar leaves, where some rules of the routing match nothing.
    """
    matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(
        lambda label: matrix if label == "spectral" else None, ROUTING.labels(params)
    )
