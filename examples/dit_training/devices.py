"""The devices of a run: its mesh, and the processes that share it.

Every process runs the same program. A step's batch is a function of the seed and the
step, and each process hands over the rows that its own devices take, so that the
numbers do not depend on how many processes there are.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_training import training
from dit_training.errors import RunError
from dit_training.options import Settings
from fusionopt_jax import dit

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is lost; all others then stop."""

JOIN_SECONDS = 120
"""How long the processes wait for each other at the start."""

LEAVE_SECONDS = 20
"""How long they wait for each other at the end."""

BROKEN_EXCHANGE = (
    *("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
    *("coordination", "heartbeat", "Barrier"),
)
"""What the errors of JAX and of the libraries below it say when a process is lost.

They come in the class of whatever was being computed.
"""


def join(coordinator: str, processes: int, process: int) -> None:
    """Become one of several processes; before anything else is asked of JAX."""
    if not 0 <= process < processes:
        raise RunError(
            f"--process-id {process}: must lie in [0, {processes - 1}] for --processes "
            f"{processes}"
        )
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {process} of {processes} found no others at {coordinator} "
            f"({first_line(error)}); start them all with the same --coordinator and "
            "--processes, the address being that of process 0 with a free port"
        ) from error


def part() -> None:
    """Leave the others, once all have come so far; nothing if there are none."""
    if several():
        jax.distributed.shutdown()


def left(status: int) -> int:
    """The exit status of a run that ends early; ends a process among several at once.

    Others can be waiting in an exchange that this process will never join. They learn
    of it when its connections close, which must not wait for an orderly end.
    """
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process prints, and writes the files that only one may write."""
    return not several() or jax.process_index() == 0


def lost(error: Exception) -> RunError | None:
    """The error of a process whose exchange with the others broke; None for others."""
    if not any(word in str(error) for word in BROKEN_EXCHANGE):
        return None
    return RunError(
        f"process {jax.process_index()} of {jax.process_count()} lost another "
        f"process ({first_line(error)}); see what that one says, and start them all "
        "again with --resume"
    )


def agreed(here: bool) -> bool:
    """Whether it holds in any of the processes; all of them ask at the same step."""
    if not several():
        return here
    return bool(np.any(multihost_utils.process_allgather(np.array(here))))


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """What only the first process does, the others read when it is done."""
    if several() and not is_first():
        multihost_utils.sync_global_devices(name)
    yield
    if several() and is_first():
        multihost_utils.sync_global_devices(name)


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of `data=2,fsdp=4` with their sizes."""
    axes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = entry.partition("=")
        if name not in dit.RULES or name in axes or not size.isdecimal() or size == "0":
            raise RunError(
                f"--mesh {text}: {entry!r} is no axis; give each of "
                f"{', '.join(dit.RULES)} at most once with its size, such as "
                "data=2,fsdp=4"
            )
        axes[name] = int(size)
    return axes


def start(mesh: str | None, processes: int) -> Mesh | None:
    """The mesh of the run; on CPUs, as many devices as it needs are made.

    Several processes that are not told a mesh divide the batch among all devices.
    """
    axes = None if mesh is None else parse_mesh(mesh)
    wanted = processes if axes is None else math.prod(axes.values())
    if wanted % processes:
        raise RunError(
            f"--mesh {mesh}: {processes} processes can't share {wanted} devices evenly"
        )
    if axes is None and processes == 1:
        return None
    # Once JAX has started, the number is what it is; it is looked at below.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", wanted // processes)
    devices = jax.devices()
    if axes is None:
        axes = {"data": len(devices)}
        wanted = len(devices)
    if wanted > len(devices) or (processes > 1 and wanted != len(devices)):
        raise RunError(
            f"--mesh {mesh}: it has {wanted} devices, and there are {len(devices)} "
            f"({devices[0].platform}) in {processes} process(es); give sizes whose "
            f"product is {len(devices)}"
        )
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=devices[:wanted],
    )


class Placement(NamedTuple):
    """Where everything lies on the mesh of a run.

    Attributes:
        state: the sharding of each array of the training state.
        shapes: that state as shapes, each with its sharding.
        batch: the sharding of images and labels.
    """

    state: training.TrainState
    shapes: training.TrainState
    batch: NamedSharding

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device has all of."""
        return NamedSharding(self.batch.mesh, PartitionSpec())

    def first_state(self, start: Callable[[], Any]) -> training.TrainState:
        """What `start` computes, each device its own part."""
        return jax.jit(start, out_shardings=self.state)()

    def restored(self, state: training.TrainState) -> training.TrainState:
        """A state from a checkpoint, whose step is on the host."""
        step = np.asarray(state.step, np.int32)
        return state._replace(
            step=jax.make_array_from_callback((), self.whole, lambda _: step)
        )

    def feed(self, *arrays: np.ndarray, rows: np.ndarray) -> list[jax.Array]:
        """Rows of host arrays, each on the devices that take it.

        Where the devices can't share them evenly, every device takes all.
        """
        even = len(rows) % shares(self.batch) == 0
        sharding = self.batch if even else self.whole
        return [
            jax.make_array_from_callback(
                (len(rows), *array.shape[1:]),
                sharding,
                # Called for the devices of this process alone.
                lambda index, array=array: array[rows[index[0]]],
            )
            for array in arrays
        ]

    def collected(self, tree: Any) -> Any:
        """A tree of arrays, all of each on one device of this process."""
        gather = jax.jit(lambda tree: tree, out_shardings=self.whole)
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), gather(tree))


def placement(mesh: Mesh, settings: Settings, model: dit.DiTConfig) -> Placement:
    """Where a run's state and batches lie, by the library's rules for the mesh."""
    start = partial(training.init_state, model, settings.optimizer, settings.seed)
    shapes = jax.eval_shape(start)
    try:
        params = with_shardings(shapes.params, dit.shardings(model, mesh))
    except ValueError as error:
        raise RunError(f"--mesh {settings.mesh}: {error}") from error
    batch = dit.batch_sharding(mesh)
    if settings.batch_size % shares(batch):
        raise RunError(
            f"--batch-size {settings.batch_size}: the {shares(batch)} devices along "
            f"the mesh axes {' and '.join(batch_axes(batch))} can't share it evenly; "
            f"give a multiple of {shares(batch)}"
        )
    opt_state = dit.state_shardings(shapes.opt_state, params)
    state = training.TrainState(
        NamedSharding(mesh, PartitionSpec()), dit.shardings(model, mesh), opt_state
    )
    return Placement(state, with_shardings(shapes, state), batch)


def batch_axes(batch: NamedSharding) -> tuple[str, ...]:
    """The axes of the mesh that divide a batch."""
    axes = batch.spec[0] if batch.spec else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def shares(batch: NamedSharding) -> int:
    """Among how many devices a batch is divided."""
    return math.prod(batch.mesh.shape[axis] for axis in batch_axes(batch))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that know where their arrays lie."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )


def first_line(error: Exception) -> str:
    """What an error says first, without what follows on other lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
