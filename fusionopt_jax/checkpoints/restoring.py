"""Read the newest checkpoint that is as it was saved, into what it was saved from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from fusionopt_jax._optax import TransformLike
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.checkpoints import extras, processes, record
from fusionopt_jax.checkpoints.reading import newest, read_items, read_record
from fusionopt_jax.checkpoints.warming import warmed
from fusionopt_jax.recipes.warm_start import WarmStartReport
from fusionopt_jax.routing import Routing


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        step: The step it was saved at.
        params: The training parameters.
        opt_state: The state of the optimiser.
        about: What was given to `save` as `about`.
        skipped: The newer steps that are damaged, and what is wrong with each. Orbax
            writes no step before its latest, so delete them (`manager.delete(step)`)
            before going on.
        extra: What was given to `save` as `extra`, if it was asked for.
        report: What `warm_start` carried over, started and dropped, if it was asked
            for.
    """

    step: int
    params: Params
    opt_state: PyTree[Any]
    about: dict[str, Any]
    skipped: dict[int, str]
    extra: PyTree[Any] = None
    report: WarmStartReport | None = None


def restore(
    manager: ocp.CheckpointManager,
    params: Params,
    opt_state: PyTree[Any],
    *,
    routing: Routing,
    step: int | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
    extra: PyTree[Any] = None,
    warm_start: TransformLike | None = None,
) -> Restored:
    """Reads the newest checkpoint whose every number is as it was saved.

    Of several processes, every one calls it, and all come to the same step: what one of
    them finds damaged is damaged.

    Args:
        manager: Where to look.
        params: Parameters like the saved ones: arrays, or each a
            `jax.ShapeDtypeStruct`. An array is restored with the sharding of its
            target; where that is not committed to a device, neither is the array.
        opt_state: A state like the saved one: `tx.init(params)`, or its shapes from
            `jax.eval_shape`.
        routing: What the optimiser is built with; it must divide the parameters as it
            did when they were saved.
        step: The checkpoint to read. `None` takes the newest, or, with a
            `DamagedCheckpointWarning` for each one skipped, the newest good one.
        check: Called with the `about` of the checkpoint before anything is compared or
            read; what it raises is raised.
        extra: A tree like the one that was given to `save`, with any values: arrays
            and keys, or a `jax.ShapeDtypeStruct` of each, say where they go, as for
            `params`. `None` leaves what was saved.
        warm_start: The optimiser whose state `opt_state` is, to go on with a checkpoint
            of other components or another routing. The state is then that of
            `fusionopt_jax.warm_start`: what the saved one has of it is carried over,
            the rest starts anew. So does what the components kept of a leaf that is
            routed in another way; its Schedule-Free iterates are carried. Look at the
            `report`.

    Returns:
        Step, parameters, state, `about`, the newer steps that are damaged, `extra` and
        `report`.

    Raises:
        ValueError: If the checkpoint was written under another routing (it lists the
            leaves that moved), by another set of components (it names them), or with
            other shapes or dtypes; with `warm_start`, for that one's reasons.
        DamagedCheckpointError: If no checkpoint, or not the one asked for, is as it
            was saved; it says what is wrong with each.
        FileNotFoundError: If there is no checkpoint.

    Example:
        See `save`.
    """

    def read(found: int) -> Restored:
        content = read_record(manager, found)
        with processes.together():
            if check is not None:
                check(content["about"])
            record.check_arrays(content, "params", named_leaves(params))
            if warm_start is None:
                _check_routing(routing, params, content)
                record.check_components(content, params, opt_state)
                record.check_arrays(content, "opt_state", named_leaves(opt_state))
            if extra is not None:
                _check_saved(manager, found, content, extras.ITEM, "restore without it")
                record.check_arrays(content, extras.ITEM, extras.leaves_of(extra))
        targets = {"params": params}
        if warm_start is None:
            targets["opt_state"] = opt_state
        trees = read_items(manager, found, content, targets, extra)
        report = None
        if warm_start is not None:
            trees["opt_state"], report = warmed(
                manager, found, content, trees["params"], opt_state, warm_start, routing
            )
        return Restored(
            found,
            trees["params"],
            trees["opt_state"],
            content["about"],
            {},
            trees.get(extras.ITEM),
            report,
        )

    restored, skipped = newest(manager, step, read)
    return restored._replace(skipped=skipped)


def restore_deployed(
    manager: ocp.CheckpointManager, params: Params, *, step: int | None = None
) -> Params:
    """Reads the weights that were given to `save` as `deployed`, without the optimiser.

    Args:
        manager: Where to look.
        params: Weights like the saved ones, as for `restore`.
        step: As for `restore`.

    Returns:
        The weights.

    Raises:
        ValueError: If the checkpoint was saved without `deployed`, or with other shapes
            or dtypes.
        DamagedCheckpointError: As for `restore`.
        FileNotFoundError: If there is no checkpoint.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> import fusionopt_jax as fo, orbax.checkpoint as ocp
        >>> from fusionopt_jax import checkpoints
        >>> params, state = {"kernel": jnp.ones((2, 2))}, ()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ocp.CheckpointManager(folder) as manager:
        ...         saved = checkpoints.save(
        ...             manager, 1, params, state, routing=fo.Routing(), deployed=params
        ...         )
        ...         checkpoints.restore_deployed(manager, params)["kernel"]
        Array([[1., 1.],
               [1., 1.]], dtype=float32)
    """

    def read(found: int) -> Params:
        content = read_record(manager, found)
        with processes.together():
            remedy = "use `restore` and `eval_params`"
            _check_saved(manager, found, content, "deployed", remedy)
            record.check_arrays(content, "deployed", named_leaves(params))
        return read_items(manager, found, content, {"deployed": params})["deployed"]

    return newest(manager, step, read)[0]


def read_about(
    manager: ocp.CheckpointManager, *, step: int | None = None
) -> dict[str, Any]:
    """Reads what was given to `save` as `about`, and no array.

    Args:
        manager: Where to look.
        step: As for `restore`.

    Returns:
        What JSON made of it.

    Raises:
        DamagedCheckpointError: As for `restore`.
        FileNotFoundError: If there is no checkpoint.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> import fusionopt_jax as fo, orbax.checkpoint as ocp
        >>> from fusionopt_jax import checkpoints
        >>> params = {"kernel": jnp.ones((2, 2))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ocp.CheckpointManager(folder) as manager:
        ...         saved = checkpoints.save(
        ...             manager, 1, params, (), routing=fo.Routing(), about={"seed": 3}
        ...         )
        ...         checkpoints.read_about(manager)
        {'seed': 3}
    """
    return newest(manager, step, lambda found: read_record(manager, found)["about"])[0]


def _check_routing(routing: Routing, params: Params, content: dict[str, Any]) -> None:
    """Require the routing that the checkpoint was written under."""
    try:
        routing.check(params, content["routing"])
    except ValueError as error:
        raise ValueError(
            f"{error} `warm_start` does that for these leaves alone."
        ) from None


def _check_saved(
    manager: ocp.CheckpointManager,
    step: int,
    content: dict[str, Any],
    item: str,
    remedy: str,
) -> None:
    """Require an item that not every checkpoint has."""
    if item not in content["arrays"]:
        raise ValueError(
            f"The checkpoint of step {step} in {manager.directory} was saved without "
            f"`{item}`; {remedy}."
        )
