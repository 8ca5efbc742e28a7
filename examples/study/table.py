"""Every row of the study by name, in the order in which they are run.

A row is one method; a new one is one entry here.
"""

from typing import Any

from study import workloads
from study.method import Method
from study.optimizers import (
    SF_NORMUON,
    Build,
    accumulated,
    adamw,
    constant_adamw,
    fusion,
    muon,
    referred,
    sf_adamw,
)
from study.rules import hold, relative

PARTS = {
    "baselines": "baselines and the recipe",
    "rules": "the shared step size",
    "components": "what each component adds",
    "decay": "which iterate is decayed",
    "settings": "settings of the recipe",
    "length": "longer and shorter runs",
    "away": "a loss with a negative term",
    "accumulation": "sixteen micro-batches a step",
    "conv": "a convolutional network",
    "shapes": "depth against width",
}

RECIPE = "fixed_nesterov"
"""The row that `fusion_opt(8e-3)` is."""

BASE = "fixed_0.2"
"""The row that ablations change one thing of: the same without look-ahead."""

_LM = ("lm",)
"""The workload of ablations: there methods differ by the most standard errors."""

_MUON_LIKE = {"cosine": True, "momentum": 0.9, "nesterov": True}
_NORMUON = fusion("ns5", "normuon", **_MUON_LIKE)
_PLAIN = fusion(*SF_NORMUON)
_DEFAULT = fusion(*SF_NORMUON, nesterov=True)
_RATIO = fusion(*SF_NORMUON, polyak_rule="ratio")


def _with(*components: str, **keywords: Any) -> Build:
    """SF-NorMuon with something added or changed."""
    return fusion(*SF_NORMUON, *components, **keywords)


def _set(component: str, **settings: Any) -> Build:
    """SF-NorMuon with settings of one of its components changed."""
    return _with(settings={component: settings})


def _varied(title: str, build: Build, base: str = BASE, **changes: Any) -> Method:
    """A row that changes one thing of another: tuned from there, with its decay."""
    return Method(title, build, base=base, **{"decays": (), **changes})


# Tuned to no workload: the same everywhere.
_FIXED = {"centre": 8e-3, "decays": (0.05,), "climbs": False}

# Where the rule gains and where it costs; elsewhere both are compared at one setting.
_TUNED_ON = ("lm", "vit")

_BASELINES = {
    "adamw": Method("AdamW, cosine", adamw(), centre=4e-3, seeds=5),
    "fixed": Method(
        "SF-NorMuon, no rule, rate 0.008 and decay 0.05", _PLAIN, seeds=5, **_FIXED
    ),
    "fixed_ratio": Method(
        "SF-NorMuon, ratio, rate 0.008 and decay 0.05", _RATIO, **_FIXED
    ),
    **{
        f"fixed_{decay}": Method(
            f"SF-NorMuon, no rule, rate 0.008 and decay {decay}",
            _PLAIN,
            **{**_FIXED, "decays": (decay,)},
        )
        for decay in (0.2, 0.4)
    },
    **{
        f"fixed_{name}": Method(
            f"SF-NorMuon, {title}, rate 0.008 and decay 0.2",
            build,
            on=() if name == "nesterov" else ("lm", "vit", "digits"),
            **{**_FIXED, "decays": (0.2,)},
        )
        for name, title, build in (
            ("relative", "ratio over its start", referred(relative, "ratio")),
            ("momentum_0.6", "momentum 0.6", _with(momentum=0.6)),
            ("nesterov", "Nesterov momentum", _DEFAULT),
            *(
                (
                    *(f"nesterov_{m:g}", f"Nesterov momentum {m:g}"),
                    _with(nesterov=True, momentum=m),
                )
                for m in (0.7, 0.9)
            ),
            (
                *("nesterov_r_4", "Nesterov momentum, r 4"),
                _with(nesterov=True, settings={"sf": {"r": 4.0}}),
            ),
        )
    },
    "adamw_rest": Method(
        "AdamW, cosine, four times the rate for the rest",
        adamw(rest=4.0),
        centre=4e-3,
    ),
    "normuon": Method("NorMuon, cosine", _NORMUON, seeds=5),
    "sf_normuon": Method("SF-NorMuon, no rule", _PLAIN, on=_TUNED_ON),
    "ratio": Method("SF-NorMuon, ratio", _RATIO, on=_TUNED_ON),
    "muon": Method("Optax Muon, cosine", muon(0.9)),
    "sf_adamw": Method("Schedule-Free AdamW", sf_adamw),
    "normuon_95": _varied(
        "NorMuon, cosine, momentum 0.95",
        fusion("ns5", "normuon", **{**_MUON_LIKE, "momentum": 0.95}),
        base="normuon",
        on=_LM,
    ),
    "muon_95": _varied(
        "Optax Muon, cosine, momentum 0.95", muon(0.95), base="muon", on=_LM
    ),
}

