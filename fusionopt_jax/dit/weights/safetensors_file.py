"""Read a `.safetensors` file."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fusionopt_jax.dit.weights.reader import Choose, Stored

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(path: pathlib.Path, choose: Choose) -> Mapping[str, Any]:
    """The arrays of a `.safetensors` file.

    Args:
        path: The file.
        choose: What to take of it.

    Returns:
        A `Stored` by name.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the file is damaged.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "weights.safetensors"
        ...     save_file({"bias": np.zeros(2, np.float32)}, path)
        ...     read_safetensors(path, lambda content: content)["bias"].read()
        array([0., 0.], dtype=float32)
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "reading .safetensors needs safetensors, which is not installed; install "
            'the extra `dit`: pip install "fusionopt-jax[dit]".'
        ) from error
    try:
        start, header = _header(path)
        # For its checks: that every offset lies in the file, that none overlap. It
        # maps the whole file into memory, so the arrays are read without it.
        with safe_open(os.fspath(path), framework="numpy"):
            pass
        content = {name: _stored(path, start, about) for name, about in header.items()}
    except Exception as error:
        raise ValueError(f"{path} is not a readable .safetensors: {error}.") from error
    return choose(content)


def _header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Where the arrays begin, and what the file says about each."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError("its head does not fit into it; it may be cut off")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    end = start + max(
        (about["data_offsets"][1] for about in header.values()), default=0
    )
    if size < end:
        raise ValueError(
            f"it has {size:,} of {end:,} bytes; it was not written or fetched to its "
            "end, so fetch it again"
        )
    return start, header


def _stored(path: pathlib.Path, start: int, about: dict[str, Any]) -> Stored:
    """One array that lies `start` bytes and its own offset into the file."""
    if about["dtype"] not in _DTYPES:
        raise ValueError(f"it has arrays of the unknown type {about['dtype']}")
    dtype, shape = np.dtype(_DTYPES[about["dtype"]]), tuple(about["shape"])
    place = start + about["data_offsets"][0]
    read = functools.partial(_read, path, place, shape, dtype)
    return Stored(shape, dtype, read)


def _read(
    path: pathlib.Path, place: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray:
    """The values of one array."""
    count = int(np.prod(shape, dtype=np.int64))
    with path.open("rb") as stream:
        stream.seek(place)
        data = stream.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{path} became shorter while it was read.")
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
