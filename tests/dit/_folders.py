"""Folders of random weights in the forms that people download, written without PyTorch.

Names and shapes are written out here from the layouts of diffusers and of the published
DiT, not taken from the code that reads them.
"""

import json
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 16,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 10,
    "num_layers": 2,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 4,
    "upcast_attention": False,
}

VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 8,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

INDEX = {
    "_class_name": "DiTPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "transformer": ["diffusers", "DiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

FILE_NAME = "diffusion_pytorch_model"


class Draw:
    """Random weights under names, none of them zero."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.arrays: dict[str, np.ndarray] = {}

    def normal(self, name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        values = mean + scale * self.generator.standard_normal(shape)
        self.arrays[name] = values.astype(np.float32)

    def map(self, name: str, outputs: int, inputs: int, *kernel: int) -> None:
        """A linear map or a convolution, with a bias."""
        scale = (inputs * int(np.prod(kernel))) ** -0.5
        self.normal(f"{name}.weight", outputs, inputs, *kernel, scale=scale)
        self.normal(f"{name}.bias", outputs, scale=0.1)

    def norm(self, name: str, size: int) -> None:
        self.normal(f"{name}.weight", size, scale=0.1, mean=1.0)
        self.normal(f"{name}.bias", size, scale=0.1)


def transformer_arrays(
    config: Mapping[str, Any] = TRANSFORMER, seed: int = 0
) -> dict[str, np.ndarray]:
    """A DiT under diffusers' names; every block has the same embedders."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, channels = config["patch_size"], config["in_channels"]
    draw = Draw(seed)
    draw.map("pos_embed.proj", width, channels, patch, patch)
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        embedder = f"{block}.norm1.emb"
        if index == 0:
            draw.map(f"{embedder}.timestep_embedder.linear_1", width, 256)
            draw.map(f"{embedder}.timestep_embedder.linear_2", width, width)
            draw.normal(
                f"{embedder}.class_embedder.embedding_table.weight",
                config["num_embeds_ada_norm"] + 1,
                width,
                scale=0.5,
            )
            embedders = [name for name in draw.arrays if name.startswith(embedder)]
        for name in embedders:
            copy = name.replace("transformer_blocks.0.", f"{block}.")
            draw.arrays[copy] = draw.arrays[name]
        draw.map(f"{block}.norm1.linear", 6 * width, width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            draw.map(f"{block}.attn1.{part}", width, width)
        draw.map(f"{block}.ff.net.0.proj", 4 * width, width)
        draw.map(f"{block}.ff.net.2", width, 4 * width)
    draw.map("proj_out_1", 2 * width, width)
    draw.map("proj_out_2", patch * patch * config["out_channels"], width)
    return draw.arrays


def vae_arrays(config: Mapping[str, Any] = VAE, seed: int = 1) -> dict[str, np.ndarray]:
    """An autoencoder of the Stable Diffusion family under diffusers' names."""
    widths, latent = config["block_out_channels"], config["latent_channels"]
    layers = config["layers_per_block"]
    draw = Draw(seed)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        draw.norm(f"{name}.norm1", inputs)
        draw.map(f"{name}.conv1", outputs, inputs, 3, 3)
        draw.norm(f"{name}.norm2", outputs)
        draw.map(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            draw.map(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    def middle(name: str, width: int) -> None:
        draw.norm(f"{name}.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            draw.map(f"{name}.attentions.0.{part}", width, width)
        resnet(f"{name}.resnets.0", width, width)
        resnet(f"{name}.resnets.1", width, width)

    draw.map("encoder.conv_in", widths[0], config["in_channels"], 3, 3)
    for index, width in enumerate(widths):
        block = f"encoder.down_blocks.{index}"
        inputs = widths[max(index - 1, 0)]
        for layer in range(layers):
            resnet(f"{block}.resnets.{layer}", width if layer else inputs, width)
        if index + 1 < len(widths):
            draw.map(f"{block}.downsamplers.0.conv", width, width, 3, 3)
    middle("encoder.mid_block", widths[-1])
    draw.norm("encoder.conv_norm_out", widths[-1])
    draw.map("encoder.conv_out", 2 * latent, widths[-1], 3, 3)
    draw.map("quant_conv", 2 * latent, 2 * latent, 1, 1)

    draw.map("post_quant_conv", latent, latent, 1, 1)
    draw.map("decoder.conv_in", widths[-1], latent, 3, 3)
    middle("decoder.mid_block", widths[-1])
    upward = widths[::-1]
    for index, width in enumerate(upward):
        block = f"decoder.up_blocks.{index}"
        inputs = upward[max(index - 1, 0)]
        for layer in range(layers + 1):
            resnet(f"{block}.resnets.{layer}", width if layer else inputs, width)
        if index + 1 < len(widths):
            draw.map(f"{block}.upsamplers.0.conv", width, width, 3, 3)
    draw.norm("decoder.conv_norm_out", widths[0])
    draw.map("decoder.conv_out", config["out_channels"], widths[0], 3, 3)
    return draw.arrays


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """A JSON file as diffusers writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


class _Name:
    """Pickles as a reference to a name that can't be imported here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _TensorPickler(pickle._Pickler):
    """Writes arrays as `torch.save` writes tensors, one storage each."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Name):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, np.ndarray):
            self.save(_Name("torch._utils", "_rebuild_tensor_v2"))
            key = str(len(self.storages))
            self.storages.append(obj)
            self.write(pickle.MARK)
            kind = _Name("torch", "FloatStorage")
            self.save(("storage", kind, key, "cpu", obj.size))
            self.write(pickle.BINPERSID)
            strides = tuple(step // obj.itemsize for step in obj.strides)
            for part in (0, obj.shape, strides, False, OrderedDict()):
                self.save(part)
            self.write(pickle.TUPLE + pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def write_bin(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """A `.bin` or `.pt` file as `torch.save` writes it; dicts may be nested."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            pickler = _TensorPickler(stream, 2)
            pickler.storages = []
            pickler.dump(dict(arrays))
        for key, array in enumerate(pickler.storages):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def write_weights(
    folder: pathlib.Path, arrays: Mapping[str, np.ndarray], form: str = "safetensors"
) -> None:
    """A part's weights.

    Args:
        folder: Of the part.
        arrays: By name.
        form: "safetensors", "bin", "fp16" (the variant's name) or "sharded".
    """
    folder.mkdir(parents=True, exist_ok=True)
    if form == "bin":
        write_bin(folder / f"{FILE_NAME}.bin", arrays)
    elif form == "sharded":
        names = list(arrays)
        shards = [names[::2], names[1::2]]
        where = {}
        for index, shard in enumerate(shards, 1):
            file = f"{FILE_NAME}-{index:05}-of-{len(shards):05}.safetensors"
            save_file({name: arrays[name] for name in shard}, folder / file)
            where |= dict.fromkeys(shard, file)
        size = sum(array.nbytes for array in arrays.values())
        write_json(
            folder / f"{FILE_NAME}.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": where},
        )
    else:
        variant = "" if form == "safetensors" else f".{form}"
        path = folder / f"{FILE_NAME}{variant}.safetensors"
        save_file(dict(arrays), path, {"format": "pt"})


def write_pipeline(
    folder: pathlib.Path,
    *,
    form: str = "safetensors",
    index: Mapping[str, Any] = INDEX,
    transformer: Mapping[str, Any] = TRANSFORMER,
    vae: Mapping[str, Any] | None = VAE,
    scheduler: Mapping[str, Any] | None = SCHEDULER,
) -> pathlib.Path:
    """A pipeline's folder as `save_pretrained` writes it.

    Args:
        folder: Where; it is made.
        form: Of the weights; see `write_weights`.
        index: What `model_index.json` says.
        transformer: Its config.
        vae: Its config; None leaves the autoencoder out.
        scheduler: Its config; None leaves the scheduler out.

    Returns:
        The folder.
    """
    write_json(folder / "model_index.json", index)
    write_json(folder / "transformer" / "config.json", transformer)
    write_weights(folder / "transformer", transformer_arrays(transformer), form)
    if vae is not None:
        write_json(folder / "vae" / "config.json", vae)
        write_weights(folder / "vae", vae_arrays(vae), form)
    if scheduler is not None:
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    return folder
