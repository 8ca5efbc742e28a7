"""A file of named arrays that can't come back as other numbers."""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fusionopt_jax.dit.cache.table import StaleCacheError
from fusionopt_jax.dit.files import check_archive, replacing


def write_arrays(
    path: str | os.PathLike[str],
    format_name: str,
    about: str,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Write an `.npz` file, whole or not at all, with a digest of all that is in it.

    Args:
        path: The file; one that exists is replaced.
        format_name: What kind of file it is; a reader refuses any other.
        about: A text that belongs to the arrays.
        arrays: What to keep; any type that JAX has.

    Raises:
        OSError: If the file can't be written.

    Example:
        See :func:`read_arrays`.
    """
    kinds = {name: [value.dtype.name, value.shape] for name, value in arrays.items()}
    members: dict[str, Any] = {
        "format": np.array(format_name),
        "about": np.array(about),
        "kinds": np.array(json.dumps(kinds)),
    }
    # As bytes: the npz format has no name for bfloat16.
    for name, value in arrays.items():
        members[f"array {name}"] = np.ravel(value).view(np.uint8)
    members["digest"] = np.array(_digest(members))
    with replacing(path) as stream:
        np.savez(stream, **members)


def read_arrays(
    path: str | os.PathLike[str], format_name: str
) -> tuple[str, dict[str, np.ndarray]]:
    """Read what :func:`write_arrays` wrote.

    Args:
        path: The file.
        format_name: What kind of file it must be.

    Returns:
        The text, and the arrays by name.

    Raises:
        OSError: If the file is not there, is a folder, or can't be read.
        StaleCacheError: If it is damaged, or of another kind.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "a.npz"
        ...     write_arrays(path, "kind 1", "text", {"a": np.arange(3)})
        ...     read_arrays(path, "kind 1")
        ('text', {'a': array([0, 1, 2])})
    """
    # Read here, so that an error of the file system is not mistaken for damage.
    stream = io.BytesIO(pathlib.Path(path).read_bytes())
    try:
        check_archive(stream)
        with np.load(stream, allow_pickle=False) as file:
            if str(file["format"]) != format_name:
                raise ValueError(f"its format is {str(file['format'])!r}")
            members = {name: file[name] for name in file.files}
        if str(members.pop("digest")) != _digest(members):
            raise ValueError("its content does not have the digest that it names")
        arrays = {
            name: members[f"array {name}"].view(jnp.dtype(dtype)).reshape(shape)
            for name, (dtype, shape) in json.loads(str(members["kinds"])).items()
        }
        return str(members["about"]), arrays
    except Exception as error:
        # A damaged archive fails in too many ways to list: zlib, struct, Unicode, JSON.
        raise StaleCacheError(
            f"{os.fspath(path)} is not a readable modulator cache ({error}); delete it "
            "to have a new one written."
        ) from error


def _digest(members: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of every member: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(members):
        array = np.ascontiguousarray(members[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
