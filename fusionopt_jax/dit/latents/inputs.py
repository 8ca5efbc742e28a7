"""What `decode` and `encode` require of their arguments."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from fusionopt_jax import _checks


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Require float32 or bfloat16.

    Args:
        dtype: Of the operands of convolutions.

    Returns:
        The dtype in the form that compares equal to itself.

    Raises:
        ValueError: If it is another one.

    Example:
        >>> check_dtype(jnp.bfloat16)
        dtype(bfloat16)
    """
    found = jnp.dtype(dtype)
    if found not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"`dtype` must be float32 or bfloat16, got {found}. The residual stream of "
            "the published autoencoders leaves the range of float16."
        )
    return found


def check_images(name: str, images: Array | np.ndarray, channels: int) -> Array:
    """Require a batch of images with channels last.

    Args:
        name: Of the argument, for the errors.
        images: [batch, height, width, channels].
        channels: How many channels it must have.

    Returns:
        The images as an array of JAX.

    Raises:
        ValueError: If the axes or the number of channels are others.
        TypeError: If they are no floating-point numbers.

    Example:
        >>> check_images("images", np.ones((2, 8, 8, 3), np.float32), 3).shape
        (2, 8, 8, 3)
    """
    images = jnp.asarray(images)
    text = _checks.shape_text(images)
    if images.ndim != 4 or images.shape[3] != channels:
        remedy = "; they do not belong to this autoencoder."
        if images.ndim == 3:
            remedy = "; a single one needs a batch axis: image[None]."
        elif images.ndim == 4 and images.shape[1] == channels:
            remedy = ": channels come last here; transpose them by (0, 2, 3, 1)."
        elif images.ndim == 4 and (channels, images.shape[3]) == (3, 1):
            remedy = "; repeat the one channel of grey images three times."
        raise ValueError(
            f"`{name}` must have shape [batch, height, width, {channels}], got "
            f"{text}{remedy}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be floating-point numbers, got {text}; bytes 0 to 255 are "
            "pixels / 127.5 - 1."
        )
    if 0 in images.shape:
        raise ValueError(f"`{name}` must not be empty, got {text}.")
    return images
