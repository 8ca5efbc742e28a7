"""What the optimisers of the study are built from.

All decay the same leaves, the matrices, and have one learning rate for matrices and for
the rest. A matrix's update has a root mean square of 0.2 times the rate wherever it is
orthogonalised, so that the rates of different rows can be compared.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

import fusionopt_jax as fo

SF_NORMUON = ("ns5", "normuon", "sf")
"""The components of the recipe."""

Build: TypeAlias = Callable[["Setting"], optax.GradientTransformationExtraArgs]


class Setting(NamedTuple):
    """What an optimiser is built from; rate and decay may be traced.

    Attributes:
        rate: peak learning rate.
        decay: decoupled weight decay of the matrices.
        steps: length of the run, which only schedules with a horizon look at.
        params: the weights, or their shapes.
        routing: which leaves are matrices, fused ones in chunks.
        unchunked: the same without chunks.
    """

    rate: float | jax.Array
    decay: float | jax.Array
    steps: int
    params: Any
    routing: fo.Routing
    unchunked: fo.Routing


def warmup_cosine(setting: Setting) -> Callable[[Any], Any]:
    """The learning rate at a step: 7.5 % of warm-up, then a cosine to zero."""
    warmup = max(round(0.075 * setting.steps), 1)
    factor = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup, max(setting.steps, warmup + 1)
    )
    return lambda count: setting.rate * factor(count)


def adamw(rest: float = 1.0) -> Build:
    """AdamW with warm-up and cosine; leaves that are no matrices at `rest` the rate."""

    def build(setting: Setting) -> optax.GradientTransformationExtraArgs:
        labels = setting.routing.labels(setting.params)
        tx = optax.adamw(
            warmup_cosine(setting),
            b2=0.99,
            weight_decay=setting.decay,
            mask=jax.tree.map(lambda label: label == "spectral", labels),
        )
        scaled = optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda u, label: u if label == "spectral" else rest * u, updates, labels
            )
        )
        return optax.with_extra_args_support(optax.chain(tx, scaled))

    return build


def muon(beta: float) -> Build:
    """Optax's own Muon with warm-up and cosine; it knows stacks but no chunks."""

    def build(setting: Setting) -> optax.GradientTransformationExtraArgs:
        matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
        tx = optax.contrib.muon(
            warmup_cosine(setting),
            beta=beta,
            weight_decay=setting.decay,
            adam_b2=0.99,
            muon_weight_dimension_numbers=jax.tree.map(
                lambda label: matrix if label == "spectral" else None,
                setting.routing.labels(setting.params),
            ),
            consistent_rms=0.2,
        )
        return optax.with_extra_args_support(tx)

    return build


def constant_adamw(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """AdamW at a constant rate."""
    labels = setting.routing.labels(setting.params)
    return optax.with_extra_args_support(
        optax.adamw(
            setting.rate,
            b2=0.99,
            weight_decay=setting.decay,
            mask=jax.tree.map(lambda label: label == "spectral", labels),
        )
    )


def accumulated(build: Build, every: int) -> Build:
    """The same, run once for so many gradients; a run has as many fewer updates."""

    def used(setting: Setting) -> optax.GradientTransformationExtraArgs:
        setting = setting._replace(steps=setting.steps // every)
        return fo.accumulate(build(setting), every)

    return used


def sf_adamw(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """Schedule-Free AdamW with 7.5 % of warm-up, decay on the fast iterate."""
    labels = setting.routing.labels(setting.params)
    mask = jax.tree.map(lambda label: label == "spectral", labels)
    warmup = max(round(0.075 * setting.steps), 1)
    ramp = optax.warmup_constant_schedule(0.0, 1.0, warmup)
    return fo.schedule_free(
        optax.chain(
            optax.scale_by_adam(b1=0.0, b2=0.99),
            optax.add_decayed_weights(setting.decay, mask),
        ),
        lambda count: setting.rate * ramp(count),
    )


def fusion(
    *components: str,
    cosine: bool = False,
    chunks: bool = True,
    decays: bool = True,
    **keywords: Any,
) -> Build:
    """`fusion_opt` with these components; no rule and no look-ahead unless asked."""

    def build(setting: Setting) -> optax.GradientTransformationExtraArgs:
        return fo.fusion_opt(
            warmup_cosine(setting) if cosine else setting.rate,
            components=components,
            routing=setting.routing if chunks else setting.unchunked,
            weight_decay=setting.decay if decays else 0.0,
            **{"polyak_rule": None, "nesterov": False, **keywords},
        )

    return build


def referred(use: Callable[..., Any], rule: str) -> Build:
    """SF-NorMuon under a rule whose factor is used as `use` of `rules` says.

    What it refers to is taken from the first tenth of the run.
    """
    base = fusion(*SF_NORMUON)

    def build(setting: Setting) -> optax.GradientTransformationExtraArgs:
        used = use(base(setting), steps=max(setting.steps // 10, 2))
        return fo.polyak(used, rule=rule)

    return build
