"""The DiT as diffusers has it, in and out: other names, and a config beside them."""

import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusionopt_jax._checks import check_choice
from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.weights.families import CLASSES, check_family, refusal
from fusionopt_jax.dit.weights.files import Progress, Weights, listed, read_weights
from fusionopt_jax.dit.weights.folder import CONFIG_NAME, STEM, read_folder
from fusionopt_jax.dit.weights.published import (
    POSITIONS,
    build_params,
    check_entries,
    expected_shapes,
    take_apart,
)

_CLASS = "DiTTransformer2DModel"

_OLD_CLASS = "Transformer2DModel"
"""The class of every transformer once; what kind of one it was, `norm_type` says."""

_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "sample_size",
    "patch_size",
    "in_channels",
    # The documentation calls it a number of diffusion steps; it is that of classes.
    "num_embeds_ada_norm",
)

_NORM_EPS = 1e-5
"""Of the MLP's norm where a config says nothing, as those of old versions do."""

_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True, None),
    "norm_elementwise_affine": (False, None),
    "cross_attention_dim": (None,),
    "num_vector_embeds": (None,),
    "only_cross_attention": (False, None),
    "double_self_attention": (False, None),
    "use_linear_projection": (False, None),
    "caption_channels": (None,),
}
"""Settings that make another network of it, and what they are for a DiT."""

_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
"""What every block of diffusers has a copy of, under `norm1.emb`."""

_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}

_INNER = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
"""Names within a block; queries, keys and values lie apart in diffusers."""


