"""A loop over parts of arrays that writes each part where it was read."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def each(
    count: int, function: Callable[[Any, Any], Any], written: Any, read: Any
) -> Any:
    """`function` of each of `count` parts, in turn, written where the part was read.

    All are trees of arrays that are divided along their first axes. `jax.lax.map` would
    fill second arrays with zeros before it starts.
    """
    if count == 1:
        return function(written, read)

    def step(i: Array, written: Any) -> Any:
        def part(array: Array) -> Array:
            size = array.shape[0] // count
            return jax.lax.dynamic_slice_in_dim(array, i * size, size)

        def replaced(array: Array, old: Array, new: Array) -> Array:
            # What the function hands through needn't be written again.
            if new is old:
                return array
            start = i * (array.shape[0] // count)
            return jax.lax.dynamic_update_slice_in_dim(array, new, start, 0)

        old = jax.tree.map(part, written)
        new = function(old, jax.tree.map(part, read))
        return jax.tree.map(replaced, written, old, new)

    return jax.lax.fori_loop(0, count, step, written)
