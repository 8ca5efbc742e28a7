"""The decoder against the published one, the reference, and itself in tiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax.dit import latents
from fusionopt_jax.dit.latents import blocks, decoder
from tests import _compare
from tests.dit import _folders
from tests.dit.latents._recordings import recording
from tests.references import autoencoder

# Ten times what fp32 differs from float64 in the recording (1.9e-6).
TOLERANCE = 2e-5

SCALE = 0.18215

# All that the recorded model leaves at its default, in one: other channels, a shift,
# neither 1x1 convolutions nor attention, two residual blocks a level.
OTHER_CONTENT = _folders.VAE | {
    "latent_channels": 16,
    "layers_per_block": 2,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
OTHER_WEIGHTS = {
    name: array
    for name, array in _folders.vae_arrays(OTHER_CONTENT).items()
    if "quant_conv" not in name and "attentions" not in name
}


@pytest.fixture(scope="module")
def recorded():
    return recording("vae_decoder")


@pytest.fixture(scope="module")
def model(recorded):
    return latents.from_diffusers(recorded.weights, recorded.config)


@pytest.fixture(scope="module")
def reference(recorded):
    """The reference's stages of the first recorded latent, channels last."""
    z, groups = recorded.arrays["in/z"][0], recorded.config["norm_num_groups"]
    stages = autoencoder.decode_stages(recorded.weights, z / SCALE, groups)
    return {name: stage.transpose(1, 2, 0) for name, stage in stages.items()}


def recorded_stages(recorded):
    """The recorded stages by name, and how to pick what was recorded of them."""
    for name, _ in recorded.arrays.items():
        part, _, stage = name.partition("/")
        if part == "inter":
            step = 4 if "up_block" in stage else 1
            yield stage, recorded.nhwc(name)[0], step


def test_reference_is_the_published_decoder(recorded, reference):
    wanted = recorded.nhwc("out/image_f64")[0]
    # Computed in float64, stored in fp32: half a last place of 2.2 is 1.2e-7.
    _compare.assert_within(reference["image"], wanted, 2e-7)
    for name, wanted, step in recorded_stages(recorded):
        # The recording is in fp32, and these numbers are up to 32: 5e-7 of the largest.
        _compare.assert_within(reference[name][..., ::step], wanted, 2e-5, name)


def test_images_are_the_published_ones(recorded, model):
    images = latents.decode(*model, recorded.nhwc("in/z"))
    assert images.dtype == jnp.float32
    _compare.assert_within(images, recorded.nhwc("out/image"), TOLERANCE)


def test_stages_are_the_published_ones(recorded, model, reference):
    params, config = model

    @jax.jit
    def stages(z):
        layers, groups = params["decoder"], config.norm_num_groups
        found = {"post_quant_conv": blocks.conv(params["post_quant_conv"], z)}
        x = found["conv_in"] = blocks.conv(layers["conv_in"], found["post_quant_conv"])
        middle = layers["mid_block"]
        x = found["mid_resnet0"] = blocks.resnet(middle["resnets"]["0"], x, groups)
        found["mid_attn"] = blocks.attend(middle["attentions"]["0"], x, groups)
        x = found["mid_block"] = blocks.mid_block(middle, found["conv_in"], groups)
        for level in "01":
            x = blocks.up_block(layers["up_blocks"][level], x, groups)
            found[f"up_block{level}"] = x
        return found

    found = stages(recorded.nhwc("in/z")[:1] / np.float32(SCALE))
    for name, wanted, step in recorded_stages(recorded):
        # Ten times what the recording differs from float64, but at least 1e-5.
        floor = np.abs(reference[name][..., ::step] - wanted).max()
        stage = found[name][0, ..., ::step]
        _compare.assert_within(stage, wanted, max(10 * floor, 1e-5), name)


def test_images_of_a_pipeline_are_the_published_ones():
    recorded = recording("pipeline_vae")
    params, config = latents.from_diffusers(recorded.weights, recorded.config)
    images = latents.decode(params, config, recorded.nhwc("latents"))
    _compare.assert_within(images, recorded.nhwc("image"), TOLERANCE)


def test_another_kind_of_the_family(rng):
    params, config = latents.from_diffusers(OTHER_WEIGHTS, OTHER_CONTENT)
    z = rng.normal(size=(1, 16, 2, 3)).astype(np.float32)
    images = latents.decode(params, config, z.transpose(0, 2, 3, 1))
    wanted = autoencoder.decode(OTHER_WEIGHTS, z, 4, scale=0.3611, shift=0.1159)
    _compare.assert_within(images, wanted.transpose(0, 2, 3, 1), TOLERANCE)


