"""The momentum of the matrices in `fusion_opt`."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._optax import transformation
from fusionopt_jax._types import Array, Count, Number, Params

Nesterov: TypeAlias = bool | Literal["optax"]

NESTEROV: tuple[Nesterov, ...] = (False, True, "optax")


class LookAheadState(NamedTuple):
    """State of the momentum of `fusion_opt(nesterov="optax")`.

    Attributes:
        count: Updates so far.
        trace: The sum of the gradients, as `optax.trace` keeps it.
    """

    count: Count
    trace: Any


def momentum_of(decay: Number, nesterov: Nesterov) -> optax.GradientTransformation:
    """The decaying sum of the gradients in fp32, with a look-ahead if one is chosen."""
    if nesterov == "optax":
        return _unbiased_look_ahead(decay)
    return optax.trace(decay, nesterov=nesterov, accumulator_dtype=jnp.float32)


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
