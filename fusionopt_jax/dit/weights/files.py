"""Named arrays out of weight files of any known format, none of which is executed."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fusionopt_jax.dit.weights.npz_file import read_npz
from fusionopt_jax.dit.weights.pt_file import read_pt
from fusionopt_jax.dit.weights.reader import Reader
from fusionopt_jax.dit.weights.safetensors_file import read_safetensors

FORMATS: dict[str, Reader] = {
    ".pt": read_pt,
    ".pth": read_pt,
    ".ckpt": read_pt,
    ".safetensors": read_safetensors,
    ".npz": read_npz,
}
"""What reads a file, by its ending; a new format is a module and a line here."""

_ENTRIES = ("ema", "model", "state_dict")
"""Where training checkpoints keep weights, the preferred ones first."""


def read_weights(
    source: Mapping[str, Any] | str | os.PathLike[str], entry: str | None = None
) -> dict[str, np.ndarray]:
    """Read named arrays from a file, or from a dict in memory.

    Args:
        source: A dict from names to arrays (NumPy, JAX or PyTorch), or a file: `.pt`,
            `.pth` or `.ckpt`, `.safetensors` (needs safetensors), or `.npz`.
        entry: Which part of a training checkpoint to take. None takes "ema", else
            "model", else "state_dict", else all of it.

    Returns:
        Finite fp32 arrays by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is needed and missing.
        ValueError: If the file is damaged or no weight file, if there is no such entry,
            or if values are not finite floating-point numbers.

    Example:
        >>> read_weights({"ema": {"bias": np.zeros(2, np.float16)}})
        {'bias': array([0., 0.], dtype=float32)}
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(pathlib.Path(source), entry)
    return _read_mapping(_choose_entry(source, entry, "`state_dict`"))


def _read_file(path: pathlib.Path, entry: str | None) -> dict[str, np.ndarray]:
    """The arrays of a weight file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}.")
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        *others, last = FORMATS
        raise ValueError(
            f"{path} must end in {', '.join(others)} or {last}, so that its format is "
            "known."
        )
    return _read_mapping(read(path, lambda held: _choose_entry(held, entry, str(path))))


def _choose_entry(content: Any, entry: str | None, source: str) -> Mapping[str, Any]:
    """The state dict inside a checkpoint."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{source} holds a {type(content).__name__} instead of a dict of weights; "
            "save model.state_dict()."
        )
    if entry is None:
        nested = [key for key in _ENTRIES if isinstance(content.get(key), Mapping)]
        content = content[nested[0]] if nested else content
    elif isinstance(content.get(entry), Mapping):
        content = content[entry]
    else:
        names = [str(key) for key in content if isinstance(content[key], Mapping)]
        raise ValueError(
            f"{source} has no `entry` {entry!r}; "
            + (
                f"it has {', '.join(names)}."
                if names
                else "it is one plain state dict."
            )
        )
    wrong = [key for key in content if not isinstance(key, str)]
    if wrong:
        raise ValueError(f"{source} has names that are not text, such as {wrong[0]!r}.")
    return content


def _read_mapping(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every value as a finite fp32 array."""
    arrays, wrong = {}, []
    for name, value in state_dict.items():
        if hasattr(value, "detach"):
            # A PyTorch tensor: NumPy reads neither bfloat16 nor gradients from one.
            value = value.detach().float().cpu().numpy()
        array = np.asarray(value) if hasattr(value, "dtype") else None
        if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
            kind = type(value).__name__ if array is None else str(array.dtype)
            wrong.append(f"{name} is {kind} instead of floating point")
            continue
        array = array.astype(np.float32)
        if not np.all(np.isfinite(array)):
            wrong.append(f"{name} holds values that are not finite")
        arrays[name] = array
    if wrong:
        raise ValueError(listed("these weights can't be used", wrong))
    return arrays


def listed(title: str, lines: list[str]) -> str:
    """A title and its lines, the first twenty of them.

    Args:
        title: What is wrong.
        lines: Where.

    Returns:
        A text of several lines for an error message.

    Example:
        >>> print(listed("missing", ["pos_embed"]))
        missing:
          pos_embed
    """
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n  ".join([f"{title}:", *lines[:20], *more])
