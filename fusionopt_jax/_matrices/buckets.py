"""Calls of a function of stacks over many leaves.

Leaves of equal matrix shape, turned or not, form one bucket, and the function is called
once per bucket.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionopt_jax._matrices.placement import automatic, device_count, spread
from fusionopt_jax._matrices.view import MatrixView

Stack: TypeAlias = Float[Array, "b m n"]
StackFunction: TypeAlias = Callable[[Stack], Stack]
Bucketing: TypeAlias = Literal["auto", "loop", "batch", "leaf"]

BUCKETINGS: tuple[Bucketing, ...] = ("auto", "loop", "batch", "leaf")


def resolve_bucketing(bucketing: Bucketing, *leaves: Array) -> Bucketing:
    """`"auto"` made definite: loop over matrices on one CPU, batch them elsewhere.

    A CPU's matrix product of one matrix already fills the machine, and the loop keeps
    temporary memory at one matrix; an accelerator needs the batch to be busy, and
    several devices can't share a loop.
    """
    if bucketing != "auto":
        return bucketing
    one_cpu = jax.default_backend() == "cpu" and device_count(*leaves) == 1
    return "loop" if one_cpu else "batch"


def map_stacks(
    function: StackFunction,
    leaves: Sequence[Array],
    views: Sequence[MatrixView],
    *,
    bucketing: Bucketing = "auto",
) -> list[Array]:
    """`function` of every leaf's matrices.

    Args:
        function: Takes and returns a stack `(b, m, n)`. It must treat the matrices of a
            stack independently, and a transposed one as the matrix itself.
        leaves: Arrays.
        views: How each of them is a stack.
        bucketing: `"batch"` joins leaves of equal matrix shape and dtype and makes one
            batched call; `"loop"` goes through them one matrix at a time in a compiled
            loop, through a leaf that is a stack as it lies and through single matrices
            joined; `"leaf"` makes one batched call for each leaf; `"auto"` chooses
            between the first two by the backend.

    Returns:
        The results, shaped like the leaves.
    """

    def mapped(*leaves: Array) -> tuple[Array, ...]:
        return tuple(_mapped(function, leaves, views, bucketing))

    return list(automatic(mapped, *leaves, like=tuple(leaves)))


def _mapped(
    function: StackFunction,
    leaves: Sequence[Array],
    views: Sequence[MatrixView],
    bucketing: Bucketing,
) -> list[Any]:
    """`map_stacks` without an explicit mesh."""
    bucketing = resolve_bucketing(bucketing, *leaves)
    results: list[Any] = [None] * len(leaves)
    for members in _buckets(leaves, views, bucketing):
        if bucketing == "loop" and len(members) == 1:
            only = members[0]
            results[only] = _loop(function, leaves[only], views[only])
            continue
        # Only stacks that are joined have to lie the same way.
        mixed = len({views[i].tall for i in members}) > 1
        turns = {i: mixed and views[i].tall for i in members}
        joined = jnp.concatenate(
            [turned(views[i].to_stack(leaves[i]), turns[i]) for i in members]
        )
        if bucketing == "loop":
            done = _each(lambda matrix: function(matrix[None])[0], joined)
        else:
            done = spread(function, *leaves)(joined)
        start = 0
        for i, turn in turns.items():
            part = done[start : start + views[i].count]
            results[i] = views[i].from_stack(turned(part, turn))
            start += views[i].count
    return results


def turned(stack: Array, turn: bool) -> Array:
    """The stack, transposed if it is to be; its own inverse."""
    return stack.mT if turn else stack


def _loop(function: StackFunction, leaf: Array, view: MatrixView) -> Array:
    """`function` of one leaf's matrices, split one layer at a time."""
    if view.batch_axes == (0,) and view.shape[0] > 1:
        # Splitting the whole leaf would copy it.
        layer = view.one_layer()
        return _each(lambda part: _loop(function, part, layer), leaf)
    stack = view.to_stack(leaf)
    if view.count > 1:
        stack = _each(lambda matrix: function(matrix[None])[0], stack)
    else:
        stack = function(stack)
    return view.from_stack(stack)


def _each(function: Callable[[Array], Array], stack: Array) -> Array:
    """`function` of each part of a stack, in turn, written where the part was read.

    `jax.lax.map` would fill a second stack with zeros before it starts.
    """

    def step(i: Array, stack: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(stack, function(part), i, 0)

    return jax.lax.fori_loop(0, stack.shape[0], step, stack)


def _buckets(
    leaves: Sequence[Array], views: Sequence[MatrixView], bucketing: Bucketing
) -> list[list[int]]:
    """Indices of the leaves that one call serves."""
    buckets: dict[Hashable, list[int]] = {}
    devices = device_count(*leaves)
    # A loop gains nothing from joining stacks, and the copy would cost memory; a stack
    # that gives every device a matrix needs no other, and a copy would be an exchange.
    enough = 2 if bucketing == "loop" else devices if devices > 1 else math.inf
    for i, (leaf, view) in enumerate(zip(leaves, views, strict=True)):
        alone = bucketing == "leaf" or view.count >= enough
        key = i if alone else (*sorted(view.matrix_shape), leaf.dtype)
        buckets.setdefault(key, []).append(i)
    return list(buckets.values())
