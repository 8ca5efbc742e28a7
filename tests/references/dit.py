"""The diffusion transformer in float64 NumPy, one image and one head at a time.

Written from sections 3.1 and 3.2 of Peebles and Xie (arXiv 2212.09748). Parameters have
the library's names and layout: kernels `(in, out)`, those of the blocks
`(depth, in, out)`. Nothing is shared with the package.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Tree = dict[str, Any]


class Sizes(NamedTuple):
    """The sizes that the weights do not show, and those that are handy."""

    patch: int
    heads: int
    depth: int
    time_scale: float = 1.0
    frequency_shift: int = 0
    norm_eps: float = 1e-6


def _linear(params: Tree, x: np.ndarray) -> np.ndarray:
    kernel, bias = np.float64(params["kernel"]), np.float64(params["bias"])
    return x @ kernel + bias


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _norm(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)


def positions(grid: int, width: int) -> np.ndarray:
    """Entry (row * grid + column) holds the column's waves, then the row's."""
    table = np.zeros((grid * grid, width))
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for part, place in enumerate((column, row)):
                for k in range(quarter):
                    angle = place / 10000 ** (k / quarter)
                    start = part * width // 2 + k
                    table[row * grid + column, start] = math.sin(angle)
                    table[row * grid + column, start + quarter] = math.cos(angle)
    return table


def time_features(time: float, shift: int = 0) -> np.ndarray:
    """128 cosines, then 128 sines."""
    angles = np.array([time * 10000 ** (-k / (128 - shift)) for k in range(128)])
    return np.concatenate([np.cos(angles), np.sin(angles)])


def conditioning(params: Tree, time: float, label: int, sizes: Sizes) -> np.ndarray:
    """SiLU of the sum of the time embedding and the label embedding."""
    embedder = params["t_embedder"]
    features = time_features(time * sizes.time_scale, sizes.frequency_shift)
    hidden = _silu(_linear(embedder["fc1"], features))
    table = np.float64(params["y_embedder"]["embedding_table"])
    return _silu(_linear(embedder["fc2"], hidden) + table[label])


def _layer(tree: Tree, index: int) -> Tree:
    """One block's parameters out of the stacked ones."""
    return {
        key: _layer(value, index) if isinstance(value, dict) else value[index]
        for key, value in tree.items()
    }


def modulators(
    params: Tree, time: float, label: int, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray]:
    """`[depth, 6, D]` and `[2, D]` for one (time, label) pair."""
    cond = conditioning(params, time, label, sizes)
    blocks = [
        _linear(_layer(params["blocks"], i)["adaLN_modulation"], cond).reshape(6, -1)
        for i in range(sizes.depth)
    ]
    final = _linear(params["final_layer"]["adaLN_modulation"], cond).reshape(2, -1)
    return np.stack(blocks), final


def _attention(params: Tree, x: np.ndarray, heads: int) -> np.ndarray:
    fused = _linear(params["qkv"], x)
    width = x.shape[1]
    size = width // heads
    mixed = np.zeros_like(x)
    for head in range(heads):
        q, k, v = (
            fused[:, part * width + head * size : part * width + (head + 1) * size]
            for part in range(3)
        )
        scores = q @ k.T / math.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed[:, head * size : (head + 1) * size] = weights @ v
    return _linear(params["proj"], mixed)


def _compute(name: tuple[Any, ...], branch: Callable[[], np.ndarray]) -> np.ndarray:
    """Every residual as it is."""
    return branch()


def forward_one(
    params: Tree,
    image: np.ndarray,
    time: float,
    label: int,
    sizes: Sizes,
    recall: Callable[[tuple[Any, ...], Callable[[], np.ndarray]], Any] = _compute,
) -> np.ndarray:
    """The output for one image.

    `recall(name, compute)` gives each residual: `("network",)` of all blocks, and
    `("attention", index)` and `("mlp", index)` of their branches before the gate.
    """
    patch = sizes.patch
    grid = image.shape[0] // patch
    block_mods, final_mods = modulators(params, time, label, sizes)
    tokens = np.stack(
        [
            image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel()
            for r in range(grid)
            for c in range(grid)
        ]
    )
    x = _linear(params["x_embedder"]["proj"], tokens)
    x = x + positions(grid, x.shape[1])

    def attention(x: np.ndarray, layer: Tree, mods: np.ndarray) -> np.ndarray:
        branch = _norm(x) * (1 + mods[1]) + mods[0]
        return _attention(layer["attn"], branch, sizes.heads)

    def mlp(x: np.ndarray, layer: Tree, mods: np.ndarray) -> np.ndarray:
        branch = _norm(x, sizes.norm_eps) * (1 + mods[4]) + mods[3]
        return _linear(layer["mlp"]["fc2"], _gelu(_linear(layer["mlp"]["fc1"], branch)))

    def added(x: np.ndarray) -> np.ndarray:
        start = x
        for index in range(sizes.depth):
            inputs = (_layer(params["blocks"], index), block_mods[index])
            gates = block_mods[index][2], block_mods[index][5]
            x = x + gates[0] * recall(
                ("attention", index), partial(attention, x, *inputs)
            )
            x = x + gates[1] * recall(("mlp", index), partial(mlp, x, *inputs))
        return x - start

    x = x + recall(("network",), partial(added, x))
    x = _norm(x) * (1 + final_mods[1]) + final_mods[0]
    patches = _linear(params["final_layer"]["linear"], x)
    out = np.zeros((grid * patch, grid * patch, patches.shape[1] // patch**2))
    for token, values in enumerate(patches):
        r, c = divmod(token, grid)
        out[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = values.reshape(
            patch, patch, -1
        )
    return out


def forward(
    params: Tree,
    images: np.ndarray,
    times: np.ndarray,
    labels: np.ndarray,
    sizes: Sizes,
) -> np.ndarray:
    """The output for a batch, `[batch, height, width, channels out]`."""
    return np.stack(
        [
            forward_one(params, np.float64(image), float(time), int(label), sizes)
            for image, time, label in zip(images, times, labels, strict=True)
        ]
    )
