"""Recordings of published PyTorch models with random weights, and of their samplers."""

import functools
import json
import pathlib
from collections.abc import Mapping

import numpy as np

_DATA = pathlib.Path(__file__).parents[1] / "data"


@functools.cache
def recording(name: str) -> Mapping[str, np.ndarray]:
    """Every array of `tests/data/NAME.npz` by its recorded name, read-only.

    All float32 arrays lie one after the other, in the order of `shapes`, as four planes
    of bytes, lowest first: the plane of signs and exponents compresses to a third.
    """
    with np.load(_DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    flat = np.ascontiguousarray(arrays.pop("planes").T).view("<f4")[:, 0]
    for key, shape in json.loads(str(arrays.pop("shapes"))).items():
        values, flat = np.split(flat, [int(np.prod(shape))])
        arrays[key] = values.reshape(shape)
    assert flat.size == 0
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays under a prefix, named without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def nhwc(array: np.ndarray) -> np.ndarray:
    """Images with channels last instead of before height and width."""
    return np.moveaxis(array, -3, -1)
