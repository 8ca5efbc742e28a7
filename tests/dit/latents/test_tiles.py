"""Where tiles lie and how they are blended."""

import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax.dit.latents import tiles
from tests import _compare


@pytest.mark.parametrize("size", [8, 9, 13, 20, 31])
@pytest.mark.parametrize("overlap", [0, 2, 4, 7])
def test_tiles_cover_the_axis_and_their_weights_sum_to_one(size, overlap):
    starts = tiles.tile_starts(size, 8, overlap)
    assert starts[0] == 0
    assert starts[-1] == size - 8
    distances = np.diff(starts)
    assert (distances <= 8 - overlap).all()
    assert (distances > 0).all()
    total = np.zeros(size)
    weights = tiles.blend_weights(starts, 8)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + 8] += row
    assert (weights > 0).all()
    # Each weight is rounded to fp32.
    _compare.assert_within(total, np.ones(size), 1e-6)


def test_what_looks_at_no_neighbour_is_exact(rng):
    latents = jnp.asarray(rng.normal(size=(2, 11, 7, 4)), jnp.float32)

    def double(tile):
        return tile.repeat(2, axis=1).repeat(2, axis=2)

    # A sum of up to four weighted copies of one fp32 number of about 3.
    tiled = tiles.in_tiles(double, latents, 2, 4, 2)
    _compare.assert_within(tiled, double(latents), 1e-6)
