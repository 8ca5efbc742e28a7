"""Numbers for a log, read out of any optimiser state."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from fusionopt_jax._paths import path_keys
from fusionopt_jax._states import Component, Entry, state_entries
from fusionopt_jax._types import Array
from fusionopt_jax.transforms.gain import GainState

# Names that the rule in `_component_name` would not give.
_NAMES = {
    "KLShampooState": "kl_shampoo",
    "KLShampooTorchState": "kl_shampoo_torch",
    "MONAState": "mona",
    "NS5State": "ns5",
    "NorMuonState": "normuon",
    "PolyakPlusState": "polyak",
    "SNRGateState": "snr_gate",
}

# What `optax.inject_hyperparams` calls the settings that it keeps.
_HYPERPARAMS = "hyperparams"


def diagnostics(state: Any) -> dict[str, Array]:
    """Every scalar of an optimiser state, under a readable name.

    Names are `group/component/quantity`: the label of every `multi_transform` around a
    component, its name, the field of its state. Of this library there are:

    * `polyak/step_size`, and what it is made of: `polyak/loss_average` and
      `polyak/norm_average`, or `polyak/loss` and `polyak/l1_average`;
    * `schedule_free/weight_sum`, `schedule_free/max_learning_rate`,
      `schedule_free/b1`, `schedule_free/count`;
    * `spectral/ns5/audit_error` (with `audit_every`);
    * `spectral/<stage>/gain`, `input_rms` and `output_rms` of every stage under
      `measure_gain`; a stage that starts again from the raw gradient, as `kl_shampoo`
      does, has its own share in the ratio of two `output_rms`;
    * `.../cautious/kept`, `.../snr_gate/gate`;
    * what `optax.inject_hyperparams` keeps, such as `hyperparams/learning_rate`.

    Works under `jax.jit` and on traced states; copy the result to the host once for
    each log line with `jax.device_get`.

    Args:
        state: A state of any Optax optimiser, however nested.

    Returns:
        Arrays of no axes. Where a group has several components of one name, the second
        is called `name_2`, and so on.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.polyak(fo.schedule_free(optax.identity(), learning_rate=0.1))
        >>> params = {"w": jnp.ones(4)}
        >>> state = tx.init(params)
        >>> _, state = tx.update(params, state, params, value=3.0)
        >>> numbers = fo.diagnostics(state)
        >>> float(numbers["polyak/step_size"]), int(numbers["schedule_free/count"])
        (1.5, 1)
    """
    numbers: dict[str, Array] = {}
    for entry in state_entries(state):
        if not _is_scalar(entry.leaf):
            continue
        if entry.component.kind == GainState.__name__:
            name = _path((*entry.component.group, *_keys(entry)[::-1]))
        else:
            name = _path((*_component_path(entry.component), *_keys(entry)))
        numbers[name] = jnp.asarray(entry.leaf)
    for name in [name for name in numbers if name.endswith("/input_rms")]:
        stage = name.removesuffix("/input_rms")
        before, after = numbers[name], numbers[f"{stage}/output_rms"]
        gain = after / jnp.where(before > 0, before, 1)
        numbers[f"{stage}/gain"] = jnp.where(before > 0, gain, 0)
    return numbers


def _is_scalar(leaf: Any) -> bool:
    """Whether a leaf is one number, and no random key."""
    dtype = getattr(leaf, "dtype", None)
    return (
        dtype is not None
        and leaf.ndim == 0
        and not jnp.issubdtype(dtype, jax.dtypes.extended)
    )


def _component_path(component: Component) -> tuple[str, ...]:
    """Group and name of a component."""
    name = _component_name(component.kind)
    if component.number:
        name = f"{name}_{component.number + 1}"
    return (*component.group, name)


def _component_name(kind: str) -> str:
    """A state's class as users call what made it: `ScaleByAdamState` is `adam`."""
    if kind in _NAMES:
        return _NAMES[kind]
    if kind.startswith("Inject"):
        return _HYPERPARAMS
    words = kind.removesuffix("State").removeprefix("ScaleBy")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words).lower()


def _keys(entry: Entry) -> tuple[str, ...]:
    """The keys of a leaf inside its component, but for a field of that name."""
    return tuple(name for name in path_keys(entry.path) if name != _HYPERPARAMS)


def _path(names: tuple[str, ...]) -> str:
    return "/".join(name for name in names if name)
