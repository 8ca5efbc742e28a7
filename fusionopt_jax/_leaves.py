"""Which leaves a transformation can work on, and the state that belongs to them.

Every transformation takes trees of floating-point arrays. Whatever else is in a tree
(counters, random keys, functions and strings of a module) is refused by its path, in
`init` and in `update`. Complex leaves are served where each entry is treated by
itself; `init` also takes `jax.ShapeDtypeStruct` leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fusionopt_jax._checks import shape_text
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Array

_ARRAYS_ALONE = (
    "Hand over arrays alone: `eqx.filter(model, eqx.is_inexact_array)` of an Equinox "
    "model, `nnx.state(model, nnx.Param)` of an NNX module."
)


def check_arrays(component: str, tree: Any) -> None:
    """Require that every leaf has a shape and a dtype.

    Raises:
        ValueError: With the path of the first other leaf, and the remedy.
    """
    for name, leaf in named_leaves(tree):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            number = isinstance(leaf, bool | int | float | complex)
            remedy = "Make it an array with `jnp.asarray`, or filter it out." * number
            raise ValueError(
                f"`{component}`: leaf {name!r} is no array but {leaf!r} of type "
                f"{type(leaf).__name__}. {remedy or _ARRAYS_ALONE}"
            )


def check_leaves(component: str, tree: Any, *, complex_too: bool = False) -> None:
    """Require floating-point arrays of at least 16 bits.

    Args:
        component: Who asks, for the errors.
        tree: Parameters or gradients; holes and `None` are no leaves.
        complex_too: Whether complex arrays are served as well.

    Raises:
        ValueError: With the path of the first other leaf, and the remedy.
    """
    check_arrays(component, tree)
    for name, leaf in named_leaves(tree):
        if problem := _problem(leaf, complex_too):
            raise ValueError(
                f"`{component}` can't handle leaf {name!r} of {shape_text(leaf)}: "
                f"{problem}"
            )


def _problem(leaf: Any, complex_too: bool) -> str | None:
    """Why an array can't be trained and what to do, or `None` if it can."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return (
            "only floating-point arrays can be trained. Leave it out of the tree. "
            f"{_ARRAYS_ALONE}"
        )
    if is_complex(leaf) and not complex_too:
        return (
            "it works on real arrays. Send the leaf to another group with "
            "optax.multi_transform, or keep its real and imaginary parts as two leaves "
            "(optax.contrib.split_real_and_imaginary does it for one transformation)."
        )
    if jnp.finfo(leaf.dtype).bits < 16:
        return (
            "an update is lost in so few bits. Keep the parameter in bf16 or fp32, and "
            "cast it where it is used."
        )
    return None


def is_complex(leaf: Any) -> bool:
    """Whether an array's entries are complex."""
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def wide_dtype(leaf: Any, dtype: Any = jnp.float32) -> Any:
    """What an average of a leaf is kept in: `dtype`, or complex of at least its width.

    fp32 whatever the leaf's own width, but complex64 where that is complex.
    """
    return jnp.promote_types(dtype, jnp.complex64) if is_complex(leaf) else dtype


def widened(leaf: Array) -> Array:
    """A leaf in fp32, or in complex64 if it is complex."""
    return leaf.astype(wide_dtype(leaf))


def wide_zeros(tree: Any) -> Any:
    """Zeros shaped like a tree, in fp32 or complex64, laid out like its leaves."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=wide_dtype(leaf)), tree)


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf is a shape without numbers."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def copied(leaf: Any, dtype: Any) -> Any:
    """A copy of a leaf in another dtype; of a shape without numbers, such a shape.

    A copy even in the same dtype, because the caller may donate the leaf and the state
    together, and one buffer can't be donated twice.
    """
    if is_abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return jnp.array(leaf, dtype=dtype, copy=True)
