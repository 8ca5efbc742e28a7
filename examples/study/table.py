"""Every row of the study by name, in the order in which they are run.

A row is one method; a new one is one entry here.
"""

from typing import Any, NamedTuple

from study.methods import (
    SF_NORMUON,
    Build,
    Setting,
    adamw,
    fusion,
    muon,
    referred,
    sf_adamw,
)
from study.rules import hold, relative

TUNED_DECAY = 0.05
"""The decay under which the rates are tried."""


class Method(NamedTuple):
    """One row.

    Attributes:
        title: how tables call it.
        build: the optimiser.
        centre: middle of the five rates that are tried; each is twice the one before.
        decays: what is tried at the best of them; the rates were tried with the first.
        seeds: how many seeds beside the one that is tuned on.
        rate_of: the method whose best rate is taken, where none is tried.
        stretch: how many times longer than the workload's the runs are.
        name: how files and the command line call it.
        part: which question it belongs to.
    """

    title: str
    build: Build
    centre: float = 8e-3
    decays: tuple[float, ...] = (TUNED_DECAY, 0.0, 0.2)
    seeds: int = 3
    rate_of: str | None = None
    stretch: float = 1
    name: str = ""
    part: str = ""

    def optimizer(
        self, workload: Any, rate: Any, decay: Any, steps: int, params: Any
    ) -> Any:
        """The optimiser for a workload's weights."""
        split = workload.routing, workload.unchunked
        return self.build(Setting(rate, decay, steps, params, *split))


PARTS = {
    "baselines": "baselines, the recipe, and the rules of a shared step size",
    "rules": "other forms of the shared step size",
    "components": "what each component adds",
    "decay": "which iterate is decayed",
    "settings": "settings of the recipe",
    "length": "longer and shorter runs",
}

_MUON_LIKE = {"cosine": True, "momentum": 0.9, "nesterov": True}
_NORMUON = fusion("ns5", "normuon", **_MUON_LIKE)
_RECIPE = fusion(*SF_NORMUON)


def _with(*components: str, **keywords: Any) -> Build:
    """SF-NorMuon with something added or changed."""
    return fusion(*SF_NORMUON, *components, **keywords)


def _set(component: str, **settings: Any) -> Build:
    """SF-NorMuon with settings of one of its components changed."""
    return _with(settings={component: settings})


_BASELINES = {
    "adamw": Method("AdamW, cosine", adamw(), centre=4e-3, seeds=5),
    "sf_normuon": Method("SF-NorMuon, no rule", _RECIPE, seeds=5),
    "normuon": Method("NorMuon, cosine", _NORMUON, seeds=5),
    "ratio": Method("SF-NorMuon, ratio", _with(polyak_rule="ratio"), seeds=5),
    "plus": Method(
        "SF-NorMuon, schedule_free_plus",
        _with(polyak_rule="schedule_free_plus"),
        centre=1.0,
    ),
    "autoscale": Method(
        "SF-NorMuon, autoscale (Prodigy)", _with("autoscale"), centre=1.0
    ),
    "muon": Method("Optax Muon, cosine", muon(0.9), seeds=5),
    "sf_adamw": Method("Schedule-Free AdamW", sf_adamw, seeds=5),
    "d_adaptation": Method(
        "SF-NorMuon, autoscale (D-Adaptation)",
        _with("autoscale", settings={"autoscale": {"rule": "d_adaptation"}}),
        centre=1.0,
    ),
    "adamw_rest": Method(
        "AdamW, cosine, four times the rate for the rest", adamw(rest=4.0), centre=4e-3
    ),
    "normuon_95": Method(
        "NorMuon, cosine, momentum 0.95",
        fusion("ns5", "normuon", **{**_MUON_LIKE, "momentum": 0.95}),
    ),
    "muon_95": Method("Optax Muon, cosine, momentum 0.95", muon(0.95)),
}

_RULES = {
    "ratio_hold": Method("ratio for a tenth, then held", referred(hold, "ratio")),
    "ratio_relative": Method("ratio over its start", referred(relative, "ratio")),
    "schedule_free_plus_hold": Method(
        "schedule_free_plus for a tenth, then held",
        referred(hold, "schedule_free_plus"),
        centre=1.0,
    ),
    "schedule_free_plus_relative": Method(
        "schedule_free_plus over its start", referred(relative, "schedule_free_plus")
    ),
    **{
        f"ratio_{low:g}_{high:g}": Method(
            f"ratio within {low:g} to {high:g}",
            _with(
                polyak_rule="ratio",
                settings={"polyak": {"min_ratio": low, "max_ratio": high}},
            ),
        )
        for low, high in ((0.5, 2.0), (1.0, 10.0), (0.1, 1.0))
    },
    "plus_averaged": Method(
        "schedule_free_plus, averaged with 0.98",
        _with(polyak_rule="schedule_free_plus", settings={"polyak": {"b1": 0.98}}),
        centre=1.0,
    ),
    "ratio_uniform": Method(
        "ratio, averaging weights without the rate",
        _with(polyak_rule="ratio", settings={"sf": {"weight_lr_power": 0.0}}),
    ),
}

