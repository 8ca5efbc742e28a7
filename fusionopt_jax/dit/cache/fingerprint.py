"""A short integer per weight that a cache depends on, to tell other weights."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, UInt32

from fusionopt_jax._digest import array_digest
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit.network.modulation import MODULATED, MODULATOR

PARTS: tuple[tuple[str, ...], ...] = (
    ("t_embedder", "fc1", "kernel"),
    ("t_embedder", "fc1", "bias"),
    ("t_embedder", "fc2", "kernel"),
    ("t_embedder", "fc2", "bias"),
    ("y_embedder", "embedding_table"),
    *((part, MODULATOR, name) for part in MODULATED for name in ("kernel", "bias")),
)
"""Every weight that a cache depends on; the row order of a fingerprint."""

WeightDigests: TypeAlias = tuple[tuple[str, tuple[int, int]], ...]
"""Names and digests of weights, hashable."""

DIGEST = "fingerprint"
"""Name under which stripped parameters keep the digests of what was taken out."""


def fingerprint(params: Params) -> UInt32[Array | np.ndarray, "parts 2"]:
    """Digests of the weights that feed a cache, one row for each entry of `PARTS`.

    They are on the host, or traced where any of the weights is.
    """
    return stacked([_part_digest(params, path) for path in PARTS])


def weight_digests(params: Params) -> WeightDigests | None:
    """The digest of every weight by its name, stripped or not; None if one is traced.

    Example:
        >>> from fusionopt_jax.dit import DiTConfig, init_params, strip_modulators
        >>> config = DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
        >>> params = init_params(config)
        >>> digests = weight_digests(params)
        >>> digests == weight_digests(strip_modulators(params)), digests[0][0]
        (True, 't_embedder/fc1/kernel')
    """
    leaves = named_leaves(params)
    if any(isinstance(leaf, Tracer) for _, leaf in leaves):
        return None
    digests = {"/".join(path): _part_digest(params, path) for path in PARTS}
    for name, leaf in leaves:
        if name not in digests and name.split("/")[-1] != DIGEST:
            digests[name] = array_digest(leaf)
    return tuple(
        (name, (int(digest[0]), int(digest[1]))) for name, digest in digests.items()
    )


def stacked(digests: list[Any]) -> UInt32[Array | np.ndarray, "parts 2"]:
    """Digests as the rows of one array, on the host unless any of them is traced."""
    if any(isinstance(digest, Tracer) for digest in digests):
        return jnp.stack([jnp.asarray(digest) for digest in digests])
    return np.array(digests, np.uint32).reshape(-1, 2)


def _part_digest(params: Params, path: tuple[str, ...]) -> Any:
    """The digest of one weight, or the one that stripped parameters keep of it."""
    node: Any = params
    for key in path[:-1]:
        node = node[key] if isinstance(node, Mapping) and key in node else {}
    if path[-1] in node:
        return array_digest(node[path[-1]])
    if DIGEST in node:
        kept = node[DIGEST]
        kept = kept if isinstance(kept, Tracer) else np.asarray(kept)
        return kept[("kernel", "bias").index(path[-1])]
    raise ValueError(
        f"`params` have neither {'/'.join(path)} nor a fingerprint of it, so no cache "
        "can be checked against them; take modulators out with `strip_modulators`, "
        "which leaves a fingerprint behind."
    )
