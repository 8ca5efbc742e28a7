"""Write a checkpoint together with the record of what it holds."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.checkpoints import extras, processes, record
from fusionopt_jax.checkpoints.echoes import without_echoes
from fusionopt_jax.routing import Routing


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params: Params,
    opt_state: PyTree[Any],
    *,
    routing: Routing,
    deployed: Params | None = None,
    extra: PyTree[Any] = None,
    about: Mapping[str, Any] | None = None,
) -> bool:
    """Writes parameters and optimiser state, and a record of what they are.

    Digests are computed where the arrays lie, sharded or not; the writing itself goes
    on in the background if the manager is asynchronous, and the arrays may be donated
    meanwhile. What fails there is raised by the next call that waits for it: the next
    `save` or `restore`, `manager.wait_until_finished()`, or the end of its ``with``.

    Of several processes, every one calls it. An array is divided among them, or is the
    same in all.

    Args:
        manager: Whose folder it goes to, and who decides what is kept.
        step: The number of the checkpoint.
        params: The training parameters.
        opt_state: The optimiser's state.
        routing: What the optimiser was built with, `Routing()` if with none.
        deployed: The weights to use elsewhere, such as `eval_params(opt_state,
            params)`, for `restore_deployed`.
        extra: What else a run needs to go on as if it had never stopped: a tree of
            arrays, random keys (`jax.random.key`), and bool, int, float, str or bytes,
            such as ``{"key": key, "position": 300}``. NumPy's ``rng.bit_generator
            .state`` is one.
        about: Anything else to keep that JSON can hold, such as a configuration.

    Returns:
        Whether it was written; it is not if the manager's options skip this step.

    Raises:
        ValueError: If the routing doesn't fit the parameters, or something is not the
            same in all processes (it names what).
        TypeError: If `about` is not made of what JSON can hold, or a leaf of `extra` is
            of another type.
        OSError: If it can't be written.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> import fusionopt_jax as fo, orbax.checkpoint as ocp
        >>> from fusionopt_jax import checkpoints
        >>> params = {"kernel": jnp.ones((128, 128)), "bias": jnp.zeros(128)}
        >>> routing, tx = fo.Routing(), fo.fusion_opt(8e-3)
        >>> state, extra = tx.init(params), {"key": jax.random.key(0), "position": 300}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ocp.CheckpointManager(folder) as manager:
        ...         saved = checkpoints.save(
        ...             manager, 10, params, state, routing=routing, extra=extra
        ...         )
        ...         found = checkpoints.restore(
        ...             manager, params, tx.init(params), routing=routing, extra=extra
        ...         )
        >>> found.step, found.extra["position"]
        (10, 300)
    """
    if not manager.should_save(step):
        return False
    trees = {"params": params, "opt_state": opt_state}
    if deployed is not None:
        trees["deployed"] = deployed
    leaves = {item: named_leaves(tree) for item, tree in trees.items()}
    if extra is not None:
        leaves[extras.ITEM] = extras.leaves_of(extra)
        trees[extras.ITEM] = extras.arrays_of(leaves[extras.ITEM])
    described = record.make(leaves, params, opt_state, routing, about or {})
    _check_agreed(described)
    with without_echoes():
        return manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    item: ocp.args.StandardSave(jax.tree.map(_kept, tree))
                    for item, tree in trees.items()
                    if jax.tree.leaves(tree)
                },
                **{record.ITEM: ocp.args.JsonSave(described)},
            ),
        )


def _kept(leaf: Any) -> Any:
    """A leaf as Orbax can write it, whatever becomes of it in the meantime."""
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    # Orbax takes no array that lies on one of several processes alone.
    alone = (
        isinstance(leaf, jax.Array)
        and leaf.is_fully_addressable
        and jax.process_count() > 1
        and not extras.is_key(leaf)
    )
    return np.array(leaf) if alone else leaf


def _check_agreed(described: dict[str, Any]) -> None:
    """Require that every process saves the same."""
    if len(set(processes.gathered(described["sha256"]))) == 1:
        return
    names = record.differing(processes.gathered(described))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ValueError(
        f"The processes would save different things: {shown}. Give all of them the "
        "same, or one array of which each process holds a share, as "
        "`jax.make_array_from_process_local_data` makes it."
    )
