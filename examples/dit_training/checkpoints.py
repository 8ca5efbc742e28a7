"""Checkpoints of a run, and the refusal to continue a different one."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dit_training import optimizers
from dit_training.errors import RunError
from dit_training.training import TrainState, all_finite

KEPT = 2

MAY_CHANGE = ("eval_every", "data.source", "sampling.", "versions.")
"""Settings that don't touch the trajectory of the weights."""


class Checkpoints:
    """The folder `checkpoints` of a run: the two latest states that were finite."""

    def __init__(self, folder: Path, config: dict[str, Any], fingerprint: str):
        # Orbax reports every routine step of its work as a warning or info of absl.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder
        self.config = config
        self.fingerprint = fingerprint
        self.manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT, enable_async_checkpointing=False
            ),
        )

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, state: TrainState, deployed: Any) -> bool:
        """Write a state and its deployable weights, unless a number is not finite."""
        step = int(state.step)
        if not all_finite((state, deployed)):
            return False
        if step != self.latest():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    train=ocp.args.StandardSave(state._asdict()),
                    deployed=ocp.args.StandardSave(deployed),
                    about=ocp.args.JsonSave(
                        {"config": self.config, "routing": self.fingerprint}
                    ),
                ),
            )
        return True

    def restore(self, shapes: TrainState) -> TrainState:
        """The newest state, if it comes from the same settings and routing.

        `shapes` is the state that a fresh run would start from, or its shapes.
        """
        step = self.latest()
        about = self.manager.restore(
            step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
        ).about
        changed = differences(about["config"], self.config)
        if changed:
            raise RunError(
                f"--resume: {self.folder / str(step)} comes from another config: "
                f"{'; '.join(changed)}; give the same settings or another --out"
            )
        try:
            optimizers.ROUTING.check(shapes.params, about["routing"])
        except ValueError as error:
            raise RunError(f"--resume: {' '.join(str(error).split())}") from error
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            shapes._asdict(),
        )
        restored = self.manager.restore(
            step, args=ocp.args.Composite(train=ocp.args.StandardRestore(abstract))
        ).train
        # Orbax pins arrays to their device, for which the step would be compiled anew.
        return TrainState(**jax.tree.map(jnp.asarray, jax.device_get(restored)))


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`name saved -> wanted` for each setting that changes what is trained."""
    old, new = flatten(saved), flatten(wanted)
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
