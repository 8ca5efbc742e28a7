"""Where stacks of matrices lie on a mesh of devices.

A product of matrices that are split among devices needs a collective for each factor,
several in every step of an iteration. Devices that hold whole matrices, each its share
of the stack, need none: one exchange on the way in and one on the way out. What can't
be divided that way is computed by every device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def automatic(function: Callable[..., Any], *args: Any, like: Any) -> Any:
    """`function(*args)`, with the axes of an explicit mesh left to the compiler.

    Reshapes, transposes and products mix a matrix's axes, which JAX refuses to guess a
    sharding for where a mesh is explicit.

    Args:
        function: Takes `args`, trees of arrays.
        *args: Sharded in whatever way.
        like: What the results are sharded like: arrays, or a `PartitionSpec`.
    """
    explicit = [
        sharding.mesh
        for sharding in map(_sharding, jax.tree.leaves(args))
        if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types
    ]
    if not explicit:
        return function(*args)

    def wanted(leaf: Any) -> NamedSharding:
        spec = leaf if isinstance(leaf, PartitionSpec) else PartitionSpec()
        return _sharding(leaf) or NamedSharding(explicit[0], spec)

    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    results = jax.tree.map(wanted, like, is_leaf=is_spec)
    return jax.sharding.auto_axes(function, out_sharding=results)(*args)


def device_count(*leaves: Array) -> int:
    """Over how many devices the compiler may spread what is made of these leaves."""
    return _free_axes(_mesh(leaves))[1]


def spread(function: Callable[..., Any], *leaves: Array) -> Callable[..., Any]:
    """`function` of stacks, for which each device of the leaves' mesh takes a share.

    It takes and returns trees of arrays with one leading axis in common. Stacks that
    can't be divided are filled up with zeros; a single matrix is computed everywhere.
    """
    mesh = _mesh(leaves)
    axes, devices = _free_axes(mesh)
    if devices == 1:
        return function

    def spread_function(*stacks: Any) -> Any:
        count = jax.tree.leaves(stacks)[0].shape[0]
        if count == 1:
            return whole(function(*whole(stacks, *leaves)), *leaves)

        divided = functools.partial(_divided, mesh=mesh, axes=axes)
        collected = functools.partial(_collected, mesh=mesh, axes=axes, count=count)
        return jax.tree.map(collected, function(*jax.tree.map(divided, stacks)))

    return spread_function


def whole(tree: Any, *leaves: Array) -> Any:
    """A tree of which every device of the leaves' mesh holds all."""
    mesh = _mesh(leaves)
    if _free_axes(mesh)[1] == 1:
        return tree
    return jax.tree.map(lambda stack: _placed(stack, mesh), tree)


def _divided(stack: Array, mesh: Any, axes: tuple[str, ...]) -> Array:
    """A stack, filled up with zeros, of which each device holds whole matrices.

    Over one axis of the mesh after another: between a matrix that is split along two
    axes and a whole one XLA knows no exchange but a copy of everything on every device.
    """
    filling = -stack.shape[0] % math.prod(mesh.shape[name] for name in axes)
    free = [PartitionSpec.UNCONSTRAINED] * (stack.ndim - 1)
    if filling:
        stack = jnp.pad(stack, [(0, filling)] + [(0, 0)] * (stack.ndim - 1))
        if len(axes) > 1:
            # Or parts of the stack would move once more, to make room for the zeros.
            stack = _placed(stack, mesh, None, *free)
    for used in range(1, len(axes)):
        stack = _placed(stack, mesh, axes[:used], *free)
    return _placed(stack, mesh, axes)


def _collected(stack: Array, mesh: Any, axes: tuple[str, ...], *, count: int) -> Array:
    """The first `count` matrices of such a stack, as their leaf wants them split."""
    free = [PartitionSpec.UNCONSTRAINED] * (stack.ndim - 1)
    stack = _placed(stack, mesh, axes)
    for used in range(len(axes) - 1, 0, -1):
        stack = _placed(stack, mesh, axes[:used], *free)
    # Or the division would spread to the parameters, whose layers a scan takes one by
    # one; how each matrix is split is for those to say.
    return _placed(stack[:count], mesh, None, *free)


def _placed(stack: Array, mesh: Any, *axes: Any) -> Array:
    """A stack whose axes are divided among the given axes of a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.lax.with_sharding_constraint(stack, sharding)


def _mesh(leaves: Any) -> Any:
    """The mesh of the first leaf that lies on one."""
    shardings = map(_sharding, leaves)
    return next((sharding.mesh for sharding in shardings if sharding), None)


def _sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a leaf that lies on a mesh."""
    if not isinstance(leaf, jax.Array):
        return None
    # Of a concrete array, the mesh of devices and not only of their names.
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else leaf.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding


def _free_axes(mesh: Any) -> tuple[tuple[str, ...], int]:
    """The axes that are not the business of a `shard_map`; how many devices that is.

    The last comes first. A stack leaves the axis that its division names last before
    the others, and a leaf that is split along `("x", "y")` can take `"x"` before `"y"`,
    not the other way round.
    """
    if mesh is None:
        return (), 1
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    )[::-1]
    return axes, math.prod(mesh.shape[name] for name in axes)
