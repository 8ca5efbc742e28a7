"""Weights and `config.json` of a published autoencoder, in any of its namings."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from fusionopt_jax.dit.latents.config import Config
from fusionopt_jax.dit.latents.entries import (
    canonical_name,
    entry_axes,
    entry_path,
    entry_shapes,
    parts_in,
)
from fusionopt_jax.dit.weights.files import Progress, Weights, listed, read_weights
from fusionopt_jax.dit.weights.folder import read_folder

_CLASS = "AutoencoderKL"

_SIZES = ("block_out_channels", "layers_per_block", "norm_num_groups")
"""What a `config.json` must say: most of it could not be told from the weights."""

_SETTINGS = (
    *_SIZES,
    "latent_channels",
    "in_channels",
    "out_channels",
    "scaling_factor",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
    "sample_size",
)
"""The fields of `Config` that are taken over as they are."""

_ONLY = {
    "act_fn": "silu",
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}
"""Settings of which one value is served."""

_NORMALISED = ("latents_mean", "latents_std")

_WITHOUT_EFFECT = ("force_upcast",)
"""It concerns float16, which is not served."""

_PREFIX = "first_stage_model."
"""Before the autoencoder's entries in a checkpoint of a whole latent model."""

_TRAINING = ("loss.", "model_ema.decay", "model_ema.num_updates")
"""How entries begin that only the training of the first publication used."""


def from_diffusers(
    source: Mapping[str, Any] | str | os.PathLike[str],
    config: Mapping[str, Any] | Config | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Config]:
    """Read the weights of a published autoencoder of the SD-VAE family.

    Three namings are known: that of the diffusers library, the one it had before
    (`query`, `key`, `value`, `proj_attn`), and that of the first publication
    (`decoder.up.3.block.0.…`, with or without `first_stage_model.`). Weights of the
    decoder alone are enough to decode, and those of the encoder to encode. Of a file of
    a whole latent diffusion model, only the entries `first_stage_model.…` are read. The
    loss that an autoencoder was trained with (`loss.…`), and the two numbers of its
    running average, are left out.

    Args:
        source: A file, a dict from names to arrays (NumPy, JAX or PyTorch), or a folder
            as `save_pretrained` writes it, of the autoencoder or of a pipeline with a
            subfolder `vae`. Files are those of :func:`~fusionopt_jax.dit.from_pytorch`.
        config: The content of `config.json`, or a `Config`; `Config()` is the Stable
            Diffusion autoencoder. A folder has its own, so takes none.
        progress: Called after each array with the bytes that have been read, and all
            that will be.

    Returns:
        The parameters in fp32, kernels `(row, column, in, out)` and `(in, out)`, and
        the config.

    Raises:
        FileNotFoundError: If there is no such file or folder, or a part is missing.
        ImportError: If safetensors is needed and missing.
        TypeError: If `config` is something else.
        ValueError: If the config is of another model, or has settings that are not
            served; if the file is damaged or no weight file; if entries are missing,
            unexpected, misshapen or there twice, with the list of them; if values are
            not finite floating-point numbers.

    Example:
        >>> config = Config(block_out_channels=(8, 16), norm_num_groups=4)
        >>> shapes = entry_shapes(config, "decoder")
        >>> weights = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        >>> params, _ = from_diffusers(weights, config)
        >>> params["decoder"]["conv_in"]["kernel"].shape
        (3, 3, 4, 16)

    Source: Rombach et al. (arXiv 2112.10752) published the weights under the oldest
    names; the diffusers library has the others.
    """
    weights, settings = _found(source, config)
    weights = _renamed(weights, settings).reporting(progress)
    shapes = {
        name: shape
        for part in parts_in(weights)
        for name, shape in entry_shapes(settings, part).items()
    }
    params: dict[str, Any] = {}
    for name, shape in shapes.items():
        *path, kind = entry_path(name, shape)
        node = params
        for key in path:
            node = node.setdefault(key, {})
        # Attention's maps were once convolutions of one pixel.
        array = weights[name].reshape(shape).transpose(entry_axes(len(shape)))
        node[kind] = jnp.asarray(array)
    return params, settings


