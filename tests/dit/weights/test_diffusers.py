"""The DiT of diffusers: its recorded outputs, its files, and what is refused."""

import dataclasses
import json
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fusionopt_jax import dit
from fusionopt_jax.dit.network.embeddings import time_features
from fusionopt_jax.dit.network.modulation import conditioning
from tests.dit._folders import (
    FILE_NAME,
    SCHEDULER,
    TRANSFORMER,
    VAE,
    transformer_arrays,
    vae_arrays,
    write_bin,
    write_json,
    write_pipeline,
    write_weights,
)
from tests.dit._models import DATA, run

# Written by diffusers 0.42.1 with random weights. Its fp32 and float64 outputs differ
# by 9.9e-6, most of it from the frequencies of the time features, which it rounds
# otherwise than NumPy does; five times that.
TOLERANCE = 5e-5

EMBEDDER = "transformer_blocks.{}.norm1.emb."
TABLE = f"{EMBEDDER}class_embedder.embedding_table.weight"


class Recording(NamedTuple):
    """A recorded network."""

    weights: dict[str, np.ndarray]
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def output(self, name: str) -> np.ndarray:
        """An output with channels last."""
        return self.arrays[name].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def recording():
    with np.load(DATA / "diffusers_dit.npz") as file:
        arrays = {name: file[name] for name in file.files}
    weights = {
        name.removeprefix("w/"): array
        for name, array in arrays.items()
        if name.startswith("w/")
    }
    # Recorded once: the second block's embedders are those of the first.
    first, second = EMBEDDER.format(0), EMBEDDER.format(1)
    for name in [name for name in weights if name.startswith(first)]:
        weights[name.replace(first, second)] = weights[name]
    return Recording(weights, json.loads(str(arrays.pop("config"))), arrays)


@pytest.fixture(scope="module")
def shifted(recording):
    """The network as diffusers computes it."""
    return dit.from_diffusers(recording.weights, recording.config, frequency_shift=1)


def output(params, config, recording, times, labels="in/y"):
    arrays = recording.arrays
    images = jnp.asarray(arrays["in/x_nchw"].transpose(0, 2, 3, 1))
    labels = arrays[labels] if isinstance(labels, str) else labels
    times = jnp.asarray(arrays[times], jnp.float32)
    return run(params, config, images, times, jnp.asarray(labels, jnp.int32))


class TestRecordedOutput:
    def test_config(self, shifted):
        _, config = shifted
        assert config == dit.DiTConfig(
            input_size=8,
            hidden_size=48,
            depth=2,
            num_heads=4,
            num_classes=10,
            frequency_shift=1,
            norm_eps=1e-5,
        )

    @pytest.mark.parametrize(
        ("name", "times"), [("sample", "t_int"), ("sample_t_half", "t_half")]
    )
    def test_as_diffusers_computes_it(self, recording, shifted, name, times):
        got = output(*shifted, recording, f"in/{times}")
        expected = recording.output(f"out/{name}")
        chex.assert_trees_all_close(got, expected, atol=TOLERANCE)

    def test_null_label(self, recording, shifted):
        null = np.full(6, shifted[1].null_label)
        got = output(*shifted, recording, "in/t_int", null)
        expected = recording.output("out/sample_null")
        chex.assert_trees_all_close(got, expected, atol=TOLERANCE)

    def test_eps_of_the_config_in_the_norm_of_the_mlp_alone(self, recording):
        # The output is 0.09 away from that with the usual eps.
        about = {**recording.config, "norm_eps": 0.05}
        params, config = dit.from_diffusers(recording.weights, about, frequency_shift=1)
        got = output(params, config, recording, "in/t_int")
        expected = recording.output("out/sample_norm_eps_0.05")
        chex.assert_trees_all_close(got, expected, atol=TOLERANCE)

    def test_as_the_published_code_computes_it(self, recording):
        # 0.9 away from what diffusers makes of the same weights.
        params, config = dit.from_diffusers(recording.weights, recording.config)
        config = dataclasses.replace(config, norm_eps=1e-6)
        got = output(params, config, recording, "in/t_int")
        expected = recording.output("out/original_dit")
        chex.assert_trees_all_close(got, expected, atol=TOLERANCE)

    def test_cache(self, recording, shifted):
        params, config = shifted
        arrays = recording.arrays
        times, labels = np.float32(arrays["in/t_int"]), arrays["in/y"]
        cache = dit.build_cache(params, config, times, labels, force=True)
        steps, rows = np.arange(6), np.asarray(cache.rows(labels))
        block = np.asarray(cache.block)[steps, 0, rows].reshape(6, -1)
        final = np.asarray(cache.final)[steps, rows].reshape(6, -1)
        expected = (arrays["inter/block0_mod"], arrays["inter/final_mod"])
        chex.assert_trees_all_close((block, final), expected, atol=TOLERANCE)
        with pytest.raises(dit.StaleCacheError, match="frequency_shift"):
            cache.check(params, dataclasses.replace(config, frequency_shift=0))

    def test_intermediates(self, recording, shifted):
        params, config = shifted
        arrays = recording.arrays
        times = jnp.asarray(arrays["in/t_int"], jnp.float32)
        # At time 999 one rounding of the frequencies, 6e-8, is 6e-5 of an angle.
        chex.assert_trees_all_close(
            time_features(times, 1), arrays["inter/t_freq"], atol=1e-4
        )
        labels = jnp.asarray(arrays["in/y"], jnp.int32)
        cond = conditioning(params, config, times, labels)
        chex.assert_trees_all_close(
            cond, jax.nn.silu(arrays["inter/cond"]), atol=TOLERANCE
        )


