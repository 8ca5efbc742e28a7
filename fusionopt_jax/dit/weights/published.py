"""The names and layouts of the published PyTorch DiT, and the parameters out of them.

Kernels lie as `(out, in)` there and as `(in, out)` here, where those of the blocks are
stacked along a leading depth axis; convolution weights lie as (out, channel, row,
column), patches here as (row, column, channel). Whatever has other names is renamed to
these first.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import TIME_FEATURES, DiTConfig
from fusionopt_jax.dit.network.embeddings import position_embedding
from fusionopt_jax.dit.network.model import as_dict, init_params
from fusionopt_jax.dit.network.modulation import BLOCK_PARTS, FINAL_PARTS, MODULATOR
from fusionopt_jax.dit.weights.files import Weights, listed

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Heads of the published widths; the weights do not show their number."""

_MODULATOR = f"{MODULATOR}.1"
"""The second of the SiLU and the linear map that a published modulator is."""

_LINEARS = {
    "t_embedder.mlp.0": ("t_embedder", "fc1"),
    "t_embedder.mlp.2": ("t_embedder", "fc2"),
    "final_layer.linear": ("final_layer", "linear"),
    f"final_layer.{_MODULATOR}": ("final_layer", MODULATOR),
}

_BLOCK_LINEARS = {
    "attn.qkv": ("attn", "qkv"),
    "attn.proj": ("attn", "proj"),
    "mlp.fc1": ("mlp", "fc1"),
    "mlp.fc2": ("mlp", "fc2"),
    _MODULATOR: (MODULATOR,),
}

PATCH = "x_embedder.proj"
TABLE = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"

_POSITION_TOLERANCE = 1e-2
"""Far above the rounding of a bfloat16 file, far below what a learned table differs."""

_ALIGNMENT = 64
"""Bytes. JAX copies an array that starts at anything but a multiple of this."""

_NO_DIT = "these are not the weights of a DiT"


