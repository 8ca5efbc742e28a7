"""What a training step keeps for its backward pass, and the products that it makes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from fusionopt_jax import dit
from tests.dit._models import random_batch

CONFIG = dit.DiTConfig(
    input_size=16, hidden_size=32, depth=6, num_heads=2, num_classes=10
)
BATCH = 4


def lowered(config, **options):
    """Loss and gradient of shapes alone."""
    batch = random_batch(config, BATCH)

    def loss(params):
        return jnp.mean(dit.apply(params, config, *batch, **options) ** 2)

    params = jax.eval_shape(lambda: dit.init_params(config))
    return jax.jit(jax.value_and_grad(loss)).lower(params)


def kept_by_a_block(**options):
    """Bytes that a further block adds to what the program needs beside its results."""

    def temporary(depth):
        config = dataclasses.replace(CONFIG, depth=depth)
        program = lowered(config, **options).compile()
        return program.memory_analysis().temp_size_in_bytes

    return (temporary(12) - temporary(6)) / 6


def test_the_loop_keeps_products_alone():
    tokens, width = CONFIG.num_tokens, CONFIG.hidden_size
    # The input; q, k and v; attention and its map; the MLP's two maps. Of the softmax
    # two numbers for each head, and of the modulation six vectors for each image.
    a_token = (1 + 3 + 1 + 1 + 1) * width + CONFIG.mlp_size + 2 * CONFIG.num_heads
    products = 4 * BATCH * (a_token * tokens + 6 * width)
    inputs = 4 * BATCH * tokens * width
    # Allocations are rounded up to 64 bytes.
    assert kept_by_a_block() == pytest.approx(products, rel=0.01)
    assert kept_by_a_block(remat=True) == pytest.approx(inputs, rel=0.01)


def test_products_of_a_step():
    """Attention alone multiplies once more in the backward pass, for its softmax."""
    maps, attention = 5, 2  # With the modulator.
    block = maps + attention + 2 * (maps + attention) + 1
    # Patches have no gradient, nor have the features of a time.
    others = 2 + 2 + 3 * 3
    text = lowered(CONFIG).as_text()
    assert text.count("stablehlo.dot_general") == block + others
    written_out = lowered(CONFIG, unroll=True).as_text()
    block -= 1
    assert written_out.count("stablehlo.dot_general") == CONFIG.depth * block + others


@pytest.mark.parametrize("options", [{}, {"unroll": True}, {"remat": True}])
def test_kernels_have_gradients_of_one_sum(options):
    """A sum over images and another over tokens would transpose what they sum."""
    text = lowered(CONFIG, **options).as_text()
    contracted = re.findall(r"contracting_dims = \[([\d, ]*)\] x", text)
    assert contracted
    assert not [axes for axes in contracted if "," in axes]


@pytest.mark.parametrize("attention", [None, "xla"])
def test_half_precision_multiplies_no_more(attention):
    """Of `jax.nn.dot_product_attention` the result is kept."""
    options = {"dtype": jnp.bfloat16, "attention": attention}
    ours = lowered(CONFIG).as_text().count("stablehlo.dot_general")
    theirs = lowered(CONFIG, **options).as_text().count("stablehlo.dot_general")
    assert theirs == ours
