"""What a person says of leaves: rules, and which axes of a leaf make its matrices."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from fusionopt_jax._checks import (
    check_choice,
    check_integer,
    check_positive,
    is_concrete_number,
)

Axes: TypeAlias = int | Sequence[int]

SPECTRAL = "spectral"
SCALAR = "scalar"


@runtime_checkable
class DimensionNumbers(Protocol):
    """What `optax.contrib.MuonDimensionNumbers` offers."""

    @property
    def reduction_axis(self) -> Any:
        """The input axis or axes."""
        ...

    @property
    def output_axis(self) -> Any:
        """The output axis or axes."""
        ...


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """Which axes of a leaf make its matrices, and how a fused one is split.

    Axes in neither place count matrices. Where a leaf lies under a `stacked` prefix,
    its leading axis is left out of the counting.

    Args:
        reduction_axis: The input axis or axes, which a matrix sums over; `None` takes
            the layout's (the second to last of `"in_out"`, the last of `"out_in"`).
        output_axis: The output axis or axes; `None` takes the layout's other one.
        chunks: How many equal weights are fused into one: 3 for qkv, 6 for adaLN, 2 for
            gate/up. Or the size of each, such as `(1024, 256, 256)` for the queries,
            keys and values of a grouped-query attention; they must add up to the side.
            Each chunk is a matrix of its own.
        chunk_axis: The side they are fused along: `"output"`, or `"input"`, as for the
            output projection of an attention split by heads.
        block: In place of `chunks`, the size of each of the equal weights, such as the
            width of a head.

    Raises:
        ValueError: If `chunks` or `block` is below 1, both are given, or only one of
            the two axes is.

    Example:
        >>> MatrixAxes(chunks=3)
        MatrixAxes(chunks=3)
        >>> grouped = MatrixAxes(chunks=(1024, 256, 256))
        >>> conv = MatrixAxes(reduction_axis=(0, 1, 2), output_axis=3)
    """

    reduction_axis: Axes | None = None
    output_axis: Axes | None = None
    chunks: int | Sequence[int] = 1
    chunk_axis: Literal["input", "output"] = "output"
    block: int | None = None

    def __post_init__(self) -> None:
        self._check_chunks()
        check_choice("chunk_axis", self.chunk_axis, ("input", "output"))
        if (self.reduction_axis is None) != (self.output_axis is None):
            raise ValueError(
                "`reduction_axis` and `output_axis` go together: give both, or neither "
                "to take the routing's layout."
            )
        # Lists would make the routing unhashable.
        for name in ("reduction_axis", "output_axis"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                object.__setattr__(self, name, tuple(value))

    def _check_chunks(self) -> None:
        """Require sizes or counts of at least 1, given once."""
        if isinstance(self.chunks, int):
            check_integer("chunks", self.chunks, low=1)
        elif not isinstance(self.chunks, Sequence) or not self.chunks:
            raise ValueError(
                "`chunks` must be a number of equal matrices or a sequence with the "
                f"size of each, such as (1024, 256, 256); got {self.chunks!r}."
            )
        else:
            for size in self.chunks:
                check_integer("chunks", size, low=1)
            object.__setattr__(self, "chunks", tuple(self.chunks))
        if self.block is not None:
            check_integer("block", self.block, low=1)
            if self.chunks != 1:
                raise ValueError(
                    f"`chunks`={self.chunks} and `block`={self.block} were both given; "
                    "give the number of matrices, the size of each, or `block`, the "
                    "size of all."
                )

    def __repr__(self) -> str:
        return f"MatrixAxes({', '.join(_settings(self))})"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the leaves whose path a regular expression finds.

    Args:
        pattern: Searched for (`re.search`) in the slash-joined path, such as
            `"blocks/attn/qkv/kernel"`; anchor it with `^` and `$` where needed.
        label: `"spectral"`, `"scalar"`, the name of a group of your own, or `None` to
            let the size of the matrices decide.
        axes: A `MatrixAxes`, or an `optax.contrib.MuonDimensionNumbers`.
        chunks: Short for `MatrixAxes(chunks=...)`; overrides the one in `axes`.
        scale: Factor on the learning rate of the leaves it finds, a positive number;
            `Routing.scales` gives it to whoever applies the rate.

    Raises:
        ValueError: If the pattern is no regular expression, or `scale` is not positive.
        TypeError: If `axes` is none of the two kinds, or `scale` is no plain number.

    Example:
        >>> Rule("attn/qkv/kernel", chunks=3)
        Rule('attn/qkv/kernel', axes=MatrixAxes(chunks=3))
        >>> Rule("^head/", scale=0.1)
        Rule('^head/', scale=0.1)
    """

    pattern: str
    label: str | None = None
    axes: MatrixAxes | DimensionNumbers | None = None
    chunks: dataclasses.InitVar[int | Sequence[int] | None] = None
    scale: float | int = 1.0

    def __post_init__(self, chunks: int | Sequence[int] | None) -> None:
        check_pattern("pattern", self.pattern)
        if not is_concrete_number(self.scale):
            raise TypeError(
                f"`scale` must be a plain number, got {self.scale!r} of type "
                f"{type(self.scale).__name__}; a factor that changes belongs in a "
                "schedule."
            )
        check_positive("scale", self.scale)
        axes = self.axes
        if axes is not None and not isinstance(axes, MatrixAxes):
            if not isinstance(axes, DimensionNumbers):
                raise TypeError(
                    "`axes` must be a MatrixAxes or a "
                    f"optax.contrib.MuonDimensionNumbers, got {axes!r}."
                )
            axes = MatrixAxes(axes.reduction_axis, axes.output_axis)
        if chunks is not None:
            axes = dataclasses.replace(axes or MatrixAxes(), chunks=chunks)
        object.__setattr__(self, "axes", axes)

    def __repr__(self) -> str:
        return f"Rule({', '.join([repr(self.pattern), *_settings(self, 'pattern')])})"


