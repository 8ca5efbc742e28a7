"""Compose an optimiser out of its pieces, and read what each of them does.

    python examples/01_compose.py

Fits a two-layer network to a teacher, first with the recipe, then with the same pieces
put together by hand (the updates are identical), then with a piece exchanged.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo

WIDTH, STEPS = 128, 60


def init(seed):
    """A network with two matrices and two biases."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        name: {
            "kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5,
            "bias": jnp.zeros(WIDTH),
        }
        for name, key in zip(("hidden", "out"), keys, strict=True)
    }


def predict(params, inputs):
    """The network's outputs."""
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def by_hand(routing, spectral_momentum):
    """SF-NorMuon from its pieces, with a momentum of choice."""
    spectral = optax.chain(
        spectral_momentum,
        fo.ns5(routing=routing, coefficients="polar_express", scale="rms", eps=1e-12),
        fo.normuon(routing=routing),
        optax.add_decayed_weights(0.2),
    )
    groups = optax.multi_transform(
        {"spectral": spectral, "scalar": optax.scale_by_adam(b1=0.9, b2=0.99)},
        routing.labels,
    )
    return fo.schedule_free(groups, learning_rate=8e-3, b1=0.6, r=2.0)


def train(tx):
    """Fit the teacher; returns the deployed parameters, the state and the last loss."""
    teacher, params = init(seed=1), init(seed=0)
    state = tx.init(params)

    def loss_fn(params, inputs):
        return jnp.mean((predict(params, inputs) - predict(teacher, inputs)) ** 2)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        inputs = jax.random.normal(key, (64, WIDTH))
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for key in jax.random.split(jax.random.key(2), STEPS):
        params, state, _ = step(params, state, key)
    deployed = fo.eval_params(state, params)
    inputs = jax.random.normal(jax.random.key(3), (256, WIDTH))
    return deployed, state, float(loss_fn(deployed, inputs))


def main():
    """Train three ways and print what happened."""
    routing = fo.Routing()
    print(routing.table(init(seed=0)), end="\n\n")

    recipe, state, loss = train(fo.fusion_opt(8e-3, routing=routing))
    print(f"recipe:                 loss {loss:.4f}")
    print(f"  after {int(state.count)} steps")

    momentum = optax.trace(0.8, nesterov=True)
    composed, _, loss = train(by_hand(routing, momentum))
    apart = max(
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(jax.tree.leaves(recipe), jax.tree.leaves(composed), strict=True)
    )
    print(f"the same by hand:       loss {loss:.4f}, parameters apart by {apart:g}")

    accelerated = optax.chain(fo.mona(alpha=0.2), momentum)
    _, _, loss = train(by_hand(routing, accelerated))
    print(f"with MONA before it:    loss {loss:.4f}")


if __name__ == "__main__":
    main()
