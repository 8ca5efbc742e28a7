r"""Cautious masking: no coordinate moves against the gradient of its own step.

.. math::
    M = \mathbb 1[u \odot g > 0], \qquad
    u' = (u \odot M)\,\|u\| / \|u \odot M\| .
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._leaves import check_leaves
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._types import Array, Params, Scalar


class CautiousState(NamedTuple):
    """State of `cautious`.

    Attributes:
        kept: The share of entries that the last step kept, for logging; near 1/2 the
            update has nothing to do with the gradient.
        inner_state: State of the wrapped transformation.
    """

    kept: Scalar
    inner_state: Any


def cautious(inner: TransformLike) -> optax.GradientTransformationExtraArgs:
    r"""Drops the entries of an update that go against the gradient, keeping its norm.

    .. math::
        u = \text{inner}(g), \qquad M = \mathbb 1[u \odot g > 0], \qquad
        u' = (u \odot M)\,\|u\|_2 / \|u \odot M\|_2

    leaf by leaf. It wraps `inner`, because it compares what `inner` returns with the
    raw gradient that went in. A leaf in which nothing agrees with its gradient gets
    zero.

    The published method divides by the share of entries kept, which multiplies the norm
    by one over its square root: nearly nothing after Adam, whose updates mostly agree
    with the gradient, but a learning rate larger by 1.37 after Newton–Schulz, where
    about half of the entries do (FusionOpt's measurements).

    Args:
        inner: Returns a direction: positive sign, no learning rate. Leave weight decay
            outside, as it has nothing to do with the gradient.

    Returns:
        A transformation whose updates have the dtypes that `inner` gives them.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.cautious(optax.trace(0.9))
        >>> params = {"w": jnp.zeros(2)}
        >>> _, state = tx.update({"w": jnp.array([4.0, 4.0])}, tx.init(params))
        >>> update, _ = tx.update({"w": jnp.array([-1.0, 0.4])}, state)
        >>> [round(float(entry), 4) for entry in update["w"]]
        [0.0, 4.7707]

    Source:
        Liang et al., *Cautious Optimizers*, arXiv 2411.16085; the norm-keeping scale is
        FusionOpt's.
    """
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Params) -> CautiousState:
        check_leaves("cautious", params)
        return CautiousState(
            kept=jnp.ones([], jnp.float32), inner_state=inner_tx.init(params)
        )

    def update_fn(
        updates: Any,
        state: CautiousState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, CautiousState]:
        check_leaves("cautious", updates)
        results, inner_state = inner_tx.update(
            updates, state.inner_state, params, **extra_args
        )
        agrees = jax.tree.map(_agreement, results, updates)
        masked = jax.tree.map(_masked, results, agrees)
        counts = jax.tree.leaves(agrees)
        total = max(sum(mask.size for mask in counts), 1)
        kept = sum(
            (jnp.sum(mask, dtype=jnp.float32) for mask in counts),
            start=jnp.zeros([], jnp.float32),
        )
        return masked, CautiousState(kept=kept / total, inner_state=inner_state)

    return transformation(init_fn, update_fn)


def _agreement(update: Array, gradient: Array) -> Array:
    """Where an update and its gradient have the same sign."""
    # By sign, since the product of small numbers of half precision underflows.
    return jnp.sign(update) * jnp.sign(gradient).astype(update.dtype) > 0


def _masked(update: Array, agrees: Array) -> Array:
    """The agreeing entries, scaled to the norm of all of them."""
    full = update.astype(jnp.float32)
    _, unit, norm = _in_units(full)
    part, _, part_norm = _in_units(jnp.where(agrees, full, 0))
    scale = jnp.where(part_norm > 0, norm / jnp.where(part_norm > 0, part_norm, 1), 0)
    return (part * scale * unit).astype(update.dtype)


def _in_units(x: Array) -> tuple[Array, Array, Array]:
    """An array over its largest entry, that entry, and the norm of the quotient.

    So that no square leaves the range of fp32, however far apart two arrays are.
    """
    largest = jnp.max(jnp.abs(x), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return x / unit, unit, jnp.sqrt(jnp.sum(jnp.square(x / unit)))
