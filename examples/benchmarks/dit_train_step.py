"""How does a DiT's loss and gradient compare with the same model in PyTorch?

    pip install torch            # a CPU build will do
    python examples/benchmarks/dit_train_step.py

The same weights, images, times and labels on both sides, fp32, as many threads; losses
must agree to 1e-4 and gradients to 1e-3 before anything is timed. Without PyTorch the
other rows are measured all the same. `floor` is the time that the step's products would
take at the rate of a plain one, of the size of the MLP's, in the same rounds.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import _measure as measure
import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax import dit

try:
    import _torch_dit
    import torch
except ImportError:
    torch = None

MODES: dict[str, dict[str, Any]] = {
    "scanned": {},
    "unrolled": {"unroll": True},
    "scanned, rematerialised": {"remat": True},
}
PYTORCH = "PyTorch"
FLOOR = "floor"
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
"""Relative to the largest entry of a leaf: sums of 2,000 terms in other orders."""


def main() -> None:
    """Measures, prints, writes."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--preset", default="DiT-S/2", choices=sorted(dit.CONFIGS))
    arguments.add_argument("--depth", type=int, help="blocks (default: the preset's)")
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    arguments.add_argument("--only", nargs="+", choices=[*MODES], default=[*MODES])
    options = arguments.parse_args()
    if torch is None:
        print("PyTorch is not installed: its row is left out")
    else:
        torch.set_num_threads(os.cpu_count() or 1)
    rows = [
        row
        for tokens in options.tokens
        for row in compare(options, dit.CONFIGS[options.preset], tokens)
    ]
    measure.print_table(rows)
    measure.save(
        options.out,
        "dit_train_step",
        {
            "environment": measure.environment(),
            "threads": os.cpu_count(),
            "torch": None if torch is None else torch.__version__,
            "rows": rows,
        },
    )


def compare(options: Any, preset: dit.DiTConfig, tokens: int) -> list[dict[str, Any]]:
    """The rows of one image size."""
    config = dataclasses.replace(
        preset,
        input_size=round(tokens**0.5) * preset.patch_size,
        depth=options.depth or preset.depth,
    )
    shapes = jax.eval_shape(lambda: dit.init_params(config))
    params = measure.random_like(shapes, seed=0)
    batch = random_batch(config, options.batch_size)
    compiled = {
        name: measure.compile_function(
            jax.value_and_grad(loss_of(config, **MODES[name])), shapes, *batch
        )
        for name in options.only
    }
    runs: dict[str, Callable[[], Any]] = {
        name: lambda call=program.call: call(params, *batch)
        for name, program in compiled.items()
    }
    if torch is not None:
        step, loss_and_gradients = pytorch_step(params, config, batch)
        for name, run in runs.items():
            require_same(name, run(), loss_and_gradients(), config)
        runs[PYTORCH] = step
    # The largest product of the forward pass.
    rows = options.batch_size * config.num_tokens
    runs[FLOOR], plain = plain_product(rows, config.hidden_size, config.mlp_size)
    times = measure.interleave(runs, options.rounds)
    total = 3 * options.batch_size * operations(config)
    floor = measure.Times(*(total / plain * seconds for seconds in times.pop(FLOOR)))
    reference = times.get(PYTORCH)
    return [
        {
            "tokens": tokens,
            "what": name,
            "ms": 1e3 * time.median,
            "spread %": 100 * time.spread,
            "over PyTorch": reference and time.median / reference.median,
            "over floor": time.median / floor.median,
            "compile s": compiled[name].compile_seconds if name in compiled else None,
            "temp MB": (
                compiled[name].temporary_bytes / 1e6 if name in compiled else None
            ),
        }
        for name, time in {**times, FLOOR: floor}.items()
    ]


