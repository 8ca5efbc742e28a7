"""Fill the tables of docs/results.md from the files of the runs, and draw the plots.

    python examples/study/report.py

Everything between a pair of marks in the page is replaced; no number is typed by hand.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training.folders import write_whole
from matplotlib.figure import Figure

from study import records, summary, workloads
from study.records import Job, Record
from study.summary import Estimate, Row
from study.table import METHODS, PARTS

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
NOT_RUN = "not run yet"
TITLES = {
    "lm": "bytes",
    "vit": "characters, classifier",
    "glyphs": "characters, DiT",
    "digits": "digits, DiT",
}
CURVES = ("adamw", "adamw_rest", "muon", "normuon", "sf_adamw", "sf_normuon", "ratio")
FACTORS = ("ratio", "plus", "autoscale", "d_adaptation")

Rows = Mapping[tuple[str, str], Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write the study up.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args(arguments)
    finished = records.read_all(given.results)
    page = given.docs / "results.md"
    write_whole(page, filled(page.read_text(), finished))
    plot_curves(finished, given.docs / "images" / "study_curves.png")
    plot_rates(finished, given.docs / "images" / "study_rates.png")
    plot_factors(finished, given.docs / "images" / "study_step_sizes.png")
    if any(METHODS[job.method].part == "length" for job in finished):
        plot_shares(finished, given.docs / "images" / "study_lengths.png")
    return 0


def filled(page: str, finished: Mapping[Job, Record]) -> str:
    """The page with every block between marks made anew."""
    rows = summary.collect(finished)
    blocks: dict[str, Callable[[], str]] = {"state": lambda: state(finished, rows)}
    blocks["ratio"] = lambda: ratio(finished, rows)
    blocks["sizes"] = lambda: sizes(rows)
    blocks["common rate"] = lambda: common_rates(finished)
    for part in PARTS:
        blocks[f"losses {part}"] = lambda part=part: losses(part, rows)
        blocks[f"details {part}"] = lambda part=part: details(part, rows)

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in blocks:
            raise ValueError(f"results.md: no block {name!r}; there are {list(blocks)}")
        return f"<!-- study: {name} -->\n\n{blocks[name]()}\n\n<!-- end -->"

    marks = re.compile(r"<!-- study: ([^>]*?) -->\n.*?<!-- end -->", re.DOTALL)
    return marks.sub(block, page)


def state(finished: Mapping[Job, Record], rows: Rows) -> str:
    """How much there is, and what it ran with."""
    if not finished:
        return "No run has been made."
    wanted = {key: row for key, row in rows.items() if key[0] in workloads.NAMES}
    complete = sum(len(row.runs) > 0 for row in wanted.values())
    ran_with = sorted(
        {
            ", ".join(f"{name} {text}" for name, text in record.versions.items())
            for record in finished.values()
        }
    )
    hours = sum(record.total_seconds for record in finished.values()) / 3600
    return (
        f"{len(finished)} runs so far ({hours:.1f} processor hours), which tune and "
        f"repeat {complete} of {len(wanted)} rows (a row is a method on a workload). "
        f"They ran with {'; '.join(ran_with)}, one thread a run."
    )


def losses(part: str, rows: Rows) -> str:
    """Final validation losses: one line a method, one column a workload."""
    names = workloads.NAMES
    lines = [
        f"| | {' | '.join(TITLES[name] for name in names)} | command |",
        f"|---|{'---|' * len(names)}---|",
    ]
    for method in METHODS.values():
        if method.part == part:
            cells = [text(summary.final(rows[name, method.name])) for name in names]
            command = f"`--only {method.name}`"
            lines.append(f"| {method.title} | {' | '.join(cells)} | {command} |")
    return "\n".join(lines)


def details(part: str, rows: Rows) -> str:
    """All else that is known of the rows that have been run."""
    columns = (
        *("", "workload", "share of AdamW's steps", "of its time", "less SF-NorMuon"),
        *("time a step", "state", "Fréchet distance", "rate", "decay"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method in METHODS.values():
        for name in workloads.NAMES:
            row = rows[name, method.name]
            if method.part != part or not row.runs or row.tuned is None:
                continue
            some = next(iter(row.runs.values()))
            reference = rows[name, "sf_normuon"]
            same = method.name == "sf_normuon"
            cost = summary.cost(row, rows[name, "adamw"])
            shares = summary.shares(row, rows)
            cells = (
                method.title,
                TITLES[name],
                share_text(shares),
                "" if cost is None or not shares else time_text(shares, cost),
                "" if same else text(summary.difference(row, reference), sign="+"),
                "" if cost is None else f"{cost:.2f}×",
                f"{some.state_bytes / some.param_bytes:.2f}",
                text(summary.figure(row, "frechet_distance"), missing=""),
                f"{row.tuned.rate:g}",
                f"{row.tuned.decay:g}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "None of these rows is run yet."


def ratio(finished: Mapping[Job, Record], rows: Rows) -> str:
    """The ratio rule beside no rule: each as tuned, and both at one rate."""
    columns = (
        *("workload", "rates, as tuned", "ratio less no rule, as tuned"),
        *("γ in that run", "both at 0.008, seed 0: no rule, ratio", "γ in that run"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in workloads.NAMES:
        without, rule = rows[name, "sf_normuon"], rows[name, "ratio"]
        if not (without.tuned and rule.tuned and rule.runs):
            continue
        common = [
            finished[Job(name, method, 8e-3, 0.05, 0, workloads.STEPS)]
            for method in ("sf_normuon", "ratio")
        ]
        cells = (
            TITLES[name],
            f"{without.tuned.rate:g}, {rule.tuned.rate:g}",
            text(summary.difference(rule, without), sign="+"),
            range_text(next(iter(rule.runs.values())).step_sizes),
            ", ".join(f"{record.final:.4f}" for record in common),
            range_text(common[1].step_sizes),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "Neither is tuned yet."


def range_text(factors: Sequence[float]) -> str:
    """The smallest and the largest of some factors."""
    return f"{min(factors):.1f} to {max(factors):.1f}"


def sizes(rows: Rows) -> str:
    """The language model at four widths, under three methods."""
    names = ("adamw", "normuon", "sf_normuon")
    titles = " | ".join(METHODS[name].title for name in names)
    lines = [
        f"| width | {titles} | share of AdamW's steps: NorMuon, SF-NorMuon | command |",
        "|---|---|---|---|---|---|",
    ]
    for workload, width in {"lm": workloads.WIDTH, **workloads.SIZES}.items():
        found = [rows[workload, name] for name in names]
        cells = [text(summary.final(row)) for row in found]
        cells.append(
            ", ".join(
                share_text(summary.shares(row, rows)) or NOT_RUN for row in found[1:]
            )
        )
        command = f"`--workload {workload} --only {' '.join(names)}`"
        lines.append(f"| {width} | {' | '.join(cells)} | {command} |")
    return "\n".join(lines)


def common_rates(finished: Mapping[Job, Record]) -> str:
    """What one learning rate for every workload costs on each."""
    names = workloads.NAMES
    lines = [
        f"| | one rate | {' | '.join(TITLES[name] for name in names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for method in METHODS.values():
        found = summary.common_rate(finished, method.name)
        if method.part in ("baselines", "rules") and found:
            cells = (
                f"{100 * found.excess[name]:+.1f} %" if name in found.excess else ""
                for name in names
            )
            lines.append(f"| {method.title} | {found.rate:g} | {' | '.join(cells)} |")
    missing = "No method is tuned on two workloads yet, at rates that they share."
    return "\n".join(lines) if len(lines) > 2 else missing


def text(value: Estimate | None, sign: str = "", missing: str = NOT_RUN) -> str:
    """A mean, its standard error in the same digits, and the number of seeds."""
    if value is None:
        return "" if sign else missing
    if not math.isfinite(value.mean):
        return f"diverged ({value.seeds})"
    if not math.isfinite(value.error):
        return f"{value.mean:{sign}.4f} (1)"
    # Two figures of the error say how many of the mean mean anything.
    size = math.floor(math.log10(value.error)) if value.error > 0 else -4
    digits = min(max(1 - size, 1), 4)
    return f"{value.mean:{sign}.{digits}f} ± {value.error:.{digits}f} ({value.seeds})"


def share_text(shares: list[float]) -> str:
    """The median over the seeds, and the range."""
    if not shares:
        return ""
    low, high = min(shares), max(shares)
    shown = [one if math.isfinite(one) else None for one in (low, high)]
    ends = ["never" if one is None else f"{one:.2f}" for one in shown]
    middle = statistics.median(shares)
    first = f"{middle:.2f}" if math.isfinite(middle) else "never"
    return f"{first} ({ends[0]} to {ends[1]})" if len(shares) > 1 else first


def time_text(shares: list[float], cost: float) -> str:
    """The median share of the time, if each step takes so many of AdamW's."""
    middle = statistics.median(shares) * cost
    return f"{middle:.2f}" if math.isfinite(middle) else "never"


