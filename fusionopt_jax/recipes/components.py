"""The components of `fusion_opt` by name: one entry each, which is all it takes."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import optax

from fusionopt_jax._checks import check_choice, did_you_mean
from fusionopt_jax.routing import Routing
from fusionopt_jax.transforms.autoscale import autoscale
from fusionopt_jax.transforms.cautious import cautious
from fusionopt_jax.transforms.cautious_weight_decay import (
    add_cautious_decayed_weights,
)
from fusionopt_jax.transforms.hyperball import hyperball
from fusionopt_jax.transforms.kl_shampoo import kl_shampoo
from fusionopt_jax.transforms.mona import mona
from fusionopt_jax.transforms.normuon import normuon
from fusionopt_jax.transforms.ns5 import ns5
from fusionopt_jax.transforms.polyak import polyak
from fusionopt_jax.transforms.schedule_free import schedule_free
from fusionopt_jax.transforms.shampoo import shampoo
from fusionopt_jax.transforms.snr_gate import snr_gate

# Where a component stands: chained before the momentum, around it, chained after it,
# around all of these, in place of the decay, in place of the step, around all groups,
# around the whole optimiser.
Place: TypeAlias = Literal[
    "gradient", "momentum", "direction", "around", "decay", "step", "groups", "factor"
]

# Small enough that the orthogonalised update doesn't depend on the gradient's scale.
_TINY = 1e-12


class Component(NamedTuple):
    """One component.

    Attributes:
        make: The transformation.
        place: Where it stands; those of one place stand in the order of the table.
        filled: Keywords that `fusion_opt` fills in itself.
        defaults: Its settings where they differ from those of the transformation.
        excludes: Components that it has no meaning with, and why.
        averages: Fields of its state that `state_dtype` applies to.
    """

    make: Callable[..., Any]
    place: Place
    filled: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}
    excludes: Mapping[str, str] = {}
    averages: tuple[str, ...] = ()

    def build(
        self, routing: Routing, settings: Mapping[str, Any], **filled: Any
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation with the settings of a user."""
        if "routing" in self.filled:
            filled["routing"] = routing
        return self.make(**{**self.defaults, **settings, **filled})

    @property
    def keywords(self) -> list[str]:
        """What a user can set."""
        known = inspect.signature(self.make).parameters
        # The old names of settings are for those who call the transformation itself.
        old = {"beta", "beta2"}
        return [name for name in known if name not in {*self.filled, *old}]


_ONE_WHITENING = "both precondition the momentum; choose one"
_SPHERE = "`hyperball` keeps every matrix on its sphere and takes the step itself"

COMPONENTS: dict[str, Component] = {
    "ns5": Component(
        ns5,
        "direction",
        ("routing",),
        {"coefficients": "polar_express", "scale": "rms", "eps": _TINY},
    ),
    "normuon": Component(normuon, "direction", ("routing",)),
    "mona": Component(mona, "gradient", averages=("gradient_average",)),
    "shampoo": Component(kl_shampoo, "momentum", ("inner", "routing")),
    "sf": Component(
        schedule_free,
        "groups",
        ("inner", "learning_rate"),
        {"b1": 0.6, "r": 2.0},
    ),
    "plain_shampoo": Component(
        shampoo,
        "momentum",
        ("inner", "routing"),
        excludes={"shampoo": _ONE_WHITENING},
    ),
    "snr_gate": Component(
        snr_gate, "around", ("inner", "routing"), averages=("gradient_average",)
    ),
    "cautious": Component(cautious, "around", ("inner",)),
    "cautious_decay": Component(
        add_cautious_decayed_weights, "decay", ("weight_decay",)
    ),
    "hyperball": Component(
        hyperball,
        "step",
        ("inner", "learning_rate", "routing"),
        excludes={
            "sf": f"{_SPHERE}, which an average of its points leaves",
            "cautious_decay": f"{_SPHERE}, so that a decay does nothing",
            "autoscale": f"{_SPHERE}, which no factor can multiply afterwards",
        },
    ),
    "autoscale": Component(autoscale, "factor", ("inner",)),
}

# What is no component but has settings as well.
ADAM = Component(
    optax.scale_by_adam,
    "direction",
    ("mu_dtype",),
    {"b1": 0.9, "b2": 0.99},
    averages=("mu", "nu"),
)
_POLYAK = Component(polyak, "groups", ("inner", "rule"))


def checked_components(
    components: Iterable[str], known: Iterable[str] = tuple(COMPONENTS)
) -> frozenset[str]:
    """The chosen components, each of which exists and goes with the others."""
    if isinstance(components, str):
        raise TypeError(
            f"`components` must be a set of names such as {{'ns5', 'sf'}}, got the "
            f"string {components!r}."
        )
    known = tuple(known)
    chosen = frozenset(components)
    for name in sorted(chosen, key=str):
        check_choice("components", name, known)
    return chosen


def check_combination(chosen: frozenset[str]) -> None:
    """Require components that have a meaning together."""
    for name in sorted(chosen):
        for other, reason in COMPONENTS[name].excludes.items():
            if other in chosen:
                raise ValueError(
                    f"`components` {name!r} and {other!r} don't go together: {reason}."
                )


def in_place(place: Place, chosen: frozenset[str]) -> list[str]:
    """The chosen components of one place, in the order of the table."""
    return [
        name
        for name, component in COMPONENTS.items()
        if component.place == place and name in chosen
    ]


def checked_settings(
    settings: Mapping[str, Any] | None,
    chosen: frozenset[str],
    with_polyak: bool,
) -> dict[str, Mapping[str, Any]]:
    """The settings of every chosen component, of `"adam"` and of `"polyak"`."""
    having = {**COMPONENTS, "adam": ADAM, "polyak": _POLYAK}
    checked: dict[str, Mapping[str, Any]] = {name: {} for name in having}
    for name, given in (settings or {}).items():
        check_choice("settings", name, having)
        if name in COMPONENTS and name not in chosen:
            raise ValueError(
                f"`settings` has {name!r}, which is not among the components "
                f"{sorted(chosen)}: add it there, or leave its settings out."
            )
        if name == "polyak" and not with_polyak:
            raise ValueError(
                "`settings` has 'polyak', which `polyak_rule`=None leaves out: choose "
                "a rule, or leave its settings out."
            )
        if not isinstance(given, Mapping):
            raise TypeError(
                f"`settings[{name!r}]` must map keywords to values, such as "
                f"{{'b1': 0.9}}, got {given!r}."
            )
        component = having[name]
        for keyword in given:
            if keyword in component.filled:
                raise ValueError(
                    f"`settings[{name!r}]` has {keyword!r}, which `fusion_opt` fills "
                    "in: it follows from its own arguments."
                )
            if keyword not in component.keywords:
                listed = ", ".join(map(repr, component.keywords)) or "none"
                hint = did_you_mean(keyword, component.keywords)
                raise ValueError(
                    f"`settings[{name!r}]` has no {keyword!r}; the settings of "
                    f"{name!r} are {listed}.{hint}"
                )
        checked[name] = given
    return checked


def adam(settings: Mapping[str, Any], **filled: Any) -> optax.GradientTransformation:
    """Adam's direction with the settings of a user."""
    return ADAM.make(**{**ADAM.defaults, **settings, **filled})
