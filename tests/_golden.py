"""Loader of the recorded trajectories of the published PyTorch optimisers.

The archives under ``data/optim`` hold what the public reference implementations did in
twelve steps on a CPU, in PyTorch's (out, in) shapes. Index ``t`` of an array is the
value after step ``t``. Arrays that two recordings share are stored once. Parameters
are kept as differences from step to step in units of 2^-23, as planes of bytes, which
is half the size and 6e-8 away from the recording at most. Of element-wise rules, which
treat every shape alike, only some of the recorded shapes are kept.
"""

import functools
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

_FOLDER = pathlib.Path(__file__).parent / "data" / "optim"

_FAMILIES = {
    "muon": "muon",
    "normuon": "normuon",
    "sf_plus": "schedule_free_plus",
    "sf": "schedule_free",
    "kl_shampoo": "kl_shampoo",
    "fusion": "fusion",
}

STEPS = 12


class Golden(NamedTuple):
    """One recorded run: inputs, trajectory, final state and settings."""

    case: str
    params0: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    params: dict[str, np.ndarray]
    state: dict[str, dict[str, np.ndarray]]
    scalars: dict[str, np.ndarray]
    hyper: dict[str, Any]
    noise_floor: dict[str, float]
    extra: dict[str, Any]

    def tolerance(self, array: str) -> float:
        """Ten times what half a unit in the last place of the gradients changes.

        The recorded floor is one draw of such a perturbation, and NumPy, XLA and
        PyTorch order sums differently in several places, hence the ten; 1e-6 is a few
        units in the last place of numbers near one, where a floor was smaller.
        """
        return max(10 * self.noise_floor.get(array, 0.0), 1e-6)


@functools.cache
def _archive(family: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(_FOLDER / f"{family}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files if key != "meta"}
        meta = json.loads(str(stored["meta"]))
    arrays = {key: _decoded(array) for key, array in arrays.items()}
    for array in arrays.values():
        array.setflags(write=False)
    arrays |= {key: arrays[target] for key, target in meta.get("alias", {}).items()}
    return arrays, meta


def _decoded(array: np.ndarray) -> np.ndarray:
    """A trajectory from the byte planes of its differences; else the array itself."""
    if array.dtype != np.uint8:
        return array
    differences = np.moveaxis(array, 0, -1).copy().view("<i4")[..., 0]
    units = np.cumsum(differences, axis=0, dtype=np.int64)
    return (units / 2.0**23).astype(np.float32)


def load(case: str) -> Golden:
    """Read one recorded run by name, for instance ``"muon_fp32"``."""
    family = next(f for prefix, f in _FAMILIES.items() if case.startswith(prefix))
    arrays, meta = _archive(family)
    settings = meta["cases"][case]
    parts: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        owner, _, rest = key.partition("/")
        if owner == case:
            kind, _, name = rest.partition("/")
            parts.setdefault(kind, {})[name or kind] = array
    if "grad" not in parts:
        # The scaled recording used the gradients of its unscaled sibling times this
        # factor, to half a unit in the last place: below what the tolerance resolves.
        sibling = load(re.sub("_clamped$", "", case))
        scale = np.float32(settings["grad_scale"])
        parts["grad"] = {name: scale * g for name, g in sibling.grads.items()}
    state: dict[str, dict[str, np.ndarray]] = {}
    for kind in ("state", *(k for k in parts if k.startswith("initial_"))):
        for key, array in parts.get(kind, {}).items():
            if kind == "state":
                quantity, _, name = key.partition("/")
            else:
                quantity, name = kind, key
            state.setdefault(quantity, {})[name] = array
    scalars = dict(parts.get("scalar", {}))
    for kind in ("loss", "loss_used", "grad_mask"):
        scalars |= parts.get(kind, {})
    return Golden(
        case=case,
        params0=parts["param0"],
        grads=parts["grad"],
        params=parts["param"],
        state=state,
        scalars=scalars,
        hyper=settings["hyper"],
        noise_floor=settings["noise_floor"],
        extra={k: v for k, v in settings.items() if k not in ("hyper", "noise_floor")},
    )


def newton_schulz() -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Inputs and outputs of the published Newton-Schulz routines, and noise floors."""
    arrays, meta = _archive("ns5")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        parts.setdefault(kind, {})[name] = array
    return parts, meta["ns5"]["noise_floor"]


def without_missing(golden: Golden) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The gradients with zeros where the recording had none, and where it had one."""
    present = golden.scalars.get("grad_mask", np.ones(STEPS))
    grads = {
        name: stack * present.reshape(-1, *[1] * (stack.ndim - 1)).astype(stack.dtype)
        for name, stack in golden.grads.items()
    }
    return grads, present
