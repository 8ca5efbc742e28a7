"""The encoder against the reference, whose blocks the recorded decoder confirms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax.dit import latents
from tests import _compare
from tests.dit import _folders
from tests.dit.latents.test_decoder import OTHER_CONTENT, OTHER_WEIGHTS
from tests.references import autoencoder

# Ten times what fp32 differs from float64 in the recorded decoder, a network of the
# same blocks, depth and magnitudes.
TOLERANCE = 2e-5

WEIGHTS = _folders.vae_arrays()
GROUPS = _folders.VAE["norm_num_groups"]
SCALE = 0.18215


@pytest.fixture(scope="module")
def model():
    return latents.from_diffusers(WEIGHTS, _folders.VAE)


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(3)
    return generator.uniform(-1, 1, size=(2, 3, 8, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def moments(images):
    """Means and deviations, [batch, height, width, channels]."""
    pairs = [autoencoder.moments(WEIGHTS, image, GROUPS) for image in images]
    means, log_variances = (
        np.stack(part).transpose(0, 2, 3, 1) for part in zip(*pairs, strict=True)
    )
    return means, np.exp(log_variances / 2)


def test_without_a_key_it_is_the_scaled_mean(model, images, moments):
    encoded = latents.encode(*model, images.transpose(0, 2, 3, 1))
    assert encoded.dtype == jnp.float32
    _compare.assert_within(encoded, moments[0] * SCALE, TOLERANCE)
    # Far enough from the unscaled mean for a forgotten factor to show.
    assert np.abs(moments[0]).max() > 0.1


def test_with_a_key_it_is_a_draw(model, images, moments, key):
    means, deviations = moments
    noise = np.asarray(jax.random.normal(key, means.shape))
    encoded = latents.encode(*model, images.transpose(0, 2, 3, 1), key=key)
    _compare.assert_within(encoded, (means + deviations * noise) * SCALE, TOLERANCE)
    assert deviations.min() > 0.1


def test_variances_are_clamped(model, images, key):
    params, config = model
    bias = jnp.array([0.0, 0, 0, 0, 1000, -1000, 1000, -1000])
    layer = {"kernel": jnp.zeros((1, 1, 8, 8)), "bias": bias}
    encoded = latents.encode(
        params | {"quant_conv": layer}, config, images.transpose(0, 2, 3, 1), key=key
    )
    noise = np.asarray(jax.random.normal(key, encoded.shape), np.float64)
    deviations = np.exp(np.array([[[[10.0, -15.0, 10.0, -15.0]]]]))
    # The exponential of 10 in fp32 is good to some 1e-6 of itself.
    np.testing.assert_allclose(encoded, SCALE * deviations * noise, rtol=1e-5)


def test_another_kind_of_the_family(images):
    params, config = latents.from_diffusers(OTHER_WEIGHTS, OTHER_CONTENT)
    encoded = latents.encode(params, config, images[:1].transpose(0, 2, 3, 1))
    mean, _ = autoencoder.moments(OTHER_WEIGHTS, images[0], GROUPS)
    wanted = (mean.transpose(1, 2, 0) - 0.1159) * 0.3611
    _compare.assert_within(encoded[0], wanted, TOLERANCE)


def test_bfloat16_stays_close(model, images, moments):
    encoded = latents.encode(*model, images.transpose(0, 2, 3, 1), dtype=jnp.bfloat16)
    error = np.abs(encoded - moments[0] * SCALE)
    # As for the decoder, at a sixth of its magnitudes.
    assert 1e-4 < error.max() < 0.01


class TestBadInput:
    @pytest.mark.parametrize(
        ("shape", "says"),
        [
            ((2, 3, 8, 8), r"transpose them by \(0, 2, 3, 1\)"),
            ((2, 8, 8, 1), "repeat the one channel of grey images"),
            ((2, 8, 8, 4), r"must have shape \[batch, height, width, 3\]"),
            ((2, 8, 9, 3), "divisible by 2"),
        ],
    )
    def test_shape(self, model, unchecked_types, shape, says):
        with pytest.raises(ValueError, match=says):
            latents.encode(*model, np.zeros(shape, np.float32))

    def test_bytes(self, model, unchecked_types):
        with pytest.raises(TypeError, match=r"pixels / 127\.5 - 1"):
            latents.encode(*model, np.zeros((1, 8, 8, 3), np.uint8))

    def test_only_a_decoder(self, model):
        params = {"decoder": model[0]["decoder"]}
        with pytest.raises(ValueError, match="have no encoder; read a file that holds"):
            latents.encode(params, model[1], np.zeros((1, 8, 8, 3)))