_KL_EVERY_STEP = {"shampoo": {"update_every": 1, "b2": 0.9}}
# Half the fresh gradient and half its average over 40 steps.
_NEGATIVE_MONA = {"mona": {"alpha": -0.5, "b1": 0.975, "weighted": False}}

_COMPONENTS = {
    "ns5": Method("ns5, constant rate", fusion("ns5")),
    "ns5_normuon": Method("ns5 + normuon, constant rate", fusion("ns5", "normuon")),
    "ns5_sf": Method("ns5 + sf", fusion("ns5", "sf")),
    "mona": Method("+ mona, k = +0.2", _with("mona")),
    "mona_negative": Method("+ mona, k = -0.5", _with("mona", settings=_NEGATIVE_MONA)),
    "kl_every_step": Method(
        "+ KL-Shampoo at every step", _with("shampoo", settings=_KL_EVERY_STEP)
    ),
    "kl_every_10": Method("+ KL-Shampoo every 10", _with("shampoo")),
    "plain_shampoo": Method("+ plain Shampoo every 10", _with("plain_shampoo")),
    "full": Method(
        "full: + mona + KL-Shampoo at every step",
        _with("mona", "shampoo", settings=_KL_EVERY_STEP),
    ),
    "full_ratio": Method(
        "full, ratio",
        _with("mona", "shampoo", settings=_KL_EVERY_STEP, polyak_rule="ratio"),
    ),
    "kl_alone": Method("KL-Shampoo alone", fusion("shampoo")),
    "whole": Method("fused kernels whole", _with(chunks=False)),
    "quintic": Method("quintic coefficients", _set("ns5", coefficients="quintic")),
    "aol": Method("AOL, 4 steps", _set("ns5", preconditioner="aol", steps=4)),
    "cautious": Method("+ cautious", _with("cautious")),
    "cautious_decay": Method(
        "+ cautious decay", _with("cautious_decay"), decays=(TUNED_DECAY, 0.2)
    ),
    "snr_gate": Method("+ SNR gate", _with("snr_gate")),
    "hyperball": Method(
        "hyperball, cosine",
        fusion("ns5", "normuon", "hyperball", decays=False, **_MUON_LIKE),
        decays=(0.0,),
    ),
}

# Three times the length, so that a decay has time to tell; the rate is the recipe's.
_LONG = {"rate_of": "sf_normuon", "stretch": 3}

_DECAY = {
    **{
        f"decay_{letter}": Method(
            f"decay on {letter}",
            _set("sf", inner_params=which),
            decays=(0.2, 0.05, 0.8),
            **_LONG,
        )
        for letter, which in (("z", "fast"), ("y", "gradient"), ("x", "average"))
    },
    "decay_none": Method("no decay", _RECIPE, decays=(0.0,), **_LONG),
}

_SETTINGS = {
    **{
        f"beta_{b1:g}": Method(f"sf b1 {b1:g}", _set("sf", b1=b1))
        for b1 in (0.4, 0.8, 0.9)
    },
    **{f"r_{r:g}": Method(f"sf r {r:g}", _set("sf", r=r)) for r in (0.0, 1.0, 4.0)},
    **{
        f"momentum_{m:g}": Method(f"momentum {m:g}", _with(momentum=m))
        for m in (0.6, 0.9, 0.95)
    },
    "nesterov": Method("Nesterov momentum", _with(nesterov=True)),
    **{
        f"hot_{dtype}": Method(f"hot dtype {dtype}", _set("ns5", hot_dtype=dtype))
        for dtype in ("bf16", "fp16")
    },
}

_LENGTH = {
    f"{name}_x{stretch:g}": Method(
        f"{title}, {stretch:g} times the steps",
        build,
        decays=(TUNED_DECAY,),
        rate_of=name,
        stretch=stretch,
    )
    for stretch in (0.5, 3)
    for name, title, build in (
        ("adamw", "AdamW", adamw()),
        ("adamw_rest", "AdamW, four times the rate for the rest", adamw(rest=4.0)),
        ("normuon", "NorMuon", _NORMUON),
        ("sf_normuon", "SF-NorMuon", _RECIPE),
    )
}

METHODS: dict[str, Method] = {
    name: method._replace(name=name, part=part)
    for part, rows in zip(
        PARTS,
        (_BASELINES, _RULES, _COMPONENTS, _DECAY, _SETTINGS, _LENGTH),
        strict=True,
    )
    for name, method in rows.items()
}
"""All rows by name, the most valuable first."""

ADAMW = tuple(name for name in METHODS if name.startswith("adamw"))
"""AdamW with a cosine, by all its rows: the others are compared with the best."""
