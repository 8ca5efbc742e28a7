"""Which runs are wanted next, given those that have finished.

Every method is tuned on seed 0 by the same climb: twice the learning rate that it
starts at, and on upwards while that gets better; if the first was no better, downwards
likewise. So the chosen rate has a worse one on either side. Then the decay climbs in
the same way. A row that changes one thing of another starts at that one's rate and
keeps its decay. The chosen setting runs with the seeds from 1 on, which are the ones
that count: what was chosen on a seed flatters it there.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from study import workloads
from study.method import Method
from study.records import Job, Record
from study.table import METHODS, PARTS

REACH = 6
"""How often at most a rate is doubled or halved."""

FIRST_SEEDS = 3
"""Seeds that every row of a part gets before one of them gets more."""


class Tuned(NamedTuple):
    """What tuning chose."""

    rate: float
    decay: float


class Wanted(NamedTuple):
    """What a row still needs on a workload.

    Attributes:
        jobs: runs that can start now, in order; those that tune `base` come first.
        least: how many of its own are missing at least; a climb may go further.
        tuned: the chosen setting, once it is known.
        seeds: the seeds that count.
        so_far: the best setting while the decay is still climbing.
    """

    jobs: list[Job]
    least: int
    tuned: Tuned | None
    seeds: tuple[int, ...]
    so_far: Tuned | None = None


def seeds_of(method: Method, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """The seeds that count for a row."""
    return tuple(range(1, method.seeds + 1)) if given is None else tuple(given)


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
    decays = method.decays

    def job(rate: float, decay: float, seed: int) -> Job:
        return Job(workload, method.name, rate, decay, seed, length)

    def loss(rate: float, decay: float) -> float | None:
        found = finished.get(job(rate, decay, 0))
        return None if found is None else found.final

    def waiting(rate: float, decay: float, least: int) -> Wanted:
        return Wanted([job(rate, decay, 0)], least + len(counted), None, counted)

    start = Tuned(method.centre, decays[0] if decays else math.nan)
    larger = workload in workloads.SIZES
    # A larger model starts where the same method is best on the smallest.
    base = METHODS[method.name if larger else method.base or method.name]
    if larger or method.base:
        where = "lm" if larger else workload
        before = wanted(where, steps, base, finished, ())
        found = before.tuned
        if found is None:
            tries = 3 * method.climbs + max(len(decays) - 1, 0)
            return Wanted(before.jobs, tries + len(counted), None, counted)
        keeps = larger or not decays
        start = Tuned(found.rate, found.decay if keeps else decays[0])
        decays = () if keeps else decays

    rate, decay = start
    if method.climbs:
        ladder = [_rounded(rate * 2.0**step) for step in range(-REACH, REACH + 1)]
        climb = _climb(ladder, rate, lambda rate: loss(rate, decay))
        if climb.missing is not None:
            return waiting(
                climb.missing, decay, climb.least + min(max(len(decays) - 1, 0), 2)
            )
        rate = climb.best
    if len(decays) > 1:
        climb = _climb(sorted(decays), decay, lambda decay: loss(rate, decay))
        if climb.missing is not None:
            todo = waiting(rate, climb.missing, climb.least)
            return todo._replace(so_far=Tuned(rate, climb.best))
        decay = climb.best
    left = [job(rate, decay, seed) for seed in counted]
    left = [job for job in left if job not in finished]
    return Wanted(left, len(left), Tuned(rate, decay), counted)


def places(method: Method, names: Iterable[str]) -> list[str]:
    """Those of some workloads that a row runs on."""
    on = method.on or (*workloads.NAMES, *workloads.SIZES)
    return [name for name in names if name in on]


def in_order(
    steps: Mapping[str, int],
    methods: Sequence[Method],
    finished: Mapping[Job, Record],
    seeds: Sequence[int] | None = None,
) -> Iterator[Job]:
    """All runs that can start now, the most valuable first.

    Part by part; in each, every row with a few seeds, then the rest of the seeds.

    Args:
        steps: The workloads, and the length of a run on each.
        methods: The rows, the most valuable first.
        finished: Runs that there are.
        seeds: The seeds that count; the rows' own if `None`.
    """
    for part in PARTS:
        rows = [method for method in methods if method.part == part]
        for limit in (FIRST_SEEDS, math.inf):
            for method in rows:
                for name in places(method, steps):
                    todo = wanted(name, steps[name], method, finished, seeds)
                    few = set(todo.seeds[: min(limit, len(todo.seeds))])
                    yield from (job for job in todo.jobs if job.seed in (0, *few))


class _Climb(NamedTuple):
    """How far a climb is: the best, or what has to be tried next."""

    best: float
    missing: float | None
    least: int


def _climb(
    ladder: Sequence[float], start: float, loss: Callable[[float], float | None]
) -> _Climb:
    """Upwards from `start` while it gets better, else downwards.

    Args:
        ladder: What can be tried, in rising order.
        start: One of them.
        loss: What it ended at; `None` if it has not been tried.
    """
    place = ladder.index(start)
    here = loss(start)
    if here is None:
        return _Climb(start, start, min(3, len(ladder)))
    for direction in (1, -1):
        while 0 <= place + direction < len(ladder):
            there = loss(ladder[place + direction])
            if there is None:
                least = 2 if direction == 1 and ladder[place] == start else 1
                return _Climb(ladder[place], ladder[place + direction], least)
            # From a rate that diverged, any lower one is as good.
            better = there < here or (direction == -1 and math.isinf(here))
            if not better:
                break
            place, here = place + direction, there
        if ladder[place] != start:
            break
    return _Climb(ladder[place], None, 0)


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")
