"""The comparison with PyTorch, as far as no PyTorch is needed."""

import numpy as np
import pytest

from fusionopt_jax import dit
from tests.dit._models import CONFIG, random_params


@pytest.fixture(scope="module")
def script(benchmark_script):
    return benchmark_script("dit_train_step")


@pytest.mark.parametrize(
    ("preset", "published"), [("DiT-S/2", 6.06), ("DiT-B/4", 5.56), ("DiT-XL/2", 118.6)]
)
def test_operations_are_the_published_ones(script, preset, published):
    """Peebles and Xie, table 4, count a multiplication and its addition as one."""
    found = script.operations(dit.CONFIGS[preset]) / 2e9
    assert found == pytest.approx(published, rel=2e-3)


def test_other_numbers_are_an_error(script):
    params = random_params(CONFIG)
    gradients = dit.to_pytorch(params, CONFIG)
    script.require_same("same", (1.0, params), (1.0, gradients), CONFIG)
    with pytest.raises(AssertionError, match="the losses are"):
        script.require_same("other", (1.001, params), (1.0, gradients), CONFIG)
    name = "y_embedder.embedding_table.weight"
    gradients[name] = gradients[name] + np.float32(0.01)
    with pytest.raises(AssertionError, match="gradients of y_embedder"):
        script.require_same("other", (1.0, params), (1.0, gradients), CONFIG)
