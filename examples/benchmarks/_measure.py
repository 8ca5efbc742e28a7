"""What the benchmarks share: interleaved timing, the machine's own limits, output.

A time on a shared machine means nothing by itself. So everything that is to be compared
runs in turn, round after round, in one process; what counts is the median over rounds
and its spread, and the rate of a plain matrix product that ran in the same rounds.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure


class Compiled(NamedTuple):
    """A compiled function and what compiling it cost.

    Attributes:
        call: the function; arguments as in the lowering.
        trace_seconds: of tracing and lowering.
        compile_seconds: of compiling.
        compile_cpu_seconds: of all threads while compiling; the steadier figure on a
            machine that others use too.
        temporary_bytes: allocated while it runs, beyond arguments and results.
        hlo_lines: length of the optimised program.
    """

    call: Callable[..., Any]
    trace_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float
    temporary_bytes: int
    hlo_lines: int

    @property
    def costs(self) -> dict[str, float]:
        """Everything but the function."""
        return {k: v for k, v in self._asdict().items() if k != "call"}


class Times(NamedTuple):
    """Seconds of one candidate over all rounds.

    Attributes:
        median: the middle.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.high - self.low) / self.median


def compile_function(
    function: Callable[..., Any],
    *args: Any,
    donate: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles for these arguments, which may be shapes, without running anything."""
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*args)
    traced, cpu = time.perf_counter(), time.process_time()
    program = lowered.compile(compiler_options=dict(options or {}))
    done, cpu_done = time.perf_counter(), time.process_time()
    memory = program.memory_analysis()
    return Compiled(
        call=program,
        trace_seconds=traced - start,
        compile_seconds=done - traced,
        compile_cpu_seconds=cpu_done - cpu,
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
        hlo_lines=len(program.as_text().splitlines()),
    )


def interleave(
    candidates: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, Times]:
    """Runs every candidate once in each round; each must return arrays to wait for."""
    for run in candidates.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds):
        # Another first one in every round, or one would always follow the same.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            jax.block_until_ready(candidates[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: Sequence[float]) -> Times:
    """Median and quartiles."""
    if len(values) < 2:
        return Times(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Times(median, low, high)


def plain_products(
    m: int, n: int, count: int, dtype: Any = jnp.float32
) -> tuple[Callable[[], Any], int]:
    """`count` products of an m × m with an m × n matrix, and their operations."""
    looped = jax.default_backend() == "cpu"

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(
            left,
            right,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).astype(dtype)

    def products(right: jax.Array, left: jax.Array) -> jax.Array:
        if not looped:
            return multiply(left, right)

        def step(i: jax.Array, right: jax.Array) -> jax.Array:
            return right.at[i].set(multiply(left[i], right[i]))

        return jax.lax.fori_loop(0, count, step, right)

    keys = jax.random.split(jax.random.key(0))
    # Of this size the product is as large as its right factor, round after round.
    left = jax.random.normal(keys[0], (count, m, m), dtype) / m**0.5
    right = jax.random.normal(keys[1], (count, m, n), dtype)
    return _in_place(products, right, left), 2 * m * m * n * count


def copy_pass(size: int) -> tuple[Callable[[], Any], int]:
    """One pass over `size` fp32 numbers, and the bytes that it reads and writes."""
    array = jnp.ones(size, jnp.float32)
    return _in_place(lambda x: x * 1.000001, array), 8 * size


def _in_place(
    function: Callable[..., jax.Array], array: jax.Array, *others: jax.Array
) -> Callable[[], jax.Array]:
    """A call that replaces `array`, as a step replaces the parameters."""
    call = jax.jit(function, donate_argnums=0)
    held = [array]

    def run() -> jax.Array:
        held[0] = call(held[0], *others)
        return held[0]

    return run


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree: Any) -> int:
    """Numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random_like(tree: Any, seed: int) -> Any:
    """Normal arrays of the shapes and dtypes of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [
        0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    device = jax.devices()[0]
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load_average": list(load),
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Aligned columns; numbers with three significant digits."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def save(out: Path, name: str, result: Mapping[str, Any]) -> None:
    """Writes `<name>.json`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def bar_plot(
    out: Path,
    name: str,
    title: str,
    unit: str,
    bars: Mapping[str, tuple[float, float, float]],
    floor: tuple[str, float] | None = None,
) -> None:
    """Horizontal bars of (median, low, high), with an optional line at a limit."""
    figure = Figure(figsize=(7.0, 0.9 + 0.36 * len(bars)), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, bars, unit)
    if floor is not None:
        axes.axvline(floor[1], color="#c0392b", linestyle="--", linewidth=1)
        axes.annotate(
            floor[0],
            (floor[1], len(bars) - 0.45),
            color="#c0392b",
            fontsize=8,
            ha="left",
        )
    axes.set_title(title, fontsize=10)
    save_figure(figure, out, name)


def draw_bars(
    axes: Any, bars: Mapping[str, tuple[float, float, float]], unit: str
) -> None:
    """The bars of `bar_plot`, the first one on top."""
    names = list(bars)[::-1]
    medians = [bars[label][0] for label in names]
    below = [max(bars[label][0] - bars[label][1], 0) for label in names]
    above = [max(bars[label][2] - bars[label][0], 0) for label in names]
    colours = ["#1f5fa8" if "fusionopt" in label else "#b8bec6" for label in names]
    axes.barh(names, medians, xerr=[below, above], color=colours, ecolor="#444444")
    for position, median in enumerate(medians):
        axes.annotate(
            f" {median:,.0f}" if median >= 1000 else f" {median:.3g}",
            (bars[names[position]][2], position),
            va="center",
            fontsize=8,
        )
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


def save_figure(figure: Figure, out: Path, name: str) -> None:
    """Writes `<name>.png`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    result.add_argument("--rounds", type=int, default=7, help="times each one runs")
    return result


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
