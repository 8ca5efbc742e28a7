r"""A gate on the update by how repeatable the raw gradient is.

.. math::
    m \leftarrow \beta m + (1-\beta)\,g, \qquad
    v \leftarrow \beta v + (1-\beta)\,g^2, \qquad
    s = \min\bigl(1, |\hat m| / \sqrt{\hat v}\bigr), \qquad
    u' = \max(s^p, s_{\min})\,u .
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from fusionopt_jax._checks import (
    check_choice,
    check_decay_rate,
    check_number,
    check_positive,
)
from fusionopt_jax._leaves import check_leaves, wide_zeros
from fusionopt_jax._matrices.placement import automatic
from fusionopt_jax._matrices.view import MatrixView
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._types import Array, Count, Number, Params, Scalar
from fusionopt_jax.routing import Routing, matrix_views

Unit: TypeAlias = Literal["neuron", "entry"]

_UNITS: tuple[Unit, ...] = ("neuron", "entry")


class SNRGateState(NamedTuple):
    """State of `snr_gate`.

    Attributes:
        count: Updates so far.
        gate: Mean gate of the last step over all units, for logging.
        gradient_average: Moving average of the gradients, shaped like the parameters,
            in fp32.
        second_moment: Moving average of their squares: `(matrices, out)` for each leaf
            by neuron, shaped like the parameters by entry.
        inner_state: State of the wrapped transformation.
    """

    count: Count
    gate: Scalar
    gradient_average: Params
    second_moment: Params
    inner_state: Any


def snr_gate(
    inner: TransformLike,
    *,
    decay: Number = 0.9,
    floor: Number = 0.0,
    power: Number = 1.0,
    unit: Unit = "neuron",
    routing: Routing | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Slows down the neurons whose gradient is noise.

    .. math::
        m &\leftarrow \beta m + (1-\beta)\,g, \qquad
        v \leftarrow \beta v + (1-\beta)\,\|g\|^2 \quad\text{per neuron} \\
        s &= \min\Bigl(1, \frac{\|m\| / (1-\beta^t)}{\sqrt{v / (1-\beta^t)}}\Bigr),
        \qquad u' = \max(s^p, s_{\min})\,\text{inner}(g)

    An orthogonalised update has the same size whether its gradient is signal or noise;
    the gate gives back what that takes away. It is measured on the raw gradient, which
    is why it wraps `inner`: momentum makes any sequence look repeatable. A steady
    gradient gives 1; independent noise settles at :math:`\sqrt{(1-\beta)/(1+\beta)}`,
    0.23 at the default. The first step is never gated down, having one gradient to
    go by.

    Args:
        inner: Returns a direction: positive sign, no learning rate.
        decay: Decay rate of both averages, :math:`\beta`, in [0, 1).
        floor: The smallest gate, :math:`s_{\min}`, in [0, 1].
        power: :math:`p`, positive; above 1 closes the gate faster.
        unit: `"neuron"` gates each output neuron of a matrix, `"entry"` each entry.
        routing: Where the matrices of a leaf come from; without one, `(in, out)` over
            the last two axes. By `"entry"` it isn't needed.

    Returns:
        A transformation whose updates have the dtypes that `inner` gives them.

    Raises:
        ValueError: If a setting is out of range; by `"neuron"`, if a leaf has no
            matrices.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.snr_gate(optax.identity(), unit="entry")
        >>> params = {"w": jnp.zeros(2)}
        >>> _, state = tx.update({"w": jnp.array([1.0, 1.0])}, tx.init(params))
        >>> update, _ = tx.update({"w": jnp.array([1.0, -1.0])}, state)
        >>> [round(float(entry), 4) for entry in update["w"]]
        [1.0, -0.0526]

    Source:
        FusionOpt, the release of August 2026 (its `snr` component with `snr_source`
        `"grad"`); its PyTorch matrices are `(out, in)`.
    """
    check_decay_rate("decay", decay)
    check_number("floor", floor, low=0.0, high=1.0)
    check_positive("power", power)
    check_choice("unit", unit, _UNITS)
    inner_tx = accepting_extra_args(inner)

    def views_of(tree: Any) -> list[MatrixView | None]:
        """The matrices of every leaf, or `None` for each where entries are gated."""
        if unit == "entry":
            return [None for _ in jax.tree.leaves(tree)]
        return list(matrix_views(tree, routing, "snr_gate"))

    def init_fn(params: Params) -> SNRGateState:
        check_leaves("snr_gate", params)
        leaves, treedef = jax.tree.flatten(params)
        moments = [
            # Like the leaf, since that takes over its sharding too.
            jnp.zeros_like(leaf, dtype=jnp.float32)
            if view is None
            else jnp.zeros((view.count, view.matrix_shape[1]), jnp.float32)
            for leaf, view in zip(leaves, views_of(params), strict=True)
        ]
        return SNRGateState(
            count=jnp.zeros([], jnp.int32),
            gate=jnp.ones([], jnp.float32),
            gradient_average=wide_zeros(params),
            second_moment=jax.tree.unflatten(treedef, moments),
            inner_state=inner_tx.init(params),
        )

    def update_fn(
        updates: Any,
        state: SNRGateState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, SNRGateState]:
        check_leaves("snr_gate", updates)
        results, inner_state = inner_tx.update(
            updates, state.inner_state, params, **extra_args
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = 1 - jnp.asarray(decay, jnp.float32) ** count
        treedef = jax.tree.structure(updates)
        gated, averages, moments, gates = [], [], [], []
        for update, gradient, average, moment, view in zip(
            treedef.flatten_up_to(results),
            jax.tree.leaves(updates),
            jax.tree.leaves(state.gradient_average),
            jax.tree.leaves(state.second_moment),
            views_of(updates),
            strict=True,
        ):
            g = gradient.astype(jnp.float32)
            m = decay * average + (1 - decay) * g
            v = decay * moment + (1 - decay) * _squares(g, view)
            signal = jnp.sqrt(_squares(m, view))
            noise = jnp.sqrt(v * correction)
            ratio = jnp.where(noise > 0, signal / jnp.where(noise > 0, noise, 1), 0)
            gate = jnp.maximum(jnp.minimum(ratio, 1.0) ** power, floor)
            gated.append(_gated(update, gate, view))
            averages.append(m)
            moments.append(v)
            gates.append(gate)
        units = max(sum(gate.size for gate in gates), 1)
        total = sum((jnp.sum(gate) for gate in gates), start=jnp.zeros([], jnp.float32))
        return jax.tree.unflatten(treedef, gated), SNRGateState(
            count=count,
            gate=total / units,
            gradient_average=jax.tree.unflatten(treedef, averages),
            second_moment=jax.tree.unflatten(treedef, moments),
            inner_state=inner_state,
        )

    return transformation(init_fn, update_fn)


def _squares(x: Array, view: MatrixView | None) -> Array:
    """Squares of the entries, summed over each neuron's inputs where there are some."""
    if view is None:
        return x * x
    sums = lambda x: jnp.sum(jnp.square(view.to_stack(x)), axis=1)  # noqa: E731
    return automatic(sums, x, like=PartitionSpec())


def _gated(update: Array, gate: Array, view: MatrixView | None) -> Array:
    """An update times its gate, in its dtype."""
    if view is None:
        return (update.astype(jnp.float32) * gate).astype(update.dtype)

    def gated(update: Array, gate: Array) -> Array:
        stack = view.to_stack(update).astype(jnp.float32) * gate[:, None, :]
        return view.from_stack(stack).astype(update.dtype)

    return automatic(gated, update, gate, like=update)