class TestCopies:
    def test_that_disagree_are_refused_with_the_list(self, recording):
        name = TABLE.format(1)
        wrong = {**recording.weights, name: recording.arrays[f"w_alt/{name}"]}
        with pytest.raises(ValueError, match="they disagree") as caught:
            dit.from_diffusers(wrong, recording.config)
        assert f"{name} differs from {TABLE.format(0)} by" in str(caught.value)
        assert str(caught.value).count("differs") == 1

    def test_that_differ_in_one_value(self, recording):
        name = f"{EMBEDDER.format(1)}timestep_embedder.linear_2.bias"
        wrong = recording.weights[name].copy()
        wrong[3] += 1e-6
        with pytest.raises(ValueError, match=f"{name} differs"):
            dit.from_diffusers({**recording.weights, name: wrong}, recording.config)


class TestFiles:
    @pytest.mark.parametrize("form", ["safetensors", "bin", "fp16", "sharded"])
    def test_folders(self, recording, shifted, tmp_path, form):
        write_weights(tmp_path / "transformer", recording.weights, form)
        write_json(tmp_path / "transformer" / "config.json", recording.config)
        for folder in (tmp_path, str(tmp_path / "transformer")):
            params, config = dit.from_diffusers(folder, frequency_shift=1)
            assert config == shifted[1]
            chex.assert_trees_all_equal(params, shifted[0])

    def test_pipeline(self, tmp_path):
        write_pipeline(tmp_path)
        params, config = dit.from_diffusers(tmp_path)
        assert (config.hidden_size, config.num_heads, config.depth) == (32, 2, 2)
        expected = transformer_arrays()["transformer_blocks.1.attn1.to_k.weight"]
        kernel = params["blocks"]["attn"]["qkv"]["kernel"][1]
        np.testing.assert_array_equal(kernel[:, 32:64], expected.T)

    def test_a_config_of_sizes_is_not_that_of_diffusers(
        self, recording, shifted, unchecked_types
    ):
        with pytest.raises(TypeError, match="dict, got a DiTConfig; `to_diffusers`"):
            dit.from_diffusers(recording.weights, config=shifted[1])

    def test_file_with_the_config_beside(self, recording, shifted, tmp_path):
        path = tmp_path / "weights.bin"
        write_bin(path, recording.weights)
        params, _ = dit.from_diffusers(path, recording.config, frequency_shift=1)
        chex.assert_trees_all_equal(params, shifted[0])

    def test_there_and_back(self, recording, shifted, tmp_path):
        arrays, about = dit.to_diffusers(*shifted, tmp_path)
        chex.assert_trees_all_equal(arrays, recording.weights)
        known = {name: recording.config.get(name) for name in about}
        assert about == known
        # What the recorded config says beyond this is the version alone.
        assert recording.config.keys() - about.keys() == {"_diffusers_version"}
        path = tmp_path / f"{FILE_NAME}.safetensors"
        chex.assert_trees_all_equal(load_file(path), recording.weights)
        again, config = dit.from_diffusers(tmp_path, frequency_shift=1)
        assert config == shifted[1]
        chex.assert_trees_all_equal(again, shifted[0])

    def test_says_how_far_it_is(self, recording, tmp_path):
        write_weights(tmp_path, recording.weights)
        write_json(tmp_path / "config.json", recording.config)
        told = []
        dit.from_diffusers(tmp_path, progress=lambda *done: told.append(done))
        size = sum(array.nbytes for array in recording.weights.values())
        done = [one for one, _ in told]
        assert {total for _, total in told} == {size}
        assert len(told) == len(recording.weights)
        assert done == sorted(done)
        assert done[-1] == size


