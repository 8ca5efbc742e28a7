"""What may stand inside `schedule_free`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare

PARAMS = {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)}
LABELS = {"kernel": "spectral", "bias": "scalar"}
RULED = fo.Routing([fo.Rule("^kernel$", label="spectral")], min_dim=8)


def grouped(spectral, scalar, labels=LABELS):
    return optax.multi_transform({"spectral": spectral, "scalar": scalar}, labels)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "sgd": lambda: optax.sgd(0.1),
    "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
    "clipped": lambda: optax.chain(optax.clip(1.0), optax.adam(1e-3)),
    "warmed up": lambda: optax.adam(optax.linear_schedule(0.0, 1e-3, 10)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "recipe": lambda: fo.fusion_opt(1e-3, components={"ns5"}, polyak_rule=None),
    "hyperball": lambda: fo.hyperball(optax.identity(), 0.1),
    "of the loss": lambda: fo.polyak(optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_complete_optimizer_is_refused_when_it_is_built(name):
    with pytest.raises(ValueError, match="goes against the gradient"):
        fo.schedule_free(OPTIMIZERS[name](), 1.0)


@pytest.mark.parametrize("labels", [LABELS, RULED.labels], ids=["tree", "function"])
def test_one_in_a_group_is_refused_once_the_leaves_are_known(labels):
    # Such labels fit one tree alone, so that nothing can be tried before.
    tx = fo.schedule_free(grouped(optax.identity(), optax.adam(1e-3), labels), 1.0)
    with pytest.raises(ValueError, match="goes against the gradient"):
        jax.eval_shape(tx.init, PARAMS)


DIRECTIONS = {
    "identity": optax.identity,
    "adam": optax.scale_by_adam,
    "decayed": lambda: optax.chain(
        optax.scale_by_adam(), optax.add_decayed_weights(10.0)
    ),
    "nothing": optax.set_to_zero,
    "noisy": lambda: optax.chain(optax.identity(), optax.add_noise(1.0, 0.5, key=0)),
    "grouped": lambda: grouped(
        optax.chain(optax.trace(0.9), fo.ns5()), optax.scale_by_adam()
    ),
    "routed": lambda: grouped(
        fo.ns5(routing=RULED), optax.scale_by_adam(), RULED.labels
    ),
    "preconditioned": lambda: grouped(fo.kl_shampoo(fo.mona()), optax.identity()),
    "cautious": lambda: fo.cautious(optax.trace(0.9)),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_are_accepted(name):
    tx = fo.schedule_free(DIRECTIONS[name](), 0.1)
    jax.eval_shape(tx.init, PARAMS)
    jax.jit(tx.init)(PARAMS)


def test_matrices_without_a_routing_are_tried_as_well():
    fo.schedule_free(fo.ns5(), 0.1)
    with pytest.raises(ValueError, match="goes against the gradient"):
        fo.schedule_free(optax.chain(fo.ns5(), optax.scale(-0.1)), 1.0)


def test_what_needs_more_than_a_gradient_is_taken_at_its_word():
    def update(updates, state, params, *, needed):
        return jax.tree.map(lambda u: needed * u, updates), state

    init = lambda params: optax.EmptyState()  # noqa: E731
    inner = optax.GradientTransformationExtraArgs(init, update)
    tx = fo.schedule_free(inner, 0.1)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, needed=2.0)
    # The first average is the fast iterate: one step of 0.1 * 2.
    np.testing.assert_allclose(updates["bias"], -0.2, rtol=1e-6)


def test_the_lines_that_migrate_give_the_same_steps():
    theirs = optax.contrib.schedule_free(
        optax.adam(0.1, b1=0.0), learning_rate=0.1, b1=0.9
    )
    ours = fo.schedule_free(optax.scale_by_adam(b1=0.0), learning_rate=0.1, b1=0.9)
    results = []
    for tx in (theirs, ours):
        params, state = PARAMS, tx.init(PARAMS)
        for scale in (1.0, -0.5, 2.0):
            grads = jax.tree.map(lambda p, s=scale: s * p, PARAMS)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    # Numbers near one, a few roundings in three steps.
    _compare.assert_trees_within(*results, 1e-6)
