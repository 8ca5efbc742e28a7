"""The one list of public transformations and recipes, and trees to run them on.

Every parametrised file goes through `ALL`, so that a new transformation is held to the
whole contract by one line here. Shapes are tiny and compiled steps are shared.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo

ROUTING = fo.Routing(min_dim=8, stacked=["blocks"])
"""Serves `parameters`; `fo.Routing(min_dim=8)` serves trees without stacked layers."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One transformation with the settings that the shared tests use.

    Attributes:
        name: What a failing test is called: the factory's name, and what is special.
        build: A routing to a fresh transformation.
        kind: `"direction"` where updates point along the gradient and carry no learning
            rate, `"optimizer"` where they are to be added to the parameters.
        value: Whether `update` must be given the loss.
        params: Whether `update` must be given the parameters.
        matrices: Whether every leaf has to be a matrix or a stack of them.
        complex_too: Whether complex leaves are served; elsewhere they are refused.
        starts_still: Whether the first gradient only starts statistics.
        exhaustive: Whether the sweeps over all cases leave it to the exhaustive run: it
            takes long to compile, and what it is made of is in every run.
    """

    name: str
    build: Callable[[fo.Routing], Any]
    kind: Literal["direction", "optimizer"]
    value: bool = False
    params: bool = False
    matrices: bool = False
    complex_too: bool = False
    starts_still: bool = False
    exhaustive: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def factory(self) -> str:
        """The public function that it is made by."""
        return max((n for n in factories() if self.name.startswith(n)), key=len)


def _direction(name: str, build: Callable[..., Any], **facts: bool) -> Case:
    return Case(name, build, "direction", **facts)


def _optimizer(name: str, build: Callable[..., Any], **facts: bool) -> Case:
    return Case(name, build, "optimizer", **facts)


def _momentum() -> optax.GradientTransformation:
    # Keeps fp32 and returns the dtype that it was given, as `optax.trace` would not.
    return fo.mona(alpha=-0.5)


ALL = (
    _direction("ns5", lambda routing: fo.ns5(), matrices=True),
    _direction(
        "ns5_routed",
        lambda routing: fo.ns5(
            routing=routing,
            coefficients="polar_express",
            scale="rms",
            audit_every=2,
            steps=3,
        ),
        matrices=True,
    ),
    _direction("normuon", lambda routing: fo.normuon(routing=routing), matrices=True),
    _direction("mona", lambda routing: fo.mona(), complex_too=True),
    _direction(
        "kl_shampoo",
        lambda routing: fo.kl_shampoo(
            _momentum(), routing=routing, sides="both", update_every=2
        ),
        matrices=True,
    ),
    _direction(
        "kl_shampoo_every_step",
        lambda routing: fo.kl_shampoo(b2=0.9, update_every=1, restore_norm=True),
        matrices=True,
        exhaustive=True,
    ),
    _direction(
        "shampoo",
        lambda routing: fo.shampoo(_momentum(), routing=routing, restore_norm=True),
        matrices=True,
    ),
    _direction(
        "quantize_state",
        lambda routing: fo.quantize_state(_momentum(), {"gradient_average": "int8"}),
        exhaustive=True,
    ),
    _direction("cautious", lambda routing: fo.cautious(_momentum())),
    _direction(
        "add_cautious_decayed_weights",
        lambda routing: fo.add_cautious_decayed_weights(0.1),
        params=True,
    ),
    _direction(
        "snr_gate",
        lambda routing: fo.snr_gate(_momentum(), routing=routing),
        matrices=True,
    ),
    _direction(
        "measure_gain",
        lambda routing: fo.measure_gain("momentum", _momentum()),
        complex_too=True,
    ),
    _optimizer(
        "hyperball",
        lambda routing: fo.hyperball(_momentum(), 1e-2, routing=routing),
        params=True,
        matrices=True,
    ),
    _optimizer(
        "accumulate",
        lambda routing: fo.accumulate(optax.sgd(1e-2), every=1),
        complex_too=True,
    ),
    _optimizer(
        "schedule_free",
        lambda routing: fo.schedule_free(_momentum(), 1e-2),
        params=True,
        complex_too=True,
    ),
    _optimizer(
        "schedule_free_keeping_average",
        lambda routing: fo.schedule_free(
            _momentum(),
            lambda count: 1e-2 / (1 + count),
            b1_max=0.95,
            b1_anneal_steps=10,
            averaging_warmup=2,
            keep_average=True,
        ),
        params=True,
        complex_too=True,
    ),
    _optimizer(
        "polyak",
        lambda routing: fo.polyak(optax.sgd(1e-2)),
        value=True,
        complex_too=True,
    ),
    _optimizer(
        "polyak_schedule_free_plus",
        lambda routing: fo.polyak(
            fo.schedule_free(optax.identity(), 1e-2), rule="schedule_free_plus"
        ),
        value=True,
        params=True,
        complex_too=True,
    ),
    _optimizer(
        "autoscale",
        lambda routing: fo.autoscale(fo.schedule_free(_momentum(), 1.0), first=1e-2),
        params=True,
        complex_too=True,
    ),
    _optimizer(
        "fusion_opt",
        lambda routing: fo.fusion_opt(1e-2, routing=routing),
        params=True,
    ),
    _optimizer(
        "fusion_opt_in_few_bits",
        lambda routing: fo.fusion_opt(
            1e-2,
            routing=routing,
            components={"ns5", "normuon", "sf", "mona", "snr_gate"},
            nesterov="optax",
            state_dtype="int8",
        ),
        params=True,
        exhaustive=True,
    ),
    _optimizer(
        "fusion_opt_muon",
        lambda routing: fo.fusion_opt(
            1e-2,
            routing=routing,
            components={"ns5"},
            scalar_learning_rate=5e-3,
            warmup_steps=3,
        ),
        params=True,
    ),
    _optimizer(
        "fusion_opt_mona",
        lambda routing: fo.fusion_opt(
            optax.linear_schedule(1e-2, 1e-3, 10),
            routing=routing,
            components={"ns5", "normuon", "mona", "sf"},
            polyak_rule="ratio",
        ),
        value=True,
        params=True,
        exhaustive=True,
    ),
    _optimizer(
        "fusion_opt_shampoo",
        lambda routing: fo.fusion_opt(
            1e-2,
            routing=routing,
            components={"ns5", "normuon", "sf", "mona", "shampoo"},
            polyak_rule="ratio",
            gains=True,
            settings={"shampoo": {"update_every": 2}},
        ),
        value=True,
        params=True,
        exhaustive=True,
    ),
    _optimizer(
        "kl_shampoo_torch",
        lambda routing: fo.kl_shampoo_torch(1e-2, routing=routing),
        params=True,
        starts_still=True,
        matrices=True,
        exhaustive=True,
    ),
    _optimizer(
        "fusion_opt_torch",
        lambda routing: fo.fusion_opt_torch(1e-2, routing=routing),
        params=True,
        exhaustive=True,
    ),
)

every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.exhaustive] if case.exhaustive else [])
        for case in ALL
    ],
    ids=str,
)
"""Parametrises a test by all cases."""


def factories() -> dict[str, Callable[..., Any]]:
    """Every public function that makes a transformation, by its name."""
    made = optax.GradientTransformationExtraArgs
    return {
        name: getattr(fo, name)
        for name in fo.__all__
        if getattr(free(getattr(fo, name)), "__annotations__", {}).get("return") is made
    }


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in ALL if case.name == name)


def parameters(dtype: Any = jnp.float32, *, matrices: bool = False) -> dict[str, Any]:
    """Stacked and single matrices, and unless told otherwise, vectors beside them."""
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        # Numbers that half precision holds exactly, whatever the dtype asked for.
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype)

    tree = {
        "blocks": {"kernel": draw(2, 16, 24)},
        "head": {"kernel": draw(24, 16)},
    }
    if not matrices:
        tree["blocks"]["bias"] = draw(2, 24)
        tree["head"]["bias"] = draw(16)
    return tree


def gradients(like: Any, seed: int = 2) -> Any:
    """Normal entries shaped like a tree of arrays; half precision holds them too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.bfloat16).astype(
            leaf.dtype
        ),
        like,
    )


