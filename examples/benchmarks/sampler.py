"""What does the cache of modulators save: time per step, and bytes that stay resident?

    python examples/benchmarks/sampler.py
    python examples/benchmarks/sampler.py --presets DiT-XL/2 --dtype bfloat16 --steps 50

Whole sampling loops without guidance, with the cache and without it, in turn, for each
preset and batch size. Resident bytes are those of the weights and the cache that
sampling needs; they come from shapes, so every preset gets its row even where running
it would take too long.
"""

from typing import Any

import _measure as measure
import jax
import jax.numpy as jnp

from fusionopt_jax import dit

PRESETS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
LABEL = 207


def resident(preset: str, steps: int, dtype: Any) -> dict[str, Any]:
    """Bytes of the weights and of the cache for one label, from shapes."""
    config = dit.CONFIGS[preset]
    width = jnp.dtype(dtype).itemsize
    full = measure.tree_size(jax.eval_shape(lambda: dit.init_params(config))) * width
    modulators = dit.modulator_bytes(config, dtype)
    # Sampling without guidance needs one label; a cache holds the null label as well.
    cache = dit.cache_bytes(config, steps, 2, dtype)
    return {
        "preset": preset,
        "steps": steps,
        "weights MB": full / 1e6,
        "modulators MB": modulators / 1e6,
        "cache MB": cache / 1e6,
        "less resident %": 100 * (modulators - cache) / full,
    }


def main() -> None:
    """Measures, prints, writes."""
    cpu = jax.default_backend() == "cpu"
    arguments = measure.parser(__doc__)
    presets = ("DiT-S/2",) if cpu else PRESETS
    arguments.add_argument("--presets", nargs="*", default=presets, choices=PRESETS)
    arguments.add_argument(
        "--batches", nargs="*", type=int, default=[1, 8] if cpu else [1, 8, 64]
    )
    arguments.add_argument("--steps", type=int, default=4 if cpu else 50)
    arguments.add_argument("--dtype", default="float32" if cpu else "bfloat16")
    arguments.add_argument("--unroll", nargs="*", type=int, default=[0, 1])
    options = arguments.parse_args()
    dtype = jnp.dtype(options.dtype)

    memory = [resident(preset, 50, jnp.bfloat16) for preset in PRESETS]
    measure.print_table(memory)
    rows: list[dict[str, Any]] = []
    for preset in options.presets:
        for batch in options.batches:
            rows += time_preset(preset, batch, dtype, options)
    measure.print_table(rows)
    environment = measure.environment()
    result = {"environment": environment, "resident": memory, "rows": rows}
    measure.bar_plot(
        options.out,
        "sampler",
        f"One sampling step, {environment['device']}",
        "milliseconds (median, quartiles)",
        {bar_name(row): (row["ms a step"], row["low"], row["high"]) for row in rows},
    )
    measure.save(options.out, "sampler", result)


def bar_name(row: dict[str, Any]) -> str:
    """A row of the table as the label of a bar."""
    library = " (fusionopt)" if row["modulators"] == "cached" else ""
    return (
        f"{row['preset']} batch {row['batch']}, {row['blocks']}, "
        f"{row['modulators']}{library}"
    )


def time_preset(
    preset: str,
    batch: int,
    dtype: Any,
    options: Any,
    config: dit.DiTConfig | None = None,
) -> list[dict[str, Any]]:
    """Cached and uncached, looped and unrolled, in turn; `config` is the preset's."""
    config = dit.CONFIGS[preset] if config is None else config
    shapes = jax.eval_shape(lambda: dit.init_params(config))
    params = measure.random_like(shapes, seed=0)
    if dtype != jnp.float32:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    sampler = dit.Sampler.euler(steps=options.steps)
    label = LABEL % config.num_classes
    labels = jnp.full(batch, label, jnp.int32)
    cache = dit.build_cache(params, config, sampler.eval_times(), [label], dtype=dtype)
    stripped = dit.strip_modulators(params)
    shape = (batch, config.input_size, config.input_size, config.in_channels)
    noise = jax.random.normal(jax.random.key(1), shape)

    def run(cached: bool, unroll: bool) -> Any:
        return lambda: dit.sample(
            stripped if cached else params,
            config,
            cache if cached else None,
            noise,
            labels,
            sampler,
            1.0,
            dtype=dtype,
            unroll=unroll,
        )

    cases = {
        (cached, bool(unroll)): run(cached, bool(unroll))
        for unroll in options.unroll
        for cached in (False, True)
    }
    times = measure.interleave(
        {str(case): call for case, call in cases.items()}, options.rounds
    )
    rows = []
    for cached, unroll in cases:
        time = times[str((cached, unroll))]
        without = times[str((False, unroll))].median
        scale = 1e3 / options.steps
        rows.append(
            {
                "preset": preset,
                "batch": batch,
                "blocks": "unrolled" if unroll else "scanned",
                "modulators": "cached" if cached else "computed",
                "ms a step": scale * time.median,
                "low": scale * time.low,
                "high": scale * time.high,
                "saved %": 100 * (1 - time.median / without),
            }
        )
    return rows


if __name__ == "__main__":
    main()
