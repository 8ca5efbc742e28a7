"""Classifier-free guidance of two predictions, and as one call of the network."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.model import apply


def guide(
    conditional: Float[Array, "batch height width outputs"],
    unconditional: Float[Array, "batch height width outputs"],
    cfg_scale: float | Float[Array, "..."],
    channels: int,
) -> Float[Array, "batch height width outputs"]:
    """Classifier-free guidance of the first channels; the others stay conditional.

    Args:
        conditional: Prediction given the label.
        unconditional: Prediction given the null label.
        cfg_scale: Scalar, or one scale per image.
        channels: How many channels are guided.

    Returns:
        The guided prediction; variance logits are those of the label.

    Example:
        >>> ones = jnp.ones((1, 1, 1, 2))
        >>> guide(ones, 0 * ones, 4.0, channels=1)[0, 0, 0].tolist()
        [4.0, 1.0]
    """
    scale = jnp.asarray(cfg_scale, conditional.dtype).reshape(-1, 1, 1, 1)
    base = unconditional[..., :channels]
    guided = base + scale * (conditional[..., :channels] - base)
    return jnp.concatenate([guided, conditional[..., channels:]], axis=-1)


def apply_with_guidance(
    params: Params,
    config: DiTConfig,
    images: Any,
    times: Any,
    labels: Any,
    scale: Any,
    *,
    channels: int | None = None,
    **options: Any,
) -> Float[Array, "b h w c_out"]:
    r"""Evaluate the network with and without the labels, and push the two apart.

    The first `channels` channels become
    :math:`f(\emptyset) + s\,(f(y) - f(\emptyset))`, with s in `scale` and y in
    `labels`; the others are those of f(y).

    Args:
        params: Full parameters.
        config: The sizes; static under `jax.jit`. It must have a null label.
        images: `[batch, input_size, input_size, in_channels]`.
        times: `[batch]` model times.
        labels: `[batch]` integers.
        scale: Guidance scale; 1 is no guidance.
        channels: How many channels are guided. None guides every channel of the image
            and leaves the variance; 3 is what the published model does, unintended by
            its author but behind its published figures.
        options: Handed to :func:`~fusionopt_jax.dit.apply`.

    Returns:
        `[batch, input_size, input_size, config.out_channels]`.

    Raises:
        ValueError: If the model has no null label, or as `apply` does.

    Example:
        >>> from fusionopt_jax.dit import init_params
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params, images = init_params(config), jnp.ones((1, 8, 8, 4))
        >>> time, label = jnp.array([9.0]), jnp.array([3])
        >>> apply_with_guidance(params, config, images, time, label, 4.0).shape
        (1, 8, 8, 8)

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598),
    equation 6 with s = 1 + w.
    """
    images, times, labels = (jnp.asarray(part) for part in (images, times, labels))
    null = jnp.full_like(labels, config.null_label)
    both = apply(
        params,
        config,
        jnp.concatenate([images, images]),
        jnp.concatenate([times, times]),
        jnp.concatenate([labels, null]),
        **options,
    )
    conditional, unconditional = jnp.split(both, 2)
    guided = config.in_channels if channels is None else channels
    return guide(conditional, unconditional, jnp.asarray(scale), guided)
