"""A fused weight of unequal parts is treated as its parts stored apart are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from fusionopt_jax.recipes import torch_release
from tests import _compare

SIZES = {"q": 9, "k": 6, "v": 6}

COMPONENTS = {
    "ns5": lambda routing: fo.ns5(routing=routing, bucketing="loop"),
    "ns5_batch": lambda routing: fo.ns5(
        routing=routing, bucketing="batch", scale="aspect"
    ),
    "ns5_leaf": lambda routing: fo.ns5(routing=routing, bucketing="leaf", scale="rms"),
    "normuon": lambda routing: fo.normuon(routing=routing),
    "snr_gate": lambda routing: fo.snr_gate(fo.ns5(routing=routing), routing=routing),
    "hyperball": lambda routing: fo.hyperball(
        fo.ns5(routing=routing), 0.1, routing=routing
    ),
    # Renewed at every step, for the phases of other steps depend on a leaf's name.
    "kl_shampoo": lambda routing: fo.kl_shampoo(
        routing=routing, update_every=1, bucketing="loop"
    ),
    "kl_shampoo_batch": lambda routing: fo.kl_shampoo(
        routing=routing, update_every=1, bucketing="batch"
    ),
    "shampoo": lambda routing: fo.shampoo(routing=routing, update_every=1),
    "unit_rows": lambda routing: torch_release._unit_rows(0.9, routing),
}


@pytest.mark.parametrize(
    "side", ["output", pytest.param("input", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("layers", [3, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "component",
    [
        pytest.param(
            name, marks=[pytest.mark.exhaustive] if name == "kl_shampoo_batch" else []
        )
        for name in COMPONENTS
    ],
)
def test_parts_are_matrices_of_their_own(rng, component, layers, side):
    axis = 2 if side == "output" else 1

    def drawn():
        shape = lambda size: (  # noqa: E731
            (layers, 6, size) if side == "output" else (layers, size, 6)
        )
        return {
            name: jnp.asarray(rng.normal(size=shape(size)), jnp.float32)
            for name, size in SIZES.items()
        }

    def fused(parts):
        return {"qkv": jnp.concatenate([parts[name] for name in SIZES], axis)}

    axes = fo.MatrixAxes(chunks=tuple(SIZES.values()), chunk_axis=side)
    rule = fo.Rule("qkv", "spectral", axes)
    whole = COMPONENTS[component](fo.Routing([rule], stacked=["qkv"]))
    rules = [fo.Rule(name, "spectral") for name in SIZES]
    apart = COMPONENTS[component](fo.Routing(rules, stacked=list(SIZES)))
    weights = drawn()
    state, states = whole.init(fused(weights)), apart.init(weights)
    update, updates = jax.jit(whole.update), jax.jit(apart.update)
    for _ in range(2):
        gradients = drawn()
        ours, new_state = update(fused(gradients), state, fused(weights))
        theirs, states = updates(gradients, states, weights)
        # Another program for the same float32 numbers, near 1.
        _compare.assert_within(ours["qkv"], fused(theirs)["qkv"], 2e-6)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        state = new_state
    kept = [np.size(leaf) for leaf in jax.tree.leaves(state)]
    assert sum(kept) == sum(np.size(leaf) for leaf in jax.tree.leaves(states)), (
        "the parts are remembered as often"
    )


def test_state_is_an_array_for_each_part():
    routing = fo.Routing([fo.Rule("w", "spectral", chunks=(9, 6, 6))])
    state = fo.normuon(routing=routing).init({"w": jnp.zeros((6, 21))})
    shapes = [part.shape for part in state.second_moment["w"]]
    assert shapes == [(1, 9), (1, 6), (1, 6)]


def test_a_composition_trains_such_a_leaf():
    """Masks, Schedule-Free and the step size are around tuples in the state."""
    routing = fo.Routing([fo.Rule("w", "spectral", chunks=(9, 6, 6))])
    tx = fo.fusion_opt(0.05, routing=routing)
    params = {"w": jnp.ones((6, 21)), "b": jnp.ones(21)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: optax.tree.norm(p, squared=True))(
            params
        )
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(3):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
