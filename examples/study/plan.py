"""Which runs are wanted next, given those that have finished.

Every method is tuned by the same budget on seed 0: five learning rates, each twice the
one before; further ones while the best lies at the edge, four at most; then two other
decays at the best rate. The best setting runs with the seeds from 1 on, which are the
ones that count: what was chosen on a seed flatters it there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from study.records import Job, Record
from study.table import METHODS, Method

RATES = 5
EXTENSIONS = 4
"""Further rates at most, where the best lies at the edge."""


class Tuned(NamedTuple):
    """What tuning chose."""

    rate: float
    decay: float


class Wanted(NamedTuple):
    """What a row still needs on a workload.

    Attributes:
        jobs: runs that can start now, in order.
        least: how many are missing in all, if no more rates are needed.
        tuned: the chosen setting, once it is known.
        seeds: the seeds that count.
    """

    jobs: list[Job]
    least: int
    tuned: Tuned | None
    seeds: tuple[int, ...]


def seeds_of(method: Method, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """The seeds that count for a row."""
    return tuple(given) if given else tuple(range(1, method.seeds + 1))


def wanted(
    workload: str,
    steps: int,
    method: Method,
    finished: Mapping[Job, Record],
    seeds: Sequence[int] | None = None,
) -> Wanted:
    """What is missing of a row.

    Args:
        workload: Its name.
        steps: The length of a run there, before the row's stretch.
        method: The row.
        finished: Runs that there are.
        seeds: The seeds that count; the row's own if `None`.
    """
    counted = seeds_of(method, seeds)
    length = round(method.stretch * steps)

    def job(rate: float, decay: float, seed: int) -> Job:
        return Job(workload, method.name, rate, decay, seed, length)

    def missing(jobs: list[Job]) -> list[Job]:
        return [job for job in jobs if job not in finished]

    first, *others = method.decays
    if method.rate_of:
        base = wanted(workload, steps, METHODS[method.rate_of], finished)
        if base.tuned is None:
            tries = len(method.decays) if others else 0
            return Wanted([], tries + len(counted), None, counted)
        rate = base.tuned.rate
    else:
        rates = _grid(method)
        while not missing([job(rate, first, 0) for rate in rates]):
            rate = min(rates, key=lambda rate: finished[job(rate, first, 0)].final)
            further = _beyond(rates, rate)
            if further is None:
                break
            rates.append(further)
        else:
            left = missing([job(rate, first, 0) for rate in rates])
            return Wanted(left, len(left) + len(others) + len(counted), None, counted)

    decay = first
    if others:
        left = missing([job(rate, decay, 0) for decay in method.decays])
        if left:
            return Wanted(left, len(left) + len(counted), None, counted)
        decay = min(
            method.decays, key=lambda decay: finished[job(rate, decay, 0)].final
        )
    left = missing([job(rate, decay, seed) for seed in counted])
    return Wanted(left, len(left), Tuned(rate, decay), counted)


def in_order(
    workloads: Mapping[str, int],
    methods: Sequence[Method],
    finished: Mapping[Job, Record],
    seeds: Sequence[int] | None = None,
) -> Iterator[Job]:
    """All runs that can start now: row by row, each on every workload in turn.

    Args:
        workloads: Their names, and the length of a run on each.
        methods: The rows, the most valuable first.
        finished: Runs that there are.
        seeds: The seeds that count; the rows' own if `None`.
    """
    for method in methods:
        for name, steps in workloads.items():
            yield from wanted(name, steps, method, finished, seeds).jobs


def _grid(method: Method) -> list[float]:
    """The five rates, from the middle outwards, so that a stop leaves the likeliest."""
    steps = sorted(range(-(RATES // 2), RATES // 2 + 1), key=abs)
    return [_rounded(method.centre * 2.0**step) for step in steps]


def _beyond(rates: list[float], best: float) -> float | None:
    """The next rate where the best lies at the edge of those tried."""
    if len(rates) >= RATES + EXTENSIONS:
        return None
    if best == max(rates):
        return _rounded(best * 2)
    return _rounded(best / 2) if best == min(rates) else None


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")
