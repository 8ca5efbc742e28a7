"""Checkpoints of a run, and the refusal to continue a different one."""

import dataclasses
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dit_training import optimizers
from dit_training.errors import RunError
from dit_training.training import TrainState, all_finite
from fusionopt_jax import checkpoints, dit

KEPT = 2

MAY_CHANGE = (
    "eval_every",
    "data.source",
    "latents",
    "mesh",
    "sampling.",
    "versions.",
)
"""Settings that don't touch the trajectory of the weights.

An autoencoder is known by its digest, wherever its folder is. Another mesh adds numbers
up in another order, and no more.
"""


class Checkpoints:
    """The folder `checkpoints` of a run: the two latest states that were finite."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder = folder
        self.config = config
        self.manager = open_manager(
            folder, max_to_keep=KEPT, enable_async_checkpointing=False
        )

    def close(self) -> None:
        """End what Orbax has running in the background."""
        self.manager.close()

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, state: TrainState, deployed: Any) -> bool:
        """Write a state and its deployable weights, unless a number is not finite."""
        if not all_finite((state, deployed)):
            return False
        step, before = int(state.step), self.latest()
        if step == before:
            return True
        try:
            checkpoints.save(
                self.manager,
                step,
                state.params,
                state.opt_state,
                routing=optimizers.ROUTING,
                deployed=deployed,
                about=self.config,
            )
        # The second is how the library below Orbax says that the disk is full.
        except (OSError, ValueError) as error:
            again = "start again" if before is None else "go on with --resume"
            raise RunError(
                f"the checkpoint of step {step} cannot be written to {self.folder} "
                f"({one_line(error)}); make room, and {again}"
            ) from error
        return True

    def restore(self, shapes: TrainState) -> TrainState:
        """The newest state that is as it was saved, by the same settings and routing.

        `shapes` is the state that a fresh run would start from, or its shapes. Newer
        checkpoints that are damaged are reported and removed: the run writes them anew.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", checkpoints.DamagedCheckpointWarning)
                found = checkpoints.restore(
                    self.manager,
                    shapes.params,
                    shapes.opt_state,
                    routing=optimizers.ROUTING,
                    check=self.check_config,
                )
        except (checkpoints.DamagedCheckpointError, OSError, ValueError) as error:
            raise RunError(f"--resume: {one_line(error)}") from error
        for step, reason in found.skipped.items():
            if jax.process_index() == 0:
                print(
                    f"train_dit.py: {self.folder / str(step)} is damaged ({reason}); "
                    f"going on from step {found.step}",
                    file=sys.stderr,
                )
            self.manager.delete(step)
        return TrainState(jnp.int32(found.step), found.params, found.opt_state)

    def check_config(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, and list them."""
        changed = differences(saved, self.config)
        if changed:
            raise RunError(
                f"--resume: {self.folder} comes from another config: "
                f"{'; '.join(changed)}; give the same settings or another --out"
            )


def one_line(error: Exception) -> str:
    """What an error says, without the line breaks."""
    return " ".join(str(error).split())


def open_manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    """Orbax's manager of a folder."""
    # Orbax logs every routine step of its work, and of an error what it also raises;
    # asyncio, the errors of the reads that were under way with the first that failed.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return ocp.CheckpointManager(
        folder.resolve(), options=ocp.CheckpointManagerOptions(**options)
    )


def saved_config(folder: Path) -> dict[str, Any]:
    """The config in the newest checkpoint of a folder that can be read."""
    try:
        with (
            open_manager(folder, read_only=True) as manager,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", checkpoints.DamagedCheckpointWarning)
            return checkpoints.read_about(manager)
    except (checkpoints.DamagedCheckpointError, OSError) as error:
        raise RunError(f"--resume: {one_line(error)}") from error


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`name saved -> wanted` for each setting that changes what is trained."""
    old, new = flatten(saved), flatten(wanted)
    if "model" in saved:
        # A run of an older version lacks the settings that were added since; it ran
        # with what their defaults are.
        defaults = dataclasses.asdict(dit.DiTConfig())
        old = flatten({"model": defaults}) | old
    may_change = MAY_CHANGE
    if new.get("optimizer") not in optimizers.NEEDS_HORIZON:
        may_change = (*may_change, "steps")
    return [
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if not name.startswith(may_change) and old.get(name) != new.get(name)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
