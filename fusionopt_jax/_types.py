"""The words that signatures use for arrays and trees of arrays."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

Scalar: TypeAlias = Float[Array, ""]
"""A floating-point array of no axes, on the device."""

Count: TypeAlias = Int[Array, ""]
"""A step counter: an int32 array of no axes."""

Params: TypeAlias = PyTree[Any]
"""A tree of parameter arrays; the holes of a masked tree are not leaves of it."""

Matrices: TypeAlias = Float[Array, "*batch m n"]
"""A stack of matrices over its last two axes."""

Leaf: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""What a tree may hold: numbers of JAX or NumPy, or a shape without numbers."""

KeyPath: TypeAlias = tuple[Any, ...]
"""A path of keys as `jax.tree_util` gives it."""

Number: TypeAlias = float | int | jax.Array
"""A setting; an array where `optax.inject_hyperparams` keeps it in the state."""

ScalarOrSchedule: TypeAlias = float | int | jax.Array | Callable[..., Any]
"""A number, or a function from the step count (from 0) to a number."""

__all__ = [
    "Array",
    "Count",
    "Float",
    "Int",
    "KeyPath",
    "Leaf",
    "Matrices",
    "Number",
    "Params",
    "PyTree",
    "Scalar",
    "ScalarOrSchedule",
    "Shaped",
]