def _found(
    source: Mapping[str, Any] | str | os.PathLike[str],
    config: Mapping[str, Any] | Config | None,
) -> tuple[Weights, Config]:
    """The weights, none of which is read yet, and the sizes."""
    if not isinstance(source, Mapping) and pathlib.Path(source).is_dir():
        if config is not None:
            raise ValueError(
                f"`config` must be None for {source}: a folder has its own config.json."
            )
        weights, content = read_folder(source, "vae")
        return weights, _read_config(content)
    weights = read_weights(source, used=_used)
    if config is None:
        raise ValueError(
            "`config` is needed: the content of the autoencoder's config.json, or "
            "latents.Config() for the Stable Diffusion autoencoder."
        )
    if isinstance(config, Config):
        return weights, config
    if not isinstance(config, Mapping):
        raise TypeError(
            "`config` must be the content of config.json as a dict, or a "
            f"latents.Config, got {type(config).__name__}."
        )
    return weights, _read_config(config)


def _used(names: Iterable[str]) -> list[str]:
    """The entries of the autoencoder itself."""
    names = list(names)
    prefixed = [name for name in names if name.startswith(_PREFIX)]
    return [
        name
        for name in prefixed or names
        if not name.removeprefix(_PREFIX).startswith(_TRAINING)
    ]


def _read_config(content: Mapping[str, Any]) -> Config:
    """The sizes in a `config.json`; other models and settings are refused by name."""
    model = content.get("_class_name", _CLASS)
    if model != _CLASS:
        raise ValueError(
            f"this config.json is of {_text(model)}, not of {_CLASS}: only "
            "autoencoders of the Stable Diffusion family can be read."
        )
    problems = [f"{name} is missing" for name in _SIZES if name not in content]
    for name, served in _ONLY.items():
        value = content.get(name, served)
        values = value if isinstance(value, list | tuple) else [value]
        others = [_text(other) for other in values if other != served]
        if others:
            problems.append(
                f"{name} has {', '.join(dict.fromkeys(others))}; only {served} is "
                "supported"
            )
    problems += [
        f"{name} normalises every channel by itself, which is not supported"
        for name in _NORMALISED
        if content.get(name) is not None
    ]
    known = {*_SETTINGS, *_ONLY, *_NORMALISED, *_WITHOUT_EFFECT, "shift_factor"}
    problems += [
        f"{name} = {_text(value)} is not known here"
        for name, value in content.items()
        if not name.startswith("_")
        and name not in known
        and value is not None
        and value is not False
    ]
    if problems:
        raise ValueError(listed("this config.json can't be used", problems))
    fields = {name: content[name] for name in _SETTINGS if name in content}
    if isinstance(fields["block_out_channels"], list):
        fields["block_out_channels"] = tuple(fields["block_out_channels"])
    if content.get("shift_factor") is not None:
        fields["shift_factor"] = content["shift_factor"]
    try:
        config = Config(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"this config.json can't be used: {error}") from error
    levels = len(config.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        if name in content and len(content[name]) != levels:
            raise ValueError(
                f"this config.json can't be used: {name} lists {len(content[name])} "
                f"blocks, block_out_channels {levels}."
            )
    return config


def _renamed(weights: Weights, config: Config) -> Weights:
    """Every entry under its name of today, each in its shape, none other."""
    origins: dict[str, str] = {}
    problems = []
    for old in weights:
        name = canonical_name(old.removeprefix(_PREFIX), len(config.block_out_channels))
        if name in origins:
            problems.append(f"{old} and {origins[name]} are the same entry")
        origins[name] = old
    expected = {
        name: shape
        for part in parts_in(origins)
        for name, shape in entry_shapes(config, part).items()
    }
    if not expected:
        problems.append("neither a decoder nor an encoder is in them")
    for name, shape in expected.items():
        held = weights.shapes[origins[name]] if name in origins else None
        if held is None:
            problems.append(f"{name} is missing")
        elif held not in (shape, (*shape, 1, 1)):
            problems.append(f"{origins[name]} has shape {held} instead of {shape}")
    problems += [
        f"{old} is unexpected" for name, old in origins.items() if name not in expected
    ]
    if problems:
        raise ValueError(
            listed("these are not the weights of the config's autoencoder", problems)
        )
    return weights.renamed({name: [old] for name, old in origins.items()})


def _text(value: Any) -> str:
    """A value of a JSON file for an error message."""
    return value if isinstance(value, str) else repr(value)
