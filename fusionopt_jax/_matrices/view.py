"""A leaf seen as a stack of matrices `(count, in, out)`, and back."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How one leaf is a stack of matrices.

    Attributes:
        shape: The leaf's shape.
        in_axes: The axes that a matrix sums over, counted from 0.
        out_axes: The axes of its output neurons.
        chunks: Into how many matrices each fused matrix is split.
        chunk_axis: Which side the split runs along.
    """

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    chunks: int = 1
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
    def matrix_shape(self) -> tuple[int, int]:
        """`(in, out)` of one matrix."""
        rows, columns = self.fused_shape
        if self.chunk_axis == "input":
            return rows // self.chunks, columns
        return rows, columns // self.chunks

    @property
    def count(self) -> int:
        """How many matrices the leaf holds."""
        return self._size(self.batch_axes) * self.chunks

    @property
    def stack_shape(self) -> tuple[int, int, int]:
        """`(count, in, out)`."""
        return (self.count, *self.matrix_shape)

    @property
    def tall(self) -> bool:
        """Whether a matrix has more inputs than outputs."""
        rows, columns = self.matrix_shape
        return rows > columns

    def checked(self, name: str) -> "MatrixView":
        """Itself, if its axes are distinct and its chunks equal; `name` is a path."""
        used = self.in_axes + self.out_axes
        if len(set(used)) != len(used):
            raise ValueError(
                f"The matrices of leaf {name!r} use an axis twice: inputs "
                f"{self.in_axes}, outputs {self.out_axes}."
            )
        side = self.fused_shape[0 if self.chunk_axis == "input" else 1]
        if side % self.chunks:
            raise ValueError(
                f"Leaf {name!r} of shape {self.shape} can't be split into "
                f"`chunks`={self.chunks}: its {self.chunk_axis} side is {side} long."
            )
        return self

    def one_layer(self) -> "MatrixView":
        """How one part of the leaf along its first axis, a batch axis, is a stack."""
        return dataclasses.replace(
            self,
            shape=self.shape[1:],
            in_axes=tuple(axis - 1 for axis in self.in_axes),
            out_axes=tuple(axis - 1 for axis in self.out_axes),
        )

    def to_stack(self, leaf: Array) -> Array:
        """The leaf as `(count, in, out)`."""
        order = self.batch_axes + self.in_axes + self.out_axes
        batch = self._size(self.batch_axes)
        rows, columns = self.fused_shape
        stack = jnp.transpose(leaf, order).reshape(batch, rows, columns)
        if self.chunks == 1:
            return stack
        if self.chunk_axis == "input":
            return stack.reshape(self.stack_shape)
        split = stack.reshape(batch, rows, self.chunks, columns // self.chunks)
        return jnp.swapaxes(split, 1, 2).reshape(self.stack_shape)

    def from_stack(self, stack: Array) -> Array:
        """The inverse of `to_stack`."""
        batch = self._size(self.batch_axes)
        rows, columns = self.fused_shape
        if self.chunks > 1 and self.chunk_axis == "output":
            split = stack.reshape(batch, self.chunks, rows, columns // self.chunks)
            stack = jnp.swapaxes(split, 1, 2)
        order = self.batch_axes + self.in_axes + self.out_axes
        sorted_shape = tuple(self.shape[axis] for axis in order)
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return jnp.transpose(stack.reshape(sorted_shape), inverse)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)
