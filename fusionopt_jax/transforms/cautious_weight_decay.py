r"""Cautious weight decay: only where the update shrinks the weight already.

.. math:: u' = u + \lambda\,\mathbb 1[u \odot w \ge 0] \odot w .
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import check_rate_or_schedule
from fusionopt_jax._leaves import check_leaves
from fusionopt_jax._optax import accepting_extra_args, transformation
from fusionopt_jax._types import Array, Count, Params, ScalarOrSchedule


class CautiousDecayState(NamedTuple):
    """State of `add_cautious_decayed_weights`.

    Attributes:
        count: Updates so far.
    """

    count: Count


def add_cautious_decayed_weights(
    weight_decay: ScalarOrSchedule, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds weight decay to the entries whose update has the sign of their weight.

    .. math:: u' = u + \lambda\,\mathbb 1[u \odot w \ge 0] \odot w

    Since a weight moves by :math:`-u'`, decay acts where the update shrinks the weight
    already, and never holds back a weight that the loss wants larger. To be put where
    `optax.add_decayed_weights` would be, after everything that makes the direction.
    Inside `schedule_free` the weights :math:`w` are the fast iterate :math:`z`; only
    about half of the entries are decayed at any step, so what is known about decay and
    stability there does not carry over.

    Args:
        weight_decay: :math:`\lambda`, non-negative, or a schedule of the step count
            from 0.
        mask: Which leaves are decayed: a tree of booleans or a function from a tree to
            one, as `optax.add_decayed_weights` takes.

    Returns:
        A transformation whose updates have the dtypes of its input.

    Raises:
        ValueError: If `weight_decay` is negative, or an update comes without `params`.

    Example:
        >>> import jax.numpy as jnp, fusionopt_jax as fo
        >>> tx = fo.add_cautious_decayed_weights(0.1)
        >>> params = {"w": jnp.array([2.0, -2.0])}
        >>> update, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
        >>> update["w"]
        Array([1.2, 1. ], dtype=float32)

    Source:
        *Cautious Weight Decay*, arXiv 2510.12402.
    """
    check_rate_or_schedule("weight_decay", weight_decay)

    def init_fn(params: Params) -> CautiousDecayState:
        check_leaves("add_cautious_decayed_weights", params)
        return CautiousDecayState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: Any,
        state: CautiousDecayState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, CautiousDecayState]:
        del extra_args
        if params is None:
            raise ValueError(
                "`add_cautious_decayed_weights` needs the current parameters: call "
                "`update(updates, state, params)`."
            )
        check_leaves("add_cautious_decayed_weights", updates)
        rate = weight_decay(state.count) if callable(weight_decay) else weight_decay

        def decay(u: Array, w: Array) -> Array:
            agrees = jnp.sign(u) * jnp.sign(w).astype(u.dtype) >= 0
            decayed = u.astype(jnp.float32) + rate * w.astype(jnp.float32)
            return jnp.where(agrees, decayed.astype(u.dtype), u)

        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.map(decay, updates, params), CautiousDecayState(count)

    tx = transformation(init_fn, update_fn)
    return tx if mask is None else accepting_extra_args(optax.masked(tx, mask))
