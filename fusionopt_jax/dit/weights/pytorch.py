"""Weights of the published PyTorch DiT, and of SiT and REPA, which have its names."""

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from fusionopt_jax._checks import check_choice
from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.weights.families import check_family
from fusionopt_jax.dit.weights.files import Progress, Weights, listed, read_weights
from fusionopt_jax.dit.weights.published import (
    POSITIONS,
    build_params,
    check_entries,
    check_positions,
    expected_shapes,
    read_config,
    take_apart,
)

Kind: TypeAlias = Literal["dit", "sit", "repa"]

_TIME_SCALES: dict[Kind, float] = {"dit": 1.0, "sit": 1e-3, "repa": 1e-3}
"""What turns 1000 t into the time that a model embeds: SiT and REPA embed t itself."""


def from_pytorch(
    source: Mapping[str, Any] | str | os.PathLike[str],
    num_heads: int | None = None,
    *,
    kind: Kind = "dit",
    entry: str | None = None,
    has_null_label: bool = True,
    time_scale: float | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], DiTConfig]:
    """Read the weights of a published PyTorch DiT, or of one that was trained like it.

    Every size is read from the weights. Files are never executed: a `.pt` file is read
    without PyTorch, and one that holds anything but tensors and plain data is refused.
    Arrays are read one at a time, once all names and shapes have been checked.

    Args:
        source: A dict from names to arrays (NumPy, JAX or PyTorch), or a file: `.pt`,
            `.pth`, `.ckpt` or `.bin` (what `torch.save` writes), `.safetensors` (needs
            safetensors), or `.npz`.
        num_heads: Attention heads. None takes those of the published model of this
            width; other widths must say, since the weights do not show it.
        kind: The code that the weights were trained with, which they do not show
            either: "dit", "sit" or "repa". The last two embed t in [0, 1], so that
            `time_scale` becomes 0.001 and the model is given 1000 t like any other.
            SiT has its data at t = 1 and REPA at t = 0: sample them with
            `convention="data_at_one"` and "noise_at_one". Of a REPA file the
            projectors, which only its training uses, are left out with a warning, and
            blocks that an older version named `decoder_blocks` are put after the
            others.
        entry: Which part of a training checkpoint to take, such as "ema" or "model".
            None takes "ema", else "model", else "state_dict", else all of it.
        has_null_label: Whether the last row of the label table is the null label, as
            in every published model.
        time_scale: `DiTConfig.time_scale` of a model of kind "dit"; None is 1.
        progress: Called after each array with the bytes that have been read and the
            bytes of all, as they are stored; None calls nothing.

    Returns:
        The parameters, in fp32 and in the layout of
        :func:`~fusionopt_jax.dit.init_params`, and the config. `learn_sigma` is read
        from the rows of the last layer; a SiT's second half of channels means nothing,
        and samplers don't read it.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is needed and missing.
        ValueError: If the file is damaged or no weight file; if it is of another family
            of models, or has the names of diffusers; if entries are missing,
            unexpected or misshapen, with the list of them; if values are not finite
            floating-point numbers; if the position embedding is not the fixed one; if
            `time_scale` is not that of the kind.

    Warns:
        UserWarning: If projectors of REPA are left out.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> from fusionopt_jax.dit import init_params
        >>> weights = to_pytorch(init_params(config), config)
        >>> params, same_config = from_pytorch(weights, num_heads=4)
        >>> same_config == config
        True
        >>> _, of_sit = from_pytorch(weights, num_heads=4, kind="sit")
        >>> of_sit.time_scale
        0.001

    Source: names and layouts of the PyTorch model that Peebles and Xie published; SiT
    (Ma et al., arXiv 2401.08740) and REPA (Yu et al., arXiv 2410.06940) keep them.
    """
    check_choice("kind", kind, _TIME_SCALES)
    scale = _TIME_SCALES[kind] if time_scale is None else time_scale
    if kind != "dit" and scale != _TIME_SCALES[kind]:
        raise ValueError(
            f"`time_scale` of a model of kind {kind!r} is {_TIME_SCALES[kind]}, not "
            f"{time_scale}; leave it out."
        )
    weights = read_weights(source, entry)
    weights = weights.renamed(
        {name.removeprefix("module."): [name] for name in weights}
    )
    check_family(weights, "published")
    weights = _without_training_parts(weights, kind)
    config = read_config(weights.shapes, num_heads, has_null_label, scale)
    check_entries(weights.shapes, expected_shapes(config))
    weights = weights.reporting(progress)
    check_positions(weights[POSITIONS], config)
    return build_params(weights, config), config


def to_pytorch(params: Params, config: DiTConfig) -> dict[str, np.ndarray]:
    """Write parameters as a state dict of the published PyTorch DiT.

    Args:
        params: Full parameters.
        config: Their sizes.

    Returns:
        NumPy arrays in fp32 under the published names, with the position embedding.
        `torch.from_numpy`, `numpy.savez` and `safetensors.numpy.save_file` take them.

    Raises:
        ValueError: If the parameters do not have the sizes of the config, or if the
            published code would compute something else with them.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> to_pytorch(init_params(config), config)["blocks.1.attn.qkv.weight"].shape
        (96, 32)

    Source: names and layouts of the PyTorch model that Peebles and Xie published.
    """
    for name, value in (("frequency_shift", 0), ("norm_eps", 1e-6)):
        if getattr(config, name) != value:
            raise ValueError(
                f"the published DiT has {name} {value} in its code, but this model "
                f"{getattr(config, name)}, so it would give other images there; to "
                "have the weights all the same, hand over "
                f"dataclasses.replace(config, {name}={value})."
            )
    return take_apart(params, config)


def _without_training_parts(weights: Weights, kind: Kind) -> Weights:
    """What samples of a file of REPA, under the published names."""
    normed = [name for name in weights if re.search(r"\.attn\.[qk]_norm\.", name)]
    if normed:
        raise ValueError(
            listed(
                "a model that normalises its queries and keys (qk_norm) is not "
                "supported",
                normed,
            )
        )
    projectors = [name for name in weights if name.startswith("projectors.")]
    decoders = [name for name in weights if name.startswith("decoder_blocks.")]
    if kind != "repa" and projectors + decoders:
        raise ValueError(
            f"{(projectors + decoders)[0]} is of a model trained with REPA; pass "
            'kind="repa".'
        )
    if projectors:
        warnings.warn(
            f"{len(projectors)} arrays of REPA's projectors ({projectors[0]} and the "
            "like) are left out: only training uses them.",
            UserWarning,
            stacklevel=3,
        )
    # An older version kept the blocks after the aligned one apart, counted from zero.
    numbers = [re.match(r"blocks\.(\d{1,6})\.", name) for name in weights]
    before = max((int(number[1]) + 1 for number in numbers if number), default=0)

    def published(name: str) -> str:
        """The published name of an entry."""
        match = re.match(r"decoder_blocks\.(\d{1,6})\.", name)
        if match is None:
            return name
        return f"blocks.{int(match[1]) + before}.{name[match.end() :]}"

    return weights.renamed(
        {published(name): [name] for name in weights if name not in projectors}
    )
