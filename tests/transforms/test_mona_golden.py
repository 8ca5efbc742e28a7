"""`mona` against FusionOpt's two-buffer form and the paper's equations."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare, _golden, _replay
from tests.references import mona


def accelerated(tx, grads):
    """What a transformation makes of a history of gradients, at every step."""
    zeros = {name: np.zeros_like(stack[0]) for name, stack in grads.items()}
    paths, _, _ = _replay.run(tx, zeros, grads)
    # The updates were added up from zero.
    return {name: np.diff(path, axis=0, prepend=0.0) for name, path in paths.items()}


@pytest.mark.parametrize(
    "case", ["fusion_ns5-mona", "fusion_ns5-normuon-sf-mona", "fusion_full_period3"]
)
def test_acceleration_of_fusion_opt(case):
    golden = _golden.load(case)
    alpha = golden.extra["defaults"]["mona_alpha"]
    tx = fo.mona(alpha=alpha, b1=golden.extra["defaults"]["beta_n"])
    grads = {name: golden.grads[name] for name in golden.state["A"]}
    state = tx.init({name: jnp.asarray(g[0]) for name, g in grads.items()})
    for step in range(_golden.STEPS):
        gradient = {name: jnp.asarray(g[step]) for name, g in grads.items()}
        update, state = tx.update(gradient, state)
    for name, expected in golden.state["A"].items():
        acceleration = (np.asarray(update[name]) - gradient[name]) / alpha
        # Entries near 4, of which alpha = 0.2 leaves a fifth beside the gradient: a few
        # units of 2^-22, divided by alpha again.
        _compare.assert_within(acceleration, expected, 1e-5, name)


@pytest.mark.parametrize("alpha", [0.2, -5.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_follows_the_equations(alpha, weighted):
    golden = _golden.load("fusion_ns5-mona")
    ours = accelerated(fo.mona(alpha=alpha, b1=0.975, weighted=weighted), golden.grads)
    for name, grads in golden.grads.items():
        expected, _ = mona.trajectory(grads, alpha=alpha, beta=0.975, weighted=weighted)
        # float32 sums of the updates, which reach |alpha| times 30.
        tolerance = 1e-5 * (1 + abs(alpha))
        _compare.assert_within(ours[name], expected, tolerance, name)


def test_one_buffer_shaped_like_the_parameters():
    params = {"w": jnp.ones((3, 4), jnp.bfloat16)}
    state = fo.mona().init(params)
    assert state.gradient_average["w"].shape == (3, 4)
    assert state.gradient_average["w"].dtype == jnp.float32
    assert len(optax.tree.get_all_with_path(state, "gradient_average")) == 1
