"""Fill the tables of the documentation from the files of the runs, and draw the plots.

    python examples/study/report.py

Everything between a pair of marks in a page is replaced; no number is typed by hand.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training.folders import write_whole

from study import inline, plan, plots, records, summary, times, workloads
from study.cells import (
    NOT_RUN,
    UNSETTLED,
    final_text,
    range_text,
    share_text,
    text,
    time_text,
)
from study.records import Job, Record
from study.summary import Row
from study.table import ADAMW, BASE, METHODS, PARTS, RECIPE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = (
    *("README.md", "docs/index.md", "docs/results.md"),
    *("docs/choosing.md", "docs/open_questions.md"),
    "docs/methods/quantize_state.md",
)
"""What has figures of the study in it."""
Rows = Mapping[tuple[str, str], Row]
EMPTY: times.Seconds = {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write the study up.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    given = parser.parse_args(arguments)
    finished, seconds = records.read_all(given.results), times.read(given.results)
    for name in PAGES:
        page = given.root / name
        write_whole(page, filled(page.read_text(), finished, seconds))
    images = given.root / "docs" / "images"
    plots.curves(finished, images / "study_curves.png")
    plots.rates(finished, images / "study_rates.png")
    plots.factors(finished, images / "study_step_sizes.png")
    if any(METHODS[job.method].part == "length" for job in finished):
        plots.shares(finished, images / "study_lengths.png")
    return 0


def filled(
    page: str, finished: Mapping[Job, Record], seconds: times.Seconds = EMPTY
) -> str:
    """The page with every block between marks made anew."""
    rows = summary.collect(finished)
    blocks: dict[str, Callable[[], str]] = {"state": lambda: state(finished, rows)}
    blocks["recipe"] = lambda: recipe(rows, seconds)
    blocks["times"] = lambda: step_times(seconds)
    blocks["ratio"] = lambda: ratio(rows)
    blocks["sizes"] = lambda: sizes(rows)
    blocks["shapes"] = lambda: shapes(rows)
    blocks["away"] = lambda: away(rows)
    blocks["common rate"] = lambda: common_rates(finished)
    for part in PARTS:
        blocks[f"losses {part}"] = lambda part=part: losses(part, rows)
        blocks[f"details {part}"] = lambda part=part: details(part, rows, seconds)

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in blocks:
            raise ValueError(f"no block {name!r} is known; there are {list(blocks)}")
        return f"<!-- study: {name} -->\n\n{blocks[name]()}\n\n<!-- end -->"

    marks = re.compile(r"<!-- study: ([^>]*?) -->\n.*?<!-- end -->", re.DOTALL)
    return inline.filled(marks.sub(block, page), rows, seconds)


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


def columns_of(part: str) -> list[str]:
    """The workloads that a part's rows run on, larger language models aside."""
    methods = [method for method in METHODS.values() if method.part == part]
    names = [name for name in workloads.OTHERS if name not in workloads.SIZES]
    places = [plan.places(method, (*workloads.NAMES, *names)) for method in methods]
    return list(dict.fromkeys(name for found in places for name in found))


def beside(rows: Rows, row: Row) -> Row | None:
    """SF-NorMuon's row of the same part, or the one that most are compared with."""
    own = f"sf_normuon_{METHODS[row.method].part}"
    return rows.get((row.workload, own)) or rows.get((row.workload, BASE))


def losses(part: str, rows: Rows) -> str:
    """Final validation losses: one line a method, one column a workload."""
    names = columns_of(part)
    lines = [
        f"| | {' | '.join(plots.title(name) for name in names)} | command |",
        f"|---|{'---|' * len(names)}---|",
    ]
    for method in METHODS.values():
        if method.part == part:
            cells = [
                final_text(rows[name, method.name])
                if (name, method.name) in rows
                else "not planned"
                for name in names
            ]
            command = f"`--only {method.name}`"
            lines.append(f"| {method.title} | {' | '.join(cells)} | {command} |")
    return "\n".join(lines)


