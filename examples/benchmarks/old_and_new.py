"""Is anything slower than it was? Any benchmark here, of two checkouts, in turns.

    git worktree add ../old COMMIT
    python examples/benchmarks/old_and_new.py --old ../old optimizer_step.py --rounds 5

Each checkout runs its own script in a process of its own, with all arguments that
follow the script's name. Where the script would time its candidates round after round,
the two processes take turns instead: one candidate of the old checkout, the same of the
new one, and the other way round in the next round. What counts is the median of these
pairs' ratios. Candidates that only one of them has are left out, and named.
"""

import argparse
import contextlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("old", "new")


class Worker:
    """A checkout's script, which waits wherever it has candidates to be timed."""

    def __init__(
        self, checkout: Path, script: str, arguments: Sequence[str], folder: str
    ) -> None:
        command = [sys.executable, __file__, "--worker", str(checkout), script]
        self._name = f"{script} of {checkout}"
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )

    def names(self) -> list[str] | None:
        """The candidates that it has come to; `None` where the script has ended."""
        line = self._read()
        if line is not None:
            return line
        if code := self._process.wait():
            raise SystemExit(f"old_and_new.py: error: {self._name} failed ({code})")
        return None

    def seconds(self, name: str) -> float:
        """Run a candidate once."""
        self._write(name)
        taken = self._read()
        if taken is None:
            raise SystemExit(f"old_and_new.py: error: {self._name} ended in {name!r}")
        return taken

    def go_on(self) -> None:
        """There is nothing more to time here."""
        self._write(None)

    def close(self) -> None:
        """End it, whatever it does."""
        with self._process:  # Which closes the pipes and waits.
            self._process.kill()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def _write(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


def work(checkout: Path, script: str, arguments: Sequence[str]) -> None:
    """Run a script whose candidates are run when the other side says so."""
    folder = checkout / "examples" / "benchmarks"
    sys.path.insert(0, str(folder))
    # What the script prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import _measure as measure
    import jax

    def answer(message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    def interleave(
        candidates: Mapping[str, Callable[[], Any]], rounds: int
    ) -> dict[str, Any]:
        del rounds  # The other side counts them.
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for run in candidates.values():
            jax.block_until_ready(run())
        answer(list(candidates))
        while (name := json.loads(sys.stdin.readline())) is not None:
            start = time.perf_counter()
            jax.block_until_ready(candidates[name]())
            seconds[name].append(time.perf_counter() - start)
            answer(seconds[name][-1])
        # One that the other side lacks was never run.
        return {
            name: measure.summary(values or [float("nan")])
            for name, values in seconds.items()
        }

    measure.interleave = interleave
    sys.argv = [script, *arguments]
    runpy.run_path(str(folder / script), run_name="__main__")


class Pair(NamedTuple):
    """Seconds of one candidate, round by round."""

    old: list[float]
    new: list[float]

    def row(self, name: str) -> dict[str, Any]:
        """A line of the table."""
        ratios = [new / old for old, new in zip(self.old, self.new, strict=True)]
        low, middle, high = quartiles(ratios)
        found: dict[str, Any] = {"candidate": name}
        for side, values in zip(SIDES, self, strict=True):
            first, median, last = quartiles(values)
            found[f"{side} ms"] = round(1e3 * median, 2)
            found[f"{side} spread %"] = round(100 * (last - first) / median, 1)
        return found | {"new over old": round(middle, 3), "low": low, "high": high}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first, the middle and the third."""
    # Not those of `_measure`: each side has to import its own checkout's.
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(old: Worker, new: Worker, rounds: int) -> list[dict[str, Any]]:
    """All candidates that both have, in turns."""
    rows = []
    while True:
        lists = old.names(), new.names()
        if lists[0] is None or lists[1] is None:
            return rows
        shared = [name for name in lists[1] if name in lists[0]]
        for side, names in zip(SIDES, lists, strict=True):
            for name in names:
                if name not in shared:
                    print(f"only in the {side} one: {name}", file=sys.stderr)
        pairs = {name: Pair([], []) for name in shared}
        for number in range(rounds):
            # Another first one in every round, or one would always follow the same.
            start = number % max(len(shared), 1)
            for name in shared[start:] + shared[:start]:
                turns = [(old, pairs[name].old), (new, pairs[name].new)]
                for worker, seconds in turns if number % 2 else reversed(turns):
                    seconds.append(worker.seconds(name))
        rows += [pair.row(name) for name, pair in pairs.items()]
        for worker in (old, new):
            worker.go_on()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, required=True, help="the other checkout")
    parser.add_argument("--new", type=Path, default=ROOT, help="this one, usually")
    parser.add_argument("--rounds", type=int, default=7, help="times each one runs")
    parser.add_argument("--out", type=Path, help="a file of JSON for the table")
    parser.add_argument("script", help="one of examples/benchmarks, its arguments next")
    given, rest = parser.parse_known_args(arguments)
    checkouts = [given.old.resolve(), given.new.resolve()]
    for checkout in checkouts:
        if not (checkout / "examples" / "benchmarks" / given.script).is_file():
            parser.error(f"{checkout} has no examples/benchmarks/{given.script}")
    if given.rounds < 1:
        parser.error("--rounds: at least 1")
    # What the scripts write by themselves is not wanted.
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = []
        for checkout in checkouts:
            workers.append(Worker(checkout, given.script, rest, folder))
            stack.callback(workers[-1].close)
        rows = compare(*workers, given.rounds)
    if rows:
        columns = list(rows[0])
        print(" | ".join(columns))
        for row in rows:
            print(" | ".join(shown(row[column]) for column in columns))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def shown(value: Any) -> str:
    """A cell; a time in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        sys.exit(main())
