"""A tree of the user's own: arrays, random keys, and plain values of Python.

Arrays and the words of keys are an ordinary item of Orbax, numbered in the order of the
leaves. Plain values stand in the record as they are, so that an integer of 128 bits, as
NumPy's generators have, or a string is the same afterwards.
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import PyTree

ITEM = "extra"
"""The name under which Orbax keeps the arrays."""

_PLAIN = {kind.__name__: kind for kind in (bool, int, float, str, bytes)}


class Plain(NamedTuple):
    """A value that is no array.

    Attributes:
        kind: The name of its type.
        text: What the record holds of it.
    """

    kind: str
    text: str

    @property
    def value(self) -> Any:
        """The value itself."""
        read = json.loads(self.text)
        return bytes.fromhex(read) if self.kind == "bytes" else _PLAIN[self.kind](read)


def leaves_of(tree: PyTree[Any]) -> list[tuple[str, Any]]:
    """The name of each leaf, and the leaf as an array, a key or a `Plain`."""
    named = [(name, _leaf(name, leaf)) for name, leaf in named_leaves(tree)]
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`extra` has two leaves of the name {twice[0]!r}; rename a key."
        )
    return named


def arrays_of(leaves: list[tuple[str, Any]]) -> dict[str, Any]:
    """What Orbax keeps: every array, and of a key its words, by its place."""
    return {
        str(place): jax.random.key_data(leaf) if is_key(leaf) else leaf
        for place, (_, leaf) in enumerate(leaves)
        if not isinstance(leaf, Plain)
    }


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds random keys, which neither NumPy nor a file can."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def words_of(key: Any) -> jax.ShapeDtypeStruct:
    """Dtype, shape and sharding of the words of a key, or of one's shape."""
    words = jax.eval_shape(
        jax.random.key_data, jax.ShapeDtypeStruct(key.shape, key.dtype)
    )
    return jax.ShapeDtypeStruct(words.shape, words.dtype)


def key_of(words: Any, like: Any) -> jax.Array:
    """The key that words make, of the kind of another key or of one's shape."""
    kinds: list[Any] = []
    jax.eval_shape(
        lambda key: kinds.append(jax.random.key_impl(key)),
        jax.ShapeDtypeStruct(like.shape, like.dtype),
    )
    return jax.random.wrap_key_data(jnp.asarray(words), impl=kinds[0])


def as_described(leaf: Any, described: str) -> Any:
    """What was read, or the key whose words it is, by what the record says of it."""
    for kind in ("threefry2x32", "rbg", "unsafe_rbg"):
        if described.startswith(f"{jax.random.key(0, impl=kind).dtype}["):
            return jax.random.wrap_key_data(jnp.asarray(leaf), impl=kind)
    return leaf


def _leaf(name: str, leaf: Any) -> Any:
    if type(leaf) in _PLAIN.values():
        held = leaf.hex() if isinstance(leaf, bytes) else leaf
        return Plain(type(leaf).__name__, json.dumps(held))
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "OSUMm":
        return np.asarray(leaf)
    raise TypeError(
        f"`extra` can't hold leaf {name!r} of type {type(leaf).__name__}: give arrays, "
        "random keys, bool, int, float, str or bytes."
    )
