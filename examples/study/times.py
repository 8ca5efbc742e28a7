"""What a training step of one method takes beside another's, measured in turns.

Runs that were made at different hours differ by a quarter in the processor seconds of
the same step, on a machine that other programs use too. Here the methods take turns in
one process, some steps each, and what counts is the ratio within a round.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from dit_training.folders import write_whole

from study import training, workloads
from study.records import Job
from study.table import BASE, METHODS, RECIPE

TIMED = ("adamw", "normuon", RECIPE, "muon", "sf_adamw")
"""What is timed on every workload."""

TIMED_ON_LM = (
    *(*TIMED, BASE, "plus", "autoscale", "d_adaptation"),
    *(name for name, method in METHODS.items() if method.part == "components"),
    *("hot_bf16", "hot_fp16", "state_bf16", "state_int8"),
)
"""And there the rows whose step is a program of its own."""

NAME = "times.json"

Seconds = Mapping[str, Mapping[str, Sequence[float]]]
"""Of a step, by workload and method, one figure a round."""


class Ratio(NamedTuple):
    """How many times another method's step a step takes.

    Attributes:
        middle: the median over the rounds.
        low: the first quartile.
        high: the third quartile.
    """

    middle: float
    low: float
    high: float


def measure(
    names: Sequence[str],
    only: Sequence[str] = (),
    *,
    rounds: int = 9,
    steps: int = 20,
    progress: Callable[[str], None] = lambda _: None,
) -> Seconds:
    """Processor seconds of a step on each workload; what compiles is not counted."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        methods = only or (TIMED_ON_LM if name == "lm" else TIMED)
        turns = {method: _turn(name, method, steps) for method in methods}
        for turn in turns.values():
            turn()
        found[name] = {method: [] for method in methods}
        for number in range(rounds):
            # Whoever comes first in one round comes later in the next.
            start = number % len(methods)
            for method in (*methods[start:], *methods[:start]):
                found[name][method].append(turns[method]())
            progress(f"{name}: round {number + 1} of {rounds}")
    return found


def _turn(name: str, method: str, steps: int) -> Callable[[], float]:
    """What makes some steps and returns the seconds of one."""
    row = METHODS[method]
    job = Job(name, method, row.centre, (row.decays or (0.2,))[0], 1, workloads.STEPS)
    step, _ = training.compiled(name, method, job.steps)
    workload = workloads.get(name)
    numbers = map(jnp.float32, (job.rate, job.decay))
    arguments = (workload.train, jnp.int32(job.seed), *numbers)
    params, state = training.start(job)
    done = 0

    def turn() -> float:
        nonlocal params, state, done
        began = time.process_time()
        for _ in range(steps):
            params, state = step(params, state, jnp.int32(done), *arguments)
            done += 1
        jax.block_until_ready((params, state))
        return (time.process_time() - began) / steps

    return turn


def write(folder: Path, seconds: Seconds) -> None:
    """Write the figures, and what they were taken with."""
    short = {
        name: {
            method: [float(f"{one:.4g}") for one in found]
            for method, found in by_method.items()
        }
        for name, by_method in seconds.items()
    }
    content = {"versions": training.versions(), "seconds": short}
    write_whole(folder / NAME, json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> Seconds:
    """The figures; empty where none were taken."""
    path = folder / NAME
    return json.loads(path.read_text())["seconds"] if path.exists() else {}


def ratio(
    seconds: Seconds, workload: str, method: str, other: str = "adamw"
) -> Ratio | None:
    """One method's step over another's, round by round."""
    found = seconds.get(workload, {})
    if method not in found or other not in found:
        return None
    pairs = zip(found[method], found[other], strict=True)
    ratios = [own / theirs for own, theirs in pairs]
    if len(ratios) < 2:
        return Ratio(*ratios * 3)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, low, high)