def from_diffusers(
    source: Mapping[str, Any] | str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    *,
    frequency_shift: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], DiTConfig]:
    """Read the weights of a DiT in the form of diffusers.

    The sizes come from `config.json`. Nothing is executed, PyTorch is not needed, and
    arrays are read one at a time, once all names and shapes have been checked.

    Args:
        source: A folder as `save_pretrained` writes it, of a pipeline or of its
            transformer: `.safetensors` or `.bin`, in one file or several. Or a weight
            file, or a dict from names to arrays (NumPy, JAX or PyTorch); these two need
            `config`.
        config: What `config.json` says; only where `source` is no folder.
        frequency_shift: `DiTConfig.frequency_shift`, which `config.json` does not say.
            0 is what the released weights were trained with; 1 is what diffusers itself
            computes, so the choice for a model that was trained there, and for getting
            the numbers that diffusers gets.
        progress: Called after each array with the bytes that have been read and the
            bytes of all, as they are stored; None calls nothing.

    Returns:
        The parameters, in fp32 and in the layout of
        :func:`~fusionopt_jax.dit.init_params`, and the config, with `norm_eps` as
        `config.json` has it.

    Raises:
        FileNotFoundError: If a folder or a file of it is missing.
        ImportError: If safetensors is needed and missing.
        TypeError: If `config` is no dict; a `DiTConfig` is not what `config.json` says.
        ValueError: If anything is damaged, unfinished or no weight file; if it is of
            another family of models, or has the names of the published PyTorch code; if
            `config.json` lacks a size or asks for what a DiT has not; if entries are
            missing, unexpected or misshapen; if the blocks disagree about the embedders
            of time and label, of which each has a copy.

    Example:
        >>> import dataclasses, tempfile
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(
        ...     input_size=8, hidden_size=32, depth=2, num_heads=4, frequency_shift=1
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = to_diffusers(init_params(config), config, folder)
        ...     params, same_config = from_diffusers(folder, frequency_shift=1)
        >>> same_config == config
        True

    Source: names, layouts and defaults of `DiTTransformer2DModel` of diffusers 0.42.
    """
    check_choice("frequency_shift", frequency_shift, (0, 1))
    if not isinstance(config, Mapping | None):
        raise TypeError(
            f"`config` must be what {CONFIG_NAME} says, as a dict, got a "
            f"{type(config).__name__}; `to_diffusers` writes one for a DiTConfig."
        )
    is_path = isinstance(source, str | os.PathLike)
    if is_path and not pathlib.Path(source).is_file():
        if config is not None:
            raise ValueError(
                f"`config` has no effect beside the {CONFIG_NAME} of a folder; leave "
                "it out."
            )
        weights, about = read_folder(source, "transformer")
    else:
        if config is None:
            raise ValueError(
                "`config` is needed where `source` is no folder: what the "
                f"{CONFIG_NAME} beside the weights says. Or give the folder of both."
            )
        weights, about = read_weights(source), dict(config)
    check_class(about)
    check_family(weights, "diffusers")
    sizes = _read_config(about, frequency_shift)
    if sizes.depth > len(weights):
        # Before as many names are written out, should the config be damaged.
        raise ValueError(
            f"the {CONFIG_NAME} has num_layers {sizes.depth}, but there are only "
            f"{len(weights)} arrays; it is that of another model."
        )
    names, copies = _names(sizes)
    shapes = expected_shapes(sizes)
    expected = {
        one: (shapes[name][0] // len(parts), *shapes[name][1:])
        for name, parts in names.items()
        for one in parts
    }
    expected |= {copy: expected[first] for copy, first in copies.items()}
    check_entries(weights.shapes, expected)
    counted = weights.reporting(progress)
    _check_copies(counted, weights, copies)
    return build_params(counted.renamed(names), sizes), sizes


def to_diffusers(
    params: Params,
    config: DiTConfig,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Write parameters as a `DiTTransformer2DModel` of diffusers.

    Args:
        params: Full parameters.
        config: Their sizes. A `frequency_shift` of 0, which every released model was
            trained with, is written with a warning: diffusers always computes 1, so
            its images differ there.
        folder: Where to write `config.json` and `diffusion_pytorch_model.safetensors`,
            as `from_pretrained` reads them; it is made if need be. None writes nothing.

    Returns:
        NumPy arrays in fp32 under the names of diffusers, each block with its copy of
        the embedders, and what `config.json` says.

    Raises:
        ImportError: If a folder is given and safetensors is missing.
        OSError: If the folder can't be written.
        ValueError: If the parameters do not have the sizes of the config, or if
            diffusers would compute something else with them.

    Warns:
        UserWarning: If `frequency_shift` is 0.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(
        ...     input_size=8, hidden_size=32, depth=2, num_heads=4, frequency_shift=1
        ... )
        >>> arrays, about = to_diffusers(init_params(config), config)
        >>> arrays["transformer_blocks.1.attn1.to_q.weight"].shape
        (32, 32)
        >>> about["num_attention_heads"], about["num_embeds_ada_norm"]
        (4, 1000)

    Source: as for :func:`from_diffusers`.
    """
    for name, value in (("time_scale", 1.0), ("mlp_ratio", 4.0)):
        if getattr(config, name) != value:
            raise ValueError(
                f"the DiT of diffusers has {name} {value} in its code, but this model "
                f"{getattr(config, name)}, so it would give other images there."
            )
    if not config.has_null_label:
        raise ValueError(
            "the DiT of diffusers always has a null label, which this model lacks "
            "(`class_dropout_prob` is 0)."
        )
    if config.frequency_shift == 0:
        warnings.warn(
            "diffusers computes frequency_shift 1, which no file can tell it, and this "
            "model has 0: its images differ there. from_diffusers reads it back as it "
            "is.",
            stacklevel=2,
        )
    published = take_apart(params, config)
    names, copies = _names(config)
    arrays = {}
    for name, parts in names.items():
        for part, array in zip(
            parts, np.split(published[name], len(parts)), strict=True
        ):
            arrays[part] = array
    # Each a copy of its own: PyTorch refuses to save what shares memory.
    arrays |= {copy: arrays[first].copy() for copy, first in copies.items()}
    about = _write_config(config)
    if folder is not None:
        _save(pathlib.Path(folder), arrays, about)
    return arrays, about


def check_class(about: Mapping[str, Any]) -> None:
    """Refuse the config of another model than a DiT.

    Args:
        about: What `config.json` says.

    Raises:
        ValueError: If it is of another class, or an old one of another kind.

    Example:
        >>> check_class({"_class_name": "FluxTransformer2DModel"})
        Traceback (most recent call last):
        ...
        ValueError: these are the weights of a Flux model, not of a DiT.
    """
    name = about.get("_class_name", _CLASS)
    if name in CLASSES:
        raise ValueError(refusal(CLASSES[name]))
    if name == _OLD_CLASS and about.get("norm_type") == "ada_norm_single":
        raise ValueError(refusal(CLASSES["PixArtTransformer2DModel"]))
    if name not in (_CLASS, _OLD_CLASS):
        raise ValueError(
            f"{CONFIG_NAME} is of the class {name!r}, not of {_CLASS!r}; "
            "`from_diffusers` reads a DiT alone."
        )


def _read_config(about: Mapping[str, Any], frequency_shift: int) -> DiTConfig:
    """The sizes that a `config.json` says."""
    problems = [
        f"{name} is {about.get(name)!r} instead of a whole number"
        for name in _SIZES
        if type(about.get(name)) is not int
    ]
    for name, allowed in _FIXED.items():
        if about.get(name) not in allowed:
            problems.append(f"{name} is {about.get(name)!r} instead of {allowed[0]!r}")
    if problems:
        raise ValueError(listed(f"the {CONFIG_NAME} is not that of a DiT", problems))
    channels = about["in_channels"]
    outputs = about.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"the {CONFIG_NAME} is not that of a DiT: out_channels is {outputs} "
            f"instead of {channels}, or {2 * channels} with a learned variance."
        )
    norm_eps = about.get("norm_eps")
    return DiTConfig(
        input_size=about["sample_size"],
        patch_size=about["patch_size"],
        in_channels=channels,
        hidden_size=about["num_attention_heads"] * about["attention_head_dim"],
        depth=about["num_layers"],
        num_heads=about["num_attention_heads"],
        num_classes=about["num_embeds_ada_norm"],
        learn_sigma=outputs != channels,
        frequency_shift=frequency_shift,
        norm_eps=_NORM_EPS if norm_eps is None else norm_eps,
    )


def _write_config(config: DiTConfig) -> dict[str, Any]:
    """What `config.json` says of a model; the inverse of `_read_config`."""
    return {
        "_class_name": _CLASS,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
        "upcast_attention": False,
    }


def _names(config: DiTConfig) -> tuple[dict[str, list[str]], dict[str, str]]:
    """From published names to those here, and from each copy to the first of its."""
    first = "transformer_blocks.0.norm1.emb"
    single = _OUTER | {name: f"{first}.{part}" for name, part in _EMBEDDERS.items()}
    linears = {name: [part] for name, part in single.items()}
    for index in range(config.depth):
        block = f"transformer_blocks.{index}"
        for name, parts in _INNER.items():
            linears[f"blocks.{index}.{name}"] = [f"{block}.{part}" for part in parts]
    names = {
        name: [f"{part}.{kind}" for part in linears[stem]]
        for name in expected_shapes(config)
        if name != POSITIONS
        for stem, _, kind in [name.rpartition(".")]
    }
    embedders = [
        one for parts in names.values() for one in parts if one.startswith(first)
    ]
    copies = {
        one.replace(first, f"transformer_blocks.{index}.norm1.emb"): one
        for index in range(1, config.depth)
        for one in embedders
    }
    return names, copies


def _check_copies(
    counted: Weights, weights: Weights, copies: Mapping[str, str]
) -> None:
    """Require that all blocks have the same embedders; this model has them once."""
    # Read outside of the count, which has each array once.
    first = {name: weights[name] for name in dict.fromkeys(copies.values())}
    problems = []
    for copy, name in copies.items():
        difference = float(np.max(np.abs(counted[copy] - first[name])))
        if difference > 0:
            problems.append(f"{copy} differs from {name} by {difference:.2g}")
    if problems:
        raise ValueError(
            listed(
                "each block has embedders of its own here, and they disagree; the "
                "published DiT has them once, so this model can't be read",
                problems,
            )
        )


def _save(
    folder: pathlib.Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Write a folder as `save_pretrained` does."""
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(
            "writing .safetensors needs safetensors, which is not installed; install "
            'the extra `dit`: pip install "fusionopt-jax[dit]".'
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    # The metadata is what PyTorch's own writer says; readers ask for it.
    save_file(dict(arrays), folder / f"{STEM}.safetensors", {"format": "pt"})
    text = json.dumps(dict(about), indent=2, sort_keys=True)
    (folder / CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")
