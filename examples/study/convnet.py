"""A small convolutional classifier, its kernels `(height, width, in, out)`."""

from typing import Any

import jax
import jax.numpy as jnp

from fusionopt_jax import MatrixAxes, Routing, Rule

CHANNELS = (64, 128, 128, 128)
STRIDES = (1, 2, 1, 2)

ROUTING = Routing(
    rules=(
        # The sum of a convolution runs over all axes but the last.
        Rule(
            r"^layer\d/kernel$",
            axes=MatrixAxes(reduction_axis=(0, 1, 2), output_axis=3),
        ),
        Rule(r"^head$", label="scalar"),
    )
)
"""Three of the four kernels are matrices; the first has nine rows, too few for one."""


def init(key: jax.Array, classes: int) -> dict[str, Any]:
    """Fresh weights of fp32."""
    params: dict[str, Any] = {}
    before = 1
    for number, channels in enumerate(CHANNELS):
        key, own = jax.random.split(key)
        shape = (3, 3, before, channels)
        kernel = (2 / (9 * before)) ** 0.5 * jax.random.normal(own, shape)
        params[f"layer{number}"] = {"kernel": kernel, "scale": jnp.ones(channels)}
        before = channels
    head = 0.1 * before**-0.5 * jax.random.normal(key, (before, classes))
    return params | {"head": head}


def apply(params: Any, images: jax.Array) -> jax.Array:
    """Logits `[batch, classes]` of images `[batch, height, width, 1]`."""
    x = images
    for number, stride in enumerate(STRIDES):
        layer = params[f"layer{number}"]
        x = jax.lax.conv_general_dilated(
            *(x, layer["kernel"], (stride, stride), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        size = jax.lax.rsqrt(jnp.mean(x * x, (1, 2, 3), keepdims=True) + 1e-6)
        x = jax.nn.gelu(x * size * layer["scale"][None, None, None])
    return x.mean((1, 2)) @ params["head"]
