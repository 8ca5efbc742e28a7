"""Read a `.safetensors` file."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from fusionopt_jax.dit.weights.reader import Choose


def read_safetensors(path: pathlib.Path, choose: Choose) -> Mapping[str, Any]:
    """The arrays of a `.safetensors` file.

    Args:
        path: The file.
        choose: What to take of it.

    Returns:
        Arrays by name.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the file is damaged.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "weights.safetensors"
        ...     save_file({"bias": np.zeros(2, np.float32)}, path)
        ...     read_safetensors(path, lambda content: content)
        {'bias': Array([0., 0.], dtype=float32)}
    """
    try:
        # Not the reader into NumPy, which has no bfloat16.
        from safetensors import flax as safetensors_flax
    except ImportError as error:
        raise ImportError(
            "reading .safetensors needs safetensors, which is not installed; install "
            'the extra `dit`: pip install "fusionopt-jax[dit]".'
        ) from error
    try:
        content = safetensors_flax.load_file(os.fspath(path))
    except Exception as error:
        raise ValueError(f"{path} is not a readable .safetensors: {error}.") from error
    return choose(content)
