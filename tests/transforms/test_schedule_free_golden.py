"""`schedule_free` around Optax pieces, against the published optimisers."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare, _golden, _replay


def warmed_up(hyper):
    """The published learning rate: linear over the first steps, then constant."""
    return lambda count: (
        hyper["lr"] * jnp.minimum(1.0, (count + 1) / hyper["warmup_steps"])
    )


def adamw(hyper, *, inner_params):
    """Schedule-Free AdamW; the decay acts on what `inner_params` names."""
    direction = optax.scale_by_adam(
        b1=hyper.get("inner_momentum", 0.0), b2=hyper["betas"][1], eps=hyper["eps"]
    )
    return fo.schedule_free(
        optax.chain(direction, optax.add_decayed_weights(hyper["weight_decay"])),
        warmed_up(hyper),
        b1=hyper["betas"][0],
        r=hyper["r"],
        weight_lr_power=hyper["weight_lr_power"],
        inner_params=inner_params,
    )


def adamw_of_the_paper(hyper):
    """The first published code: Adam's bias correction sits in the learning rate."""
    warm = warmed_up(hyper)
    beta2 = hyper["betas"][1]
    direction = optax.scale_by_rms(
        decay=beta2, eps=hyper["eps"], eps_in_sqrt=False, bias_correction=False
    )
    return fo.schedule_free(
        optax.chain(direction, optax.add_decayed_weights(hyper["weight_decay"])),
        lambda count: warm(count) * jnp.sqrt(1 - beta2 ** (count + 1.0)),
        b1=hyper["betas"][0],
        inner_params="gradient",
    )


def sgd(hyper):
    """Schedule-Free SGD: its `momentum` is the interpolation."""
    return fo.schedule_free(
        optax.add_decayed_weights(hyper["weight_decay"]),
        warmed_up(hyper),
        b1=hyper["momentum"],
        inner_params="gradient",
    )


def optimizer(method, hyper):
    """The composition that says the same as a published class."""
    if "sgd" in method:
        return sgd(hyper)
    if "paper" in method:
        return adamw_of_the_paper(hyper)
    # The published code decays at y, the point of the gradient, unless told otherwise.
    return adamw(hyper, inner_params="fast" if "decay_at_z" in method else "gradient")


@functools.cache
def trajectory(method):
    """The run of one composition; the recordings of a method share all settings."""
    recorded = {
        "sf_adamw": "sf_adamw_reference",
        "sf_adamw_decay_at_z_inner": "sf_adamw_reference_decay_at_z_inner",
        "sf_sgd": "sf_sgd_reference",
    }
    golden = _golden.load(recorded.get(method, method))
    tx = optimizer(method, golden.hyper)
    return _replay.run(tx, golden.params0, golden.grads)


@pytest.mark.parametrize(
    "case",
    [
        "sf_adamw_reference",
        "sf_adamw_reference_decay_at_z_inner",
        "sf_adamw_fast",
        "sf_adamw_fast_noforeach",
        "sf_adamw_paper",
        "sf_sgd_reference",
        "sf_sgd_fast",
    ],
)
def test_follows_the_published_code(case):
    golden = _golden.load(case)
    # The published fast and reference classes compute the same in another order.
    paths, state, states = trajectory(re.sub("_(fast|noforeach|reference)", "", case))
    _compare.assert_follows(golden, paths)
    params = {name: jnp.asarray(path[-1], jnp.float32) for name, path in paths.items()}
    average, fast = fo.eval_params(state, params), fo.fast_params(state, params)
    for name in params:
        # Recovering x from y and z divides their rounding, one unit of 6e-8, by b1 =
        # 0.9 and adds it to that of the trajectory.
        tolerance = golden.tolerance(f"state/x/{name}")
        _compare.assert_within(average[name], golden.state["x"][name], tolerance, name)
        tolerance = golden.tolerance(f"state/z/{name}")
        _compare.assert_within(fast[name], golden.state["z"][name], tolerance, name)
    # float32 sums of up to twelve terms.
    np.testing.assert_allclose(
        states.weight_sum, golden.scalars["weight_sum"], rtol=1e-5
    )
    np.testing.assert_allclose(
        states.max_learning_rate, golden.scalars["lr_max"], rtol=1e-6
    )


@pytest.mark.parametrize("case", ["sf_adamw_reference", "sf_sgd_reference"])
def test_keeping_the_average_changes_nothing(case):
    golden = _golden.load(case)
    h = golden.hyper
    inner = optax.add_decayed_weights(h["weight_decay"])
    if "adamw" in case:
        adam = optax.scale_by_adam(b1=0.0, b2=h["betas"][1], eps=h["eps"])
        inner = optax.chain(adam, inner)
    tx = fo.schedule_free(
        inner,
        warmed_up(h),
        b1=0.9,
        inner_params="gradient",
        keep_average=True,
    )
    paths, state, _ = _replay.run(tx, golden.params0, golden.grads)
    _compare.assert_follows(golden, paths)
    for name, expected in golden.state["x"].items():
        tolerance = golden.tolerance(f"state/x/{name}")
        _compare.assert_within(state.x[name], expected, tolerance, name)
