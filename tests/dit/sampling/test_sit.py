"""SiT: recordings of its published code on random weights, a reference, closed forms.

The tolerances are ten times what float32 changes in the recorded run itself (5e-7 to
8e-7 of states near 3), at least 1e-5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.sampling.sampler import At, Prediction
from tests._compare import assert_within
from tests.dit._recordings import nhwc, part, recording

TOLERANCE = 1e-5

# The recordings' names of the runs, with SiT's `num_steps` 11, 11, 9 and 6.
RUNS = {
    "ode_euler": dit.Sampler.euler(10, convention="data_at_one"),
    "ode_heun2": dit.Sampler.heun(10, convention="data_at_one"),
    "ode_euler_cfg4": dit.Sampler.euler(10, convention="data_at_one"),
    "ode_heun2_cfg4": dit.Sampler.heun(10, convention="data_at_one"),
    "sde_em": dit.Sampler.sit_sde(9),
    "sde_heun": dit.Sampler.sit_sde(
        6,
        diffusion="linear",
        norm=0.7,
        solver="heun",
        last_step="euler",
        last_step_size=0.1,
    ),
}


@functools.cache
def model():
    """The recorded weights."""
    return dit.from_pytorch(part(recording("sit"), "w/"), num_heads=4, time_scale=0.001)


@functools.cache
def network(scale):
    """The recorded model at one time, guided if there is a scale, compiled once."""
    params, config = model()

    @jax.jit
    def evaluate(images, time, labels):
        times = jnp.full(len(images), time)
        if scale is None:
            return dit.apply(params, config, images, times, labels)
        return dit.apply_with_guidance(
            params, config, images, times, labels, scale, channels=3
        )

    return evaluate


def start(run):
    """Noise, labels and the noises of the steps."""
    arrays = recording("sit")
    noises = arrays.get(f"{run}/noise", np.zeros((0, 2, 4, 8, 8), np.float32))
    # The last step draws none.
    noises = np.append(nhwc(noises), np.zeros((1, 2, 8, 8, 4), np.float32), axis=0)
    return jnp.asarray(nhwc(arrays["z"])), jnp.asarray(arrays["y"]), noises


def states(run, sampler, flip=False):
    """Every state of a walk, and the model times that it asked for.

    With `flip`, the network is that of the opposite time and sign.
    """
    image, labels, noises = start(run)
    evaluate = network(4.0 if run.endswith("cfg4") else None)
    times, found, asked = sampler.host_times(), [], []
    memory = sampler.start(image)
    for step in range(sampler.steps):

        def predict(x, ahead=0, step=step):
            time = times[step + ahead]
            asked.append(float(time) / 1000)
            output = evaluate(x, 1000 - time if flip else time, labels)[..., :4]
            return Prediction(-output if flip else output, output)

        coefficients = jax.tree.map(
            lambda values, step=step: jnp.float32(values[step]), sampler.coefficients()
        )
        z = noises[step] if sampler.is_random else None
        image, _, memory = sampler.step(predict, image, At(coefficients, z, memory))
        found.append(image)
    return np.stack(found), asked


@pytest.mark.parametrize("run", RUNS)
def test_every_state_is_the_recorded_one(run):
    arrays = recording("sit")
    expected = nhwc(arrays[f"{run}/xs"])
    found, _ = states(run, RUNS[run])
    assert len(found) == len(expected)
    for step, (state, recorded) in enumerate(zip(found, expected, strict=True)):
        assert_within(state, recorded, TOLERANCE, f"{run} after step {step + 1}")
