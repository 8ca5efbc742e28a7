"""What memory does decoding latents take, and what do tiles and half precision change?

    python examples/benchmarks/decoder.py
    python examples/benchmarks/decoder.py --side 64

The decoder of Stable Diffusion with random weights. Memory is what XLA plans for the
compiled program beside weights, latents and image; nothing runs for it. Differences are
those from an image that was decoded whole in fp32, from latents of pure noise. They
take minutes on a CPU, and four times as long with twice the `--side`.
"""

import math
from collections.abc import Sequence
from typing import Any

import _measure as measure
import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax.dit import latents
from fusionopt_jax.dit.latents.entries import entry_shapes

SMALL = latents.Config(
    block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, sample_size=8
)


def random_params(config: latents.Config) -> dict[str, Any]:
    """Uniform kernels of PyTorch's width, norms that change nothing."""
    generator, weights = np.random.default_rng(0), {}
    for name, shape in entry_shapes(config, "decoder").items():
        if len(shape) == 1:
            array = np.full(shape, float(name.endswith("weight")), np.float32)
        else:
            width = 1 / math.sqrt(math.prod(shape[1:]))
            array = generator.uniform(-width, width, shape).astype(np.float32)
        weights[name] = array
    return latents.from_diffusers(weights, config)[0]


def temporary_mib(
    params: dict[str, Any], config: latents.Config, side: int, tile: int | None
) -> float:
    """Temporary memory of one fp32 image from `side` x `side` latents, in MiB."""
    noise = jax.ShapeDtypeStruct((1, side, side, config.latent_channels), jnp.float32)
    compiled = measure.compile_function(
        lambda *given: latents.decode(given[0], config, given[1], tile=tile),
        params,
        noise,
    )
    mib = compiled.temporary_bytes / 2**20
    # The table prints three digits of what is no integer.
    return round(mib) if mib >= 100 else mib


def memory(
    params: dict[str, Any], config: latents.Config, pixels: Sequence[int]
) -> list[dict[str, Any]]:
    """Whole, and in tiles of the size that the autoencoder was trained on."""
    tile = config.sample_size // config.downsampling
    rows = []
    for size in pixels:
        side = size // config.downsampling
        tiled = temporary_mib(params, config, side, tile) if side > tile else None
        rows.append(
            {
                "pixels": f"{size}x{size}",
                "whole MiB": temporary_mib(params, config, side, None),
                f"tile={tile} MiB": tiled,
            }
        )
    return rows


def differences(
    params: dict[str, Any], config: latents.Config, side: int
) -> tuple[float, list[dict[str, Any]]]:
    """The images' standard deviation, and how far each way of decoding is off."""
    shape = (1, side, side, config.latent_channels)
    noise = jax.random.normal(jax.random.key(0), shape)
    whole = np.asarray(latents.decode(params, config, noise))
    half, quarter = side // 2, side // 4
    ways: list[dict[str, Any]] = [
        {"dtype": jnp.bfloat16},
        {"tile": half, "overlap": 0},
        {"tile": half, "overlap": half // 4},
        {"tile": quarter, "overlap": 0},
        {"tile": quarter, "overlap": quarter // 4},
    ]
    rows = []
    for way in ways:
        error = np.asarray(latents.decode(params, config, noise, **way)) - whole
        rows.append(
            {
                "dtype": jnp.dtype(way.get("dtype", jnp.float32)).name,
                "tile": way.get("tile"),
                "overlap": way.get("overlap"),
                "root mean square": float(np.sqrt(np.mean(error**2))),
                "largest": float(np.abs(error).max()),
            }
        )
    return float(whole.std()), rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = measure.parser(__doc__)
    parser.add_argument(
        "--pixels",
        nargs="*",
        type=int,
        default=[256, 512, 1024, 2048],
        help="sides of the images whose memory is planned",
    )
    parser.add_argument(
        "--side", type=int, default=32, help="of the latents that are decoded"
    )
    parser.add_argument(
        "--small", action="store_true", help="two narrow levels, for a first look"
    )
    options = parser.parse_args(arguments)
    config = SMALL if options.small else latents.Config()
    params = random_params(config)
    planned = memory(params, config, options.pixels)
    measure.print_table(planned)
    deviation, off = differences(params, config, options.side)
    print(
        f"\n{options.side}x{options.side} latents; the images have a standard "
        f"deviation of {deviation:.3g} and are off by"
    )
    measure.print_table(off)
    result = {
        "environment": measure.environment(),
        "memory": planned,
        "side": options.side,
        "standard deviation": deviation,
        "differences": off,
    }
    measure.save(options.out, "decoder", result)
    return result


if __name__ == "__main__":
    main()