def panels(finished: Mapping[Job, Record]) -> list[str]:
    """The workloads that there are runs of."""
    there = {job.workload for job in finished}
    return [name for name in workloads.NAMES if name in there]


def plot_curves(finished: Mapping[Job, Record], path: Path) -> None:
    """Validation losses at the tuned settings, one line a seed."""
    rows = summary.collect(finished)

    def draw(axes, name: str) -> None:
        for number, method in enumerate(CURVES):
            for place, record in enumerate(rows[name, method].runs.values()):
                axes.plot(
                    _steps(record),
                    record.curve,
                    color=f"C{number}",
                    linewidth=1,
                    alpha=0.8,
                    label="_" * (place > 0) + METHODS[method].title,
                )
        axes.set(xlabel="step", ylabel="validation loss", yscale="log")

    _plot(panels(finished), draw, path)


def plot_rates(finished: Mapping[Job, Record], path: Path) -> None:
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

    _plot(panels(finished), draw, path)


def plot_factors(finished: Mapping[Job, Record], path: Path) -> None:
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
                factors = record.step_sizes
                axes.plot(
                    [
                        workloads.EVAL_EVERY * (place + 1)
                        for place in range(len(factors))
                    ],
                    factors,
                    color=f"C{number}",
                    linewidth=0.5 + 0.4 * place,
                    label="_" * (place > 0) + METHODS[method].title,
                )
        axes.set(xlabel="step", ylabel="shared factor", yscale="log")

    _plot(panels(finished), draw, path)


