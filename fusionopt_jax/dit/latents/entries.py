"""The entries of an autoencoder's state dict: their names, their shapes, their place.

The names are those of today's diffusers library. Weights of the same networks are also
found under the names that it had before, and under those of the first publication.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np

from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit.latents.config import Config
from fusionopt_jax.dit.weights.published import check_entries

Shape: TypeAlias = tuple[int, ...]
"""The length of each axis."""

_FIRST_NAMES = (
    (r"^encoder\.down\.(\d{1,3})\.", r"encoder.down_blocks.\1."),
    (r"\.block\.(\d{1,3})\.", r".resnets.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(up|down)sample\.conv\.", r".\1samplers.0.conv."),
    (r"^((?:en|de)coder)\.norm_out\.", r"\1.conv_norm_out."),
)
"""Patterns of the first publication's names, and what they are called today."""

_ATTENTION_NAMES = {
    # Once in the diffusers library.
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
    # As first published.
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "norm": "group_norm",
}
"""Layers of an attention under names they had, and under those they have."""

_PARTS = {
    "decoder": ("decoder", "post_quant_conv"),
    "encoder": ("encoder", "quant_conv"),
}
"""Which entries each direction needs, by the first word of their names."""


def entry_shapes(config: Config, part: str) -> dict[str, Shape]:
    """The shape of every entry that one direction needs, as PyTorch keeps it.

    Args:
        config: Sizes of the autoencoder.
        part: "decoder" or "encoder".

    Returns:
        Shapes by name: convolutions (out, in, row, column), linear maps (out, in).

    Example:
        >>> entry_shapes(Config(), "decoder")["decoder.conv_in.weight"]
        (512, 4, 3, 3)
    """
    shapes: dict[str, Shape] = {}

    def add(name: str, *shape: int) -> None:
        """A weight, and the bias that belongs to it."""
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def add_resnet(name: str, inputs: int, outputs: int) -> None:
        """The entries of a residual block."""
        add(f"{name}.norm1", inputs)
        add(f"{name}.conv1", outputs, inputs, 3, 3)
        add(f"{name}.norm2", outputs)
        add(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            add(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    latent, moments = config.latent_channels, 2 * config.latent_channels
    fine_to_coarse = config.block_out_channels
    if part == "decoder":
        widths, layers = fine_to_coarse[::-1], config.layers_per_block + 1
        inputs, outputs = latent, config.out_channels
        blocks, resampler = "up_blocks", "upsamplers"
        if config.use_post_quant_conv:
            add("post_quant_conv", latent, latent, 1, 1)
    else:
        widths, layers = fine_to_coarse, config.layers_per_block
        inputs, outputs = config.in_channels, moments
        blocks, resampler = "down_blocks", "downsamplers"
        if config.use_quant_conv:
            add("quant_conv", moments, moments, 1, 1)

    add(f"{part}.conv_in", widths[0], inputs, 3, 3)
    width = widths[0]
    for level, next_width in enumerate(widths):
        name = f"{part}.{blocks}.{level}"
        for index in range(layers):
            add_resnet(f"{name}.resnets.{index}", width, next_width)
            width = next_width
        if level < len(widths) - 1:
            add(f"{name}.{resampler}.0.conv", width, width, 3, 3)

    middle, coarsest = f"{part}.mid_block", fine_to_coarse[-1]
    for index in range(2):
        add_resnet(f"{middle}.resnets.{index}", coarsest, coarsest)
    if config.mid_block_add_attention:
        add(f"{middle}.attentions.0.group_norm", coarsest)
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            add(f"{middle}.attentions.0.{layer}", coarsest, coarsest)

    add(f"{part}.conv_norm_out", widths[-1])
    add(f"{part}.conv_out", outputs, widths[-1], 3, 3)
    return shapes


def canonical_name(name: str, levels: int) -> str:
    """The name that today's diffusers library has for an entry under an older one.

    Args:
        name: Of the entry, in any of the three namings.
        levels: Number of `block_out_channels`: the first publication counts the levels
            of the decoder from the finest, diffusers from the coarsest.

    Returns:
        The name, unchanged if it is no older one.

    Example:
        >>> canonical_name("decoder.up.3.block.0.nin_shortcut.weight", levels=4)
        'decoder.up_blocks.0.resnets.0.conv_shortcut.weight'
        >>> canonical_name("decoder.mid_block.attentions.0.proj_attn.bias", levels=4)
        'decoder.mid_block.attentions.0.to_out.0.bias'
    """
    if match := re.match(r"decoder\.up\.(\d{1,3})\.(.*)", name):
        name = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{match[2]}"
    for old, new in _FIRST_NAMES:
        name = re.sub(old, new, name)
    head, attention, layer = name.partition(".attentions.0.")
    if attention:
        old, dot, kind = layer.rpartition(".")
        layer = _ATTENTION_NAMES.get(old, old) + dot + kind
    return head + attention + layer


def entry_path(name: str, shape: Shape) -> tuple[str, ...]:
    """Where an entry lies in the tree of parameters."""
    *path, kind = name.split(".")
    if kind == "weight":
        kind = "scale" if len(shape) == 1 else "kernel"
    return (*path, kind)


def entry_axes(rank: int) -> tuple[int, ...]:
    """The axes of an entry, by their rank, in this library's order: output last."""
    return (2, 3, 1, 0) if rank == 4 else tuple(range(rank))[::-1]


@functools.cache
def _param_shapes(config: Config, part: str) -> dict[str, Shape]:
    """The shape of every parameter that one direction needs."""
    return {
        "/".join(entry_path(name, shape)): tuple(
            shape[axis] for axis in entry_axes(len(shape))
        )
        for name, shape in entry_shapes(config, part).items()
    }


def check_params(params: Params, config: Config, part: str) -> None:
    """Require the parameters of one direction, with the sizes of the config.

    Args:
        params: What `from_diffusers` returned, or a tree like it.
        config: Sizes of the autoencoder.
        part: "decoder" or "encoder".

    Raises:
        ValueError: If it has no such part, or one of other sizes, with the list.

    Example:
        >>> check_params({"decoder": {}}, Config(), "encoder")
        Traceback (most recent call last):
        ...
        ValueError: `params` have no encoder; read a file that holds it.
    """
    roots = _PARTS[part]
    if not isinstance(params, Mapping) or part not in params:
        raise ValueError(f"`params` have no {part}; read a file that holds it.")
    held = {
        name: np.shape(leaf)
        for name, leaf in named_leaves(
            {root: params[root] for root in roots if root in params}
        )
    }
    check_entries(held, _param_shapes(config, part), "`params` do not fit the config")


def parts_in(names: Iterable[str]) -> list[str]:
    """The directions whose entries are among these names."""
    first = {name.split(".")[0] for name in names}
    return [part for part, roots in _PARTS.items() if first.intersection(roots)]
