"""The recorded autoencoders: random weights, and what the published code made of them.

`vae_decoder.npz` holds a decoder of its own and its stages, `pipeline_vae.npz` that of
a recorded pipeline, its last latents and its images before the clamp. Stages are those
of the first of two latents; of those of the up blocks, every fourth channel.
"""

import functools
import json
from typing import Any, NamedTuple

import numpy as np

from tests.dit._models import DATA


class Recording(NamedTuple):
    """Weights under today's names, the content of config.json, and everything else."""

    weights: dict[str, np.ndarray]
    config: dict[str, Any]
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def nhwc(self, name: str) -> np.ndarray:
        """An image array with channels last."""
        return self.arrays[name].transpose(0, 2, 3, 1)


@functools.cache
def recording(name: str) -> Recording:
    """One of the files of `tests/data`."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(arrays.pop("meta").tobytes())
    flat, weights = arrays.pop("weights"), {}
    for key, shape in meta["shapes"].items():
        part, flat = np.split(flat, [int(np.prod(shape))])
        weights[key] = part.reshape(shape)
    return Recording(weights, meta["config"], meta, arrays)