def plot_shares(finished: Mapping[Job, Record], path: Path) -> None:
    """The share of AdamW's steps against the length of the run, one line a method."""
    rows = summary.collect(finished)

    def draw(axes, name: str) -> None:
        for number, method in enumerate(("normuon", "sf_normuon")):
            found = {}
            for length in ("_x0.5", "", "_x3"):
                row = rows[name, method + length]
                shares = summary.shares(row, rows)
                if shares and math.isfinite(max(shares)):
                    steps = next(iter(row.runs.values())).job.steps
                    found[steps] = (min(shares), statistics.median(shares), max(shares))
            if found:
                low, middle, high = zip(*found.values(), strict=True)
                axes.fill_between(list(found), low, high, color=f"C{number}", alpha=0.2)
                axes.plot(
                    list(found),
                    middle,
                    color=f"C{number}",
                    marker="o",
                    label=METHODS[method].title,
                )
        axes.set(xlabel="steps of the run", ylabel="share of AdamW's steps")
        axes.set_ylim(0, 1)

    _plot(panels(finished), draw, path)


def _steps(record: Record) -> list[int]:
    return [record.eval_every * place for place in range(1, len(record.curve) + 1)]


def _plot(names: Sequence[str], draw: Callable[..., None], path: Path) -> None:
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
        axes.set_title(TITLES[name])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=6, framealpha=0.5)
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter("{x:.2g}")
            axes.yaxis.set_minor_formatter("{x:.2g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