def read_config(
    shapes: Mapping[str, tuple[int, ...]],
    num_heads: int | None,
    has_null_label: bool,
    time_scale: float,
) -> DiTConfig:
    """The sizes that published weights have.

    Args:
        shapes: Of every array, by its published name.
        num_heads: Attention heads; None takes those of the published model of this
            width.
        has_null_label: Whether the last row of the label table is the null label.
        time_scale: `DiTConfig.time_scale`.

    Returns:
        The config.

    Raises:
        ValueError: If the shapes are not those of a DiT, or `num_heads` is needed.

    Example:
        >>> config = DiTConfig(hidden_size=384, depth=2, num_heads=6)
        >>> read_config(expected_shapes(config), None, True, 1.0) == config
        True
    """
    ranks = {
        f"{PATCH}.weight": 4,
        POSITIONS: 3,
        TABLE: 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    problems = [
        f"{name} is missing"
        if name not in shapes
        else f"{name} has {len(shapes[name])} axes instead of {rank}"
        for name, rank in ranks.items()
        if name not in shapes or len(shapes[name]) != rank
    ]
    if problems:
        raise ValueError(listed(_NO_DIT, problems))
    width, channels, patch, _ = shapes[f"{PATCH}.weight"]
    tokens = shapes[POSITIONS][1]
    rows = shapes[TABLE][0]
    outputs = shapes["final_layer.linear.weight"][0]
    inputs = patch * patch * channels
    side = math.isqrt(tokens)
    if min(width, inputs, tokens) == 0 or side * side != tokens:
        problems.append(f"{POSITIONS} has {tokens} tokens, which is no square grid")
    if outputs not in (inputs, 2 * inputs):
        problems.append(
            f"final_layer.linear.weight has {outputs} outputs instead of {inputs} (or "
            f"{2 * inputs} with a learned variance)"
        )
    if rows <= int(has_null_label):
        problems.append(f"{TABLE} has {rows} rows, too few for a class")
    if problems:
        raise ValueError(listed(_NO_DIT, problems))
    if num_heads is None and width not in _HEADS:
        raise ValueError(
            f"`num_heads` is needed: the weights do not show it, and width {width} is "
            "none of the published models."
        )
    found = {
        int(match[1])
        for name in shapes
        if (match := re.match(r"blocks\.(\d{1,6})\.", name))
    }
    return DiTConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=len(found),
        num_heads=_HEADS[width] if num_heads is None else num_heads,
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
        class_dropout_prob=0.1 if has_null_label else 0.0,
        num_classes=rows - int(has_null_label),
        learn_sigma=outputs == 2 * inputs,
        time_scale=time_scale,
    )


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every entry of a published state dict.

    Args:
        config: The sizes.

    Returns:
        Shapes by published name.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> expected_shapes(config)["blocks.1.attn.qkv.weight"]
        (96, 32)
    """
    width, patch = config.hidden_size, config.patch_size
    linears = {
        "t_embedder.mlp.0": (width, TIME_FEATURES),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (patch**2 * config.out_channels, width),
        f"final_layer.{_MODULATOR}": (FINAL_PARTS * width, width),
    }
    for index in range(config.depth):
        linears |= {
            f"blocks.{index}.attn.qkv": (3 * width, width),
            f"blocks.{index}.attn.proj": (width, width),
            f"blocks.{index}.mlp.fc1": (config.mlp_size, width),
            f"blocks.{index}.mlp.fc2": (width, config.mlp_size),
            f"blocks.{index}.{_MODULATOR}": (BLOCK_PARTS * width, width),
        }
    shapes: dict[str, tuple[int, ...]] = {
        POSITIONS: (1, config.num_tokens, width),
        f"{PATCH}.weight": (width, config.in_channels, patch, patch),
        f"{PATCH}.bias": (width,),
        TABLE: (config.num_labels, width),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def check_entries(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    title: str = _NO_DIT,
) -> None:
    """Require every entry, no other, each in its shape.

    Args:
        shapes: Of what there is.
        expected: Of what there has to be.
        title: What is wrong if they differ, for the error.

    Raises:
        ValueError: If they differ, with the list.

    Example:
        >>> check_entries({"bias": (2,)}, {"bias": (3,)})
        Traceback (most recent call last):
        ...
        ValueError: these are not the weights of a DiT:
          bias has shape (2,) instead of (3,)
    """
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is unexpected" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        raise ValueError(listed(title, problems))


def check_positions(table: np.ndarray, config: DiTConfig) -> None:
    """Require the fixed position embedding, which this library computes itself.

    Args:
        table: `[1, tokens, hidden]`.
        config: The sizes.

    Raises:
        ValueError: If it is a learned one, or another.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> check_positions(position_embedding(config.grid_size, 32)[None], config)
    """
    fixed = position_embedding(config.grid_size, config.hidden_size)
    difference = float(np.max(np.abs(table[0] - fixed)))
    if difference > _POSITION_TOLERANCE:
        raise ValueError(
            f"{POSITIONS} differs from the fixed sine table by {difference:.2g}: a "
            "model with a learned or another position embedding is not supported."
        )


def build_params(weights: Weights, config: DiTConfig) -> dict[str, Any]:
    """Parameters out of published weights, whose entries have been checked.

    Each array is read into its place in a stack, so that on a CPU there is one array in
    memory beside the parameters, and on another device one stack.

    Args:
        weights: By published name; the positions are not read.
        config: Their sizes.

    Returns:
        The parameters, in fp32 and in the layout of
        :func:`~fusionopt_jax.dit.init_params`; nothing of them is shared with
        `weights`.

    Raises:
        ValueError: If a file turns out to be damaged, or values are not finite.

    Example:
        See :func:`~fusionopt_jax.dit.from_pytorch`.
    """

    def linear(name: str) -> Params:
        """A linear map in `(in, out)` layout."""
        return {
            "kernel": _own(weights[f"{name}.weight"].T),
            "bias": _own(weights[f"{name}.bias"]),
        }

    def stacked(name: str) -> Array:
        """An array of every block."""
        shape = weights.shapes[f"blocks.0.{name}"][::-1]
        stack = _room((config.depth, *shape))
        for index in range(config.depth):
            stack[index] = weights[f"blocks.{index}.{name}"].T
        return jax.device_put(stack)

    patch = weights[f"{PATCH}.weight"].transpose(2, 3, 1, 0)
    params: dict[str, Any] = {
        "x_embedder": {
            "proj": {
                "kernel": _own(patch.reshape(-1, config.hidden_size)),
                "bias": _own(weights[f"{PATCH}.bias"]),
            }
        },
        "y_embedder": {"embedding_table": _own(weights[TABLE])},
        "blocks": {},
    }
    for name, path in _LINEARS.items():
        _put(params, path, linear(name))
    for name, path in _BLOCK_LINEARS.items():
        layer = {"kernel": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}
        _put(params["blocks"], path, layer)
    return params


def take_apart(params: Params, config: DiTConfig) -> dict[str, np.ndarray]:
    """Parameters as arrays under the published names.

    Args:
        params: Full parameters.
        config: Their sizes.

    Returns:
        NumPy arrays in fp32, with the position embedding.

    Raises:
        ValueError: If the parameters do not have the sizes of the config.

    Example:
        See :func:`~fusionopt_jax.dit.to_pytorch`.
    """
    params = as_dict(params)
    _check_params(params, config)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(params))
    width, patch = config.hidden_size, config.patch_size
    kernel = params["x_embedder"]["proj"]["kernel"]
    kernel = kernel.reshape(patch, patch, config.in_channels, width)
    positions = position_embedding(config.grid_size, width)
    arrays = {
        POSITIONS: positions[None],
        f"{PATCH}.weight": kernel.transpose(3, 2, 0, 1),
        f"{PATCH}.bias": params["x_embedder"]["proj"]["bias"],
        TABLE: params["y_embedder"]["embedding_table"],
    }
    for name, path in _LINEARS.items():
        leaf = _get(params, path)
        arrays |= {f"{name}.weight": leaf["kernel"].T, f"{name}.bias": leaf["bias"]}
    for index in range(config.depth):
        for name, path in _BLOCK_LINEARS.items():
            leaf = _get(params["blocks"], path)
            arrays[f"blocks.{index}.{name}.weight"] = leaf["kernel"][index].T
            arrays[f"blocks.{index}.{name}.bias"] = leaf["bias"][index]
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """Memory for an fp32 array that JAX on a CPU takes over instead of copying it."""
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)


def _own(array: np.ndarray) -> Array:
    """A copy, since JAX may go on using the memory that it is handed."""
    room = _room(array.shape)
    room[...] = array
    return jax.device_put(room)


def _get(tree: Params, path: tuple[str, ...]) -> Params:
    """The subtree at a path."""
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[str, ...], value: Params) -> None:
    """Set the subtree at a path."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _check_params(params: Params, config: DiTConfig) -> None:
    """Require the parameters to have the sizes of the config."""
    expected = jax.eval_shape(lambda: init_params(config))
    check_entries(
        {name: np.shape(leaf) for name, leaf in named_leaves(params)},
        {name: leaf.shape for name, leaf in named_leaves(expected)},
        "`params` do not fit the config",
    )
