r"""A gate on the update by how repeatable the raw gradient is.

.. math::
    m \leftarrow \beta m + (1-\beta)\,g, \qquad
    v \leftarrow \beta v + (1-\beta)\,g^2, \qquad
    s = \min\bigl(1, |\hat m| / \sqrt{\hat v}\bigr), \qquad
    u' = \max(s^p, s_{\min})\,u .
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_choice,
    check_decay_rate,
    check_number,
    check_positive,
)
from fusionopt_jax._leaves import check_leaves, wide_zeros
from fusionopt_jax._matrices.buckets import Stack, map_leaves, stack_states
from fusionopt_jax._matrices.norm import frobenius_norm
from fusionopt_jax._matrices.view import MatrixView
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._types import Array, Count, Float, Number, Params, Scalar
from fusionopt_jax.routing import Routing, matrix_views

Unit: TypeAlias = Literal["neuron", "entry"]

_UNITS: tuple[Unit, ...] = ("neuron", "entry")


class SNRGateState(NamedTuple):
    r"""State of `snr_gate`.

    Attributes:
        count: Updates so far.
        gate: Mean gate of the last step over all units, for logging.
        gradient_average: Moving average of the gradients, shaped like the parameters,
            in fp32.
        size: Root of the moving average of their squares, :math:`\sqrt v`, in fp32:
            `(matrices, out)` for each leaf by neuron (a tuple of such where chunks are
            unequal), shaped like the parameters by entry.
        inner_state: State of the wrapped transformation.
    """

    count: Count
    gate: Scalar
    gradient_average: Params
    size: Params
    inner_state: Any


def snr_gate(
    inner: TransformLike,
    *,
    b1: Number = 0.9,
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
    go by. Of :math:`v` the root is kept, so that gradients of any finite size are in
    range.

    Args:
        inner: Returns a direction: positive sign, no learning rate.
        b1: Decay rate of both averages, :math:`\beta`, in [0, 1).
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
    check_decay_rate("b1", b1)
    check_number("floor", floor, low=0.0, high=1.0)
    check_positive("power", power)
    check_choice("unit", unit, _UNITS)
    inner_tx = accepting_extra_args(inner)

    def init_fn(params: Params) -> SNRGateState:
        check_leaves("snr_gate", params)
        # Like the leaves, since that takes over their sharding too.
        average = wide_zeros(params)
        if unit == "entry":
            size = wide_zeros(params)
        else:
            size = _per_neuron(params, matrix_views(params, routing, "snr_gate"))
        return SNRGateState(
            count=jnp.zeros([], jnp.int32),
            gate=jnp.ones([], jnp.float32),
            gradient_average=average,
            size=size,
            inner_state=inner_tx.init(params),
        )

    def next_gate(
        g: Array, m: Array, root: Array, correction: Scalar
    ) -> tuple[Array, Array, Array]:
        """The new averages of one leaf or stack, and its gates."""
        norm = jnp.abs if unit == "entry" else _neuron_norms
        g = g.astype(jnp.float32)
        b = jnp.asarray(b1, jnp.float32)
        m = b * m + (1 - b) * g
        # Of v its root, which has the range of the gradients.
        root = jnp.hypot(jnp.sqrt(b) * root, jnp.sqrt(1 - b) * norm(g))
        noise = root * jnp.sqrt(correction)
        s = jnp.where(noise > 0, norm(m) / jnp.where(noise > 0, noise, 1), 0)
        return m, root, jnp.maximum(jnp.minimum(s, 1.0) ** power, floor)

    def by_neuron(
        u: Stack, m: Stack, root: Array, gate: Array, g: Stack, correction: Scalar
    ) -> tuple[Stack, Stack, Array, Array]:
        """The gated update of a stack, its averages, and the gates."""
        m, root, gate = next_gate(g, m, root, correction)
        return _times(u, gate[:, None, :]), m, root, gate

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
        correction = 1 - jnp.asarray(b1, jnp.float32) ** count
        if unit == "entry":
            treedef = jax.tree.structure(updates)
            trees = (updates, state.gradient_average, state.size)
            done = [
                next_gate(g, m, root, correction)
                for g, m, root in zip(*map(treedef.flatten_up_to, trees), strict=True)
            ]
            average, size, gates = (
                treedef.unflatten([leaf[i] for leaf in done]) for i in range(3)
            )
            results = jax.tree.map(_times, results, gates)
        else:
            views = matrix_views(updates, routing, "snr_gate")
            results, average, size, gates = map_leaves(
                by_neuron,
                views,
                written=[results, state.gradient_average],
                states=[state.size, _per_neuron(updates, views)],
                read=[updates],
                scalars=[correction],
            )
        units = max(sum(gate.size for gate in jax.tree.leaves(gates)), 1)
        total = sum(map(jnp.sum, jax.tree.leaves(gates)), start=jnp.float32(0))
        return results, SNRGateState(
            count=count,
            gate=total / units,
            gradient_average=average,
            size=size,
            inner_state=inner_state,
        )

    return transformation(init_fn, update_fn)


def _per_neuron(tree: Any, views: Sequence[MatrixView]) -> Any:
    """Zeros for every output neuron of every leaf."""
    return stack_states(
        tree, views, lambda stack: jnp.zeros((stack.count, stack.outputs), jnp.float32)
    )


def _neuron_norms(stack: Stack) -> Float[Array, "b out"]:
    """The norm of each output neuron's inputs."""
    return frobenius_norm(stack, axis=1)[:, 0, :]


def _times(update: Array, gate: Array) -> Array:
    """An update times its gate, in its dtype."""
    return (update.astype(jnp.float32) * gate).astype(update.dtype)
