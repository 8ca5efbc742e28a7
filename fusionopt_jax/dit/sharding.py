"""Where the parameters of a DiT lie on a mesh: logical axes, and rules for them.

Each axis of each parameter has a logical name, such as `embed` or `mlp`. Rules say by
which axis of the mesh a logical axis is divided; what no rule names is whole on every
device. The network itself knows nothing of this: the compiler follows the parameters.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fusionopt_jax._checks import did_you_mean, shape_text
from fusionopt_jax._paths import named_leaves, path_keys, path_name
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.cache.fingerprint import DIGEST
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import init_params
from fusionopt_jax.dit.network.modulation import MODULATED, MODULATOR

Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]
"""From a logical axis to the axis of a mesh, or to several, that divide it."""

LAYERS = "layers"
"""The leading axis of every parameter of the blocks."""

BATCH = "batch"
"""The one logical axis that belongs to images and labels and to no parameter."""

_LINEAR: dict[str, tuple[str, str]] = {
    "x_embedder/proj": ("patch", "embed"),
    "t_embedder/fc1": ("time", "mlp"),
    "t_embedder/fc2": ("mlp", "condition"),
    "blocks/attn/qkv": ("embed", "qkv"),
    "blocks/attn/proj": ("heads", "embed"),
    "blocks/mlp/fc1": ("embed", "mlp"),
    "blocks/mlp/fc2": ("mlp", "embed"),
    "final_layer/linear": ("embed", "patch"),
    **{f"{part}/{MODULATOR}": ("condition", "modulation") for part in MODULATED},
}
"""Input and output of every linear map."""


def _axes() -> dict[str, tuple[str, ...]]:
    """The logical axes of every parameter by its name."""
    axes: dict[str, tuple[str, ...]] = {
        "y_embedder/embedding_table": ("labels", "condition")
    }
    for name, (inputs, outputs) in _LINEAR.items():
        stack = (LAYERS,) if name.startswith("blocks/") else ()
        axes[f"{name}/kernel"] = (*stack, inputs, outputs)
        axes[f"{name}/bias"] = (*stack, outputs)
    return axes


LOGICAL_AXES: dict[str, tuple[str, ...]] = _axes()
"""The logical axes of every parameter of `dit.init_params`, by its name."""

RULES: dict[str, dict[str, str]] = {
    "data": {BATCH: "data"},
    "fsdp": {BATCH: "fsdp", "embed": "fsdp", "condition": "fsdp", "time": "fsdp"},
    "tensor": {
        "qkv": "tensor",
        "heads": "tensor",
        "mlp": "tensor",
        "modulation": "tensor",
    },
}
"""Ready rules, by the name of the mesh axis that each is about.

