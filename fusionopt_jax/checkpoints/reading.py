"""Read the items of one checkpoint, and the newest one that is not damaged."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import PyTree
from fusionopt_jax.checkpoints import extras, processes, record
from fusionopt_jax.checkpoints.echoes import without_echoes
from fusionopt_jax.checkpoints.errors import (
    DamagedCheckpointError,
    DamagedCheckpointWarning,
)

_T = TypeVar("_T")


def newest(
    manager: ocp.CheckpointManager, step: int | None, read: Callable[[int], _T]
) -> tuple[_T, dict[int, str]]:
    """What `read` makes of the newest step that is not damaged, and those that are.

    Every process comes to the same step.
    """
    manager.wait_until_finished()
    seen = [set(found) for found in processes.gathered(list(manager.all_steps()))]
    steps = sorted(set().union(*seen), reverse=True)
    if not steps:
        raise FileNotFoundError(f"No checkpoint in {manager.directory}.")
    if step is not None and step not in steps:
        raise FileNotFoundError(
            f"No checkpoint of step {step} in {manager.directory}; there is "
            f"{', '.join(map(str, reversed(steps)))}."
        )
    damage: dict[int, str] = {}
    for candidate in steps if step is None else [step]:
        blind = [n for n, found in enumerate(seen) if candidate not in found]
        try:
            if blind:
                raise DamagedCheckpointError(f"process {blind[0]} does not see it")
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


def read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The record of a checkpoint, exactly as it was written, in all processes."""
    with processes.together():
        content = orbax_read(manager, step, {record.ITEM: ocp.args.JsonRestore()})[
            record.ITEM
        ]
        if not record.intact(content):
            raise DamagedCheckpointError(
                "its record is not as it was saved, or was not written by `save`"
            )
    if len(set(processes.gathered(content["sha256"]))) > 1:
        raise DamagedCheckpointError(
            "the processes find different records; give them one folder"
        )
    if content["format"] != record.FORMAT:
        raise ValueError(
            f"The checkpoint of step {step} in {manager.directory} has format "
            f"{content['format']}; this version reads {record.FORMAT}."
        )
    return content


def read_items(
    manager: ocp.CheckpointManager,
    step: int,
    content: dict[str, Any],
    targets: dict[str, PyTree[Any]],
    extra: PyTree[Any] = None,
) -> dict[str, PyTree[Any]]:
    """Trees of a checkpoint like the targets, their digests compared.

    Args:
        manager: Where it is.
        step: Which it is.
        content: Its record.
        targets: What to read, by item.
        extra: A tree like the saved one, or `None` to leave it.
    """
    wanted = dict(targets)
    places: list[str] = []
    extra_leaves = [] if extra is None else extras.leaves_of(extra)
    if extra is not None:
        saved = [name for name, _, _ in content["arrays"][extras.ITEM]]
        places = [str(saved.index(name)) for name, _ in extra_leaves]
        wanted[extras.ITEM] = {
            place: _words_target(leaf) if extras.is_key(leaf) else leaf
            for place, (_, leaf) in zip(places, extra_leaves, strict=True)
            if not isinstance(leaf, extras.Plain)
        }
    with processes.together():
        restored = orbax_read(
            manager,
            step,
            {
                item: ocp.args.StandardRestore(jax.tree.map(_orbax_target, tree))
                for item, tree in wanted.items()
                if jax.tree.leaves(tree)
            },
        )
        trees = {
            item: jax.tree.map(_placed, tree, restored.get(item, tree))
            for item, tree in wanted.items()
        }
    leaves = {item: named_leaves(trees[item]) for item in targets}
    if extra is not None:
        arrays = trees[extras.ITEM]
        values = [
            _extra_leaf(content, name, leaf, arrays.get(place))
            for place, (name, leaf) in zip(places, extra_leaves, strict=True)
        ]
        leaves[extras.ITEM] = [
            (name, value)
            for (name, leaf), value in zip(extra_leaves, values, strict=True)
            if not isinstance(leaf, extras.Plain)
        ]
        trees[extras.ITEM] = jax.tree.unflatten(jax.tree.structure(extra), values)
    check_digests(content, leaves)
    return trees


def check_digests(
    content: dict[str, Any], leaves: dict[str, list[tuple[str, Any]]]
) -> None:
    """Require the bits that were saved of all named leaves, by item."""
    # Where an array is divided, its digest is a sum over all processes.
    wrong = [
        name
        for item, found in leaves.items()
        for name in record.changed(content, item, found)
    ]
    with processes.together():
        if wrong:
            raise DamagedCheckpointError(
                f"{len(wrong)} of its arrays hold other numbers than were saved, "
                f"{wrong[0]} first"
            )


def _extra_leaf(content: dict[str, Any], name: str, target: Any, read: Any) -> Any:
    """A leaf of the user's own tree, out of what was read."""
    if isinstance(target, extras.Plain):
        texts = {name: text for name, _, text in content["arrays"][extras.ITEM]}
        return extras.Plain(target.kind, texts[name]).value
    return extras.key_of(read, target) if extras.is_key(target) else read


def _words_target(key: Any) -> Any:
    """What makes Orbax restore the words of a key where the key shall be."""
    words = extras.words_of(key)
    sharding = committed_sharding(key)
    if sharding is None:
        return words
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)


def orbax_read(
    manager: ocp.CheckpointManager, step: int, items: dict[str, Any]
) -> dict[str, Any]:
    """What Orbax reads; whatever it says of broken files becomes one error."""
    try:
        with without_echoes():
            if jax.process_count() == 1:
                found = manager.restore(step, args=ocp.args.Composite(**items))
            else:
                found = _read_alone(manager, step, items)
        return dict(found.items())
    except PermissionError:
        raise
    # Broken files end in nearly every class of error, out of four libraries.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpointError(f"it can't be read: {first[:200]}") from error


def _read_alone(
    manager: ocp.CheckpointManager, step: int, items: dict[str, Any]
) -> Any:
    """What this process reads of its share, without waiting for the others.

    The manager would: where one process fails, the others would wait for it for ever.
    """
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(
            step_folder(manager, step), args=ocp.args.Composite(**items)
        )


def step_folder(manager: ocp.CheckpointManager, step: int) -> Any:
    """The folder of a step, whatever the manager's format of names."""
    for path in ocp.utils.checkpoint_steps_paths(manager.directory):
        if ocp.utils.step_from_checkpoint_name(path.name) == step:
            return path
    raise FileNotFoundError(f"{manager.directory} has no folder of step {step}")


def committed_sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding that a target asks for."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def _orbax_target(leaf: Any) -> Any:
    """What makes Orbax restore a leaf onto its devices, or else to the host."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = committed_sharding(leaf)
    if sharding is None and not extras.is_key(leaf):
        # Orbax would pin the array, and a compiled step compile anew for that.
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(target: Any, leaf: Any) -> Any:
    """A restored leaf where its target would be."""
    if not isinstance(target, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    if committed_sharding(target) is None and extras.is_key(target):
        words = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    return jnp.asarray(leaf)
