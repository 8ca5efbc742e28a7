"""What a reader of one weight format is, and what it returns."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """An array that has not been read yet: what it will be, and how to get it.

    Attributes:
        shape: Its shape.
        dtype: Its type; one of NumPy's, or of `ml_dtypes`.
        read: Returns it, read from the file at every call. What `read` needs of the
            file stays open as long as it is kept.
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Choose: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""From all that a file holds to the state dict inside it, which alone is read."""

Reader: TypeAlias = Callable[[pathlib.Path, Choose], Mapping[str, Any]]
"""From a file and a choice to a `Stored` by name, and what else stands beside them.

A reader runs nothing that is in the file, reads no array, checks the sizes that it
claims, and raises `ValueError` with the path if it is damaged. Whether the arrays are
floating point, finite and those of a model is checked afterwards.
"""
