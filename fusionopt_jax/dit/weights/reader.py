"""What a reader of one weight format is."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Choose: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""From all that a file holds to the state dict inside it, which alone is read."""

Reader: TypeAlias = Callable[[pathlib.Path, Choose], Mapping[str, Any]]
"""From a file and a choice to arrays by name.

A reader runs nothing that is in the file, checks the sizes that it claims before it
takes memory for them, and raises `ValueError` with the path if it is damaged. Whether
the arrays are floating point, finite and those of a model is checked afterwards.
"""
