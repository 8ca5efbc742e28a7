"""The momentum of the matrices in `fusion_opt`, and what its averages are kept in."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._optax import transformation
from fusionopt_jax._types import Array, Count, Number, Params
from fusionopt_jax.transforms import quantize_state as quantized

Nesterov: TypeAlias = bool | Literal["optax"]
StateDtype: TypeAlias = Literal["fp32"] | quantized.StateDtype

NESTEROV: tuple[Nesterov, ...] = (False, True, "optax")
STATE_DTYPES: tuple[StateDtype, ...] = ("fp32", "bf16", "int8")


class LookAheadState(NamedTuple):
    """State of the momentum of `fusion_opt(nesterov="optax")`.

    Attributes:
        count: Updates so far.
        trace: The sum of the gradients, as `optax.trace` keeps it.
    """

    count: Count
    trace: Any


def momentum_of(
    decay: Number, nesterov: Nesterov, state_dtype: StateDtype = "fp32"
) -> optax.GradientTransformation:
    """The decaying sum of the gradients, with a look-ahead if one is chosen."""
    if nesterov == "optax":
        tx: optax.GradientTransformation = _unbiased_look_ahead(decay)
    else:
        tx = optax.trace(decay, nesterov=nesterov, accumulator_dtype=jnp.float32)
    if state_dtype == "fp32":
        return tx
    return quantized.quantize_state(tx, {"trace": state_dtype})


def averages_in(
    state_dtype: StateDtype,
    tx: optax.GradientTransformation,
    fields: Iterable[str],
) -> optax.GradientTransformation:
    """`tx`, whose averages are in 16 bits where the momentum is in 16 or less.

    They move too slowly for 8 bits: nearly every step of theirs would be rounded away.
    """
    names = tuple(fields)
    if state_dtype == "fp32" or not names:
        return tx
    return quantized.quantize_state(tx, dict.fromkeys(names, "bf16"))


def _unbiased_look_ahead(decay: Number) -> optax.GradientTransformation:
    r"""The look-ahead of `optax.contrib.muon`, which corrects the bias of both terms.

    .. math::
        \beta\,\frac{m_t}{1-\beta^{t+1}} + (1-\beta)\,\frac{g_t}{1-\beta^t}, \qquad
        m_t = (1-\beta)\,v_t, \quad v_t = \beta v_{t-1} + g_t

    Muon's own code mixes the two without; after 1/(1 - β) steps they are the same.
    """
    trace = optax.trace(decay, accumulator_dtype=jnp.float32)

    def init_fn(params: Params) -> LookAheadState:
        return LookAheadState(jnp.zeros([], jnp.int32), trace.init(params))

    def update_fn(
        updates: Any, state: LookAheadState, params: Any = None, **_: Any
    ) -> tuple[Any, LookAheadState]:
        sums, kept = trace.update(updates, state.trace, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        beta = jnp.asarray(decay, jnp.float32)
        of_sum = beta * (1 - beta) / (1 - beta ** (count + 1))
        of_gradient = (1 - beta) / (1 - beta**count)

        def mix(total: Array, gradient: Array) -> Array:
            return of_sum * total + of_gradient * gradient.astype(total.dtype)

        return jax.tree.map(mix, sums, updates), LookAheadState(count, kept)

    return transformation(init_fn, update_fn)
