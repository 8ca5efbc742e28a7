"""`snr_gate` against its equations; signal passes, noise meets the known level."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare
from tests.references import stabilisers

SHAPE = (6, 8)


@pytest.mark.parametrize("unit", ["neuron", "entry"])
def test_follows_the_equations(rng, unit):
    settings = {"floor": 0.3, "power": 2.0}
    tx = fo.snr_gate(optax.trace(0.9), b1=0.8, unit=unit, **settings)
    reference = stabilisers.SignalToNoiseGate(
        SHAPE, by_neuron=unit == "neuron", decay=0.8, **settings
    )
    update = jax.jit(tx.update)
    state = tx.init({"w": jnp.zeros(SHAPE)})
    momentum = np.zeros(SHAPE)
    for _ in range(6):
        gradient = rng.normal(size=SHAPE).astype(np.float32)
        momentum = 0.9 * momentum + gradient
        gate = reference.next(np.asarray(gradient, np.float64))
        ours, state = update({"w": jnp.asarray(gradient)}, state)
        # float32 averages of entries near 1, times a momentum near 3.
        _compare.assert_within(ours["w"], momentum * gate, 1e-5)
        np.testing.assert_allclose(state.gate, gate.mean(), rtol=1e-5)


def test_a_steady_gradient_passes_unchanged(rng):
    gradient = {"w": jnp.asarray(rng.normal(size=SHAPE), jnp.float32)}
    tx = fo.snr_gate(optax.identity())
    state = tx.init(gradient)
    for _ in range(4):
        update, state = tx.update(gradient, state)
        # The ratio of two equal float32 numbers, computed apart.
        np.testing.assert_allclose(update["w"], gradient["w"], rtol=1e-6)


def test_independent_noise_settles_at_the_known_level(rng):
    tx = fo.snr_gate(optax.identity())
    noise = jnp.asarray(rng.normal(size=(60, 64, 256)), jnp.float32)
    start = tx.init({"w": noise[0]})
    step = lambda state, g: (tx.update({"w": g}, state)[1], None)  # noqa: E731
    state, _ = jax.jit(lambda start: jax.lax.scan(step, start, noise))(start)
    # The square of the ratio is (1 - b) / (1 + b) up to the sampling of 64 inputs and
    # 10 effective steps, 3 % for one neuron and far less in the mean over 256; the root
    # of a spread lies below the root of its mean by under 1 %.
    np.testing.assert_allclose(state.gate, np.sqrt(0.1 / 1.9), rtol=0.02)


def test_neurons_are_those_of_the_routing(rng):
    gradients = rng.normal(size=(3, 2, *SHAPE)).astype(np.float32)
    plain = fo.snr_gate(optax.identity())
    routed = fo.snr_gate(optax.identity(), routing=fo.Routing(layout="out_in"))
    state = plain.init({"w": jnp.zeros(SHAPE)})
    turned = routed.init({"w": jnp.zeros(SHAPE[::-1])})
    for gradient in gradients[:, 0]:
        ours, state = plain.update({"w": jnp.asarray(gradient)}, state)
        theirs, turned = routed.update({"w": jnp.asarray(gradient.T)}, turned)
    np.testing.assert_array_equal(ours["w"].T, theirs["w"])


def test_silent_neurons_get_the_floor():
    gradient = {"w": jnp.zeros((3, 2)).at[0, 0].set(1.0)}
    tx = fo.snr_gate(
        optax.stateless(lambda g, _: jax.tree.map(jnp.ones_like, g)), floor=0.25
    )
    update, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(update["w"], np.array([[1.0, 0.25]] * 3), rtol=1e-6)


def test_updates_keep_their_dtype():
    gradient = {"w": jnp.ones((3, 2), jnp.bfloat16)}
    tx = fo.snr_gate(optax.identity())
    update, state = tx.update(gradient, tx.init(gradient))
    assert update["w"].dtype == jnp.bfloat16
    assert state.gradient_average["w"].dtype == jnp.float32


def test_a_vector_has_no_neurons():
    with pytest.raises(ValueError, match="snr_gate"):
        fo.snr_gate(optax.identity()).init({"bias": jnp.ones(3)})


@pytest.mark.parametrize("bad", [{"b1": 1.0}, {"floor": 1.5}, {"power": 0.0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        fo.snr_gate(optax.identity(), **bad)
