"""Read the newest checkpoint that is as it was saved, into what it was saved from."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fusionopt_jax._types import Params, PyTree
from fusionopt_jax.checkpoints import record
from fusionopt_jax.checkpoints.echoes import without_echoes
from fusionopt_jax.routing import Routing

_T = TypeVar("_T")


class DamagedCheckpointError(Exception):
    """No checkpoint can be restored: files are missing, or hold something else."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint newer than the one that was restored is damaged."""


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
    """

    step: int
    params: Params
    opt_state: PyTree[Any]
    about: dict[str, Any]
    skipped: dict[int, str]


def restore(
    manager: ocp.CheckpointManager,
    params: Params,
    opt_state: PyTree[Any],
    *,
    routing: Routing,
    step: int | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Restored:
    """Reads the newest checkpoint whose every number is as it was saved.

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

    Returns:
        Step, parameters, state, `about`, and the newer steps that are damaged.

    Raises:
        ValueError: If the checkpoint was written under another routing (it lists the
            leaves that moved), by another set of components (it names them), or with
            other shapes or dtypes.
        DamagedCheckpointError: If no checkpoint, or not the one asked for, is as it
            was saved; it says what is wrong with each.
        FileNotFoundError: If there is no checkpoint.

    Example:
        See `save`.
    """

    def read(found: int) -> Restored:
        content = _read_record(manager, found)
        if check is not None:
            check(content["about"])
        routing.check(params, content["routing"])
        record.check_arrays(content, "params", params)
        record.check_components(content, params, opt_state)
        record.check_arrays(content, "opt_state", opt_state)
        trees = _read_items(
            manager, found, content, {"params": params, "opt_state": opt_state}
        )
        restored = trees["params"], trees["opt_state"]
        return Restored(found, *restored, content["about"], {})

    restored, skipped = _newest(manager, step, read)
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
        content = _read_record(manager, found)
        if "deployed" not in content["arrays"]:
            raise ValueError(
                f"The checkpoint of step {found} in {manager.directory} was saved "
                "without `deployed`; use `restore` and `eval_params`."
            )
        record.check_arrays(content, "deployed", params)
        return _read_items(manager, found, content, {"deployed": params})["deployed"]

    return _newest(manager, step, read)[0]


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
    return _newest(manager, step, lambda found: _read_record(manager, found)["about"])[
        0
    ]


def _newest(
    manager: ocp.CheckpointManager, step: int | None, read: Callable[[int], _T]
) -> tuple[_T, dict[int, str]]:
    """What `read` makes of the newest step that is not damaged, and those that are."""
    manager.wait_until_finished()
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        raise FileNotFoundError(f"No checkpoint in {manager.directory}.")
    if step is not None and step not in steps:
        raise FileNotFoundError(
            f"No checkpoint of step {step} in {manager.directory}; there is "
            f"{', '.join(map(str, reversed(steps)))}."
        )
    damage: dict[int, str] = {}
    for candidate in steps if step is None else [step]:
        try:
            found = read(candidate)
        except DamagedCheckpointError as error:
            damage[candidate] = str(error)
            continue
        for number, reason in damage.items():
            warnings.warn(
                f"The checkpoint of step {number} in {manager.directory} is damaged: "
                f"{reason}; that of step {candidate} is used.",
                DamagedCheckpointWarning,
                stacklevel=3,
            )
        return found, damage
    raise DamagedCheckpointError(
        f"No good checkpoint in {manager.directory}: "
        + "; ".join(f"step {number}, {reason}" for number, reason in damage.items())
        + "."
    )


def _read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The record of a checkpoint, exactly as it was written."""
    content = _read(manager, step, {record.ITEM: ocp.args.JsonRestore()})[record.ITEM]
    if not record.intact(content):
        raise DamagedCheckpointError(
            "its record is not as it was saved, or was not written by `save`"
        )
    if content["format"] != record.FORMAT:
        raise ValueError(
            f"The checkpoint of step {step} in {manager.directory} has format "
            f"{content['format']}; this version reads {record.FORMAT}."
        )
    return content


def _read_items(
    manager: ocp.CheckpointManager,
    step: int,
    content: dict[str, Any],
    targets: dict[str, PyTree[Any]],
) -> dict[str, PyTree[Any]]:
    """Trees of a checkpoint like the targets, their digests compared."""
    restored = _read(
        manager,
        step,
        {
            item: ocp.args.StandardRestore(jax.tree.map(_orbax_target, tree))
            for item, tree in targets.items()
            if jax.tree.leaves(tree)
        },
    )
    trees = {}
    for item, target in targets.items():
        tree = jax.tree.map(_placed, target, restored.get(item, target))
        wrong = record.changed(content, item, tree)
        if wrong:
            raise DamagedCheckpointError(
                f"{len(wrong)} of its arrays hold other numbers than were saved, "
                f"{wrong[0]} first"
            )
        trees[item] = tree
    return trees


def _read(
    manager: ocp.CheckpointManager, step: int, items: dict[str, Any]
) -> dict[str, Any]:
    """What Orbax reads; whatever it says of broken files becomes one error."""
    try:
        with without_echoes():
            found = manager.restore(step, args=ocp.args.Composite(**items))
        return dict(found.items())
    except PermissionError:
        raise
    # Broken files end in nearly every class of error, out of four libraries.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpointError(f"it can't be read: {first[:200]}") from error


def _committed_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding that a target asks for."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def _orbax_target(leaf: Any) -> Any:
    """What makes Orbax restore a leaf onto its devices, or else to the host."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = _committed_sharding(leaf)
    if sharding is None and not _is_key(leaf):
        # Orbax would pin the array, and a compiled step compile anew for that.
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(target: Any, leaf: Any) -> Any:
    """A restored leaf where its target would be."""
    if not isinstance(target, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    if _committed_sharding(target) is None and _is_key(target):
        words = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    return jnp.asarray(leaf)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf holds random keys, which the host can't."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
