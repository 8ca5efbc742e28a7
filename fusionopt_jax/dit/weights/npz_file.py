"""Read an `.npz` file of NumPy."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusionopt_jax.dit.files import check_archive
from fusionopt_jax.dit.weights.reader import Choose


def read_npz(path: pathlib.Path, choose: Choose) -> Mapping[str, Any]:
    """The arrays of an `.npz` file; pickled objects in it are refused.

    Args:
        path: The file.
        choose: What to take of it.

    Returns:
        Arrays by name.

    Raises:
        ValueError: If the file is damaged, or claims far more than it has bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "weights.npz"
        ...     np.savez(path, bias=np.zeros(2))
        ...     read_npz(path, lambda content: content)
        {'bias': array([0., 0.])}
    """
    # Opened here, since np.load forgets to close what it can't read.
    with path.open("rb") as stream:
        try:
            check_archive(stream)
            with np.load(stream, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
        except Exception as error:
            # Damaged bytes can fail anywhere: zip, zlib, the header of an array.
            raise ValueError(f"{path} is not a readable .npz: {error}.") from error
    return choose(content)
