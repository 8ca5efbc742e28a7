"""Read the state of another optimiser, and go on from it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fusionopt_jax._optax import TransformLike, accepting_extra_args
from fusionopt_jax._paths import named_leaves, path_keys
from fusionopt_jax._states import named_tuple_classes, state_entries
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.checkpoints import extras, processes, record
from fusionopt_jax.checkpoints.errors import DamagedCheckpointError
from fusionopt_jax.checkpoints.reading import (
    check_digests,
    committed_sharding,
    orbax_read,
    step_folder,
)
from fusionopt_jax.recipes.warm_start import WarmStartReport, carry
from fusionopt_jax.routing import Routing, routes


def warmed(
    manager: ocp.CheckpointManager,
    step: int,
    content: dict[str, Any],
    params: Params,
    opt_state: PyTree[Any],
    tx: TransformLike,
    routing: Routing,
) -> tuple[PyTree[Any], WarmStartReport]:
    """A state of `tx` with what the checkpoint has of it, placed like `opt_state`.

    Args:
        manager: Where the checkpoint is.
        step: Which it is.
        content: Its record.
        params: Its parameters.
        opt_state: A state of `tx`, or its shapes.
        tx: The optimiser to go on with.
        routing: What `tx` is built with.
    """
    fresh = accepting_extra_args(tx).init(params)
    if jax.tree.structure(fresh) != jax.tree.structure(opt_state):
        raise ValueError(
            "`opt_state` must be a state of the optimiser given as `warm_start`: "
            "`tx.init(params)`, or its shapes."
        )
    moved = [
        path
        for path, _, _ in routes.differences(routing.routes(params), content["routing"])
    ]
    leaves = [
        (name, jnp.asarray(leaf))
        for name, leaf in _saved_leaves(manager, step, content, opt_state, params)
    ]
    state, report = carry(fresh, params, record.entries(content, leaves), moved)
    return jax.tree.map(_placed_like, opt_state, state), report


def _saved_leaves(
    manager: ocp.CheckpointManager,
    step: int,
    content: dict[str, Any],
    opt_state: PyTree[Any],
    params: Params,
) -> list[tuple[str, Any]]:
    """Every leaf of the saved state by its name, its digest compared.

    What the new state has as well comes onto the devices where it will be, the rest to
    the host.
    """
    described = {name: text for name, text, _ in content["arrays"]["opt_state"]}
    if not described:
        return []
    likes = {
        (entry.component, path_keys(entry.path)): entry.leaf
        for entry in state_entries(opt_state, named_tuple_classes(params))
    }
    targets: dict[str, Any] = {}
    for entry in record.entries(content, [(name, name) for name in described]):
        like = likes.get((entry.component, path_keys(entry.path)))
        if like is not None and _shape(record.described(like)) == _shape(
            described[entry.leaf]
        ):
            targets[entry.leaf] = like
    with processes.together():
        try:
            folder = step_folder(manager, step) / "opt_state"
            tree = ocp.StandardCheckpointHandler().metadata(folder).tree
        except Exception as error:
            raise DamagedCheckpointError(f"its state can't be read: {error}") from error
        # NNX's variables are a key of their own to Orbax, and none in a name.
        names = [
            name if name in described else name.removesuffix("/value")
            for name, _ in named_leaves(tree)
        ]
        wanted = [
            _target(targets.get(name), leaf)
            for name, (_, leaf) in zip(names, named_leaves(tree), strict=True)
        ]
        target = jax.tree.unflatten(jax.tree.structure(tree), wanted)
        restored = orbax_read(
            manager, step, {"opt_state": ocp.args.StandardRestore(target)}
        )
        if sorted(names) != sorted(described):
            raise DamagedCheckpointError("its state has other leaves than were saved")
        leaves = [
            (name, extras.as_described(leaf, described[name]))
            for name, leaf in zip(
                names, jax.tree.leaves(restored["opt_state"]), strict=True
            )
        ]
    check_digests(content, {"opt_state": leaves})
    return leaves


def _target(like: Any, saved: Any) -> Any:
    """What makes Orbax restore a leaf where another one lies, or else to the host."""
    sharding = None if like is None else committed_sharding(like)
    # Of a key there are words here, which have another shape.
    if sharding is None or extras.is_key(like):
        return np.broadcast_to(np.zeros((), saved.dtype), saved.shape)
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)


def _shape(described: str) -> str:
    """The shape out of a leaf's dtype and shape."""
    return described.partition("[")[2]


def _placed_like(target: Any, leaf: Any) -> Any:
    """A leaf of the new state where its target asks for it."""
    sharding = committed_sharding(target)
    if sharding is None or leaf.sharding == sharding:
        return leaf
    return jax.device_put(leaf, sharding)
