"""The pictures of docs/results.md."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from study import summary, workloads
from study.records import Job, Record
from study.table import METHODS, RECIPE

TITLES = {
    "lm": "bytes",
    "vit": "characters, classifier",
    "glyphs": "characters, DiT",
    "digits": "digits, DiT",
    "conv": "characters, convolutions",
    **{
        name: f"{task}, weight {weight:g}"
        for name, (task, weight) in workloads.AWAY.items()
    },
}
CURVES = (
    *("adamw", "adamw_rest", "muon", "normuon", "sf_adamw"),
    *("sf_normuon", RECIPE, "ratio"),
)
FACTORS = ("ratio", "plus", "autoscale", "d_adaptation")


def title(workload: str) -> str:
    """What tables and pictures call a workload."""
    return TITLES.get(workload, workload)


def panels(finished: Mapping[Job, Record]) -> list[str]:
    """The workloads that there are runs of."""
    there = {job.workload for job in finished}
    return [name for name in workloads.NAMES if name in there]


def curves(finished: Mapping[Job, Record], path: Path) -> None:
    """Validation losses at the tuned settings, one line a seed."""
    rows = summary.collect(finished)

    def draw(axes, name: str) -> None:
        for number, method in enumerate(CURVES):
            row = rows.get((name, method))
            for place, record in enumerate(row.runs.values() if row else ()):
                axes.plot(
                    _steps(record),
                    record.curve,
                    color=f"C{number}",
                    linewidth=1,
                    alpha=0.8,
                    label="_" * (place > 0) + METHODS[method].title,
                )
        axes.set(xlabel="step", ylabel="validation loss", yscale="log")

    _draw(panels(finished), draw, path)


def rates(finished: Mapping[Job, Record], path: Path) -> None:
    """What every learning rate ended at on seed 0."""

    def draw(axes, name: str) -> None:
        for number, method in enumerate((*CURVES, *FACTORS[1:])):
            first = METHODS[method].decays[0]
            tried = sorted(
                (job.rate, record.final)
                for job, record in finished.items()
                if (job.workload, job.method) == (name, method)
                and (job.seed, job.decay) == (0, first)
            )
            if tried:
                axes.plot(
                    *zip(*tried, strict=True),
                    color=f"C{number}",
                    marker="o",
                    markersize=3,
                    label=METHODS[method].title,
                )
        axes.set(xlabel="learning rate", ylabel="final validation loss", xscale="log")

    _draw(panels(finished), draw, path)


def factors(finished: Mapping[Job, Record], path: Path) -> None:
    """The shared factor along the run, at every rate that was tried on seed 0."""

    def draw(axes, name: str) -> None:
        for number, method in enumerate(FACTORS):
            runs = [
                record
                for job, record in sorted(finished.items())
                if (job.workload, job.method, job.seed) == (name, method, 0)
                and job.decay == METHODS[method].decays[0]
            ]
            for place, record in enumerate(runs):
                found = record.step_sizes
                axes.plot(
                    [workloads.EVAL_EVERY * (place + 1) for place in range(len(found))],
                    found,
                    color=f"C{number}",
                    linewidth=0.5 + 0.4 * place,
                    label="_" * (place > 0) + METHODS[method].title,
                )
        axes.set(xlabel="step", ylabel="shared factor", yscale="log")

    _draw(panels(finished), draw, path)


def shares(finished: Mapping[Job, Record], path: Path) -> None:
    """The share of AdamW's steps against the length of the run, one line a method."""
    rows = summary.collect(finished)

    def draw(axes, name: str) -> None:
        for number, method in enumerate(("normuon", "sf_normuon")):
            found = {}
            usual = METHODS[f"{method}_x3"].base
            for length in (f"{method}_x0.5", usual, f"{method}_x3"):
                row = rows.get((name, length))
                shares = summary.shares(row, rows) if row else []
                if shares and math.isfinite(max(shares)):
                    steps = next(iter(row.runs.values())).job.steps
                    found[steps] = (min(shares), statistics.median(shares), max(shares))
            if len(found) > 1:
                low, middle, high = zip(*found.values(), strict=True)
                axes.fill_between(list(found), low, high, color=f"C{number}", alpha=0.2)
                axes.plot(
                    list(found),
                    middle,
                    color=f"C{number}",
                    marker="o",
                    label=METHODS[usual].title,
                )
        axes.set(xlabel="steps of the run", ylabel="share of AdamW's steps")
        axes.set_ylim(0, 1)

    _draw(panels(finished), draw, path)


def _steps(record: Record) -> list[int]:
    return [record.eval_every * place for place in range(1, len(record.curve) + 1)]


def _draw(names: Sequence[str], draw: Callable[..., None], path: Path) -> None:
    """One panel for each workload that there is something to draw of."""

    def empty(name: str) -> bool:
        axes = Figure().subplots()
        draw(axes, name)
        return not axes.lines

    names = [name for name in names if not empty(name)]
    if not names:
        return
    figure = Figure(figsize=(4.2 * len(names) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        draw(axes, name)
        axes.set_title(title(name))
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=6, framealpha=0.5)
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter("{x:.2g}")
            axes.yaxis.set_minor_formatter("{x:.2g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
