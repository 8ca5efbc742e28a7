"""Where stacks of matrices lie on a mesh of devices.

A product of matrices that are split among devices needs a collective for each factor,
several in every step of an iteration. Devices that hold whole matrices, each its share
of the stack, need none: one exchange on the way in and one on the way out. What can't
be divided that way is computed by every device.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import sdy
from jax.interpreters import ad, batching, mlir
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


def spread(
    function: Callable[..., Any], *leaves: Array, joined: bool = False
) -> Callable[..., Any]:
    """`function` of stacks, for which each device of the leaves' mesh takes a share.

    It is `function(stacks, state, ids, *scalars) -> (stack, state)`, of trees of arrays
    with one leading axis in common but for the scalars. Every device runs it by itself
    on its part, so that neither its loops nor its branches wait for another. Stacks
    that can't be divided are filled up with zeros; a single matrix is computed
    everywhere. The state that comes out lies as `stored` leaves it.

    Args:
        function: What each device runs.
        leaves: What lies on the mesh.
        joined: Whether the stacks are several that are shorter than there are devices.
    """
    mesh = _mesh(leaves)
    axes, devices = _free_axes(mesh)
    if devices == 1:
        return function

    def spread_function(
        stacks: tuple[Array, ...], state: Any, ids: Array, *scalars: Array
    ) -> tuple[Array, Any]:
        count = ids.shape[0]
        share = PartitionSpec() if count == 1 else PartitionSpec(axes)

        def divided(stacks: tuple[Array, ...]) -> list[Array]:
            if count == 1:
                return [_placed(stack, mesh) for stack in stacks]
            # What the stacks are made of stays as it lies: momentum, above all.
            bounded = [_bounded(stack, "forward") for stack in stacks]
            if len(bounded) == 1 or len({stack.dtype for stack in bounded}) > 1:
                return [_divided(stack, mesh, axes) for stack in bounded]
            # One exchange for all of them.
            together = _divided(jnp.stack(bounded, 1), mesh, axes)
            return [together[:, k] for k in range(len(bounded))]

        def collected(stack: Array) -> Array:
            if count == 1:
                return _placed(stack, mesh)
            return _collected(stack, mesh, axes, count=count)

        def fetched(array: Array) -> Array:
            if count == 1:
                return _placed(array, mesh)
            filling = [(0, -count % devices)] + [(0, 0)] * (array.ndim - 1)
            return _placed(jnp.pad(array, filling), mesh, axes)

        def kept(array: Array) -> Array:
            shape = (1 if joined else count, *array.shape[1:])
            return _placed(array[:count], mesh, *storage(shape, mesh))

        alone = jax.shard_map(
            function,
            mesh=mesh,
            axis_names=set(axes),
            in_specs=(share, share, share) + (PartitionSpec(),) * len(scalars),
            out_specs=share,
            # What a loop starts with may be the same everywhere, what it ends with not.
            check_vma=False,
        )
        # Of concrete arrays it would go through the operations one by one.
        stack, state = jax.jit(alone)(
            tuple(divided(stacks)),
            *jax.tree.map(fetched, (state, ids)),
            *scalars,
        )
        return collected(stack), jax.tree.map(kept, state)

    return spread_function


def stored(tree: Any, *leaves: Any) -> Any:
    """A tree of state of which every device of the leaves' mesh holds its part.

    Args:
        tree: Arrays `(count, ...)` of what is remembered of a stack's matrices.
        leaves: What lies on the mesh, or shapes. Where they are traced, so are the
            arrays.
    """
    mesh = _mesh(leaves)
    if _free_axes(mesh)[1] == 1:
        return tree
    leaf = next(filter(_sharding, leaves))

    def placed(array: Array) -> Array:
        sharding = NamedSharding(mesh, PartitionSpec(*storage(array.shape, mesh)))
        if not isinstance(leaf, Tracer):
            return jax.device_put(array, sharding)
        # A program has the devices of what it reads: it has to read a leaf.
        array = _layout_p.bind(array, leaf, how="none")
        if AxisType.Explicit in mesh.axis_types:
            return jax.sharding.reshard(array, sharding)
        return jax.lax.with_sharding_constraint(array, sharding)

    return jax.tree.map(placed, tree)


def storage(shape: Sequence[int], mesh: Any) -> list[tuple[str, ...] | None]:
    """How an array of state is divided: the axes of the mesh for each of its own.

    Along the stack, where every device gets as many matrices, which then never move.
    Otherwise along the first axis that all devices divide, or along several, each by
    some axes of the mesh; what no axis divides lies everywhere.
    """
    names, devices = _free_axes(mesh)
    whole_axis = [axis for axis, size in enumerate(shape) if size % devices == 0]
    taken: list[tuple[str, ...]] = [()] * len(shape)
    if whole_axis:
        taken[whole_axis[0]] = names
    else:
        left = list(shape)
        for name in names:
            size = mesh.shape[name]
            fits = [axis for axis in range(1, len(left)) if left[axis] % size == 0]
            if fits:
                left[fits[0]] //= size
                taken[fits[0]] += (name,)
    return [axes or None for axes in taken]


def everywhere(tree: Any, *leaves: Array) -> Any:
    """A tree of which every device of the leaves' mesh holds all."""
    mesh = _mesh(leaves)
    if _free_axes(mesh)[1] == 1:
        return tree
    return jax.tree.map(lambda array: _placed(array, mesh), tree)


