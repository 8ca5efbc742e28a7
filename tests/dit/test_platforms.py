"""The model and its samplers are one program, whatever it is compiled for."""

import jax
import jax.numpy as jnp
import pytest

from fusionopt_jax import dit
from tests import _stablehlo

CONFIG = dit.DiTConfig(
    input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=10
)
SAMPLER = dit.Sampler.euler(2)


def forward(params, images, labels):
    times = jnp.full(2, 0.5)
    return dit.apply(params, CONFIG, images, times, labels, dtype=jnp.bfloat16)


def sampled(params, noise, labels):
    return dit.sample(
        params, CONFIG, None, noise, labels, SAMPLER, 1.0, dtype=jnp.bfloat16
    )


@pytest.mark.parametrize("function", [forward, sampled])
def test_every_platform_has_the_same_program(function):
    params = jax.eval_shape(lambda: dit.init_params(CONFIG))
    images = jax.ShapeDtypeStruct((2, 4, 4, 4), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    cpu, cuda, tpu = (
        _stablehlo.program(function, params, images, labels, platform=platform)
        for platform in ("cpu", "cuda", "tpu")
    )
    assert cpu == cuda == tpu
    # No kernel of a library and no call of the host.
    assert _stablehlo.custom_calls(cuda) == []
    # The large ones are in the dtype that was asked for, times and labels in fp32.
    width = CONFIG.hidden_size
    kernels = {
        right.shape[-2:]: (left.dtype, right.dtype)
        for left, right, _ in _stablehlo.products(cuda)
    }
    assert kernels[width, 3 * width] == kernels[width, 4 * width] == ("bf16", "bf16")
    assert kernels[width, 6 * width] == ("f32", "f32")
