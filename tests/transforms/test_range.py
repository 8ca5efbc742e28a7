"""Gradients far from 1: what is free of their scale stays so, and nothing overflows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare

COMPONENTS = {
    "ns5": fo.ns5,
    "ns5_aol": lambda: fo.ns5(preconditioner="aol", steps=4, scale="rms"),
    "normuon": lambda: optax.chain(fo.ns5(), fo.normuon()),
    "hyperball": lambda: fo.hyperball(optax.trace(0.9), 0.1),
    "snr_gate": lambda: fo.snr_gate(optax.chain(optax.trace(0.9), fo.ns5())),
    "snr_gate_entry": lambda: fo.snr_gate(fo.ns5(), unit="entry"),
}


def run(component, gradients):
    tx = COMPONENTS[component]()
    params = {"w": jnp.eye(6, 8)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates = []
    for gradient in gradients:
        new, state = update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        updates.append(np.asarray(new["w"]))
    return np.stack(updates), state


@pytest.mark.parametrize("scale", [1e20, 1e30])
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_scale_of_all_gradients_changes_nothing(rng, component, scale):
    gradients = rng.normal(size=(3, 6, 8))
    expected, _ = run(component, gradients)
    updates, state = run(component, scale * gradients)
    # Float32 gradients rounded at another scale, and 1e-7 beside a norm near 7.
    _compare.assert_within(updates, expected, 2e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_huge_entry_leaves_everything_finite(rng, component):
    gradients = rng.normal(size=(3, 6, 8))
    gradients[1, 2, 3] = 1e30
    updates, state = run(component, gradients)
    assert np.isfinite(updates).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
