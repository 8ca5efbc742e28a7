"""The tables of `docs/sampling.md`, out of the results of `step_cache.py`."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]

KINDS = (
    "uncached",
    "step cache",
    "fewer steps",
    "DPM-Solver++",
    "Heun",
    "branches",
    "every n-th step",
)
"""Every kind of case, in the order of a table's rows of as many evaluations."""

CACHED = ("step cache", "branches", "every n-th step")
"""Kinds that have a step cache: calibrated, for all blocks together or for branches
apart, or without a calibration."""

NAMES = {"ddim": "DDIM", "euler": "Euler"}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def of(results: Row, start: str, steps: int) -> list[tuple[str, Row]]:
    """The rows of one sampler by name, the more evaluations the higher."""
    rows = [
        (name, row)
        for name, row in results["quality"].items()
        if (row["start"], row["steps"]) == (start, steps)
    ]
    return sorted(
        rows,
        key=lambda named: (
            -named[1]["evaluations"],
            KINDS.index(named[1]["kind"]),
            named[1]["order"],
        ),
    )


def detailed(results: Row, start: str, steps: int) -> str:
    """A row for each way to sample: quality and latency."""
    lines = [
        "| evaluations | | Fréchet distance | less that of all steps | distance | "
        "ms at batch 1 | ms at batch 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = of(results, start, steps)
    (whole,) = (row["frechet"] for _, row in rows if row["kind"] == "uncached")
    for name, row in rows:
        mean, error = mean_and_error(row["frechet"])
        cells = [str(row["evaluations"]), _title(row), f"{mean:.2f} ± {error:.2f}"]
        if row["kind"] == "uncached":
            cells += ["0", "0"]
        else:
            pairs = zip(row["frechet"], whole, strict=True)
            more, error = mean_and_error([one - other for one, other in pairs])
            distance = statistics.mean(row["distance"])
            cells += [f"{more:+.2f} ± {error:.2f}", f"{distance:.3f}"]
        times = results["latency"].get(name, {})
        cells += [_latency(times.get(batch), row["kind"]) for batch in ("1", "8")]
        lines.append(_line(cells))
    return "\n".join(lines)


def overview(results: Row, samplers: Iterable[tuple[str, int]]) -> str:
    """Several samplers: what is recommended beside what one would do instead."""
    lines = [
        "| | evaluations | step cache, order 1 | fewer steps | DPM-Solver++ |",
        "|---|---|---|---|---|",
    ]
    for start, steps in samplers:
        rows = [row for _, row in of(results, start, steps)]
        for row in rows:
            mean, error = mean_and_error(row["frechet"])
            if row["kind"] == "uncached":
                # Cells with nothing in them; those of a ratio come from its rows.
                text = f"{NAMES[start]}, {steps} steps | {steps} | "
                lines.append(f"| {text}{mean:.2f} ± {error:.2f} | | |")
            elif row["kind"] == "step cache" and row["order"] == 1:
                beside = [
                    other["frechet"]
                    for kind in ("fewer steps", "DPM-Solver++")
                    for other in [_beside(rows, kind, row["ratio"])]
                ]
                cells = [f"{statistics.mean(v):.2f}" if v else "" for v in beside]
                head = [f"{row['ratio']:g}×", str(row["evaluations"]), f"{mean:.2f}"]
                lines.append(_line([*head, *cells]))
    return "\n".join(lines)


def _beside(rows: Sequence[Row], kind: str, ratio: float) -> Row:
    """The row of another kind and the same cost, or one without figures."""
    found = (row for row in rows if (row["kind"], row["ratio"]) == (kind, ratio))
    return next(found, {"frechet": ()})


def _title(row: Row) -> str:
    """What a row is of."""
    if row["kind"] == "uncached":
        return f"all {row['steps']} steps"
    order = f", order {row['order']}" if row["kind"] in CACHED else ""
    return f"{row['kind']}{order}"


def _latency(time: Row | None, kind: str) -> str:
    """Median and quartiles, and how many times faster than all steps."""
    if time is None:
        return ""
    text = f"{time['median']:.0f} ({time['low']:.0f}–{time['high']:.0f})"
    return text if kind == "uncached" else f"{text}, {time['faster']:.1f}×"


def _line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"