def loss_of(config: dit.DiTConfig, **settings: Any) -> Callable[..., jax.Array]:
    """Mean square error against a target."""

    def loss(params: Any, images: Any, times: Any, labels: Any, target: Any) -> Any:
        prediction = dit.apply(params, config, images, times, labels, **settings)
        return jnp.mean(jnp.square(prediction - target))

    return loss


def random_batch(config: dit.DiTConfig, size: int) -> tuple[jax.Array, ...]:
    """Images, times, labels and targets."""
    keys = jax.random.split(jax.random.key(1), 4)
    shape = (size, config.input_size, config.input_size)
    return (
        jax.random.normal(keys[0], (*shape, config.in_channels)),
        jax.random.uniform(keys[1], (size,), maxval=999.0),
        jax.random.randint(keys[2], (size,), 0, config.num_classes),
        jax.random.normal(keys[3], (*shape, config.out_channels)),
    )


def operations(config: dit.DiTConfig) -> int:
    """Floating-point operations of all products of one image's forward pass."""
    width, tokens = config.hidden_size, config.num_tokens
    patch = config.patch_size**2 * (config.in_channels + config.out_channels)
    block = 4 * width**2 + 2 * width * config.mlp_size + 2 * tokens * width
    conditioning = (6 * config.depth + 2) * width**2 + (256 + width) * width
    return 2 * (config.depth * block * tokens + patch * width * tokens + conditioning)


def plain_product(rows: int, m: int, n: int) -> tuple[Callable[[], Any], int]:
    """A product of matrices of normal numbers, and its operations."""
    keys = jax.random.split(jax.random.key(2))
    left = jax.random.normal(keys[0], (rows, m))
    right = jax.random.normal(keys[1], (m, n))
    call = jax.jit(jnp.matmul)
    return lambda: [call(left, right) for _ in range(10)], 10 * 2 * rows * m * n


def pytorch_step(
    params: Any, config: dit.DiTConfig, batch: tuple[jax.Array, ...]
) -> tuple[Callable[[], Any], Callable[[], tuple[float, dict[str, np.ndarray]]]]:
    """Loss and gradient in PyTorch: as a candidate, and as numbers to compare."""
    weights = {
        name: torch.from_numpy(array.copy())
        for name, array in dit.to_pytorch(params, config).items()
    }
    trained = {name: leaf for name, leaf in weights.items() if name != "pos_embed"}
    for leaf in trained.values():
        leaf.requires_grad_()
    images, times, labels, target = (torch.from_numpy(np.array(x)) for x in batch)
    images, target = (x.permute(0, 3, 1, 2).contiguous() for x in (images, target))

    def step() -> Any:
        # None and not zero: then nothing is added to the old gradients.
        for leaf in trained.values():
            leaf.grad = None
        prediction = _torch_dit.forward(
            weights,
            images,
            times,
            labels.long(),
            depth=config.depth,
            heads=config.num_heads,
            patch=config.patch_size,
        )
        loss = (prediction - target).square().mean()
        loss.backward()
        return loss.item()

    def numbers() -> tuple[float, dict[str, np.ndarray]]:
        loss = step()
        return loss, {name: leaf.grad.numpy() for name, leaf in trained.items()}

    return step, numbers


def require_same(
    name: str, ours: tuple[Any, Any], theirs: tuple[Any, Any], config: dit.DiTConfig
) -> None:
    """Raises unless both sides computed the same loss and gradients."""
    loss, gradients = float(ours[0]), dit.to_pytorch(ours[1], config)
    if abs(loss - theirs[0]) > LOSS_TOLERANCE * abs(theirs[0]):
        raise AssertionError(f"{name}: the losses are {loss} and {theirs[0]}")
    for leaf, expected in theirs[1].items():
        error = np.abs(gradients[leaf] - expected).max() / np.abs(expected).max()
        if error > GRADIENT_TOLERANCE:
            raise AssertionError(f"{name}: gradients of {leaf} differ by {error:.1e}")


if __name__ == "__main__":
    main()
