"""Reading a file takes the parameters and one array, whatever the form."""

import tracemalloc

import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.network.embeddings import position_embedding
from fusionopt_jax.dit.weights.published import expected_shapes
from tests.dit._folders import (
    TRANSFORMER,
    transformer_arrays,
    write_bin,
    write_json,
    write_weights,
)

CONFIG = dit.DiTConfig(
    input_size=8, hidden_size=192, depth=8, num_heads=4, num_classes=10
)

OBJECTS = 600_000
"""Bytes for what does not grow with the arrays: names, shapes, tables of contents."""


@pytest.fixture(scope="module")
def arrays():
    shapes = expected_shapes(CONFIG)
    table = position_embedding(CONFIG.grid_size, CONFIG.hidden_size)[None]
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return {**zeros, "pos_embed": table}


def peak_of(read):
    """Bytes that NumPy and Python held at most, and the bytes of the parameters."""
    # Imports and the first use of a library are not what a file takes.
    read()
    tracemalloc.start()
    try:
        params, config = read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = 4 * sum(np.prod(shape) for shape in expected_shapes(config).values())
    del params
    return peak, size


@pytest.mark.parametrize("form", ["safetensors", "pt", "npz"])
def test_published(arrays, tmp_path, form):
    path = tmp_path / f"weights.{form}"
    if form == "npz":
        np.savez(path, **arrays)
    elif form == "pt":
        write_bin(path, arrays)
    else:
        write_weights(tmp_path, arrays)
        (tmp_path / "diffusion_pytorch_model.safetensors").rename(path)
    peak, size = peak_of(lambda: dit.from_pytorch(path, num_heads=4))
    largest = max(array.nbytes for array in arrays.values())
    # Its bytes, the same as an array, and which of the values are finite.
    assert peak < size + 3 * largest + OBJECTS
    assert size + 3 * largest + OBJECTS < 1.5 * path.stat().st_size


def test_diffusers(tmp_path):
    about = {
        **TRANSFORMER,
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "num_layers": 8,
    }
    arrays = transformer_arrays(about)
    write_weights(tmp_path, arrays, "sharded")
    write_json(tmp_path / "config.json", about)
    peak, size = peak_of(lambda: dit.from_diffusers(tmp_path))
    largest = max(array.nbytes for array in arrays.values())
    # Beside these, the first block's copy of the embedders, for comparing the others.
    embedders = sum(a.nbytes for name, a in arrays.items() if ".0.norm1.emb" in name)
    assert peak < size + 3 * largest + embedders + OBJECTS