class TestConfig:
    def test_old_form(self, recording, shifted):
        # As the published DiT-XL/2 has it: another class, no eps, settings of others.
        old = {
            **recording.config,
            "_class_name": "Transformer2DModel",
            "_diffusers_version": "0.12.0.dev0",
            "cross_attention_dim": None,
            "num_vector_embeds": None,
            "only_cross_attention": False,
            "use_linear_projection": False,
        }
        del old["norm_eps"]
        _, config = dit.from_diffusers(recording.weights, old, frequency_shift=1)
        assert config == shifted[1]

    def test_no_learned_variance(self, recording):
        weights = dict(recording.weights)
        for kind in ("weight", "bias"):
            weights[f"proj_out_2.{kind}"] = weights[f"proj_out_2.{kind}"][:16]
        about = {**recording.config, "out_channels": None}
        assert not dit.from_diffusers(weights, about)[1].learn_sigma

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm' instead of 'ada_"),
            ({"activation_fn": "geglu"}, "activation_fn is 'geglu' instead of 'gelu-"),
            ({"attention_bias": False}, "attention_bias is False instead of True"),
            ({"norm_elementwise_affine": True}, "norm_elementwise_affine is True"),
            ({"cross_attention_dim": 768}, "cross_attention_dim is 768"),
            ({"num_layers": None}, "num_layers is None instead of a whole number"),
            ({"sample_size": "8"}, "sample_size is '8' instead of a whole number"),
            ({"out_channels": 5}, "out_channels is 5 instead of 4, or 8"),
            ({"num_layers": 10**9}, "has num_layers 1000000000, but .* 44 arrays"),
            ({"num_layers": 3}, "transformer_blocks.2.norm1.linear.weight is missing"),
            ({"num_layers": 1}, "transformer_blocks.1.norm1.linear.weight is unexpect"),
            (
                {"num_embeds_ada_norm": 11},
                r"embedding_table.weight has shape \(11, 48\) instead of \(12, 48\)",
            ),
            ({"patch_size": 4}, "pos_embed.proj.weight has shape"),
            ({"_class_name": "SanaTransformer2DModel"}, "class 'SanaTransformer2D"),
            ({"_class_name": "FluxTransformer2DModel"}, "a Flux model, not of a DiT"),
            (
                {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"},
                "a PixArt model, not of a DiT",
            ),
        ],
    )
    def test_of_another_network(self, recording, change, words):
        with pytest.raises(ValueError, match=words):
            dit.from_diffusers(recording.weights, {**recording.config, **change})

    def test_shift_that_does_not_exist(self, recording):
        with pytest.raises(ValueError, match="`frequency_shift` must be one of 0, 1"):
            dit.from_diffusers(recording.weights, recording.config, frequency_shift=2)

    def test_config_where_it_is_needed_and_only_there(self, recording, tmp_path):
        with pytest.raises(ValueError, match="`config` is needed where `source` is no"):
            dit.from_diffusers(recording.weights)
        write_pipeline(tmp_path)
        with pytest.raises(ValueError, match="`config` has no effect beside"):
            dit.from_diffusers(tmp_path, TRANSFORMER)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                {"time_scale": 1e-3},
                r"time_scale 1.0 in its code, but this model 0\.001",
            ),
            ({"mlp_ratio": 2.0}, r"mlp_ratio 4\.0 in its code"),
            ({"class_dropout_prob": 0.0}, "always has a null label"),
        ],
    )
    def test_what_diffusers_has_not(self, shifted, change, words):
        params, config = shifted
        with pytest.raises(ValueError, match=words):
            dit.to_diffusers(params, dataclasses.replace(config, **change))

    def test_other_frequencies_are_written_with_a_warning(self, shifted):
        params, config = shifted
        config = dataclasses.replace(config, frequency_shift=0)
        with pytest.warns(UserWarning, match="diffusers computes frequency_shift 1"):
            arrays, about = dit.to_diffusers(params, config)
        again, same = dit.from_diffusers(arrays, about)
        assert same == config
        chex.assert_trees_all_equal(again, params)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({}, "frequency_shift 0 in its code, but this model 1"),
            ({"frequency_shift": 0}, r"norm_eps 1e-06 in its code.*norm_eps=1e-06\)"),
        ],
    )
    def test_what_the_published_code_has_not(self, shifted, change, words):
        params, config = shifted
        with pytest.raises(ValueError, match=words):
            dit.to_pytorch(params, dataclasses.replace(config, **change))

    def test_out_as_published(self, recording):
        params, config = dit.from_diffusers(recording.weights, recording.config)
        config = dataclasses.replace(config, norm_eps=1e-6)
        again, same = dit.from_pytorch(dit.to_pytorch(params, config), num_heads=4)
        assert same == config
        chex.assert_trees_all_equal(again, params)


