r"""Neuron-wise normalisation of an orthogonalised update, the second half of NorMuon.

.. math::
    v_t = \beta_2 v_{t-1} + (1-\beta_2)\,\operatorname{mean}_{\text{in}}(O_t \odot O_t),
    \qquad \hat O_t = O_t / (\sqrt{v_t} + \epsilon), \qquad
    U_t = \hat O_t\,\|O_t\|_F / \|\hat O_t\|_F .
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusionopt_jax._checks import check_decay_rate, check_non_negative, renamed
from fusionopt_jax._matrices.buckets import Stack, map_leaves, stack_states
from fusionopt_jax._matrices.placement import device_count
from fusionopt_jax._optax import transformation
from fusionopt_jax._types import Array, Float, Number, Params
from fusionopt_jax.routing import Routing, matrix_views


class NorMuonState(NamedTuple):
    """State of `normuon`.

    Attributes:
        second_moment: For each leaf an fp32 array `(matrices, out)`: every output
            neuron's mean square, :math:`v_t`. A tuple of such where chunks are unequal.
    """

    second_moment: Params


def normuon(
    *,
    b2: Number = 0.95,
    eps: Number = 1e-10,
    restore_norm: bool = True,
    routing: Routing | None = None,
    beta2: Number | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every output neuron of an update the same long-run size.

    .. math::
        v \leftarrow \beta_2 v + (1-\beta_2)\operatorname{mean}_{\text{in}}(O \odot O),
        \quad \hat O = O / (\sqrt v + \epsilon), \quad
        U = \hat O\,\|O\|_F / \|\hat O\|_F

    The mean runs over the inputs of each output neuron: over the first axis of an
    `(in, out)` kernel. :math:`v` starts at zero without bias correction; restoring the
    norm cancels the missing factor exactly. Zero matrices stay zero. Squares of entries
    above 1e19 or below 1e-19 leave the range of fp32; what `ns5` returns is near 1,
    whatever the size of the gradient was.

    Args:
        b2: Decay rate of the second moment, :math:`\beta_2`, in [0, 1).
        eps: Added to :math:`\sqrt v`.
        restore_norm: Give each matrix back the Frobenius norm that it came with.
            Without it the first updates are :math:`1/\sqrt{1-\beta_2}` times too large.
        routing: Where the matrices of a leaf come from; without one, `(in, out)` over
            the last two axes.
        beta2: The old name of `b2`.

    Returns:
        A transformation whose updates have the shapes and dtypes of its input, to be
        put after `ns5`.

    Raises:
        ValueError: If a setting is out of range or given under both names, or a leaf
            has no matrices.

    Example:
        >>> import jax.numpy as jnp, fusionopt_jax as fo
        >>> tx = fo.normuon()
        >>> update = {"kernel": jnp.array([[1.0, 0.1], [1.0, 0.1]])}
        >>> update, _ = tx.update(update, tx.init(update))
        >>> bool(jnp.allclose(update["kernel"][:, 0], update["kernel"][:, 1]))
        True

    Source:
        Li et al., *NorMuon*, arXiv 2510.05491, Algorithm 1. The published code restores
        the norm, as here; the paper scales to a root mean square of 0.2, which
        `ns5(scale="rms")` before this transformation gives.
    """
    b2 = renamed("b2", b2, 0.95, "beta2", beta2)
    check_decay_rate("b2", b2)
    check_non_negative("eps", eps)

    def init_fn(params: Any) -> NorMuonState:
        views = matrix_views(params, routing, "normuon")
        return NorMuonState(
            stack_states(
                params,
                views,
                lambda stack: jnp.zeros((stack.count, stack.outputs), jnp.float32),
            )
        )

    def factors(
        square: Float[Array, "b out"], v: Float[Array, "b out"]
    ) -> tuple[Float[Array, "b out"], Float[Array, "b out"]]:
        """What each neuron is multiplied by, and the new second moments."""
        v = b2 * v + (1 - b2) * square
        root = jnp.sqrt(v) + eps
        factor = 1 / jnp.where(root > 0, root, 1)
        if restore_norm:
            # Both norms follow from the mean squares: one pass over the matrices.
            before = jnp.sum(square, axis=1, keepdims=True)
            after = jnp.sum(square * factor**2, axis=1, keepdims=True)
            factor *= jnp.sqrt(before / jnp.where(after > 0, after, 1))
        return factor, v

    def normalise(
        O: Stack,  # noqa: E741
        factor: Float[Array, "b out"],
    ) -> tuple[Stack, Float[Array, "b out"]]:
        U = O.astype(jnp.float32) * factor[:, None, :]
        return U.astype(O.dtype), factor

    def update_fn(
        updates: Any, state: NorMuonState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NorMuonState]:
        del params, extra_args
        views = matrix_views(updates, routing, "normuon")
        (square,) = map_leaves(
            lambda _, O: (_mean_square(O),),  # noqa: E741
            views,
            states=[state.second_moment],
            read=[updates],
        )
        # The vectors of all matrices with as many outputs at once.
        factor, second_moment = _joined(factors, square, state.second_moment)
        updates, _ = map_leaves(normalise, views, written=[updates], states=[factor])
        return updates, NorMuonState(second_moment)

    return transformation(init_fn, update_fn)


def _joined(function: Callable[..., tuple[Array, ...]], *trees: Any) -> list[Any]:
    """`function` of arrays `(b, n)`, as many as it returns, those of one `n` joined."""
    structure = jax.tree.structure(trees[0])
    columns = [jax.tree.leaves(tree) for tree in trees]
    if not columns[0]:
        return list(trees)
    # On several devices the whole would lie in one way, and its parts would have to.
    alone = device_count(*columns[0]) > 1
    kinds: dict[Hashable, list[int]] = {}
    for place, leaf in enumerate(columns[0]):
        kinds.setdefault(place if alone else leaf.shape[1:], []).append(place)
    parts: dict[int, tuple[Array, ...]] = {}
    for places in kinds.values():
        ends = np.cumsum([columns[0][place].shape[0] for place in places])[:-1]
        whole = [jnp.concatenate([column[i] for i in places]) for column in columns]
        split = [jnp.split(result, ends) for result in function(*whole)]
        parts |= dict(zip(places, zip(*split, strict=True), strict=True))
    results = zip(*(parts[place] for place in sorted(parts)), strict=True)
    return [jax.tree.unflatten(structure, result) for result in results]


def _mean_square(stack: Array) -> Float[Array, "b out"]:
    """Each output neuron's mean square, in fp32."""
    O = stack.astype(jnp.float32)  # noqa: E741
    return jnp.mean(O * O, axis=1)
