"""What Optax asks of every contributed optimiser, asked of ours.

Unknown extra arguments, one compile, `MultiSteps` and updates in the parameters' dtypes
are in `test_contract.py`, which goes through the same list.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo
from fusionopt_jax import iterates
from fusionopt_jax._types import ScalarOrSchedule
from tests import _cases, _compare

STEPS = 2000
ROUTING = fo.Routing(min_dim=2)


@dataclasses.dataclass(frozen=True)
class Target:
    """A function with one known minimum of value zero."""

    first: dict[str, Any]
    best: dict[str, Any]
    loss: Callable[[Any], Any]


def distance_to(best):
    """The sum of squares of the differences to a tree."""
    return lambda params: sum(
        jnp.sum((params[name] - jnp.asarray(best[name])) ** 2) for name in best
    )


def parabola_from(first, best):
    return Target(first, best, distance_to(best))


TARGETS = {
    "parabola": parabola_from({"x": [-1.0, 10.0, 1.0]}, {"x": [1.0, -1.0, 1.0]}),
    "rosenbrock": Target(
        {"x": [0.0, 0.0]},
        {"x": [1.0, 1.0]},
        lambda p: (1 - p["x"][0]) ** 2 + 100 * (p["x"][1] - p["x"][0] ** 2) ** 2,
    ),
    "matrix": parabola_from(
        {"w": [[0.0, 0.0], [0.0, 0.0]]}, {"w": [[3.0, -2.0], [1.0, 4.0]]}
    ),
    "mixed": parabola_from(
        {"x": [0.0, 0.0, 0.0], "w": [[0.0, 0.0], [0.0, 0.0]]},
        {"x": [1.0, -1.0, 2.0], "w": [[1.0, 0.0], [-1.0, 1.0]]},
    ),
}


def square(x):
    """The square of an absolute value; `abs` has no gradient at zero."""
    return jnp.real(x * jnp.conj(x))


COMPLEX_TARGETS = {
    "parabola": Target(
        {"x": [-1.0 + 0j, 10.0, 1.0]},
        {"x": [1.0 + 1j, -1.0 - 1j, 1.0 + 1j]},
        lambda p: jnp.sum(square(p["x"] - jnp.array([1 + 1j, -1 - 1j, 1 + 1j]))),
    ),
    "rosenbrock": Target(
        {"x": [0j, 0.0]},
        {"x": [1.0 + 1j, (1.0 + 1j) ** 2]},
        lambda p: square(1 + 1j - p["x"][0]) + 100 * square(p["x"][1] - p["x"][0] ** 2),
    ),
}


def falling(rate):
    """A learning rate that ends at zero, so that a fixed step size can settle."""
    return optax.linear_schedule(rate, 0.0, STEPS)


def adam(b1=0.9):
    return optax.scale_by_adam(b1=b1, b2=0.99)


def descending(direction, rate):
    return optax.chain(direction, optax.scale_by_learning_rate(falling(rate)))


def on_matrices(direction, rate):
    """A direction for the matrices; Adam for the rest."""
    return optax.multi_transform(
        {"spectral": descending(direction, rate), "scalar": descending(adam(), 0.1)},
        ROUTING.labels,
    )


OPTIMIZERS = {
    "ns5": lambda: on_matrices(fo.ns5(), 0.02),
    "normuon": lambda: on_matrices(optax.chain(fo.ns5(), fo.normuon()), 0.02),
    "kl_shampoo": lambda: on_matrices(fo.kl_shampoo(optax.trace(0.5)), 0.02),
    "shampoo": lambda: on_matrices(
        # Ten steps old, the powers of the first gradients are those of another scale.
        fo.shampoo(optax.trace(0.5), update_every=1),
        0.02,
    ),
    "quantize_state": lambda: descending(
        fo.quantize_state(adam(), {"mu": "int8", "nu": "bf16"}), 0.1
    ),
    "snr_gate": lambda: on_matrices(fo.snr_gate(fo.ns5()), 0.05),
    "hyperball": lambda: optax.multi_transform(
        {
            # From a start at zero it takes plain steps.
            "spectral": fo.hyperball(optax.identity(), falling(0.1)),
            "scalar": descending(adam(), 0.1),
        },
        ROUTING.labels,
    ),
    "mona": lambda: descending(optax.chain(fo.mona(), adam()), 0.1),
    "cautious": lambda: descending(fo.cautious(adam()), 0.1),
    "add_cautious_decayed_weights": lambda: descending(
        optax.chain(adam(), fo.add_cautious_decayed_weights(1e-4)), 0.1
    ),
    "measure_gain": lambda: descending(fo.measure_gain("adam", adam()), 0.1),
    "accumulate": lambda: fo.accumulate(descending(adam(), 0.2), every=2),
    "schedule_free": lambda: fo.schedule_free(adam(0.0), 0.05, r=4.0),
    "polyak": lambda: fo.polyak(descending(adam(), 0.1), b1=0.9),
    "autoscale": lambda: fo.autoscale(descending(adam(), 0.1), first=1e-3),
    "polyak_schedule_free_plus": lambda: fo.polyak(
        fo.schedule_free(adam(0.0), 0.3, r=4.0), rule="schedule_free_plus"
    ),
    "fusion_opt": lambda: fo.fusion_opt(0.1, routing=ROUTING, weight_decay=0.0),
    "fusion_opt_muon": lambda: fo.fusion_opt(
        falling(0.1),
        routing=ROUTING,
        components={"ns5"},
        weight_decay=0.0,
        polyak_rule=None,
    ),
    "fusion_opt_shampoo": lambda: fo.fusion_opt(
        0.1,
        routing=ROUTING,
        components={"ns5", "normuon", "sf", "mona", "shampoo"},
        weight_decay=0.0,
    ),
    "kl_shampoo_torch": lambda: optax.multi_transform(
        {
            "spectral": fo.kl_shampoo_torch(
                falling(0.02), betas=(0.5, 0.98), weight_decay=0.0, routing=ROUTING
            ),
            "scalar": descending(adam(), 0.1),
        },
        ROUTING.labels,
    ),
    "fusion_opt_torch": lambda: fo.fusion_opt_torch(
        # Closer to the fast iterate than by default, as the average lags in a valley.
        0.05,
        beta=0.5,
        routing=ROUTING,
        spectral_wd=0.0,
    ),
}


def minimise(name, targets):
    """Parameters to deploy after a few thousand steps, for several targets at once."""
    tx = OPTIMIZERS[name]()

    def run(target):
        params = jax.tree.map(
            jnp.asarray, target.first, is_leaf=lambda node: isinstance(node, list)
        )

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(target.loss)(params)
            # JAX's gradient of a complex number is the conjugate of the steepest way.
            grads = jax.tree.map(jnp.conj, grads)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return (
            fo.eval_params(state, params)
            if iterates.schedule_free_states(state)
            else params
        )

    return jax.jit(lambda: {key: run(target) for key, target in targets.items()})()


def test_every_transformation_converges():
    assert {_cases.named(name).factory for name in OPTIMIZERS} == set(
        _cases.factories()
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_converges_on_four_targets(name):
    check_minima(name, TARGETS)


@pytest.mark.parametrize(
    "name",
    [case.name for case in _cases.ALL if case.name in OPTIMIZERS and case.complex_too],
)
def test_converges_on_complex_targets(name):
    check_minima(name, COMPLEX_TARGETS)


def check_minima(name, targets):
    """Require that an optimiser comes to the minimum of every target."""
    for key, params in minimise(name, targets).items():
        for leaf, best in targets[key].best.items():
            # Optax's own tolerance, absolute and relative.
            np.testing.assert_allclose(
                params[leaf], best, rtol=3e-2, atol=3e-2, err_msg=f"{key} {leaf}"
            )


# How a case is built by its factory, for `optax.inject_hyperparams` to call: arguments,
# and those of them that shape the program.
INJECTED = {
    "ns5": (fo.ns5, {"steps": 3, "scale": "rms"}, ("steps",)),
    "ns5_routed": (fo.ns5, {"routing": _cases.ROUTING, "audit_every": 2}, ()),
    "normuon": (fo.normuon, {"routing": _cases.ROUTING}, ()),
    "mona": (fo.mona, {}, ()),
    "kl_shampoo": (
        fo.kl_shampoo,
        {"routing": _cases.ROUTING, "sides": "both", "update_every": 2},
        (),
    ),
    "shampoo": (fo.shampoo, {"routing": _cases.ROUTING}, ()),
    "kl_shampoo_torch": (
        fo.kl_shampoo_torch,
        {"lr": 0.1, "routing": _cases.ROUTING, "betas": (0.9, 0.98)},
        ("betas",),
    ),
    "snr_gate": (fo.snr_gate, {"inner": fo.mona(), "routing": _cases.ROUTING}, ()),
    "add_cautious_decayed_weights": (
        fo.add_cautious_decayed_weights,
        {"weight_decay": 0.1},
        (),
    ),
    "hyperball": (
        fo.hyperball,
        {"inner": fo.mona(), "learning_rate": 0.1, "routing": _cases.ROUTING},
        (),
    ),
    "accumulate": (fo.accumulate, {"tx": optax.sgd(0.1), "every": 1}, ()),
    "schedule_free": (
        fo.schedule_free,
        {"inner": fo.mona(), "learning_rate": 0.1, "b1_max": 0.95},
        (),
    ),
    "polyak": (fo.polyak, {"inner": optax.sgd(0.1)}, ()),
    "autoscale": (fo.autoscale, {"inner": optax.sgd(0.1), "first": 1e-2}, ()),
    "fusion_opt": (
        fo.fusion_opt,
        {
            "learning_rate": 0.1,
            "routing": _cases.ROUTING,
            "scalar_learning_rate": 0.05,
            "settings": {"ns5": {"steps": 3}},
        },
        (),
    ),
    "fusion_opt_torch": (
        fo.fusion_opt_torch,
        {"lr": 0.1, "routing": _cases.ROUTING},
        ("min_spectral_dim",),
    ),
}


# Their only arguments are a transformation and names.
NOTHING_TO_INJECT = {"cautious", "measure_gain", "quantize_state"}


def test_every_transformation_with_settings_is_injected():
    injected = {factory.__name__ for factory, _, _ in INJECTED.values()}
    assert injected == set(_cases.factories()) - NOTHING_TO_INJECT


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_change_nothing(name):
    case = _cases.named(name)
    factory, settings, static = INJECTED[name]
    plain = factory(**settings)
    injected = optax.inject_hyperparams(factory, static_args=static)(**settings)
    params, grads, _ = _cases.start(case)

    @jax.jit
    def both():
        results = []
        for tx in (plain, injected):
            tx = optax.with_extra_args_support(tx)
            state = tx.init(params)
            updates, state = tx.update(grads, state, params, value=jnp.asarray(0.7))
            results.append((updates, getattr(state, "inner_state", state)))
        return results[0], (results[1][0], results[1][1])

    (updates, _), (injected_updates, _) = both()
    # Settings rounded to float32, in another program.
    _compare.assert_trees_within(injected_updates, updates, 1e-5)
    # What names axes, dtypes or functions stays out of the state.
    state = jax.eval_shape(injected.init, params)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(state.hyperparams))
    for outside in ("routing", "inner", "tx", "components", *static):
        assert outside not in state.hyperparams


def test_an_injected_learning_rate_can_be_a_schedule():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    tx = optax.inject_hyperparams(fo.schedule_free)(
        inner=optax.identity(), learning_rate=schedule, b1=0.0, keep_average=True
    )
    state, moved = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        moved.append(float(updates["w"][0]))
        params = optax.apply_updates(params, updates)
    # b1 = 0 trains the fast iterate itself.
    np.testing.assert_allclose(moved, [-1.0, -0.75, -0.5], rtol=1e-6)


STABLE = [
    (case, dtype)
    for case in _cases.ALL
    for dtype in (
        *("float16", "bfloat16", "float32", "float64"),
        *(("complex64", "complex128") if case.complex_too else ()),
    )
]


@pytest.mark.parametrize(("case", "dtype"), STABLE, ids=str)
def test_state_is_stable_under_a_cond(case, dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        params = _cases.parameters(jnp.dtype(dtype), matrices=case.matrices)
        # Built anew, as nothing may be remembered from another precision.
        tx = case.build(_cases.ROUTING)
        state = jax.eval_shape(tx.init, params)

        def step(flag, state):
            return jax.lax.cond(
                flag,
                lambda s: tx.update(params, s, params, **_cases.arguments(case)),
                lambda s: (params, s),
                state,
            )

        # The branches agree in every shape, dtype and weak type, or this raises.
        updates, after = jax.eval_shape(step, jnp.asarray(True), state)
        described = lambda tree: jax.tree.map(  # noqa: E731
            lambda leaf: (leaf.shape, leaf.dtype), tree
        )
        assert described(after) == described(state)
        assert described(updates) == described(jax.eval_shape(lambda: params))


WITH_A_RATE = {
    "schedule_free": lambda rate: fo.schedule_free(fo.mona(), rate),
    "hyperball": lambda rate: fo.hyperball(fo.mona(), rate, routing=_cases.ROUTING),
    "add_cautious_decayed_weights": fo.add_cautious_decayed_weights,
    "fusion_opt": lambda rate: fo.fusion_opt(
        rate, scalar_learning_rate=rate, routing=_cases.ROUTING
    ),
    "fusion_opt_muon": lambda rate: fo.fusion_opt(
        rate, routing=_cases.ROUTING, components={"ns5"}, polyak_rule=None
    ),
    "kl_shampoo_torch": lambda rate: fo.kl_shampoo_torch(rate, routing=_cases.ROUTING),
    "fusion_opt_torch": lambda rate: fo.fusion_opt_torch(
        rate, scalar_lr=rate, routing=_cases.ROUTING
    ),
}


def test_every_transformation_with_a_rate_is_given_a_schedule():
    with_a_rate = {
        name
        for name, factory in _cases.factories().items()
        if ScalarOrSchedule in factory.__annotations__.values()
    }
    listed = {_cases.named(case).factory for case in WITH_A_RATE}
    assert listed == with_a_rate


@pytest.mark.parametrize("name", WITH_A_RATE)
def test_a_constant_schedule_is_a_constant(name):
    case = _cases.named(name)
    params, grads, _ = _cases.start(case)

    @jax.jit
    def both():
        results = []
        for rate in (0.1, optax.constant_schedule(0.1)):
            tx = WITH_A_RATE[name](rate)
            updates, _ = tx.update(
                grads, tx.init(params), params, **_cases.arguments(case)
            )
            results.append(updates)
        return results

    # The same arithmetic twice in one program.
    _compare.assert_trees_within(*both(), 1e-6)


# A bare array, as in Optax's tests of sharding: a stack of matrices.
STACK = fo.Routing([fo.Rule("", axes=fo.MatrixAxes(1, 2))], min_dim=2)


@_cases.every_case
def test_init_takes_a_bare_shape(case):
    tx = case.build(STACK)
    shape = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    made = tx.init(shape)
    expected = jax.eval_shape(tx.init, shape)
    assert jax.tree.structure(made) == jax.tree.structure(expected)


@_cases.every_case
def test_the_sharding_of_the_state_is_its_type(case):
    mesh = jax.make_mesh((8,), ("x",))
    with jax.set_mesh(mesh):
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=P(None, "x"))
        tx = case.build(STACK)
        types = lambda tree: jax.tree.map(jax.typeof, tree)  # noqa: E731
        update = lambda state: tx.update(  # noqa: E731
            params, state, params, **_cases.arguments(case)
        )
        state = tx.init(params)
        updates, after = update(state)
        assert types(after) == types(state)
        assert types(updates) == types(params)
        # The same compiled, in one program.
        compiled = jax.jit(lambda params: (tx.init(params), update(state)))
        assert types(compiled(params)) == types((state, (updates, after)))