`data` divides the batch and keeps every parameter whole on each device. `fsdp` divides
the batch and, along the width of the network, every kernel and the label table; the
biases of `qkv`, `mlp` and `modulation` stay whole, as does what writes `patch`.
`tensor` divides the inside of each block, and leaves batch and width whole.
"""


def shardings(
    params: Params | DiTConfig, mesh: Mesh | AbstractMesh, rules: Rules | None = None
) -> PyTree[NamedSharding]:
    """The sharding of every parameter on a mesh.

    Args:
        params: Parameters, full or stripped, as arrays or shapes, a nested dict or an
            `nnx.State`; or the config that they would be made from.
        mesh: A mesh of automatic axes.
        rules: From logical axes to axes of the mesh. None joins the ready `RULES` of
            every axis of the mesh, which must then be called data, fsdp or tensor. A
            logical axis that the rules do not name, or give None, is whole on every
            device, on purpose; nothing else is.

    Returns:
        A tree like the parameters, for `jax.device_put`, for `out_shardings` of
        `jax.jit`, and for the targets of a checkpoint.

    Raises:
        ValueError: If a rule names an unknown logical axis or an axis that the mesh
            lacks, if two axes of one parameter would be divided by the same axis of
            the mesh, if a size can't be divided, if a parameter is not one of a DiT, or
            if the mesh has explicit axes. It names the parameter and what to do.

    Example:
        >>> from jax.sharding import AxisType
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=2, num_heads=2)
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> placed = dit.shardings(config, mesh)
        >>> tuple(placed["blocks"]["mlp"]["fc2"]["kernel"].spec)
        (None, None, 'fsdp')
        >>> params = jax.device_put(dit.init_params(config), placed)

    Source: logical axes and rules as in Flax and MaxText; `fsdp` is ZeRO-3 (Rajbhandari
    et al., arXiv 1910.02054), `tensor` the split of Shoeybi et al. (arXiv 1909.08053).
    """
    rules = _checked_rules(mesh, rules)
    if isinstance(params, DiTConfig):
        config = params
        params = jax.eval_shape(lambda: init_params(config))

    def place(path: Any, leaf: Any) -> NamedSharding:
        """One parameter."""
        name = path_name(path)
        return NamedSharding(mesh, _spec(name, leaf, _axes_of(name, leaf), mesh, rules))

    return jax.tree_util.tree_map_with_path(place, params)


def batch_sharding(
    mesh: Mesh | AbstractMesh, rules: Rules | None = None
) -> NamedSharding:
    """The sharding of images, noise and labels: divided along their first axis.

    Args:
        mesh: As for :func:`shardings`.
        rules: As for :func:`shardings`.

    Returns:
        The sharding; it divides nothing if no axis of the mesh is for the batch. The
        batch must be a multiple of the devices along those axes.

    Raises:
        ValueError: As for :func:`shardings`.

    Example:
        >>> from jax.sharding import AxisType
        >>> from fusionopt_jax import dit
        >>> names = ("data", "fsdp")
        >>> mesh = jax.make_mesh((1, 1), names, axis_types=(AxisType.Auto,) * 2)
        >>> tuple(dit.batch_sharding(mesh).spec)
        (('data', 'fsdp'),)
    """
    rules = _checked_rules(mesh, rules)
    return NamedSharding(mesh, PartitionSpec(rules.get(BATCH) or None))


def cache_shardings(
    cache: TimeConditioningCache,
    mesh: Mesh | AbstractMesh,
    labels: str | tuple[str, ...] | None = None,
) -> TimeConditioningCache:
    """The sharding of a cache of modulators: whole, or divided along its labels.

    Divided, each device keeps the rows of its share of the labels, and every step
    exchanges those that its images need. Whole is faster, and the cache of a request of
    few labels is small.

    Args:
        cache: The cache.
        mesh: As for :func:`shardings`.
        labels: The axis of the mesh that divides the labels, or several; None keeps
            everything whole on every device.

    Returns:
        A tree like the cache, for `jax.device_put`.

    Raises:
        ValueError: If the mesh lacks the axis, or its devices can't share the rows
            evenly; there are as many rows as the next power of two.

    Example:
        >>> from jax.sharding import AxisType
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=2, num_heads=2)
        >>> params, times = dit.init_params(config), dit.Sampler.euler(2).eval_times()
        >>> cache = dit.build_cache(params, config, times, [3, 7])
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        >>> tuple(dit.cache_shardings(cache, mesh, labels="data").block.spec)
        (None, None, 'data', None, None)
        >>> cache = jax.device_put(cache, dit.cache_shardings(cache, mesh))
    """
    by = (labels,) if isinstance(labels, str) else tuple(labels or ())
    rules = _checked_rules(mesh, {"labels": by})
    axes = {"block": (None, None, "labels", None, None), "final": (None, "labels")}

    def place(path: Any, leaf: Any) -> NamedSharding:
        """One array of the cache."""
        name = path_name(path)
        logical = axes.get(name, ())
        logical = (*logical, *(None,) * (leaf.ndim - len(logical)))
        return NamedSharding(mesh, _spec(f"cache.{name}", leaf, logical, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, cache)


def state_shardings(state: PyTree[Any], params: PyTree[Any]) -> PyTree[NamedSharding]:
    """The sharding of an optimiser's state: moments lie where their parameters do.

    A leaf that has the shape of a parameter, at a place whose name ends with the name
    of that parameter, has its sharding. Everything else (counts, one number per
    neuron, factors of a preconditioner) is whole on every device.

    Args:
        state: An optimiser's state, or its shapes.
        params: Its parameters as arrays or shapes, each with its sharding.

    Returns:
        A tree like the state, to pin the state with `out_shardings`: `tx.init` alone
        makes zeros, which depend on no parameter and lie on whichever device.

    Raises:
        ValueError: If the parameters are not on a mesh.

    Example:
        >>> import optax
        >>> from jax.sharding import AxisType
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=2, num_heads=2)
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> params = jax.device_put(
        ...     dit.init_params(config), dit.shardings(config, mesh)
        ... )
        >>> tx = optax.adam(1e-3)
        >>> placed = dit.state_shardings(jax.eval_shape(tx.init, params), params)
        >>> tuple(placed[0].mu["y_embedder"]["embedding_table"].spec)
        (None, 'fsdp')
        >>> state = jax.jit(tx.init, out_shardings=placed)(params)
    """
    places = {name: (leaf.shape, leaf.sharding) for name, leaf in named_leaves(params)}
    for name, (_, sharding) in places.items():
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{name} is not on a mesh; place the parameters first, with "
                "`jax.device_put(params, dit.shardings(params, mesh))`."
            )
    whole = NamedSharding(next(iter(places.values()))[1].mesh, PartitionSpec())

    def place(path: Any, leaf: Any) -> NamedSharding:
        """One leaf of the state."""
        keys = path_keys(path)
        for first in range(len(keys)):
            shape, sharding = places.get("/".join(keys[first:]), (None, whole))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(place, state)


def joined_rules(*names: str) -> dict[str, tuple[str, ...]]:
    """Several of the ready `RULES` as one.

    Args:
        names: Keys of `RULES`.

    Returns:
        Each logical axis with the mesh axes of all of them, in the order of `names`.

    Raises:
        ValueError: If there are no such rules.

    Example:
        >>> joined_rules("data", "fsdp")["batch"]
        ('data', 'fsdp')
    """
    joined: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name not in RULES:
            raise ValueError(
                f"there are no ready rules for a mesh axis {name!r}, only for "
                f"{', '.join(RULES)}; name the axes of the mesh so, or pass `rules`."
                f"{did_you_mean(name, RULES)}"
            )
        for logical, axis in RULES[name].items():
            joined[logical] = (*joined.get(logical, ()), axis)
    return joined


def _checked_rules(
    mesh: Mesh | AbstractMesh, rules: Rules | None
) -> dict[str, tuple[str, ...]]:
    """Rules that this mesh can follow, each with a tuple of mesh axes."""
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "the mesh has axes that are not automatic, where JAX wants the sharding of "
            "every product said; make it with "
            "`jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))`."
        )
    if rules is None:
        return joined_rules(*mesh.axis_names)
    known = {BATCH, *(axis for axes in LOGICAL_AXES.values() for axis in axes)}
    checked: dict[str, tuple[str, ...]] = {}
    for logical, given in rules.items():
        if logical not in known:
            raise ValueError(
                f"`rules` name the logical axis {logical!r}; there are "
                f"{', '.join(sorted(known))}.{did_you_mean(logical, known)}"
            )
        axes = (given,) if isinstance(given, str) else tuple(given or ())
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"`rules` divide {logical!r} by the mesh axis {axis!r}; the mesh "
                    f"has {', '.join(map(repr, mesh.axis_names))}. Rename one, or give "
                    f"{logical!r} None to keep it whole on every device."
                )
        checked[logical] = axes
    return checked


def _axes_of(name: str, leaf: Any) -> tuple[str | None, ...]:
    """The logical axes of a parameter."""
    if name.split("/")[-1] == DIGEST:
        return (None,) * len(leaf.shape)
    axes = LOGICAL_AXES.get(name)
    if axes is None or len(axes) != len(leaf.shape):
        wanted = "" if axes is None else f", whose axes are {', '.join(axes)}"
        raise ValueError(
            f"{name} {shape_text(leaf)} is no parameter of a DiT{wanted}; pass what "
            "`dit.init_params` returns, and place other leaves by hand."
        )
    return axes


def _spec(
    name: str,
    leaf: Any,
    logical: tuple[str | None, ...],
    mesh: Mesh | AbstractMesh,
    rules: dict[str, tuple[str, ...]],
) -> PartitionSpec:
    """How one parameter is divided."""
    spec: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for size, axis in zip(leaf.shape, logical, strict=True):
        by = () if axis is None else rules.get(axis, ())
        for mesh_axis in by:
            if mesh_axis in taken:
                raise ValueError(
                    f"{name} {shape_text(leaf)}: the mesh axis {mesh_axis!r} can't "
                    f"divide both {taken[mesh_axis]!r} and {axis!r}; give one of them "
                    "another axis, or None to keep it whole, in `rules`."
                )
            taken[mesh_axis] = str(axis)
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in by)
        if size % parts:
            raise ValueError(
                f"{name} {shape_text(leaf)}: {axis!r} is of size {size}, which the "
                f"{parts} devices along {' and '.join(map(repr, by))} can't share "
                f"evenly; take a divisor of {size}, another size of the model, or give "
                f"{axis!r} None in `rules` to keep it whole on every device."
            )
        spec.append(None if not by else by[0] if len(by) == 1 else by)
    return PartitionSpec(*spec)
