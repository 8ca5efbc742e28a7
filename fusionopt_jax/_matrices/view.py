"""A leaf seen as stacks of matrices `(count, in, out)`, and back.

Most leaves are one stack. A fused weight whose parts have different widths (the query,
key and value of a grouped-query projection) is one stack for each part.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class StackShape(NamedTuple):
    """The shape of a stack of matrices.

    Attributes:
        count: How many matrices.
        inputs: The rows of each.
        outputs: Its columns, one for each output neuron.
    """

    count: int
    inputs: int
    outputs: int

    @property
    def matrix(self) -> tuple[int, int]:
        """`(in, out)` of one matrix."""
        return self.inputs, self.outputs

    @property
    def tall(self) -> bool:
        """Whether a matrix has more inputs than outputs."""
        return self.inputs > self.outputs


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How one leaf is stacks of matrices.

    Attributes:
        shape: The leaf's shape.
        in_axes: The axes that a matrix sums over, counted from 0.
        out_axes: The axes of its output neurons.
        chunks: Into how many equal matrices each fused matrix is split, or the sizes of
            its parts. Equal matrices lie in one stack, parts in one for each.
        chunk_axis: Which side the split runs along.
    """

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    chunks: int | tuple[int, ...] = 1
    chunk_axis: Literal["input", "output"] = "output"

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The axes that count matrices."""
        used = set(self.in_axes + self.out_axes)
        return tuple(axis for axis in range(len(self.shape)) if axis not in used)

    @property
    def fused_shape(self) -> tuple[int, int]:
        """`(in, out)` of a matrix before it is split into chunks."""
        return self._size(self.in_axes), self._size(self.out_axes)

    @property
    def stacks(self) -> tuple[StackShape, ...]:
        """The shape of each stack."""
        batch = self._size(self.batch_axes)
        rows, columns = self.fused_shape
        number, sizes = 1, self.chunks
        if isinstance(sizes, int):
            number, sizes = sizes, (self._chunked_side // sizes,)
        if self.chunk_axis == "input":
            return tuple(StackShape(batch * number, size, columns) for size in sizes)
        return tuple(StackShape(batch * number, rows, size) for size in sizes)

    @property
    def count(self) -> int:
        """How many matrices the leaf holds."""
        return sum(stack.count for stack in self.stacks)

    @property
    def smallest_side(self) -> int:
        """The shortest side of any matrix."""
        return min(min(stack.matrix) for stack in self.stacks)

    def checked(self, name: str) -> "MatrixView":
        """Itself, if its axes are distinct and its chunks fit; `name` is a path."""
        used = self.in_axes + self.out_axes
        if len(set(used)) != len(used):
            raise ValueError(
                f"The matrices of leaf {name!r} use an axis twice: inputs "
                f"{self.in_axes}, outputs {self.out_axes}."
            )
        if isinstance(self.chunks, int):
            fits, wanted = self._chunked_side % self.chunks == 0, ""
        else:
            total = sum(self.chunks)
            fits, wanted = total == self._chunked_side, f", which add up to {total}"
        if not fits:
            raise self._error(name, f"`chunks`={self.chunks}{wanted}")
        if isinstance(self.chunks, tuple) and len(set(self.chunks)) == 1:
            return dataclasses.replace(self, chunks=len(self.chunks))
        return self

    def in_blocks(self, size: int, name: str) -> "MatrixView":
        """The view whose chunks are all of one size; `name` is a path."""
        if self._chunked_side % size:
            raise self._error(name, f"blocks of `block`={size}")
        return dataclasses.replace(self, chunks=self._chunked_side // size)

    def _error(self, name: str, wanted: str) -> ValueError:
        return ValueError(
            f"Leaf {name!r} of shape {self.shape} can't be split into {wanted}: its "
            f"{self.chunk_axis} side is {self._chunked_side} long."
        )

    def one_layer(self) -> "MatrixView":
        """How a slice of length 1 along the leaf's first axis, a batch axis, is."""
        return dataclasses.replace(self, shape=(1, *self.shape[1:]))

    def to_stacks(self, leaf: Array) -> tuple[Array, ...]:
        """The leaf as one `(count, in, out)` for each of `stacks`."""
        order = self.batch_axes + self.in_axes + self.out_axes
        batch = self._size(self.batch_axes)
        rows, columns = self.fused_shape
        fused = jnp.transpose(leaf, order).reshape(batch, rows, columns)
        if isinstance(self.chunks, tuple):
            return tuple(jnp.split(fused, _ends(self.chunks), axis=self._stack_axis))
        if self.chunks > 1 and self.chunk_axis == "output":
            split = fused.reshape(batch, rows, self.chunks, columns // self.chunks)
            fused = jnp.swapaxes(split, 1, 2)
        return (fused.reshape(self.stacks[0]),)

    def from_stacks(self, stacks: Sequence[Array]) -> Array:
        """The inverse of `to_stacks`."""
        batch = self._size(self.batch_axes)
        rows, columns = self.fused_shape
        if isinstance(self.chunks, tuple):
            fused = jnp.concatenate(stacks, axis=self._stack_axis)
        elif self.chunks > 1 and self.chunk_axis == "output":
            split = stacks[0].reshape(batch, self.chunks, rows, columns // self.chunks)
            fused = jnp.swapaxes(split, 1, 2)
        else:
            fused = stacks[0]
        order = self.batch_axes + self.in_axes + self.out_axes
        sorted_shape = tuple(self.shape[axis] for axis in order)
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return jnp.transpose(fused.reshape(sorted_shape), inverse)

    def to_state(self, parts: Sequence[Any]) -> Any:
        """What a state keeps of a leaf: the part of its stack, or a tuple of parts."""
        return parts[0] if len(self.stacks) == 1 else tuple(parts)

    def from_state(self, state: Any) -> tuple[Any, ...]:
        """The inverse of `to_state`: the part of each stack."""
        return (state,) if len(self.stacks) == 1 else tuple(state)

    @property
    def _stack_axis(self) -> int:
        """The axis of a stack that chunks divide."""
        return 1 if self.chunk_axis == "input" else 2

    @property
    def _chunked_side(self) -> int:
        """The length of the side that chunks divide."""
        return self.fused_shape[self._stack_axis - 1]

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)


def _ends(sizes: Sequence[int]) -> list[int]:
    """Where each part but the last ends."""
    return list(itertools.accumulate(sizes))[:-1]
