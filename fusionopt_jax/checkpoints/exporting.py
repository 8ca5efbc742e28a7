"""Write weights alone, as a file that programs without JAX read."""

import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.checkpoints import processes, record
from fusionopt_jax.routing import Routing

_SUFFIX = ".safetensors"

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What the format calls the dtypes that it has."""

_OWN = ("format", "step", "routing", "digest")


def export_safetensors(
    path: str | os.PathLike[str],
    params: Params,
    *,
    step: int | None = None,
    routing: Routing | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes weights as a ``.safetensors`` file, with neither Orbax nor an optimiser.

    Arrays are named by their key paths, ``blocks/qkv/kernel``, and keep their layout
    (of a Flax kernel: inputs first). Divided ones are gathered one at a time; of
    several processes every one calls it, and the first writes. The file comes under its
    name when it is whole: an older one of that name stays until then.

    Args:
        path: The file, whose name ends in ``.safetensors``, in a folder that exists.
        params: The weights, such as `eval_params(opt_state, params)`.
        step: Kept as ``step``, if it is given.
        routing: Its fingerprint is kept as ``routing``, if it is given.
        metadata: More to keep, text by text. What is always there: ``format``
            (``"flax"``) and ``digest``, which is `weights_digest(params)`.

    Raises:
        ValueError: If the name of the file or of an array won't do, or `metadata` names
            what is kept anyway.
        TypeError: If a leaf is no array of a dtype that the format has, or `metadata`
            is not text.
        OSError: If it can't be written.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp, safetensors
        >>> from fusionopt_jax import checkpoints
        >>> params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "weights.safetensors"
        ...     checkpoints.export_safetensors(path, params, step=100)
        ...     with safetensors.safe_open(path, "np") as file:
        ...         print(sorted(file.keys()), file.metadata()["step"])
        ['head/bias', 'head/kernel'] 100

    Source:
        The format: https://github.com/huggingface/safetensors#format.
    """
    path = pathlib.Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"`path` must end in {_SUFFIX}, got {path.name!r}.")
    leaves = _checked(params)
    kept = {"format": "flax", "digest": weights_digest(params)}
    if step is not None:
        kept["step"] = str(step)
    if routing is not None:
        kept["routing"] = routing.fingerprint(params)
    kept |= _own_metadata(metadata or {})
    # The widest first, so that every array is aligned to its own width.
    leaves.sort(key=lambda named: (-named[1].dtype.itemsize, named[0]))
    arrays = (_gathered(leaf) for _, leaf in leaves)
    error: OSError | None = None
    if jax.process_index() == 0:
        try:
            _write_whole(path, _head(leaves, kept), arrays)
        except OSError as caught:
            error = caught
    # Every process takes part in gathering each array that is left.
    for _ in arrays:
        pass
    with processes.together():
        if error is not None:
            raise error


def weights_digest(params: Params) -> str:
    """One text for all names, dtypes, shapes and bits of a tree of weights.

    It is what `export_safetensors` keeps as ``digest``. It changes with any change of
    one element for certain, and misses any other change of an array with a chance of
    about 2^-64; how an array is sharded doesn't matter.

    Args:
        params: The weights.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import jax.numpy as jnp
        >>> from fusionopt_jax import checkpoints
        >>> first = checkpoints.weights_digest({"bias": jnp.zeros(2)})
        >>> first == checkpoints.weights_digest({"bias": jnp.array([0.0, -0.0])})
        False
    """
    lines = [
        f"{name} {record.described(leaf)} {record.digest(leaf)}"
        for name, leaf in sorted(named_leaves(params), key=lambda named: named[0])
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _checked(params: Params) -> list[tuple[str, Any]]:
    """Every leaf with a name of its own, of a dtype that the format has."""
    leaves = named_leaves(params)
    names = [name for name, _ in leaves]
    for name, leaf in leaves:
        dtype = str(getattr(leaf, "dtype", ""))
        if not isinstance(leaf, jax.Array | np.ndarray) or dtype not in _DTYPES:
            raise TypeError(
                f"A {_SUFFIX} file can't hold leaf {name!r}, {dtype or type(leaf)}: "
                f"give arrays of {', '.join(_DTYPES)}."
            )
        if not name or name == "__metadata__" or names.count(name) > 1:
            raise ValueError(
                f"A {_SUFFIX} file can't hold a leaf of the name {name!r}"
                f"{' twice' if names.count(name) > 1 else ''}: give a dictionary with "
                "other keys."
            )
    return leaves


def _own_metadata(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """The user's own metadata, if it is text beside what is kept anyway."""
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(
                f"`metadata` must be text by text, got {name!r}: {text!r}; write "
                "numbers as text and more as JSON."
            )
        if name in _OWN:
            raise ValueError(f"`metadata` can't name {name!r}, which is kept anyway.")
    return dict(metadata)


def _head(leaves: list[tuple[str, Any]], metadata: dict[str, str]) -> bytes:
    """What stands before the arrays: names, dtypes, shapes and places, as JSON."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, leaf in leaves:
        start, end = end, end + leaf.size * leaf.dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[str(leaf.dtype)],
            "shape": list(leaf.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _gathered(leaf: Any) -> np.ndarray:
    """The bytes of a leaf, on the host."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    # Bytes, since not every dtype of JAX has a buffer that Python knows.
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _write_whole(path: pathlib.Path, head: bytes, arrays: Iterator[np.ndarray]) -> None:
    """Write a file that takes its name once everything is in it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(head)
            for array in arrays:
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
