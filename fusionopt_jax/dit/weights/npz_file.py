"""Read an `.npz` file of NumPy."""

import functools
import math
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusionopt_jax.dit.files import check_archive
from fusionopt_jax.dit.weights.reader import Choose, Stored

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""What reads the head of an array, by the version of its format."""


def read_npz(path: pathlib.Path, choose: Choose) -> Mapping[str, Any]:
    """The arrays of an `.npz` file; pickled objects in it are refused.

    Args:
        path: The file.
        choose: What to take of it.

    Returns:
        A `Stored` by name.

    Raises:
        ValueError: If the file is damaged, or claims far more than it has bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "weights.npz"
        ...     np.savez(path, bias=np.zeros(2))
        ...     read_npz(path, lambda content: content)["bias"].read()
        array([0., 0.])
    """
    try:
        with path.open("rb") as stream:
            check_archive(stream)
        # Closed with the last of the arrays that it gives.
        archive = zipfile.ZipFile(path)
        content = {
            name.removesuffix(".npy"): _stored(path, archive, name)
            for name in archive.namelist()
        }
    except Exception as error:
        # Damaged bytes can fail anywhere: zip, zlib, the header of an array.
        raise ValueError(f"{path} is not a readable .npz: {error}.") from error
    return choose(content)


def _stored(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> Stored:
    """One array, of which only the head is read."""
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"{name} has the unknown version {version}")
        shape, _, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    declared = archive.getinfo(name).file_size
    if math.prod(shape) * dtype.itemsize > declared:
        raise ValueError(f"{name} has {declared} bytes, too few for shape {shape}")
    return Stored(shape, dtype, functools.partial(_read, path, archive, name))


def _read(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The values of one array."""
    try:
        with archive.open(name) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:
        raise ValueError(f"{path} is not a readable .npz: {error}.") from error