def test_bfloat16_stays_close(recorded, model):
    images = latents.decode(*model, recorded.nhwc("in/z"), dtype=jnp.bfloat16)
    assert images.dtype == jnp.float32
    error = np.abs(images - recorded.nhwc("out/image"))
    # Operands keep 8 bits, so each of a dozen layers in a row is off by some 2^-9 of
    # values up to 2.2. Measured 0.014; that the mode is on shows in more than 1e-3.
    assert 1e-3 < error.max() < 0.04


def test_a_second_call_compiles_nothing(recorded, model):
    params, _ = model
    z = recorded.nhwc("in/z")
    latents.decode(*model, z)
    before = decoder._decode._cache_size()
    _, again = latents.from_diffusers(recorded.weights, recorded.config)
    latents.decode(jax.tree.map(jnp.negative, params), again, -z, dtype=np.float32)
    assert decoder._decode._cache_size() == before


def test_it_can_be_traced(recorded, model):
    z = recorded.nhwc("in/z")
    traced = jax.eval_shape(
        lambda *given: latents.decode(given[0], model[1], given[1]), model[0], z
    )
    assert traced.shape == (2, 16, 16, 3)


def test_a_sharded_batch_stays_sharded():
    params, config = latents.from_diffusers(OTHER_WEIGHTS, OTHER_CONTENT)
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2])
    place = jax.NamedSharding(mesh, jax.P("batch"))
    z = jax.random.normal(jax.random.key(0), (2, 2, 3, 16))
    images = latents.decode(params, config, jax.device_put(z, place), tile=2)
    assert images.sharding.is_equivalent_to(place, 4)
    # On a device of its own an image takes its sums in another order.
    whole = latents.decode(params, config, z, tile=2)
    _compare.assert_within(images, whole, TOLERANCE)


class TestTiles:
    def test_each_tile_is_what_it_alone_decodes_to(self, recorded, model):
        z = recorded.nhwc("in/z")
        corner = latents.decode(*model, z[:, :4, 4:])
        tiled = latents.decode(*model, z, tile=4, overlap=0)
        _compare.assert_within(tiled[:, :8, 8:], corner, TOLERANCE)

    def test_memory_is_that_of_a_tile(self, model):
        params, config = model

        def temporary_bytes(side, tile):
            overlap = None if tile is None else 2
            program = decoder._decode.lower(
                params,
                jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32),
                config=config,
                dtype=np.dtype(np.float32),
                tile=tile,
                overlap=overlap,
            )
            return program.compile().memory_analysis().temp_size_in_bytes

        # Beside a tile's activations there is the image, which grows by 48 x 48 x 3
        # numbers, and again where the loop keeps a copy of it.
        image = 4 * 3 * (64**2 - 16**2)
        assert temporary_bytes(32, 8) <= temporary_bytes(8, 8) + 2 * image
        assert temporary_bytes(32, None) > 4 * temporary_bytes(32, 8)


class TestBadInput:
    @pytest.mark.parametrize(
        ("shape", "says"),
        [
            ((2, 4, 8, 8), r"transpose them by \(0, 2, 3, 1\)"),
            ((2, 8, 8, 16), r"\[batch, height, width, 4\], got float32\[2, 8, 8, 16\]"),
            ((8, 8, 4), r"image\[None\]"),
            ((0, 8, 8, 4), "must not be empty"),
        ],
    )
    def test_shape(self, model, unchecked_types, shape, says):
        with pytest.raises(ValueError, match=says):
            latents.decode(*model, np.zeros(shape, np.float32))

    def test_integers(self, model, unchecked_types):
        with pytest.raises(TypeError, match="must be floating-point numbers"):
            latents.decode(*model, np.zeros((1, 8, 8, 4), np.int32))

    def test_float16(self, model):
        with pytest.raises(ValueError, match="float32 or bfloat16, got float16"):
            latents.decode(*model, np.zeros((1, 8, 8, 4)), dtype=jnp.float16)

    @pytest.mark.parametrize(
        ("tile", "overlap", "says"),
        [
            (16, None, "give a smaller tile, or tile=None"),
            (0, None, "`tile` must be at least 1"),
            (4, 4, "`overlap` must be less than `tile`"),
            (4, -1, "`overlap` must be at least 0"),
            (None, 2, "without `tile` there is none"),
        ],
    )
    def test_tiles(self, model, tile, overlap, says):
        with pytest.raises(ValueError, match=says):
            latents.decode(*model, np.zeros((1, 8, 8, 4)), tile=tile, overlap=overlap)

    def test_no_decoder(self, model):
        params = {"encoder": model[0]["decoder"]}
        with pytest.raises(ValueError, match="have no decoder"):
            latents.decode(params, model[1], np.zeros((1, 8, 8, 4)))

    def test_config_of_another_model(self, model):
        config = dataclasses.replace(model[1], block_out_channels=(24, 48))
        with pytest.raises(
            ValueError,
            match=r"decoder/conv_in/kernel has shape \(3, 3, 4, 40\) instead of",
        ):
            latents.decode(model[0], config, np.zeros((1, 8, 8, 4)))
