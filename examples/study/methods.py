"""Every optimiser of the study: one row each, in the order in which they are run.

All decay the same leaves, the matrices, and have one learning rate for matrices and for
the rest. A matrix's update has a root mean square of 0.2 times the rate wherever it is
orthogonalised, so that the rates of different rows can be compared.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import fusionopt_jax as fo
from study import rules

TUNED_DECAY = 0.05
"""The decay under which the rates are tried."""

DECAYS = (TUNED_DECAY, 0.0, 0.2)


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


class Method(NamedTuple):
    """One row of the study.

    Attributes:
        name: how files and the command line call it.
        title: how tables call it.
        part: which question it belongs to.
        build: the optimiser.
        centre: middle of the five rates that are tried; each is twice the one before.
        decays: what is tried at the best of them; the rates were tried with the first.
        seeds: how many seeds beside the one that is tuned on.
        averaged: whether the average is deployed and not the parameters.
        rate_of: the method whose best rate is taken, where none is tried.
        stretch: how many times longer than the workload's the runs are.
    """

    name: str
    title: str
    part: str
    build: Callable[[Setting], optax.GradientTransformationExtraArgs]
    centre: float
    decays: tuple[float, ...] = DECAYS
    seeds: int = 3
    averaged: bool = False
    rate_of: str | None = None
    stretch: float = 1


PARTS = {
    "baselines": "baselines, the recipe, and the rules of a shared step size",
    "rules": "other forms of the shared step size",
    "components": "what each component adds",
    "decay": "which iterate is decayed",
    "settings": "settings of the recipe",
    "length": "longer and shorter runs",
}


def warmup_cosine(setting: Setting) -> Callable[[Any], Any]:
    """The learning rate at a step: 7.5 % of warm-up, then a cosine to zero."""
    warmup = max(round(0.075 * setting.steps), 1)
    factor = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup, max(setting.steps, warmup + 1)
    )
    return lambda count: setting.rate * factor(count)


def adamw(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """AdamW with warm-up and cosine."""
    labels = setting.routing.labels(setting.params)
    tx = optax.adamw(
        warmup_cosine(setting),
        b2=0.99,
        weight_decay=setting.decay,
        mask=jax.tree.map(lambda label: label == "spectral", labels),
    )
    return optax.with_extra_args_support(tx)


def muon(beta: float) -> Callable[[Setting], optax.GradientTransformationExtraArgs]:
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
) -> Callable[[Setting], optax.GradientTransformationExtraArgs]:
    """`fusion_opt` with these components; no Polyak rule unless one is named."""

    def build(setting: Setting) -> optax.GradientTransformationExtraArgs:
        return fo.fusion_opt(
            warmup_cosine(setting) if cosine else setting.rate,
            components=components,
            routing=setting.routing if chunks else setting.unchunked,
            weight_decay=setting.decay if decays else 0.0,
            **{"polyak_rule": None, **keywords},
        )

    return build


def referred(
    use: Callable[..., Any], rule: str
) -> Callable[[Setting], optax.GradientTransformationExtraArgs]:
    """SF-NorMuon under a rule whose factor is used as `use` of `rules` says.

    What it refers to is taken from the first tenth of the run.
    """
    recipe = fusion(*_SF)

    def build(setting: Setting) -> optax.GradientTransformationExtraArgs:
        used = use(recipe(setting), steps=max(setting.steps // 10, 2))
        return fo.polyak(used, rule=rule)

    return build


_SF = ("ns5", "normuon", "sf")
_AS_PUBLISHED = {"cosine": True, "momentum": 0.9, "nesterov": True}
_KL_EVERY_STEP = {"shampoo": {"update_every": 1, "b2": 0.9}}
_NEGATIVE_MONA = {"mona": {"alpha": -0.5, "b1": 0.975, "weighted": False}}


def _row(
    part: str,
    name: str,
    title: str,
    build: Callable[[Setting], optax.GradientTransformationExtraArgs],
    centre: float = 8e-3,
    **keywords: Any,
) -> Method:
    return Method(name, title, part, build, centre, **keywords)


def _ours(
    part: str,
    name: str,
    title: str,
    *components: str,
    row: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Method:
    """A row of `fusion_opt`."""
    build = fusion(*components, **keywords)
    averaged = "sf" in components
    return _row(part, name, title, build, averaged=averaged, **(row or {}))


def _recipe(
    part: str, name: str, title: str, row: Mapping[str, Any] | None = None, **kw: Any
) -> Method:
    """A row of SF-NorMuon with something changed."""
    return _ours(part, name, title, *_SF, row=row, **kw)


_HEADLINE = {"seeds": 5}

_BASELINES = [
    _row("baselines", "adamw", "AdamW, cosine", adamw, 4e-3, **_HEADLINE),
    _recipe("baselines", "sf_normuon", "SF-NorMuon, no rule", row=_HEADLINE),
    _ours(
        *("baselines", "normuon", "NorMuon, cosine", "ns5", "normuon"),
        row=_HEADLINE,
        **_AS_PUBLISHED,
    ),
    _recipe(
        *("baselines", "ratio", "SF-NorMuon, ratio"),
        row=_HEADLINE,
        polyak_rule="ratio",
    ),
    _recipe(
        *("baselines", "plus", "SF-NorMuon, schedule_free_plus"),
        row={"centre": 1.0},
        polyak_rule="schedule_free_plus",
    ),
    _ours(
        *("baselines", "autoscale", "SF-NorMuon, autoscale (Prodigy)"),
        *(*_SF, "autoscale"),
        row={"centre": 1.0},
    ),
    _row("baselines", "muon", "Optax Muon, cosine", muon(0.9), **_HEADLINE),
    _row(
        *("baselines", "sf_adamw", "Schedule-Free AdamW", sf_adamw),
        averaged=True,
        **_HEADLINE,
    ),
    _ours(
        *("baselines", "d_adaptation", "SF-NorMuon, autoscale (D-Adaptation)"),
        *(*_SF, "autoscale"),
        row={"centre": 1.0},
        settings={"autoscale": {"rule": "d_adaptation"}},
    ),
    _ours(
        *("baselines", "normuon_95", "NorMuon, cosine, momentum 0.95"),
        *("ns5", "normuon"),
        **{**_AS_PUBLISHED, "momentum": 0.95},
    ),
    _row("baselines", "muon_95", "Optax Muon, cosine, momentum 0.95", muon(0.95)),
]

_RULES = [
    *(
        _row(
            "rules", f"{rule}_{name}", title, referred(use, rule), centre, averaged=True
        )
        for rule, name, title, use, centre in (
            ("ratio", "hold", "ratio for a tenth, then held", rules.hold, 8e-3),
            ("ratio", "relative", "ratio over its start", rules.relative, 8e-3),
            (
                *("schedule_free_plus", "hold"),
                *("schedule_free_plus for a tenth, then held", rules.hold, 1.0),
            ),
            (
                *("schedule_free_plus", "relative"),
                *("schedule_free_plus over its start", rules.relative, 8e-3),
            ),
        )
    ),
    *(
        _recipe(
            *("rules", f"ratio_{low:g}_{high:g}", f"ratio within {low:g} to {high:g}"),
            polyak_rule="ratio",
            settings={"polyak": {"min_ratio": low, "max_ratio": high}},
        )
        for low, high in ((0.5, 2.0), (1.0, 10.0), (0.1, 1.0))
    ),
    _recipe(
        *("rules", "plus_averaged", "schedule_free_plus, averaged with 0.98"),
        row={"centre": 1.0},
        polyak_rule="schedule_free_plus",
        settings={"polyak": {"b1": 0.98}},
    ),
    _recipe(
        *("rules", "ratio_uniform", "ratio, uniform averaging weights"),
        polyak_rule="ratio",
        settings={"sf": {"weight_lr_power": 0.0}},
    ),
]

_COMPONENTS = [
    _ours("components", "ns5", "ns5, constant rate", "ns5"),
    _ours("components", "ns5_normuon", "ns5 + normuon, constant rate", *_SF[:2]),
    _ours("components", "ns5_sf", "ns5 + sf", "ns5", "sf"),
    _ours("components", "mona", "+ mona, k = +0.2", *_SF, "mona"),
    _ours(
        *("components", "mona_negative", "+ mona, k = -0.5", *_SF, "mona"),
        settings=_NEGATIVE_MONA,
    ),
    _ours(
        *("components", "kl_every_step", "+ KL-Shampoo at every step"),
        *(*_SF, "shampoo"),
        settings=_KL_EVERY_STEP,
    ),
    _ours("components", "kl_every_10", "+ KL-Shampoo every 10", *_SF, "shampoo"),
    _ours(
        *("components", "plain_shampoo", "+ plain Shampoo every 10"),
        *(*_SF, "plain_shampoo"),
    ),
    _ours(
        *("components", "full", "full: + mona + KL-Shampoo at every step"),
        *(*_SF, "mona", "shampoo"),
        settings=_KL_EVERY_STEP,
    ),
    _ours(
        *("components", "full_ratio", "full, ratio", *_SF, "mona", "shampoo"),
        settings=_KL_EVERY_STEP,
        polyak_rule="ratio",
    ),
    _ours("components", "kl_alone", "KL-Shampoo alone", "shampoo"),
    _recipe("components", "whole", "fused kernels whole", chunks=False),
    _recipe(
        *("components", "quintic", "quintic coefficients"),
        settings={"ns5": {"coefficients": "quintic"}},
    ),
    _recipe(
        *("components", "aol", "AOL, 4 steps"),
        settings={"ns5": {"preconditioner": "aol", "steps": 4}},
    ),
    _ours("components", "cautious", "+ cautious", *_SF, "cautious"),
    _ours(
        *("components", "cautious_decay", "+ cautious decay", *_SF, "cautious_decay"),
        row={"decays": (TUNED_DECAY, 0.2)},
    ),
    _ours("components", "snr_gate", "+ SNR gate", *_SF, "snr_gate"),
    _ours(
        *("components", "hyperball", "hyperball, cosine"),
        *("ns5", "normuon", "hyperball"),
        row={"decays": (0.0,)},
        decays=False,
        **_AS_PUBLISHED,
    ),
]

# Three times the length, so that a decay has time to tell; the rate is the recipe's.
_LONG_DECAY = {"rate_of": "sf_normuon", "stretch": 3, "decays": (0.2, 0.05, 0.8)}

_DECAY = [
    *(
        _recipe(
            *("decay", f"decay_{letter}", f"decay on {letter}"),
            row=_LONG_DECAY,
            settings={"sf": {"inner_params": which}},
        )
        for letter, which in (("z", "fast"), ("y", "gradient"), ("x", "average"))
    ),
    _recipe("decay", "decay_none", "no decay", row=_LONG_DECAY | {"decays": (0.0,)}),
]

_SETTINGS = [
    *(
        _recipe(
            *("settings", f"beta_{b1:g}", f"sf b1 {b1:g}"),
            settings={"sf": {"b1": b1}},
        )
        for b1 in (0.4, 0.8, 0.9)
    ),
    *(
        _recipe("settings", f"r_{r:g}", f"sf r {r:g}", settings={"sf": {"r": r}})
        for r in (0.0, 1.0, 4.0)
    ),
    *(
        _recipe("settings", f"momentum_{m:g}", f"momentum {m:g}", momentum=m)
        for m in (0.6, 0.9, 0.95)
    ),
    _recipe("settings", "nesterov", "Nesterov momentum", nesterov=True),
    *(
        _recipe(
            *("settings", f"hot_{dtype}", f"hot dtype {dtype}"),
            settings={"ns5": {"hot_dtype": dtype}},
        )
        for dtype in ("bf16", "fp16")
    ),
]

_TUNED = {"adamw": adamw, "normuon": fusion("ns5", "normuon", **_AS_PUBLISHED)}

_LENGTH = [
    Method(
        f"{name}_x{stretch:g}",
        f"{title}, {stretch:g} times the steps",
        "length",
        build,
        0.0,
        decays=(TUNED_DECAY,),
        averaged=name == "sf_normuon",
        rate_of=name,
        stretch=stretch,
    )
    for stretch in (0.5, 3)
    for name, title, build in (
        ("adamw", "AdamW", _TUNED["adamw"]),
        ("normuon", "NorMuon", _TUNED["normuon"]),
        ("sf_normuon", "SF-NorMuon", fusion(*_SF)),
    )
]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (*_BASELINES, *_RULES, *_COMPONENTS, *_DECAY, *_SETTINGS, *_LENGTH)
}
"""All rows by name, the most valuable first."""


def build(
    method: Method, workload: Any, rate: Any, decay: Any, steps: int, params: Any
) -> optax.GradientTransformationExtraArgs:
    """A row's optimiser for a workload's weights."""
    return method.build(
        Setting(rate, decay, steps, params, workload.routing, workload.unchunked)
    )
