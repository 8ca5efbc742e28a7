"""The latents of a recorded DiT pipeline of diffusers, step by step.

The weights are random, two blocks of width 32; guidance is 4 on all channels. Left out
of the recording: the second block's copy of the embedders, which are those of the
first, and all rows of the label table but 3, 207 and 1000.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.sampling.sampler import At, Prediction
from tests._compare import assert_within
from tests.dit._recordings import nhwc, part, recording
from tests.dit.latents import _recordings as autoencoders

# Of the largest latent, which grows from 16 to 108. Float32 changes the recorded run by
# 4e-7 of that where its frequencies are float32 too, as here; ten times that, rounded.
RELATIVE = 5e-6


@functools.cache
def model(frequency_shift=1):
    arrays = recording("pipeline_dit")
    weights = part(arrays, "transformer/")
    embedders = "transformer_blocks.{}.norm1.emb."
    for name, array in part(weights, embedders.format(0)).items():
        weights[embedders.format(1) + name] = array
    table = np.zeros((1001, 32), np.float32)
    table[[3, 207, 1000]] = arrays["label_rows"]
    for block in range(2):
        name = embedders.format(block) + "class_embedder.embedding_table.weight"
        weights[name] = table
    about = json.loads(str(arrays["config"]))
    return dit.from_diffusers(weights, about, frequency_shift=frequency_shift)


def start():
    arrays = recording("pipeline_dit")
    return jnp.asarray(nhwc(arrays["in/latents"])), jnp.asarray(arrays["in/labels"])


def states(params, config, sampler, channels=None):
    """Every state of the walk, through the sampler's own steps."""
    image, labels = start()

    @jax.jit
    def network(images, time):
        times = jnp.broadcast_to(time, len(images))
        return dit.apply_with_guidance(
            params, config, images, times, labels, 4.0, channels=channels
        )

    found = []
    for step, time in enumerate(sampler.host_times()):
        coefficients = jax.tree.map(
            lambda values, step=step: jnp.float32(values[step]), sampler.coefficients()
        )

        def predict(x, time=time):
            output = network(x, time)
            return Prediction(output[..., :4], output[..., 4:])

        image = sampler.step(predict, image, At(coefficients, None, None)).image
        found.append(image)
    return np.stack(found)


def recorded():
    return nhwc(recording("pipeline_dit")["run/latents"])


@pytest.mark.parametrize("respacing", ["ddim5", "leading5"])
def test_the_times_are_those_of_the_pipeline(respacing):
    times = dit.Sampler.ddim(respacing).eval_times()
    np.testing.assert_array_equal(times, recording("pipeline_dit")["run/timesteps"])


def test_every_state_is_that_of_the_pipeline():
    found = states(*model(), dit.Sampler.ddim("leading5"))
    for step, (state, expected) in enumerate(zip(found, recorded(), strict=True)):
        tolerance = RELATIVE * np.abs(expected).max()
        assert_within(state, expected, tolerance, f"after step {step + 1}")


def test_a_whole_program_ends_where_the_pipeline_does():
    params, config = model()
    sampler = dit.Sampler.ddim("leading5")
    noise, labels = start()
    images = dit.sample(params, config, None, noise, labels, sampler, 4.0)
    expected = recorded()[-1]
    assert_within(images, expected, RELATIVE * np.abs(expected).max())


def test_from_noise_and_labels_to_the_pictures_of_the_pipeline():
    params, config = model()
    noise, labels = start()
    sampler = dit.Sampler.ddim("leading5")
    latents = dit.sample(params, config, None, noise, labels, sampler, 4.0)
    recorded = autoencoders.recording("pipeline_vae")
    decoder = dit.latents.from_diffusers(recorded.weights, recorded.config)
    # Ten times the 1.9e-6 by which a float64 run of all of it differs.
    assert_within(dit.latents.decode(*decoder, latents), recorded.nhwc("image"), 2e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        # What the released weights were trained with, and diffusers does not compute.
        {"frequency_shift": 0},
        {"channels": 3},
        {"respacing": "5"},
    ],
)
def test_wrong_readings_would_be_noticed(wrong):
    found = states(
        *model(wrong.get("frequency_shift", 1)),
        dit.Sampler.ddim(wrong.get("respacing", "leading5")),
        wrong.get("channels"),
    )
    assert np.abs(found - recorded()).max() > 100 * RELATIVE * np.abs(recorded()).max()