def details(part: str, rows: Rows, seconds: times.Seconds = EMPTY) -> str:
    """All else that is known of the rows that have been run."""
    columns = (
        *("", "workload", "share of AdamW's steps", "of its time", "less SF-NorMuon"),
        *("time a step", "state", "Fréchet distance", "rate", "decay"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method in METHODS.values():
        if method.part != part:
            continue
        for name in columns_of(part):
            row = rows.get((name, method.name))
            if row is None or not row.runs or row.tuned is None:
                continue
            some = next(iter(row.runs.values()))
            reference = beside(rows, row)
            same = reference is None or row == reference
            cost = times.ratio(seconds, name, method.name)
            shares = summary.shares(row, rows)
            cells = (
                method.title,
                plots.title(name),
                share_text(shares),
                "" if cost is None or not shares else time_text(shares, cost.middle),
                "" if same else text(summary.difference(row, reference), sign="+"),
                "" if cost is None else f"{cost.middle:.2f}×",
                f"{some.state_bytes / some.param_bytes:.2f}",
                text(summary.figure(row, "frechet_distance"), missing=""),
                f"{row.tuned.rate:g}",
                f"{row.tuned.decay:g}{'' if row.settled else UNSETTLED}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "None of these rows is run yet."


def shapes(rows: Rows) -> str:
    """Models of equal cost, the one deep and the other wide."""
    lines = [
        "| | loss | Fréchet distance | time a step | rate | command |",
        "|---|---|---|---|---|---|",
    ]
    first = rows["digits_3x192", "blocks_3x192"]
    for name, (depth, width) in workloads.SHAPES.items():
        row = rows[name, f"blocks_{depth}x{width}"]
        cost = summary.cost(row, first)
        cells = (
            METHODS[row.method].title,
            text(summary.final(row)),
            text(summary.figure(row, "frechet_distance")),
            NOT_RUN if cost is None else f"{cost:.2f}×",
            f"{row.tuned.rate:g}" if row.tuned and row.runs else NOT_RUN,
            f"`--only {row.method}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def away(rows: Rows) -> str:
    """Where optimisers end that are pushed away from a reference."""
    names = list(workloads.AWAY)
    titles = " | ".join(plots.title(name) for name in names)
    lines = [f"| | {titles} | command |", f"|---|{'---|' * len(names)}---|"]
    for method in METHODS.values():
        if method.part != "away":
            continue
        cells = []
        for name in names:
            row = rows[name, method.name]
            found = (
                text(summary.final(row)),
                text(summary.figure(row, "distance"), missing=""),
                text(summary.figure(row, "label_accuracy"), missing=""),
            )
            cells.append("; ".join(part for part in found if part))
        command = f"`--only {method.name}`"
        lines.append(f"| {method.title} | {' | '.join(cells)} | {command} |")
    return "\n".join(lines)


def recipe(rows: Rows, seconds: times.Seconds = EMPTY) -> str:
    """The default of `fusion_opt` beside baselines that are tuned on each workload."""
    columns = (
        *("", "AdamW, cosine, tuned", "NorMuon, cosine, tuned", "`fusion_opt(8e-3)`"),
        *("of AdamW's steps", "of its time"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in workloads.NAMES:
        own = rows[name, RECIPE]
        theirs = [
            (found.mean, method)
            for method in ADAMW
            if METHODS[method].part == "baselines"
            if (found := summary.final(rows[name, method]))
        ]
        best = rows[name, min(theirs)[1] if theirs else "adamw"]
        shares, cost = summary.shares(own, rows), times.ratio(seconds, name, RECIPE)
        cells = (
            plots.title(name),
            final_text(best),
            final_text(rows[name, "normuon"]),
            final_text(own),
            share_text(shares) or NOT_RUN,
            NOT_RUN if cost is None or not shares else time_text(shares, cost.middle),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def step_times(seconds: times.Seconds) -> str:
    """What a training step takes over one with AdamW: median and quartiles."""
    if not seconds:
        return "No step has been timed."
    methods = [name for name in times.TIMED if name != "adamw"]
    titles = " | ".join(METHODS[name].title for name in methods)
    lines = [f"| | {titles} |", "|---" * (len(methods) + 1) + "|"]
    for name in seconds:
        found = [times.ratio(seconds, name, method) for method in methods]
        cells = [
            f"{one.middle:.2f} ({one.low:.2f} to {one.high:.2f})" if one else NOT_RUN
            for one in found
        ]
        lines.append(f"| {plots.title(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(rows: Rows) -> str:
    """The ratio rule beside no rule: both at one setting, and each as tuned."""
    columns = (
        *("workload", "ratio less no rule, both at 0.008 and 0.05", "γ in these runs"),
        *("ratio less no rule, as tuned", "rates", "γ in these runs"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in workloads.NAMES:
        cells = [plots.title(name)]
        for pair in (("fixed", "fixed_ratio"), ("sf_normuon", "ratio")):
            if (name, pair[1]) not in rows:
                cells += ["not planned", "", ""]
                continue
            without, rule = (rows[name, method] for method in pair)
            found = summary.difference(rule, without)
            cells.append(text(found, sign="+") or NOT_RUN)
            if pair[0] != "fixed":
                tuned = [row.tuned for row in (without, rule)]
                cells.append(", ".join(f"{one.rate:g}" for one in tuned if one))
            factors = [one for run in rule.runs.values() for one in run.step_sizes]
            cells.append(range_text(factors) if factors else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(rows: Rows) -> str:
    """The language model at four widths, under three methods."""
    names = ("adamw_rest", "normuon", RECIPE)
    titles = " | ".join(METHODS[name].title for name in names)
    lines = [
        f"| width | {titles} | share of AdamW's steps: NorMuon, the recipe | command |",
        "|---|---|---|---|---|---|",
    ]
    for workload, width in {"lm": workloads.WIDTH, **workloads.SIZES}.items():
        found = [rows[workload, name] for name in names]
        cells = [final_text(row) for row in found]
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
        f"| | one rate | {' | '.join(plots.title(name) for name in names)} |",
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


if __name__ == "__main__":
    sys.exit(main())
