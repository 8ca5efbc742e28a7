"""The names that tables of embeddings usually have.

Each of their rows is trained by the few examples that use it, so that the gradient of
one step says nothing of most rows, and an orthogonalised update moves them all alike.
The table of output vectors is treated the same, as Muon's authors do.
"""

import re

TABLES = (
    "emb",
    "embed",
    "embedding",
    "embeddings",
    "embeds",
    "wte",
    "wpe",
    "table",
    "codebook",
    "token",
    "tokens",
    "pos_enc",
    "pos_encoding",
    "position_encoding",
    "positional_encoding",
    "rel_bias",
    "rel_pos",
    "rel_pos_bias",
    "relative_attention_bias",
    "relative_position_bias",
)
"""Leaves that are tables themselves, or the `weight` of a layer of that name."""

HEADS = (
    "lm_head",
    "unembed",
    "unembedding",
    "embed_out",
    "output_embedding",
    "output_embeddings",
    "logits_dense",
)
"""Layers whose `kernel` or `weight` is the table of output vectors."""


def is_embedding_like(name: str) -> bool:
    """Whether the path of a leaf is that of a table of embeddings.

    A name counts in full or after an underscore, in any case: `token_emb` is one,
    `x_embedder` none. The kernel of a projection that is called `embedding` is none.
    """
    *above, last = name.lower().split("/")
    layer = above[-1] if above else ""
    if last == "weight":
        return _is_one_of(TABLES + HEADS, layer)
    if last == "kernel":
        return _is_one_of(HEADS, layer)
    return _is_one_of(TABLES + HEADS, last)


def _is_one_of(names: tuple[str, ...], word: str) -> bool:
    return re.search(rf"(^|_)({'|'.join(names)})$", word) is not None
