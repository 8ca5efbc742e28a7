"""Published weights in three namings, and every refusal."""

import re

import chex
import numpy as np
import pytest
from safetensors.numpy import save_file

from fusionopt_jax.dit import latents
from fusionopt_jax.dit.latents.entries import entry_shapes
from tests.dit import _folders
from tests.dit.latents._recordings import recording

WEIGHTS = _folders.vae_arrays()


def as_first_published(weights, table):
    """Weights under the first names; attention's maps were convolutions then."""
    return {
        table[name]: array[..., None, None]
        if "attentions" in name and array.ndim == 2
        else array
        for name, array in weights.items()
    }


def whole_model(weights):
    """A latent diffusion model's state dict, with what isn't floating point in one."""
    return {
        "betas": np.zeros(4, np.float32),
        "model.diffusion_model.out.0.weight": np.zeros(3, np.float32),
        "model_ema.num_updates": np.zeros((), np.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.zeros(
            (1, 77), np.int64
        ),
        **{f"first_stage_model.{name}": array for name, array in weights.items()},
    }


@pytest.fixture(scope="module")
def recorded():
    return recording("vae_decoder")


@pytest.fixture(scope="module")
def params(recorded):
    return latents.from_diffusers(recorded.weights, recorded.config)[0]


class TestNamings:
    def test_names_of_the_diffusers_library_before(self, recorded, params):
        table = recorded.meta["old_names"]
        assert len(table) == 8
        old = {table.get(name, name): v for name, v in recorded.weights.items()}
        again, _ = latents.from_diffusers(old, recorded.config)
        chex.assert_trees_all_equal(again, params)

    @pytest.mark.parametrize("prefix", ["", "first_stage_model."])
    def test_names_of_the_first_publication(self, recorded, params, prefix):
        first = as_first_published(recorded.weights, recorded.meta["ldm_names"])
        # The levels count the other way round.
        assert "decoder.up.1.upsample.conv.weight" in first
        first = {prefix + name: array for name, array in first.items()}
        first["loss.logvar"] = np.zeros(())
        again, _ = latents.from_diffusers(first, recorded.config)
        chex.assert_trees_all_equal(again, params)

    def test_entries_beside_a_prefix_are_of_other_parts(self, recorded, params):
        again, _ = latents.from_diffusers(
            whole_model(recorded.weights), recorded.config
        )
        chex.assert_trees_all_equal(again, params)

    def test_integers_and_numbers_of_the_training_are_left_out(self, recorded, params):
        trained = recorded.weights | {
            "loss.discriminator.main.3.num_batches_tracked": np.zeros((), np.int64),
            "model_ema.decay": np.float32(0.999),
            "model_ema.num_updates": np.zeros((), np.int32),
        }
        again, _ = latents.from_diffusers(trained, recorded.config)
        chex.assert_trees_all_equal(again, params)

    @pytest.mark.parametrize("prefix", ["", "first_stage_model."])
    def test_integers_that_would_be_used_are_refused(self, recorded, prefix):
        whole = whole_model(recorded.weights) if prefix else dict(recorded.weights)
        name = f"{prefix}decoder.conv_in.bias"
        whole[name] = whole[name].astype(np.int64)
        with pytest.raises(
            ValueError, match=f"{re.escape(name)} is int64 instead of floating point"
        ) as caught:
            latents.from_diffusers(whole, recorded.config)
        assert "position_ids" not in str(caught.value)

    def test_a_running_average_is_not_taken_for_the_weights(self, recorded):
        averaged = recorded.weights | {"model_ema.decoderconv_inbias": np.zeros(3)}
        with pytest.raises(ValueError, match="decoderconv_inbias is unexpected"):
            latents.from_diffusers(averaged, recorded.config)

    def test_an_encoder_under_the_first_names(self):
        def first_name(name):
            for pattern, old in (
                (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
                (
                    r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.",
                    r"encoder.down.\1.downsample.",
                ),
                (r"mid_block\.resnets\.0", "mid.block_1"),
                (r"mid_block\.resnets\.1", "mid.block_2"),
                (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
                (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
                (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
                ("conv_shortcut", "nin_shortcut"),
                ("conv_norm_out", "norm_out"),
            ):
                name = re.sub(pattern, old, name)
            return name

        half = {
            name: array
            for name, array in WEIGHTS.items()
            if name.startswith(("encoder.", "quant_conv."))
        }
        table = {name: first_name(name) for name in half}
        assert "encoder.down.0.downsample.conv.bias" in table.values()
        params, _ = latents.from_diffusers(half, _folders.VAE)
        first = as_first_published(half, table)
        again, _ = latents.from_diffusers(first, _folders.VAE)
        chex.assert_trees_all_equal(again, params)
        assert set(params) == {"encoder", "quant_conv"}


def test_shapes_are_those_of_a_full_recorded_file(recorded):
    config = latents.from_diffusers(recorded.weights, recorded.config)[1]
    found = {
        part: {name: list(shape) for name, shape in entry_shapes(config, part).items()}
        for part in ("decoder", "encoder")
    }
    assert found["decoder"] == recorded.meta["shapes"]
    assert found["encoder"] == recorded.meta["encoder_shapes"]


def test_kernels_have_the_output_last():
    params, _ = latents.from_diffusers(WEIGHTS, _folders.VAE)
    kernel = params["decoder"]["conv_in"]["kernel"]
    assert kernel.shape == (3, 3, 4, 16)
    assert kernel[0, 2, 3, 5] == WEIGHTS["decoder.conv_in.weight"][5, 3, 0, 2]
    query = params["encoder"]["mid_block"]["attentions"]["0"]["to_q"]["kernel"]
    assert query[2, 7] == WEIGHTS["encoder.mid_block.attentions.0.to_q.weight"][7, 2]


class TestConfig:
    def test_what_old_files_leave_out(self):
        content = {
            name: value
            for name, value in _folders.VAE.items()
            if name
            not in (
                "scaling_factor",
                "shift_factor",
                "force_upcast",
                "mid_block_add_attention",
                "use_quant_conv",
                "use_post_quant_conv",
                "latents_mean",
                "latents_std",
            )
        }
        _, config = latents.from_diffusers(WEIGHTS, content)
        assert config == latents.from_diffusers(WEIGHTS, _folders.VAE)[1]
        assert config.scaling_factor == 0.18215
        assert config.shift_factor == 0

    def test_the_default_is_stable_diffusion(self):
        config = latents.Config()
        assert config.block_out_channels == (128, 256, 512, 512)
        assert (config.layers_per_block, config.norm_num_groups) == (2, 32)
        assert config.downsampling == 8
        # Weights of the published file: 138 in the decoder, 106 in the encoder, and two
        # 1x1 convolutions of two entries each.
        count = len(entry_shapes(config, "decoder")) + len(
            entry_shapes(config, "encoder")
        )
        assert count == 138 + 106 + 4

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"_class_name": "AutoencoderTiny"}, "is of AutoencoderTiny, not of"),
            ({"act_fn": "gelu"}, "act_fn has gelu; only silu is supported"),
            (
                {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
                "up_block_types has AttnUpDecoderBlock2D; only UpDecoderBlock2D",
            ),
            ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types lists 1"),
            ({"latents_mean": [0.0] * 4}, "latents_mean normalises every channel"),
            ({"patch_size": 2}, "patch_size = 2 is not known here"),
            ({"norm_num_groups": 3}, "`norm_num_groups` must divide"),
            ({"scaling_factor": None}, "`scaling_factor` must be a number"),
            ({"scaling_factor": 0.0}, r"`scaling_factor` must lie in \(0"),
            ({"use_quant_conv": "no"}, "`use_quant_conv` must be True or False"),
            ({"block_out_channels": 8}, "`block_out_channels` must be a tuple"),
        ],
    )
    def test_what_is_not_served_is_refused_by_name(
        self, changes, says, unchecked_types
    ):
        with pytest.raises(ValueError, match=says):
            latents.from_diffusers(WEIGHTS, _folders.VAE | changes)

    def test_what_is_missing_is_listed(self):
        with pytest.raises(ValueError, match="block_out_channels is missing"):
            latents.from_diffusers(WEIGHTS, {"_class_name": "AutoencoderKL"})

    def test_no_config(self):
        with pytest.raises(ValueError, match="`config` is needed"):
            latents.from_diffusers(WEIGHTS)

    def test_something_else(self, unchecked_types):
        with pytest.raises(TypeError, match="must be the content of config"):
            latents.from_diffusers(WEIGHTS, "config.json")


class TestEntries:
    def refused(self, changes, says, without=()):
        weights = {n: v for n, v in WEIGHTS.items() if n not in without} | changes
        with pytest.raises(ValueError, match=says) as caught:
            latents.from_diffusers(weights, _folders.VAE)
        assert "these are not the weights of the config's autoencoder" in str(
            caught.value
        )

    def test_missing(self):
        name = "decoder.up_blocks.1.resnets.0.norm1.bias"
        self.refused({}, re.escape(f"{name} is missing"), without=[name])

    def test_unexpected(self):
        self.refused({"decoder.extra.weight": np.ones(2)}, "extra.weight is unexpected")

    def test_misshapen(self):
        self.refused(
            {"decoder.conv_in.weight": np.ones((16, 8, 3, 3))},
            r"conv_in.weight has shape \(16, 8, 3, 3\) instead of \(16, 4, 3, 3\)",
        )

    def test_there_twice(self):
        old = "decoder.mid_block.attentions.0.query.weight"
        new = "decoder.mid_block.attentions.0.to_q.weight"
        self.refused(
            {old: WEIGHTS[new]}, re.escape(f"{old} and {new} are the same entry")
        )

    def test_another_model(self):
        transformer = _folders.transformer_arrays()
        self.refused(
            transformer, "neither a decoder nor an encoder is in them", without=WEIGHTS
        )


@pytest.fixture(scope="module")
def random_params():
    return latents.from_diffusers(WEIGHTS, _folders.VAE)[0]


class TestFiles:
    @pytest.mark.parametrize("form", ["safetensors", "bin", "fp16", "sharded"])
    def test_its_own_folder(self, random_params, tmp_path, form):
        _folders.write_json(tmp_path / "config.json", _folders.VAE)
        _folders.write_weights(tmp_path, WEIGHTS, form)
        again, config = latents.from_diffusers(tmp_path)
        chex.assert_trees_all_equal(again, random_params)
        assert config.sample_size == 8

    def test_the_folder_of_a_pipeline(self, random_params, tmp_path):
        again, _ = latents.from_diffusers(_folders.write_pipeline(tmp_path))
        chex.assert_trees_all_equal(again, random_params)

    def test_a_file_and_a_config(self, random_params, tmp_path):
        np.savez(tmp_path / "vae.npz", **WEIGHTS)
        told = []
        again, _ = latents.from_diffusers(
            tmp_path / "vae.npz", _folders.VAE, progress=lambda *at: told.append(at)
        )
        chex.assert_trees_all_equal(again, random_params)
        total = sum(array.nbytes for array in WEIGHTS.values())
        assert told[-1] == (total, total)
        assert len(told) == len(WEIGHTS)

    @pytest.mark.parametrize("form", ["npz", "safetensors"])
    def test_a_file_of_a_whole_latent_model(self, random_params, tmp_path, form):
        path, told = tmp_path / f"model.{form}", []
        whole = whole_model(WEIGHTS)
        if form == "npz":
            np.savez(path, **whole)
        else:
            save_file(whole, path)
        again, _ = latents.from_diffusers(
            path, _folders.VAE, progress=lambda *at: told.append(at)
        )
        chex.assert_trees_all_equal(again, random_params)
        # What is left out isn't read either.
        assert told[-1][1] == sum(array.nbytes for array in WEIGHTS.values())

    def test_a_folder_takes_no_config(self, tmp_path):
        with pytest.raises(ValueError, match="a folder has its own config"):
            latents.from_diffusers(tmp_path, latents.Config())

    def test_a_transformer_in_its_place(self, tmp_path):
        _folders.write_json(tmp_path / "config.json", _folders.TRANSFORMER)
        _folders.write_weights(tmp_path, _folders.transformer_arrays())
        with pytest.raises(ValueError, match="is of DiTTransformer2DModel, not of"):
            latents.from_diffusers(tmp_path)

    def test_a_truncated_file(self, tmp_path):
        _folders.write_json(tmp_path / "config.json", _folders.VAE)
        _folders.write_weights(tmp_path, WEIGHTS)
        path = tmp_path / f"{_folders.FILE_NAME}.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="diffusion_pytorch_model"):
            latents.from_diffusers(tmp_path)
