"""Decode a large image tile by tile, and blend the tiles.

Along each axis the tiles start at even distances, and neighbours share at least
`overlap` latents. A tile's weight falls linearly to its edges where it overlaps another
one; the weights of all tiles sum to one at every pixel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusionopt_jax import _checks


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin.

    Args:
        size: Length of the axis, at least `tile`.
        tile: Length of a tile.
        overlap: Smallest overlap of neighbours, less than `tile`.

    Returns:
        Ascending starts, from 0 to `size - tile`.

    Example:
        >>> tile_starts(20, 8, 2)
        [0, 6, 12]
        >>> tile_starts(21, 8, 2)
        [0, 4, 8, 13]
    """
    count = -(-(size - overlap) // (tile - overlap))
    if count == 1:
        return [0]
    # In integers, so that no rounding makes an overlap smaller than asked for.
    return [place * (size - tile) // (count - 1) for place in range(count)]


def blend_weights(starts: list[int], tile: int) -> Float[np.ndarray, "tiles tile"]:
    """What each pixel of each tile counts along one axis, in fp32.

    Args:
        starts: First pixel of each tile.
        tile: Its length in pixels.

    Returns:
        Weights that sum to one over the tiles of each pixel.

    Example:
        >>> blend_weights([0, 2], 4)
        array([[1.  , 1.  , 0.75, 0.25],
               [0.25, 0.75, 1.  , 1.  ]], dtype=float32)
    """
    weights = np.ones((len(starts), tile))
    for place in range(1, len(starts)):
        width = starts[place - 1] + tile - starts[place]
        ramp = (np.arange(width) + 0.5) / width
        weights[place, :width] *= ramp
        weights[place - 1, tile - width :] *= ramp[::-1]
    # Where more than two tiles overlap, their ramps do not sum to one by themselves.
    total = np.zeros(starts[-1] + tile)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    for start, row in zip(starts, weights, strict=True):
        row /= total[start : start + tile]
    return weights.astype(np.float32)


def check_tiles(latents: Array, tile: int, overlap: int | None) -> int:
    """Require tiles that fit into the latents; returns the overlap.

    Args:
        latents: [batch, height, width, channels].
        tile: Side of a tile in latents.
        overlap: Smallest overlap, or None for a quarter of a tile.

    Returns:
        The overlap in latents.

    Raises:
        ValueError: If a side is shorter than a tile, or an overlap leaves no tile.

    Example:
        >>> check_tiles(jnp.zeros((1, 32, 32, 4)), 16, None)
        4
    """
    _checks.check_integer("tile", tile, low=1)
    if min(latents.shape[1:3]) < tile:
        raise ValueError(
            f"`tile` is {tile}, but `latents` are {_checks.shape_text(latents)}: give "
            "a smaller tile, or tile=None, which decodes them whole."
        )
    if overlap is None:
        return tile // 4
    _checks.check_integer("overlap", overlap, low=0)
    if overlap >= tile:
        raise ValueError(
            f"`overlap` must be less than `tile`, got overlap={overlap} for "
            f"tile={tile}."
        )
    return overlap


def in_tiles(
    decode: Callable[[Float[Array, "b t t c"]], Float[Array, "b s s d"]],
    latents: Float[Array, "b h w c"],
    factor: int,
    tile: int,
    overlap: int,
) -> Float[Array, "b _h _w d"]:
    """Decode one tile after the other and add them up.

    All tiles run through one program in a loop, so that its memory is that of a tile
    and of the image.

    Args:
        decode: From a tile of latents to its pixels.
        latents: At least a tile high and wide.
        factor: Pixels a side of one latent.
        tile: Side of a tile in latents.
        overlap: Smallest overlap of neighbours in latents.

    Returns:
        The image, [b, h * factor, w * factor, d].

    Example:
        >>> in_tiles(lambda tile: tile, jnp.ones((1, 5, 5, 3)), 1, 4, 1).shape
        (1, 5, 5, 3)
    """
    batch, height, width, channels = latents.shape
    row_starts = tile_starts(height, tile, overlap)
    column_starts = tile_starts(width, tile, overlap)
    side = tile * factor
    # One entry per tile: its corner, and the weights of its rows and columns.
    rows, columns = np.divmod(
        np.arange(len(row_starts) * len(column_starts)), len(column_starts)
    )
    corners = np.stack(
        [np.array(row_starts)[rows], np.array(column_starts)[columns]], axis=1
    )
    row_weights = blend_weights([factor * start for start in row_starts], side)[rows]
    column_weights = blend_weights([factor * start for start in column_starts], side)
    column_weights = column_weights[columns]

    def add_tile(image: Array, place: tuple[Array, Array, Array]) -> tuple[Array, None]:
        """Decode a tile and add it, weighted, where it lies."""
        corner, row_weight, column_weight = place
        piece = jax.lax.dynamic_slice(
            latents, (0, corner[0], corner[1], 0), (batch, tile, tile, channels)
        )
        added = decode(piece) * row_weight[None, :, None, None]
        added = added * column_weight[None, None, :, None]
        at = (0, factor * corner[0], factor * corner[1], 0)
        before = jax.lax.dynamic_slice(image, at, added.shape)
        return jax.lax.dynamic_update_slice(image, before + added, at), None

    out = jax.eval_shape(
        decode,
        jax.ShapeDtypeStruct((batch, tile, tile, channels), latents.dtype),
    )
    # Zeros that lie on the devices as the batch does: made of it, since `zeros_like` of
    # an array on an explicit mesh lies anywhere in newer versions of JAX.
    zeros = 0 * jnp.isnan(latents[:, :1, :1, :1]).astype(out.dtype)
    image = jnp.broadcast_to(
        zeros,
        (batch, height * factor, width * factor, out.shape[-1]),
    )
    places = jax.tree.map(jnp.asarray, (corners, row_weights, column_weights))
    return jax.lax.scan(add_tile, image, places)[0]