# Names of other models: in diffusers' form, then as their own code has them.
OTHERS = {
    "a PixArt model": [
        ["pos_embed.proj.weight", "adaln_single.linear.weight", "scale_shift_table"],
        ["x_embedder.proj.weight", "t_block.1.weight", "blocks.0.scale_shift_table"],
    ],
    "a Stable Diffusion 3 model": [
        [
            "pos_embed.proj.weight",
            "context_embedder.weight",
            "transformer_blocks.0.norm1_context.linear.weight",
        ],
        ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    ],
    "a Flux model": [
        ["context_embedder.weight", "single_transformer_blocks.0.proj_out.weight"],
        ["img_in.weight", "double_blocks.0.img_attn.qkv.weight"],
    ],
    "a U-Net": [
        ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
        ["model.diffusion_model.input_blocks.0.0.weight"],
    ],
    r"an autoencoder \(VAE\)": [
        list(vae_arrays()),
        ["first_stage_model.decoder.conv_in.weight"],
    ],
}


class TestAnotherModel:
    @pytest.mark.parametrize("family", OTHERS)
    def test_is_named(self, family):
        for names in OTHERS[family]:
            weights = {name: np.zeros(1, np.float32) for name in names}
            with pytest.raises(ValueError, match=f"weights of {family}, not of a DiT"):
                dit.from_diffusers(weights, TRANSFORMER)
            with pytest.raises(ValueError, match=f"weights of {family}, not of a DiT"):
                dit.from_pytorch(weights)

    def test_folder_of_an_autoencoder(self, tmp_path):
        write_pipeline(tmp_path)
        with pytest.raises(ValueError, match=r"autoencoder.*`latents.from_diffusers`"):
            dit.from_diffusers(tmp_path / "vae")

    def test_folder_of_something_else(self, tmp_path):
        write_json(tmp_path / "scheduler_config.json", SCHEDULER)
        write_json(tmp_path / "vae" / "config.json", VAE)
        with pytest.raises(
            FileNotFoundError, match=r"a folder 'transformer'.*\(it hol"
        ):
            dit.from_diffusers(tmp_path)

    def test_the_other_naming(self, recording):
        params, config = dit.from_diffusers(recording.weights, recording.config)
        with pytest.raises(ValueError, match="names of diffusers; `from_diffusers`"):
            dit.from_pytorch(recording.weights)
        published = dit.to_pytorch(params, dataclasses.replace(config, norm_eps=1e-6))
        with pytest.raises(ValueError, match="published PyTorch code; `from_pytorch`"):
            dit.from_diffusers(published, recording.config)

    def test_folder_for_the_other_function(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder; `from_diffusers` reads"):
            dit.from_pytorch(tmp_path)
