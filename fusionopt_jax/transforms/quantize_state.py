r"""A wrapper that keeps momentum and averages in 8 or 16 bits between two steps.

.. math::
    (u_t, m_t) = \text{inner}\bigl(g_t, D(\hat m_{t-1})\bigr), \qquad \hat m_t = E(m_t)

The update comes from the fp32 average; only what is remembered of it is rounded.
"""

import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax import _codec
from fusionopt_jax._checks import check_choice
from fusionopt_jax._leaves import check_leaves
from fusionopt_jax._matrices.placement import automatic, divided_blocks, placed_blocks
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._states import is_named_tuple
from fusionopt_jax._types import Array, Count, Float, Int, Params

StateDtype: TypeAlias = Literal["bf16", "int8"]

# Or Optax would find two values of one name in the state.
SCALES = "_scales"

_DTYPES: tuple[StateDtype, ...] = ("bf16", "int8")


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
        count: Updates so far, from which the stochastic rounding is drawn.
        scales: For each field in 8 bits, under its name and `_scales`, a tree of fp32
            scales: the parameters' own, with an entry for each block along the last
            axis.
        inner_state: State of the wrapped transformation, its fields in few bits.
    """

    count: Count
    scales: dict[str, Params]
    inner_state: Any


def quantize_state(
    inner: TransformLike, fields: Mapping[str, StateDtype]
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps fields of a transformation's state in 8 or 16 bits between two steps.

    Each update reads the fields in fp32, and rounds what the wrapped transformation
    makes of them:

    `"bf16"`: 2 bytes a parameter, with stochastic rounding: to one of the two
    neighbours :math:`a \le m \le b`, to :math:`b` with the chance
    :math:`(m - a) / (b - a)`. So an average is right in the mean however slowly it
    moves, where rounding to the nearest would hold it still. The chance depends on the
    step, the leaf's path and the entry's position, and on nothing else.

    `"int8"`: 1 byte a parameter and 4 for each block of numbers along the last axis,
    which is halved while that can be done and its parts are longer than 128: 1.03 to
    1.06 bytes where it has a factor of two to spare. With :math:`s = \max_\text{block}
    |m|` an entry is stored as

    .. math::
        c = \operatorname{round}\bigl(127 \operatorname{sign}(m) \sqrt{|m|/s}\bigr),
        \qquad \hat m = s\,c\,|c| / 127^2,

    off by at most :math:`s/127`; the first step from zero is :math:`s/16129`. It suits
    a momentum, into which every gradient goes whole. A slow average needs `"bf16"`:
    nothing moves it by less than half a step of the code.

    Zeros stay zeros. An entry that is not finite stays so, in 8 bits with its block.

    Args:
        inner: A transformation whose state is a NamedTuple: `optax.trace`, `mona`,
            `optax.scale_by_adam`; not a chain of some, but each of them in the chain.
        fields: Which fields of that state, trees of real numbers, and in what.

    Returns:
        A transformation with the updates of `inner`. On a mesh the codes lie as the
        parameters do, and so do the scales where the devices divide the blocks.

    Raises:
        ValueError: If `fields` is empty or names no dtype of these; from its `init`, if
            the state has no such field, or a leaf of it is no real array.
        TypeError: If `fields` is no mapping; from its `init`, if the state of `inner`
            is no NamedTuple.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = optax.chain(
        ...     fo.quantize_state(optax.trace(0.8), {"trace": "int8"}), fo.ns5()
        ... )
        >>> params = {"w": jnp.ones((256, 256))}
        >>> _, state = tx.update(params, tx.init(params))
        >>> state[0].inner_state.trace["w"].dtype
        dtype('int8')
        >>> state[0].scales["trace_scales"]["w"].shape
        (256, 2)

    Source:
        Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv
        2110.02861 (scales of blocks; their code of 8 bits is a table, whose steps are
        finer at zero and coarser elsewhere). Gupta et al., *Deep Learning with Limited
        Numerical Precision*, arXiv 1502.02551 (stochastic rounding).
    """
    if not isinstance(fields, Mapping):
        raise TypeError(
            "`fields` must map names of fields to dtypes, such as "
            f"{{'trace': 'int8'}}, got {fields!r}."
        )
    wanted = dict(fields)
    if not wanted:
        raise ValueError("`fields` is empty: name the fields of the state to shorten.")
    for name, dtype in wanted.items():
        check_choice(f"fields[{name!r}]", dtype, _DTYPES)
    inner_tx = accepting_extra_args(inner)

    def encoded(count: Count, state: Any) -> QuantizedState:
        """A state of `inner` in few bits."""
        scales: dict[str, Params] = {}
        narrow: dict[str, Params] = {}
        for name, dtype in wanted.items():
            tree = getattr(state, name)
            structure = jax.tree.structure(tree)
            if dtype == "bf16":
                leaves = [
                    _rounded(leaf, count, f"{name}/{path}")
                    for path, leaf in named_leaves(tree)
                ]
            else:
                pairs = [blocks_of(leaf) for leaf in jax.tree.leaves(tree)]
                leaves = [codes for codes, _ in pairs]
                scales[name + SCALES] = structure.unflatten(
                    [scale for _, scale in pairs]
                )
            narrow[name] = structure.unflatten(leaves)
        return QuantizedState(count, scales, state._replace(**narrow))

    def decoded(state: QuantizedState) -> Any:
        """The state of `inner` in fp32."""
        wide: dict[str, Params] = {}
        for name, dtype in wanted.items():
            tree = getattr(state.inner_state, name)
            if dtype == "bf16":
                wide[name] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
            else:
                wide[name] = jax.tree.map(numbers_of, tree, state.scales[name + SCALES])
        return state.inner_state._replace(**wide)

    def init_fn(params: Params) -> QuantizedState:
        inner_state = inner_tx.init(params)
        _check_fields(inner_state, wanted)
        state = encoded(jnp.zeros([], jnp.int32), inner_state)
        lying = {
            name: _lying_like(scales, params) for name, scales in state.scales.items()
        }
        return state._replace(scales=lying)

    def update_fn(
        updates: Any,
        state: QuantizedState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, QuantizedState]:
        check_leaves("quantize_state", updates)
        results, inner_state = inner_tx.update(
            updates, decoded(state), params, **extra_args
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        return results, encoded(count, inner_state)

    return transformation(init_fn, update_fn)


def blocks_of(
    leaf: Float[Array, "*shape"],
) -> tuple[Int[Array, "*shape"], Float[Array, "*scales"]]:
    """Codes of 8 bits that lie as the leaf does, and the scales of their blocks."""
    spec = divided_blocks(leaf, _codec.scales_shape(leaf.shape))
    return automatic(_codec.to_blocks, leaf, like=(leaf, spec))


def numbers_of(
    codes: Int[Array, "*shape"], scales: Float[Array, "*scales"]
) -> Float[Array, "*shape"]:
    """The fp32 numbers of codes and scales, which lie as the codes do."""
    return automatic(_codec.from_blocks, codes, scales, like=codes)


def _rounded(leaf: Array, count: Count, path: str) -> Array:
    """A leaf in bf16, rounded by the chance of this step."""
    salt = jnp.uint32(zlib.crc32(path.encode()))
    seed = _codec.mixed(count.astype(jnp.uint32)) ^ salt
    return automatic(_codec.stochastic_bf16, leaf, seed, like=leaf)


def _lying_like(scales: Params, params: Params) -> Params:
    """A first tree of scales, each of which lies as the blocks of its parameter do."""
    if jax.tree.structure(scales) != jax.tree.structure(params):
        return scales
    return jax.tree.map(placed_blocks, scales, params)


def _check_fields(state: Any, fields: Mapping[str, StateDtype]) -> None:
    """Require a state that has these fields, of real numbers."""
    kind = type(state).__name__
    if not is_named_tuple(state):
        raise TypeError(
            "`quantize_state` needs an `inner` whose state is a NamedTuple with fields "
            f"to name, got a state of type {kind}. Wrap the parts of a chain by "
            "themselves."
        )
    for name in fields:
        check_choice("fields", name, state._fields)
        check_leaves("quantize_state", getattr(state, name))
