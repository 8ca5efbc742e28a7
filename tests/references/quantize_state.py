"""Blocks of 8 bits and stochastic rounding, in float64 and integers of Python."""

import numpy as np

LEVELS = np.array([c * abs(c) / 127**2 for c in range(-127, 128)])
"""The share of its block's largest entry that each code stands for."""

ROOTS = np.sign(LEVELS) * np.sqrt(np.abs(LEVELS))


def parts(size):
    """How many blocks a row of this size has."""
    count = 1
    while size % 2 == 0 and size > 128:
        size, count = size // 2, 2 * count
    return count


def rounded(x):
    """Codes and scales of an array, block by block; the numbers they stand for."""
    x = np.asarray(x, np.float64)
    if x.ndim == 0:
        codes, scales, numbers = rounded(x[None])
        return codes[0], scales[0], numbers[0]
    count = parts(x.shape[-1])
    codes, numbers = np.zeros(x.shape, int), np.zeros(x.shape)
    scales = np.zeros((*x.shape[:-1], count))
    for row in np.ndindex(*x.shape[:-1]):
        for block, places in enumerate(np.split(np.arange(x.shape[-1]), count)):
            scale = max(map(abs, x[row][places]), default=0.0)
            scales[(*row, block)] = scale
            shares = x[row][places] / (scale or 1.0)
            # The level whose root is nearest to the entry's.
            roots = np.sign(shares) * np.sqrt(np.abs(shares))
            nearest = np.argmin(np.abs(roots[:, None] - ROOTS), axis=1)
            codes[row][places] = nearest - 127
            numbers[row][places] = scale * LEVELS[nearest]
    return codes, scales, numbers


def neighbours(x):
    """The bf16 numbers next to a float32: towards zero and away from it."""
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)


def lowbias32(x):
    """C. Wellons' hash of 32 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)