def laid_out(state: Any, params: Any, divided: tuple[type, ...]) -> Any:
    """The first state of an optimiser, which lies as the states after it will.

    What has a parameter's path at the end of its own, and its shape, lies as that does.
    Everything else is on every device.

    Args:
        state: What `init` returned.
        params: What it was given.
        divided: Classes of states that have divided what they hold but for an
            `inner_state`.
    """
    mesh = _mesh(jax.tree.leaves(params))
    if _free_axes(mesh)[1] == 1:
        return state
    known = dict(jax.tree_util.tree_leaves_with_path(params))

    def placed(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, divided):
            inner = laid_out(leaf.inner_state, params, divided)
            return leaf._replace(inner_state=inner)
        ends = [path[start:] for start in range(len(path) + 1)]
        param = next((known[end] for end in ends if end in known), None)
        if param is not None and param.shape == jnp.shape(leaf):
            if not (isinstance(param, Tracer) and jnp.issubdtype(param, jnp.inexact)):
                return alike(leaf, param)
            # Made of the parameter, though of none of its entries: zeros of one shape
            # are one array to the compiler, which could lie in one way only.
            never = jnp.real(param) < jnp.real(param)
            return alike(jnp.where(never, param.astype(leaf.dtype), leaf), param)
        if not isinstance(leaf, jax.Array) or _sharding(leaf) is not None:
            return leaf
        replicated = NamedSharding(mesh, PartitionSpec(*[None] * leaf.ndim))
        if not isinstance(leaf, Tracer):
            return jax.device_put(leaf, replicated)
        if AxisType.Explicit in mesh.axis_types:
            return jax.sharding.reshard(leaf, replicated)
        return leaf

    return jax.tree_util.tree_map_with_path(
        placed, state, is_leaf=lambda node: isinstance(node, divided)
    )


def divided_blocks(leaf: Any, shape: Sequence[int]) -> PartitionSpec:
    """How one number for each block of a leaf's last axis is divided: as the leaf is.

    Along the last axis only where the devices that share it have equally many blocks.

    Args:
        leaf: An array, or a shape.
        shape: That of the numbers: the leaf's, with blocks in place of entries.
    """
    sharding = _sharding(leaf)
    if sharding is None or not shape:
        return PartitionSpec()
    *before, last = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    names = last if isinstance(last, tuple) else (last,)
    devices = math.prod(sharding.mesh.shape[name] for name in names if name)
    return PartitionSpec(*before, last if shape[-1] % devices == 0 else None)


def placed_blocks(blocks: Array, leaf: Any) -> Array:
    """A first state with one number for each block of a leaf's last axis, beside it."""
    sharding = _sharding(leaf)
    if sharding is None or not blocks.ndim:
        return blocks
    wanted = NamedSharding(sharding.mesh, divided_blocks(leaf, blocks.shape))
    if not isinstance(leaf, Tracer):
        return jax.device_put(blocks, wanted)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(blocks, wanted)
    # As in `laid_out`: made of the leaf, though of none of its entries.
    parts = leaf.reshape(*blocks.shape, -1)
    return jnp.where(jnp.any(parts < parts, axis=-1), 1, blocks)


def staying(state: Any, before: Any) -> Any:
    """A state each array of which lies where the one before it does."""
    if device_count(*jax.tree.leaves(before)) == 1:
        return state
    return jax.tree.map(alike, state, before)


def alike(array: Array, like: Any) -> Array:
    """An array that lies as another of its shape does."""
    sharding = _sharding(like)
    if sharding is None or array is like or array.ndim == 0:
        return array
    if not isinstance(like, Tracer):
        return jax.device_put(array, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    # What an automatic mesh decides isn't known before the program is compiled.
    # `shard_alike` of JAX 0.10 puts all that has one shape into one group.
    return _layout_p.bind(array, like, how=next(_groups))


def _bounded(array: Array, direction: str) -> Array:
    """The array, across which the compiler infers no layout but in one direction."""
    if not isinstance(array, Tracer):
        return array
    return _layout_p.bind(array, how=direction)


def _lowered(context: Any, array: Any, *others: Any, how: str | int) -> Any:
    del context
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        return [array]
    if isinstance(how, int):
        for member in (array, *others):
            sdy.sharding_group(member, how)
        return [array]
    allowed = getattr(sdy.PropagationDirection, how.upper())
    return [sdy.PropagationBarrierOp(array, allowed_direction=allowed).result]


# An array, of which the compiler hears where layouts are inferred: in which direction,
# or, by a number of its own, that it lies as another array does. What else it is given
# is read, and nothing more.
_layout_p = Primitive("layout")
_layout_p.def_impl(lambda array, *_, **__: array)
_layout_p.def_abstract_eval(lambda array, *_, **__: array)
mlir.register_lowering(_layout_p, _lowered)
ad.deflinear2(
    _layout_p, lambda cotangent, *arrays, **_: [cotangent, None][: len(arrays)]
)
batching.primitive_batchers[_layout_p] = lambda arrays, axes, **_: (arrays[0], axes[0])
# Far from the numbers that JAX gives to groups.
_groups = itertools.count(2**32)


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
    # one. It is for those to say where the stack goes, at once for all that read it.
    bounded = _bounded(stack[:count], "backward")
    return _placed(bounded, mesh, PartitionSpec.UNCONSTRAINED, *free)


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
