"""Sums over all leaves of a tree, in fp32."""

from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fusionopt_jax._leaves import widened
from fusionopt_jax._types import Array, Scalar

# How many entries a leaf may have whose copy costs less than a program for it alone.
_SMALL = 2**14


def l2_norm(tree: Any) -> Scalar:
    r"""The Euclidean norm of all entries, :math:`\sqrt{\sum x^2}`.

    Where the sum of squares leaves the range of fp32, which entries above 1e19 or below
    1e-19 do to it, it is taken again of entries divided by the largest.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros([], jnp.float32)
    leaves = _with_small_ones_joined(leaves)
    squares = total(jnp.sum(_squares(widened(x))) for x in leaves)

    def scaled() -> Scalar:
        # Nothing of the size of a leaf is used twice, or shared by two leaves: it would
        # be stored.
        sizes = [jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in leaves]
        largest = _unit(jnp.max(jnp.stack(sizes)), 1.0)
        units = [_unit(size, largest) for size in sizes]
        squares = total(
            jnp.square(unit / largest) * jnp.sum(_squares(widened(x) / unit))
            for x, unit in zip(leaves, units, strict=True)
        )
        return largest * jnp.sqrt(squares)

    # A second look at the whole tree, for which few steps have a reason.
    in_range = (squares > jnp.finfo(jnp.float32).tiny) & jnp.isfinite(squares)
    return jax.lax.cond(in_range, lambda: jnp.sqrt(squares), scaled)


def l1_norm(tree: Any) -> Scalar:
    r"""The sum of all absolute entries, :math:`\sum |x|`."""
    return total(jnp.sum(_sizes(x)) for x in jax.tree.leaves(tree))


def inner_product(a: Any, b: Any) -> Scalar:
    r"""The sum of the products of entries, :math:`\operatorname{Re} \sum \bar a b`."""

    def product(x: Array, y: Array) -> Scalar:
        return jnp.sum(jnp.real(jnp.conj(widened(x)) * widened(y)))

    products = jax.tree.map(product, a, b)
    return total(jax.tree.leaves(products))


def entries(tree: Any) -> int:
    """How many entries a tree has."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def total(terms: Iterable[Array]) -> Scalar:
    """The sum of some scalars, 0 if there are none."""
    return sum(terms, start=jnp.zeros([], jnp.float32))


def _with_small_ones_joined(leaves: list[Any]) -> list[Any]:
    """Leaves of which the small ones of one kind are one: a sum is many operations."""
    kinds: dict[Hashable, list[Any]] = {}
    for place, leaf in enumerate(leaves):
        # On a mesh the whole would lie in one way, and its parts would have to.
        alone = leaf.size > _SMALL or jax.typeof(leaf).sharding.mesh.size > 1
        kinds.setdefault(place if alone else (leaf.shape, leaf.dtype), []).append(leaf)
    return [jnp.stack(kind) if len(kind) > 1 else kind[0] for kind in kinds.values()]


def _unit(size: Scalar, other: Scalar | float) -> Scalar:
    """A size to divide by, or another where it can't be divided by."""
    return jnp.where((size > 0) & jnp.isfinite(size), size, other)


def _squares(leaf: Array) -> Array:
    """The squared absolute values of the entries."""
    if jnp.iscomplexobj(leaf):
        return jnp.square(leaf.real) + jnp.square(leaf.imag)
    return jnp.square(leaf)


def _sizes(leaf: Array) -> Array:
    """The absolute values of the entries."""
    return jnp.abs(widened(leaf))