# Changes of how the same direction is computed, or small ones of it: at the rate of
# what they change, which the climb would find again.
_AS_TUNED = {"climbs": False}

_RULES = {
    "plus": Method(
        "schedule_free_plus", _with(polyak_rule="schedule_free_plus"), centre=1.0
    ),
    "autoscale": Method("autoscale (Prodigy)", _with("autoscale"), centre=1.0),
    "d_adaptation": Method(
        "autoscale (D-Adaptation)",
        _with("autoscale", settings={"autoscale": {"rule": "d_adaptation"}}),
        centre=1.0,
    ),
    "ratio_hold": _varied(
        "ratio for a tenth, then held", referred(hold, "ratio"), base="ratio"
    ),
    "ratio_relative": _varied("ratio over its start", referred(relative, "ratio")),
    "ratio_uniform": _varied(
        "ratio, averaging weights without the rate",
        _with(polyak_rule="ratio", settings={"sf": {"weight_lr_power": 0.0}}),
        base="ratio",
        **_AS_TUNED,
    ),
    **{
        f"ratio_{low:g}_{high:g}": _varied(
            f"ratio within {low:g} to {high:g}",
            _with(
                polyak_rule="ratio",
                settings={"polyak": {"min_ratio": low, "max_ratio": high}},
            ),
            base="ratio",
            **_AS_TUNED,
        )
        for low, high in ((0.5, 2.0), (1.0, 10.0), (0.1, 1.0))
    },
    "schedule_free_plus_hold": _varied(
        "schedule_free_plus for a tenth, then held",
        referred(hold, "schedule_free_plus"),
        base="plus",
    ),
    "schedule_free_plus_relative": _varied(
        "schedule_free_plus over its start", referred(relative, "schedule_free_plus")
    ),
    "plus_averaged": _varied(
        "schedule_free_plus, averaged with 0.98",
        _with(polyak_rule="schedule_free_plus", settings={"polyak": {"b1": 0.98}}),
        base="plus",
        **_AS_TUNED,
    ),
}

_KL_EVERY_STEP = {"shampoo": {"update_every": 1, "b2": 0.9}}
# Half the fresh gradient and half its average over 40 steps.
_NEGATIVE_MONA = {"mona": {"alpha": -0.5, "b1": 0.975, "weighted": False}}

_COMPONENTS = {
    "ns5": _varied("ns5, constant rate", fusion("ns5")),
    "ns5_normuon": _varied("ns5 + normuon, constant rate", fusion("ns5", "normuon")),
    "ns5_sf": _varied("ns5 + sf", fusion("ns5", "sf")),
    "mona": _varied("+ mona, k = +0.2", _with("mona")),
    "mona_negative": _varied(
        "+ mona, k = -0.5", _with("mona", settings=_NEGATIVE_MONA)
    ),
    "kl_every_step": _varied(
        "+ KL-Shampoo at every step", _with("shampoo", settings=_KL_EVERY_STEP)
    ),
    "full": _varied(
        "full: + mona + KL-Shampoo at every step",
        _with("mona", "shampoo", settings=_KL_EVERY_STEP),
    ),
    "kl_alone": _varied("KL-Shampoo alone", fusion("shampoo")),
    "kl_every_10": _varied("+ KL-Shampoo every 10", _with("shampoo")),
    "plain_shampoo": _varied("+ plain Shampoo every 10", _with("plain_shampoo")),
    "full_ratio": _varied(
        "full, ratio",
        _with("mona", "shampoo", settings=_KL_EVERY_STEP, polyak_rule="ratio"),
        base="ratio",
    ),
    "whole": _varied("fused kernels whole", _with(chunks=False), **_AS_TUNED),
    "quintic": _varied(
        "quintic coefficients", _set("ns5", coefficients="quintic"), **_AS_TUNED
    ),
    "aol": _varied(
        "AOL, 4 steps", _set("ns5", preconditioner="aol", steps=4), **_AS_TUNED
    ),
    "cautious": _varied("+ cautious", _with("cautious")),
    # It acts on about half of the entries, so that it may need twice as much.
    "cautious_decay": _varied(
        "+ cautious decay", _with("cautious_decay"), decays=(0.4, 0.2, 0.8)
    ),
    "snr_gate": _varied("+ SNR gate", _with("snr_gate")),
    "hyperball": _varied(
        "hyperball, cosine",
        fusion("ns5", "normuon", "hyperball", decays=False, **_MUON_LIKE),
        base="normuon",
        decays=(0.0,),
    ),
}

# Twice the length, so that a decay has time to tell.
_LONG = {"climbs": False, "stretch": 2}

_DECAY = {
    **{
        f"decay_{letter}": _varied(
            f"decay on {letter}",
            _set("sf", inner_params=which),
            decays=(0.2, 0.05, 0.8),
            **_LONG,
        )
        for letter, which in (("z", "fast"), ("y", "gradient"), ("x", "average"))
    },
    "decay_none": _varied("no decay", _PLAIN, decays=(0.0,), **_LONG),
}

