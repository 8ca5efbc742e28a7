"""Write a checkpoint together with the record of what it holds."""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.checkpoints import record
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
    about: Mapping[str, Any] | None = None,
) -> bool:
    """Writes parameters and optimiser state, and a record of what they are.

    Digests are computed where the arrays lie, sharded or not; the writing itself goes
    on in the background if the manager is asynchronous, and the arrays may be donated
    meanwhile. On several hosts, every process calls it.

    Args:
        manager: Whose folder it goes to, and who decides what is kept.
        step: The number of the checkpoint.
        params: The training parameters.
        opt_state: The optimiser's state.
        routing: What the optimiser was built with, `Routing()` if with none.
        deployed: The weights to use elsewhere, such as `eval_params(opt_state,
            params)`, for `restore_deployed`.
        about: Anything else to keep that JSON can hold, such as a configuration.

    Returns:
        Whether it was written; it is not if the manager's options skip this step.

    Raises:
        ValueError: If the routing doesn't fit the parameters.
        TypeError: If `about` is not made of what JSON can hold.
        OSError: If it can't be written.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> import fusionopt_jax as fo, orbax.checkpoint as ocp
        >>> from fusionopt_jax import checkpoints
        >>> params = {"kernel": jnp.ones((128, 128)), "bias": jnp.zeros(128)}
        >>> routing, tx = fo.Routing(), fo.fusion_opt(8e-3)
        >>> state = tx.init(params)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ocp.CheckpointManager(folder) as manager:
        ...         saved = checkpoints.save(
        ...             manager, 10, params, state, routing=routing, about={"seed": 0}
        ...         )
        ...         found = checkpoints.restore(
        ...             manager, params, tx.init(params), routing=routing
        ...         )
        >>> found.step, found.about
        (10, {'seed': 0})
    """
    if not manager.should_save(step):
        return False
    items = {"params": params, "opt_state": opt_state}
    if deployed is not None:
        items["deployed"] = deployed
    described = record.make(items, routing, about or {})
    with without_echoes():
        return manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    item: ocp.args.StandardSave(tree)
                    for item, tree in items.items()
                    if jax.tree.leaves(tree)
                },
                **{record.ITEM: ocp.args.JsonSave(described)},
            ),
        )
