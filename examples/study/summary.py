"""What the runs of a row say together: means, errors, and comparisons seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from study import plan, workloads
from study.records import Job, Record
from study.table import ADAMW, METHODS


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: over the seeds.
        error: its standard error; NaN for one seed.
        seeds: how many.
    """

    mean: float
    error: float
    seeds: int


class Row(NamedTuple):
    """A row of the study on one workload.

    Attributes:
        workload: its name.
        method: its name.
        tried: runs that tuning made.
        tuned: what tuning chose, or has found best so far.
        settled: whether tuning is through.
        runs: the runs that count, by seed, at that setting.
    """

    workload: str
    method: str
    tried: int
    tuned: plan.Tuned | None
    settled: bool
    runs: Mapping[int, Record]


def collect(finished: Mapping[Job, Record]) -> dict[tuple[str, str], Row]:
    """Every row on every workload that it runs on, run or not."""
    rows = {}
    for name, method in METHODS.items():
        for workload in plan.places(method, (*workloads.NAMES, *workloads.OTHERS)):
            own = {
                job: record
                for job, record in finished.items()
                if (job.workload, job.method) == (workload, name)
            }
            state = plan.wanted(workload, workloads.STEPS, method, finished)
            tuned = state.tuned or state.so_far
            runs = {
                job.seed: record
                for job, record in sorted(own.items())
                if tuned and job.seed and job[2:4] == tuned
            }
            tried = sum(job.seed == 0 for job in own)
            settled = state.tuned is not None
            rows[workload, name] = Row(workload, name, tried, tuned, settled, runs)
    return rows


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error; nothing where there are no values.

    Infinite if one of them is no number.
    """
    if not values:
        return None
    count = len(values)
    if not all(map(math.isfinite, values)):
        return Estimate(math.inf, math.nan, count)
    spread = statistics.stdev(values) if count > 1 else math.nan
    return Estimate(statistics.fmean(values), spread / math.sqrt(count), count)


def final(row: Row) -> Estimate | None:
    """The validation loss at the end."""
    return estimate([record.final for record in row.runs.values()])


def figure(row: Row, name: str) -> Estimate | None:
    """A figure of the generated images at the end."""
    found = [record.figures for record in row.runs.values()]
    return estimate([figures[name] for figures in found if name in figures])


def difference(row: Row, other: Row) -> Estimate | None:
    """Final loss less that of another row with the same seeds and as many steps."""
    return estimate(
        [
            record.final - other.runs[seed].final
            for seed, record in row.runs.items()
            if seed in other.runs and other.runs[seed].job.steps == record.job.steps
        ]
    )


def shares(row: Row, rows: Mapping[tuple[str, str], Row]) -> list[float]:
    """Per seed, the share of AdamW's steps that AdamW's best loss takes.

    AdamW is the run with the same seed and as many steps that comes down lowest, of all
    AdamW rows at their best. A seed that does not come down to it counts as infinite.
    """
    found = []
    apart = METHODS[row.method].part == "accumulation"
    names = [name for name in ADAMW if (METHODS[name].part == "accumulation") == apart]
    for seed, record in row.runs.items():
        theirs = [
            run
            for name in names
            if (row.workload, name) in rows
            for run in [rows[row.workload, name].runs.get(seed)]
            if run is not None and run.job.steps == record.job.steps
        ]
        if not theirs:
            continue
        target = min(theirs, key=lambda run: run.best)
        needed, taken = (run.steps_to(target.best) for run in (record, target))
        found.append(math.inf if needed is None or not taken else needed / taken)
    return found


def cost(row: Row, other: Row) -> float | None:
    """Processor seconds a step over those of another row, medians of both."""
    own, theirs = (
        [record.seconds / record.job.steps for record in one.runs.values()]
        for one in (row, other)
    )
    if not own or not theirs:
        return None
    return statistics.median(own) / statistics.median(theirs)


class Common(NamedTuple):
    """One learning rate for several workloads.

    Attributes:
        rate: the one whose largest excess is smallest.
        excess: per workload, the loss there over that at the best rate, less 1.
    """

    rate: float
    excess: Mapping[str, float]


def common_rate(finished: Mapping[Job, Record], method: str) -> Common | None:
    """The rate that loses least everywhere, of those that tuning tried on seed 0.

    Workloads count on which the rate is tuned; nothing where these are fewer than two,
    or have no rate in common. Rows that climb from another's rate and decay have none.
    """
    if not METHODS[method].decays:
        return None
    first = METHODS[method].decays[0]
    tried: dict[str, dict[float, float]] = {}
    for job, record in finished.items():
        if (job.method, job.seed, job.decay) == (method, 0, first):
            tried.setdefault(job.workload, {})[job.rate] = record.final
    tried = {
        name: losses
        for name, losses in sorted(tried.items())
        if len(losses) >= 3 and math.isfinite(min(losses.values()))
    }
    rates = set.intersection(*map(set, tried.values())) if len(tried) > 1 else set()
    if not rates:
        return None

    def excess(rate: float) -> dict[str, float]:
        return {
            name: losses[rate] / min(losses.values()) - 1
            for name, losses in tried.items()
        }

    rate = min(sorted(rates), key=lambda rate: max(excess(rate).values()))
    return Common(rate, excess(rate))