def attention_rules(within: str = "", *, per_head: bool = False) -> tuple[Rule, ...]:
    """Rules for the kernels that Flax's attention modules keep split by heads.

    `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention` keep `query`,
    `key` and `value` as `(features, heads, head_dim)` and `out` as
    `(heads, head_dim, features)`: arrays of rank 3, which are Adam's where no rule
    explains them.

    Args:
        within: Regular expression for the start of the paths that are meant, where
            other layers are called `out` or `query` too: `"^decoder/.*attn"`.
        per_head: Whether the part of every head is a matrix of its own, of
            `(features, head_dim)`, or the whole projection is one, of
            `(features, heads * head_dim)`. Heads are matrices whatever their size;
            whole projections if they are large enough for the routing.

    Returns:
        Two rules, for `Routing(rules=...)`. Axes are counted without the layers' under
        `stacked` prefixes.

    Raises:
        ValueError: If `within` is no regular expression.

    Example:
        >>> import jax.numpy as jnp, fusionopt_jax as fo
        >>> params = {
        ...     "attn": {
        ...         "query": {"kernel": jnp.ones((128, 4, 32))},
        ...         "out": {"kernel": jnp.ones((4, 32, 128))},
        ...     }
        ... }
        >>> routing = fo.Routing(fo.attention_rules())
        >>> [route.description for route in routing.routes(params)]
        ['spectral 1x(128, 128)', 'spectral 1x(128, 128)']
        >>> routing = fo.Routing(fo.attention_rules(per_head=True))
        >>> [route.description for route in routing.routes(params)]
        ['spectral 4x(32, 128)', 'spectral 4x(128, 32)']
    """
    check_pattern("within", within)
    prefix = f"{within}.*/" if within else "(^|/)"
    label = SPECTRAL if per_head else None
    inwards = MatrixAxes(reduction_axis=0, output_axis=2 if per_head else (1, 2))
    outwards = MatrixAxes(reduction_axis=1 if per_head else (0, 1), output_axis=2)
    return (
        Rule(f"{prefix}(query|key|value)/kernel$", label, inwards),
        Rule(f"{prefix}out/kernel$", label, outwards),
    )


def _settings(made: Any, *without: str) -> list[str]:
    """The settings of a dataclass that are not its defaults, as a call spells them."""
    return [
        f"{field.name}={getattr(made, field.name)!r}"
        for field in dataclasses.fields(made)
        if field.name not in without and getattr(made, field.name) != field.default
    ]


def check_pattern(argument: str, pattern: str) -> None:
    """Require a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`{argument}` {pattern!r} is no regular expression: {error}."
        ) from error