_SETTINGS = {
    name: _varied(title, build, **_AS_TUNED)
    for name, title, build in (
        *(
            (f"beta_{b1:g}", f"sf b1 {b1:g}", _set("sf", b1=b1))
            for b1 in (0.4, 0.8, 0.9)
        ),
        *((f"r_{r:g}", f"sf r {r:g}", _set("sf", r=r)) for r in (0.0, 1.0, 4.0)),
        *(
            (f"momentum_{m:g}", f"momentum {m:g}", _with(momentum=m))
            for m in (0.6, 0.9, 0.95)
        ),
        ("nesterov", "Nesterov momentum", _with(nesterov=True)),
        *(
            (f"hot_{dtype}", f"hot dtype {dtype}", _set("ns5", hot_dtype=dtype))
            for dtype in ("bf16", "fp16")
        ),
        *(
            (f"state_{dtype}", f"state in {dtype}", _with(state_dtype=dtype))
            for dtype in ("bf16", "int8")
        ),
    )
}

_LENGTH = {
    f"{name}_x{stretch:g}": _varied(
        f"{title}, {stretch:g} times the steps",
        build,
        base=base,
        climbs=False,
        stretch=stretch,
    )
    for stretch in (3, 0.5)
    for name, title, build, base in (
        (
            *("adamw_rest", "AdamW, four times the rate for the rest"),
            *(adamw(rest=4.0), "adamw_rest"),
        ),
        ("normuon", "NorMuon", _NORMUON, "normuon"),
        ("sf_normuon", "SF-NorMuon", _DEFAULT, RECIPE),
    )
}

# What would suit a longer run, by what short ones say.
_LENGTH |= {
    f"sf_normuon_x3_{name}": _varied(
        f"SF-NorMuon, 3 times the steps, {title}",
        fusion(*SF_NORMUON, nesterov=True, settings={"sf": settings}),
        base=RECIPE,
        climbs=False,
        stretch=3,
        decays=decays,
    )
    for name, title, settings, decays in (
        ("decay_0.05", "decay 0.05", {}, (0.05,)),
        ("beta_0.8", "b1 0.8", {"b1": 0.8}, ()),
        ("r_4", "r 4", {"r": 4.0}, ()),
    )
}

_FULL = _with("mona", "shampoo", settings=_KL_EVERY_STEP)
# Nothing is tuned: the lowest loss of the fit would be that of not moving at all.
_AWAY_FROM = {
    "decays": (0.05,),
    "climbs": False,
    "stretch": 0.5,
    "on": tuple(workloads.AWAY),
}

_AWAY = {
    "adamw_away": Method(
        "AdamW, constant rate", constant_adamw, centre=1e-3, **_AWAY_FROM
    ),
    "sf_normuon_away": Method("SF-NorMuon, no rule", _PLAIN, **_AWAY_FROM),
    "ratio_away": Method("SF-NorMuon, ratio", _RATIO, **_AWAY_FROM),
    "full_away": Method("full, no rule", _FULL, **_AWAY_FROM),
    "full_ratio_away": Method(
        "full, ratio",
        _with("mona", "shampoo", settings=_KL_EVERY_STEP, polyak_rule="ratio"),
        **_AWAY_FROM,
    ),
}

_ACCUMULATION = {
    f"{name}_accumulation": _varied(title, accumulated(build, 16), base=base, stretch=2)
    for name, title, build, base in (
        ("adamw", "AdamW, cosine", adamw(), "adamw"),
        ("normuon", "NorMuon, cosine", _NORMUON, "normuon"),
        ("sf_normuon", "SF-NorMuon", _DEFAULT, RECIPE),
    )
}

_CONV = {
    f"{name}_conv": _BASELINES[row]._replace(seeds=3, on=("conv",))
    for name, row in (("adamw",) * 2, ("normuon",) * 2, ("sf_normuon", RECIPE))
}

_SHAPES = {
    f"blocks_{depth}x{width}": Method(
        f"{depth} blocks of width {width}",
        _PLAIN,
        on=(name,),
        **{**_FIXED, "decays": (0.2,)},
    )
    for name, (depth, width) in workloads.SHAPES.items()
}

METHODS: dict[str, Method] = {
    name: method._replace(
        name=name, part=part, on=method.on or (() if part == "baselines" else _LM)
    )
    for part, rows in zip(
        PARTS,
        (
            *(_BASELINES, _RULES, _COMPONENTS, _DECAY, _SETTINGS, _LENGTH),
            *(_AWAY, _ACCUMULATION, _CONV, _SHAPES),
        ),
        strict=True,
    )
    for name, method in rows.items()
}
"""All rows by name, the most valuable first."""

ADAMW = tuple(name for name in METHODS if name.startswith("adamw"))
"""AdamW with a cosine, by all its rows: the others are compared with the best."""