def arguments(case: Case, value: float = 0.7) -> dict[str, Any]:
    """The extra arguments that a case cannot do without."""
    return {"value": jnp.asarray(value, jnp.float32)} if case.value else {}


@functools.cache
def transformation(case: Case) -> optax.GradientTransformationExtraArgs:
    """The case on `ROUTING`, built once."""
    return case.build(ROUTING)


@functools.cache
def update(case: Case) -> Callable[..., Any]:
    """Its compiled `update`, shared by all tests that use the same shapes."""
    return jax.jit(transformation(case).update)


@functools.cache
def start(case: Case) -> tuple[Any, Any, Any]:
    """Parameters, gradients and first state of a case, in float32."""
    params = parameters(matrices=case.matrices)
    return params, gradients(params), transformation(case).init(params)


@functools.cache
def first_update(case: Case) -> tuple[Any, Any]:
    """Updates and state after one step from `start`."""
    params, grads, state = start(case)
    return update(case)(grads, state, params, **arguments(case))


def inner_product(a: Any, b: Any) -> float:
    """The sum over all leaves of the products of entries."""
    return float(
        sum(
            np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64))
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
    )


def is_finite(tree: Any) -> bool:
    """Whether no leaf holds a NaN or an infinity."""
    return all(
        bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32))))
        for leaf in jax.tree.leaves(tree)
    )


def free(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without the checks that tests add to its annotations."""
    return inspect.unwrap(function)


def unchecked(factory: Any, *args: Any, **kwargs: Any) -> Any:
    """A function or class called without the checks that tests add to annotations.

    What is wrong in a call then meets the library's own error, as it does for users.
    """
    if not inspect.isclass(factory):
        return free(factory)(*args, **kwargs)
    made = object.__new__(factory)
    inspect.unwrap(factory.__init__)(made, *args, **kwargs)
    return made
