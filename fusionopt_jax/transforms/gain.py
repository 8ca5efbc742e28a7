"""Measures by how much a stage of a chain grows or shrinks the updates."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from fusionopt_jax._leaves import check_leaves
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._trees import entries, l2_norm
from fusionopt_jax._types import Params, Scalar


class GainState(NamedTuple):
    """State of `measure_gain`.

    Attributes:
        input_rms: Under the stage's name, the root mean square of what went in.
        output_rms: Under the stage's name, the root mean square of what came out.
        inner_state: State of the stage.
    """

    input_rms: dict[str, Scalar]
    output_rms: dict[str, Scalar]
    inner_state: Any


def measure_gain(
    name: str, inner: TransformLike
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the size of a stage's input and output in the state, and changes nothing.

    .. math::
        \text{gain} = \|u_\text{out}\| / \|u_\text{in}\|, \qquad
        \text{rms} = \|u\| / \sqrt{\text{number of entries}}

    with Frobenius norms over all leaves that the stage sees. `diagnostics` reads them
    out as `<name>/input_rms`, `<name>/output_rms` and `<name>/gain`.

    Args:
        name: What `diagnostics` calls the stage, such as `"momentum"`.
        inner: The stage.

    Returns:
        A transformation with the updates of `inner`.

    Raises:
        ValueError: If `name` is no non-empty string.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.measure_gain("doubling", optax.scale(2.0))
        >>> gradient = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(gradient, tx.init(gradient))
        >>> fo.diagnostics(state)["doubling/gain"]
        Array(2., dtype=float32)
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"`name` must be a non-empty string, got {name!r}.")
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Params) -> GainState:
        check_leaves("measure_gain", params, complex_too=True)
        return GainState(
            input_rms={name: jnp.zeros([], jnp.float32)},
            output_rms={name: jnp.zeros([], jnp.float32)},
            inner_state=inner_tx.init(params),
        )

    def update_fn(
        updates: Any,
        state: GainState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, GainState]:
        check_leaves("measure_gain", updates, complex_too=True)
        results, inner_state = inner_tx.update(
            updates, state.inner_state, params, **extra_args
        )
        return results, GainState(
            input_rms={name: _rms(updates)},
            output_rms={name: _rms(results)},
            inner_state=inner_state,
        )

    return transformation(init_fn, update_fn)


def _rms(tree: Any) -> Scalar:
    """The root mean square of all entries of a tree, in fp32; 0 of an empty one."""
    return l2_norm(tree) / math.sqrt(max(entries(tree), 1))
