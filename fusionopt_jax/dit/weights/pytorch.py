"""The layout of the published PyTorch DiT's weights, in and out."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import TIME_FEATURES, DiTConfig
from fusionopt_jax.dit.network.embeddings import position_embedding
from fusionopt_jax.dit.network.model import as_dict, init_params
from fusionopt_jax.dit.network.modulation import BLOCK_PARTS, FINAL_PARTS, MODULATOR
from fusionopt_jax.dit.weights.files import listed, read_weights

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

_PATCH = "x_embedder.proj"
_TABLE = "y_embedder.embedding_table.weight"
_POSITIONS = "pos_embed"

_POSITION_TOLERANCE = 1e-2
"""Far above the rounding of a bfloat16 file, far below what a learned table differs."""


def from_pytorch(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    num_heads: int | None = None,
    *,
    entry: str | None = None,
    has_null_label: bool = True,
    time_scale: float = 1.0,
) -> tuple[dict[str, Any], DiTConfig]:
    """Read the weights of a published PyTorch DiT, or of one that was trained like it.

    Every size is read from the weights. Files are never executed: a `.pt` file is read
    without PyTorch, and one that holds anything but tensors and plain data is refused.

    Args:
        state_dict: A dict from names to arrays (NumPy, JAX or PyTorch), or a file:
            `.pt`, `.pth`, `.ckpt` or `.bin` (what `torch.save` writes), `.safetensors`
            (needs safetensors), or `.npz`.
        num_heads: Attention heads. None takes those of the published model of this
            width; other widths must say, since the weights do not show it.
        entry: Which part of a training checkpoint to take, such as "ema" or "model".
            None takes "ema", else "model", else "state_dict", else all of it.
        has_null_label: Whether the last row of the label table is the null label, as
            in every published model.
        time_scale: `DiTConfig.time_scale` of the model.

    Returns:
        The parameters, in fp32 and in the layout of
        :func:`~fusionopt_jax.dit.init_params`, and the config.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is needed and missing.
        ValueError: If the file is damaged or no weight file; if entries are missing,
            unexpected or misshapen, with the list of them; if values are not finite
            floating-point numbers; if the position embedding is not the fixed one.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> weights = to_pytorch(init_params(config), config)
        >>> params, same_config = from_pytorch(weights, num_heads=4)
        >>> same_config == config
        True

    Source: names and layouts of the PyTorch model that Peebles and Xie published.
    """
    weights = read_weights(state_dict, entry)
    arrays = {name.removeprefix("module."): value for name, value in weights.items()}
    config = _read_config(arrays, num_heads, has_null_label, time_scale)
    _check_entries(arrays, config)
    _check_positions(arrays[_POSITIONS], config)

    def linear(name: str) -> Params:
        """A linear map in `(in, out)` layout."""
        return {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}

    # Convolution weights lie as (out, channel, row, column), patches as (row, column,
    # channel).
    patch = arrays[f"{_PATCH}.weight"].transpose(2, 3, 1, 0)
    params: dict[str, Any] = {
        "x_embedder": {
            "proj": {
                "kernel": patch.reshape(-1, config.hidden_size),
                "bias": arrays[f"{_PATCH}.bias"],
            }
        },
        "y_embedder": {"embedding_table": arrays[_TABLE]},
        "blocks": {},
    }
    for name, path in _LINEARS.items():
        _put(params, path, linear(name))
    for name, path in _BLOCK_LINEARS.items():
        layers = [linear(f"blocks.{i}.{name}") for i in range(config.depth)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
        _put(params["blocks"], path, stacked)
    return jax.tree.map(jnp.asarray, params), config


def to_pytorch(params: Params, config: DiTConfig) -> dict[str, np.ndarray]:
    """Write parameters as a state dict of the published PyTorch DiT.

    Args:
        params: Full parameters.
        config: Their sizes.

    Returns:
        NumPy arrays in fp32 under the published names, with the position embedding.
        `torch.from_numpy`, `numpy.savez` and `safetensors.numpy.save_file` take them.

    Raises:
        ValueError: If the parameters do not have the sizes of the config.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> to_pytorch(init_params(config), config)["blocks.1.attn.qkv.weight"].shape
        (96, 32)

    Source: names and layouts of the PyTorch model that Peebles and Xie published.
    """
    params = as_dict(params)
    _check_params(params, config)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(params))
    width, patch = config.hidden_size, config.patch_size
    kernel = params["x_embedder"]["proj"]["kernel"]
    kernel = kernel.reshape(patch, patch, config.in_channels, width)
    positions = position_embedding(config.grid_size, width)
    arrays = {
        _POSITIONS: positions[None],
        f"{_PATCH}.weight": kernel.transpose(3, 2, 0, 1),
        f"{_PATCH}.bias": params["x_embedder"]["proj"]["bias"],
        _TABLE: params["y_embedder"]["embedding_table"],
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


def _read_config(
    arrays: Mapping[str, np.ndarray],
    num_heads: int | None,
    has_null_label: bool,
    time_scale: float,
) -> DiTConfig:
    """The sizes that the weights have."""
    ranks = {
        f"{_PATCH}.weight": 4,
        _POSITIONS: 3,
        _TABLE: 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    problems = [
        f"{name} is missing"
        if name not in arrays
        else f"{name} has {arrays[name].ndim} axes instead of {rank}"
        for name, rank in ranks.items()
        if name not in arrays or arrays[name].ndim != rank
    ]
    if problems:
        raise ValueError(listed("these are not the weights of a DiT", problems))
    width, channels, patch, _ = arrays[f"{_PATCH}.weight"].shape
    tokens = arrays[_POSITIONS].shape[1]
    rows = arrays[_TABLE].shape[0]
    outputs = arrays["final_layer.linear.weight"].shape[0]
    inputs = patch * patch * channels
    side = math.isqrt(tokens)
    if min(width, inputs, tokens) == 0 or side * side != tokens:
        problems.append(f"{_POSITIONS} has {tokens} tokens, which is no square grid")
    if outputs not in (inputs, 2 * inputs):
        problems.append(
            f"final_layer.linear.weight has {outputs} outputs instead of {inputs} (or "
            f"{2 * inputs} with a learned variance)"
        )
    if rows <= int(has_null_label):
        problems.append(f"{_TABLE} has {rows} rows, too few for a class")
    if problems:
        raise ValueError(listed("these are not the weights of a DiT", problems))
    if num_heads is None and width not in _HEADS:
        raise ValueError(
            f"`num_heads` is needed: the weights do not show it, and width {width} is "
            "none of the published models."
        )
    found = {
        int(match[1])
        for name in arrays
        if (match := re.match(r"blocks\.(\d{1,6})\.", name))
    }
    return DiTConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=len(found),
        num_heads=_HEADS[width] if num_heads is None else num_heads,
        mlp_ratio=arrays["blocks.0.mlp.fc1.weight"].shape[0] / width,
        class_dropout_prob=0.1 if has_null_label else 0.0,
        num_classes=rows - int(has_null_label),
        learn_sigma=outputs == 2 * inputs,
        time_scale=time_scale,
    )


def _expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every entry of a state dict."""
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
        _POSITIONS: (1, config.num_tokens, width),
        f"{_PATCH}.weight": (width, config.in_channels, patch, patch),
        f"{_PATCH}.bias": (width,),
        _TABLE: (config.num_labels, width),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _check_entries(arrays: Mapping[str, np.ndarray], config: DiTConfig) -> None:
    """Require every entry, no other, each in its shape."""
    expected = _expected_shapes(config)
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is unexpected" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {arrays[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise ValueError(listed("these are not the weights of a DiT", problems))


def _check_positions(table: np.ndarray, config: DiTConfig) -> None:
    """Require the fixed position embedding, which this library computes itself."""
    fixed = position_embedding(config.grid_size, config.hidden_size)
    difference = float(np.max(np.abs(table[0] - fixed)))
    if difference > _POSITION_TOLERANCE:
        raise ValueError(
            f"{_POSITIONS} differs from the fixed sine table by {difference:.2g}: a "
            "model with a learned or another position embedding is not supported."
        )


def _check_params(params: Params, config: DiTConfig) -> None:
    """Require the parameters to have the sizes of the config."""
    expected = jax.eval_shape(lambda: init_params(config))
    wanted = {name: leaf.shape for name, leaf in named_leaves(expected)}
    held = {name: np.shape(leaf) for name, leaf in named_leaves(params)}
    problems = [
        f"{name} has shape {held[name]} instead of {shape}"
        if name in held
        else f"{name} is missing"
        for name, shape in wanted.items()
        if held.get(name) != shape
    ]
    problems += [f"{name} is unexpected" for name in held if name not in wanted]
    if problems:
        raise ValueError(listed("`params` do not fit the config", problems))
