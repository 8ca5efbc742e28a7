"""The study: every optimiser on four workloads, one command that can be repeated.

    python examples/study/run.py --list
    python examples/study/run.py
    python examples/study/run.py --workload lm --only adamw sf_normuon

It makes the runs that are missing, the most valuable first, and writes one file for
each as it ends; stop it whenever you like and repeat the command to go on. Learning
rates and decays are tuned by the same budget for every row, see `plan.py`. The tables
and pictures of docs/results.md are made from the files by `report.py`.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

# One core a run: a second one gains little at these sizes, and the order in which
# threads add up would make runs differ. Read when JAX starts.
os.environ.setdefault("NPROC", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training.errors import RunError
from dit_training.folders import claimed
from tqdm import tqdm

from study import plan, records, times, training, workloads
from study.method import Method
from study.records import Job, Record
from study.table import METHODS, PARTS

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    given = parse(arguments)
    methods = [
        method
        for method in METHODS.values()
        if (not given.only or method.name in given.only)
        and (not given.part or method.part in given.part)
    ]
    own = [name for method in methods for name in method.on]
    names = given.workload or list(dict.fromkeys((*workloads.NAMES, *own)))
    if given.times:
        names = given.workload or list(workloads.NAMES)
    steps = {name: workloads.STEPS for name in names}
    try:
        if given.list:
            print(overview(given.out, steps, methods, given.seeds))
            return 0
        with claimed(given.out):
            if given.times:
                times.write(given.out, times.measure(names, progress=print))
            else:
                work(given, steps, methods)
    except RunError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Make the study's missing runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument(
        "--only", nargs="+", choices=list(METHODS), metavar="ROW", help="these rows"
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="rows of these")
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=(*workloads.NAMES, *workloads.OTHERS),
        help="on these; on all but larger language models, if none is named",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds that count, from 1; the rows' own"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--list", action="store_true", help="say what there is, and run nothing"
    )
    parser.add_argument(
        "--times",
        action="store_true",
        help="measure what a step takes, rows taking turns, and run nothing else",
    )
    given = parser.parse_args(arguments)
    if given.processes < 1:
        parser.error("--processes: at least 1")
    if given.seeds and min(given.seeds) < 1:
        parser.error("--seeds: from 1; seed 0 is the one that is tuned on")
    return given


def work(
    given: argparse.Namespace, steps: dict[str, int], methods: list[Method]
) -> None:
    """Make all runs that are missing, some at a time."""
    finished = records.read_all(given.out)
    count = missing(steps, methods, finished, given.seeds)
    bar = tqdm(total=count, unit="run", smoothing=0.05)

    def done(record: Record) -> None:
        check_data(record, finished)
        records.write(given.out, record)
        finished[record.job] = record
        job = record.job
        bar.write(
            f"{job.workload} {job.method} rate {job.rate:g} decay {job.decay:g} seed "
            f"{job.seed}: {record.final:.4f}, {record.total_seconds:.0f} s"
        )
        bar.total = bar.n + 1 + missing(steps, methods, finished, given.seeds)
        bar.update()

    def following(running: set[Job]) -> Job | None:
        jobs = plan.in_order(steps, methods, finished, given.seeds)
        return next((job for job in jobs if job not in running), None)

    with bar:
        if given.processes == 1:
            while job := following(set()):
                bar.set_postfix_str(f"{job.workload} {job.method}")
                done(training.run(job))
            return
        # Not forked: JAX's threads don't survive that.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(given.processes, mp_context=context) as pool:
            running: dict[Future[Record], Job] = {}
            while True:
                while len(running) < given.processes:
                    job = following(set(running.values()))
                    if job is None:
                        break
                    running[pool.submit(training.run, job)] = job
                if not running:
                    return
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    del running[future]
                    done(future.result())


def missing(
    steps: dict[str, int],
    methods: list[Method],
    finished: dict[Job, Record],
    seeds: Sequence[int] | None,
) -> int:
    """How many runs are missing at least."""
    return sum(
        plan.wanted(name, steps[name], method, finished, seeds).least
        for method in methods
        for name in plan.places(method, steps)
    )


def check_data(record: Record, finished: dict[Job, Record]) -> None:
    """Refuse to mix runs of one workload on different data."""
    for other in finished.values():
        if other.job.workload == record.job.workload and other.data != record.data:
            raise RunError(
                f"{record.job.workload}: the data differs from that of earlier runs "
                f"({record.data} and {other.data}; those had Python "
                f"{other.versions['python']}): run with the same versions, or give "
                "another --out"
            )


def overview(
    folder: Path,
    steps: dict[str, int],
    methods: list[Method],
    seeds: Sequence[int] | None,
) -> str:
    """What has been run, and how long the rest takes."""
    finished = records.read_all(folder)
    lines, left = [], 0.0
    for part, title in PARTS.items():
        rows = [method for method in methods if method.part == part]
        lines += [f"{part}: {title}"] if rows else []
        for method in rows:
            cells = []
            for name in plan.places(method, steps):
                todo = plan.wanted(name, steps[name], method, finished, seeds)
                left += todo.least * method.stretch * seconds_of(name, finished)
                cells.append(f"{name} {state_of(todo)}")
            lines.append(f"  {method.name:16s} {'; '.join(cells)}")
    hours = left / 3600
    lines.append(f"{len(finished)} runs made; about {hours:.1f} h left on one core")
    return "\n".join(lines)


def state_of(todo: plan.Wanted) -> str:
    """How far a row is on a workload."""
    if todo.tuned is None:
        return f"untuned ({todo.least} runs)"
    made = len(todo.seeds) - todo.least
    return f"{made}/{len(todo.seeds)} seeds at {todo.tuned.rate:g}"


def seconds_of(workload: str, finished: dict[Job, Record]) -> float:
    """What a run of the usual length takes there; a guess where none was made."""
    found = [
        record.total_seconds * workloads.STEPS / record.job.steps
        for record in finished.values()
        if record.job.workload == workload
    ]
    return sum(found) / len(found) if found else 30.0


if __name__ == "__main__":
    sys.exit(main())
