"""`fusion_opt_torch` beyond its recordings: layout, groups, late losses, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusionopt_jax import Routing, fusion_opt_torch
from tests import _compare, _golden, _replay


def transposed(arrays, rank):
    """The arrays of one rank with their last two axes exchanged."""
    return {
        name: np.swapaxes(array, -1, -2) if array.ndim == rank else array
        for name, array in arrays.items()
    }


def test_routing_by_the_published_arguments():
    golden = _golden.load("fusion_ns5-normuon-sf")
    tx = fusion_opt_torch(
        components=golden.extra["components"], min_spectral_dim=4, **golden.hyper
    )
    paths, _, _ = _replay.run(
        tx,
        transposed(golden.params0, rank=2),
        transposed(golden.grads, rank=3),
        value=golden.scalars["loss"],
    )
    # Flax kernels are the transposes of PyTorch's weights, and so are their paths.
    _compare.assert_follows(golden, transposed(paths, rank=3))


def test_groups_have_learning_rates_and_decays_of_their_own():
    params = {"kernel": jnp.eye(4), "bias": jnp.full(4, 2.0)}
    tx = fusion_opt_torch(
        1.0,
        components=(),
        mu=0.0,
        beta1=0.0,
        beta2=0.0,
        eps=0.0,
        min_spectral_dim=4,
        spectral_lr=0.5,
        scalar_lr=lambda count: 0.25 / (1 + count),
        spectral_wd=0.1,
        scalar_wd=0.2,
    )
    gradient = {"kernel": jnp.full((4, 4), 3.0), "bias": jnp.full(4, -7.0)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    # Without components the matrices take the momentum, here the gradient; Adam without
    # memory takes its sign. Each direction gets its decay, then its rate; float32.
    _compare.assert_trees_within(
        updates,
        {
            "kernel": -0.5 * (3.0 + 0.1 * np.eye(4)),
            "bias": np.full(4, -0.25 * (-1.0 + 0.2 * 2.0)),
        },
        1e-6,
    )


def test_a_first_loss_after_steps_without_one_starts_its_average():
    params = {"kernel": jnp.eye(4)}
    tx = fusion_opt_torch(0.1, components={"sf"}, min_spectral_dim=4)
    gradient = {"kernel": jnp.ones((4, 4))}
    _, state = tx.update(gradient, tx.init(params), params)
    assert float(state.step_size) == 1.0
    _, state = tx.update(gradient, state, params, value=3.0)
    # Both averages start at their first value: 3 over a mean size of 1, in float32.
    np.testing.assert_allclose(state.step_size, 3.0, rtol=1e-6)
    np.testing.assert_allclose(state.loss_average, 3.0, rtol=1e-6)


def test_adam_is_exact_from_the_first_step():
    params = {"bias": jnp.zeros(3)}
    tx = fusion_opt_torch(1.0, components=(), eps=0.0)
    gradient = {"bias": jnp.array([1e-3, 1.0, -1e3])}
    updates, _ = tx.update(gradient, tx.init(params), params)
    # Bias-corrected, the first step is the sign. Two units in the last place: Optax's
    # own correction is 6e-6 away.
    np.testing.assert_allclose(updates["bias"], [-1.0, -1.0, 1.0], rtol=2.5e-7)


def test_all_components_are_the_default():
    params = {"kernel": jnp.ones((128, 128))}
    tree = jax.eval_shape(fusion_opt_torch().init, params)
    for kind in ("MONAState", "ShampooState", "NS5State", "RowScaleState"):
        assert optax.tree.get(tree, kind) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": {"ns5", "norm"}}, "normuon"),
        ({"components": "ns5"}, "set of names"),
        ({"hot_dtype": "float32"}, "hot_dtype"),
        ({"beta_r": 1.0}, "beta_r"),
        ({"eigen_period": 0}, "eigen_period"),
        ({"lr": -1.0}, "lr"),
        ({"routing": Routing(), "force_scalar": ["head"]}, "force_scalar"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fusion_opt_torch(**settings)


def test_components_are_those_of_the_release():
    # What `fusion_opt` has learnt since would have no effect.
    with pytest.raises(ValueError, match=r"`components`.*'cautious'"):
        fusion_opt_torch(components={"ns5", "cautious"})
