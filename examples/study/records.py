"""One JSON file per finished run, written whole, and how to find them again."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from dit_training.folders import write_whole


class Job(NamedTuple):
    """What says which run it is.

    Attributes:
        workload: its name.
        method: name of the row.
        rate: learning rate.
        decay: weight decay of the matrices.
        seed: of weights, order and noise; 0 is the one that is tuned on.
        steps: how long.
    """

    workload: str
    method: str
    rate: float
    decay: float
    seed: int
    steps: int

    @property
    def path(self) -> Path:
        """Where its file lies, below the folder of results."""
        name = (
            f"rate{self.rate:.4g}_decay{self.decay:g}_seed{self.seed}_{self.steps}.json"
        )
        return Path(self.workload) / self.method / name


class Record(NamedTuple):
    """A finished run.

    Attributes:
        job: which one.
        eval_every: steps between two validations; the first comes after so many.
        curve: validation losses, up to the end or to the first that is no number.
        step_sizes: the shared factor every 50 steps, where there is one.
        figures: of generated images.
        seconds: of training, without compilation and validation; on a CPU those of the
            processor.
        total_seconds: of the whole run, by the same clock.
        state_bytes: size of the optimiser's state.
        param_bytes: size of the weights.
        data: hash of the data.
        versions: of what it ran with, and on which device.
    """

    job: Job
    eval_every: int
    curve: list[float]
    step_sizes: list[float]
    figures: dict[str, float]
    seconds: float
    total_seconds: float
    state_bytes: int
    param_bytes: int
    data: str
    versions: dict[str, str]

    @property
    def final(self) -> float:
        """The last validation loss; infinite if the run broke off."""
        whole = len(self.curve) * self.eval_every == self.job.steps
        return self.curve[-1] if whole else math.inf

    @property
    def best(self) -> float:
        """The lowest validation loss."""
        return min(self.curve, default=math.inf)

    def steps_to(self, loss: float) -> float | None:
        """Where the curve first comes down to a loss, between its points by a line."""
        before = None
        for place, value in enumerate(self.curve, 1):
            step = place * self.eval_every
            if value <= loss:
                if before is None or value == before:
                    return float(step)
                return step - self.eval_every * (loss - value) / (before - value)
            before = value
        return None


def write(folder: Path, record: Record) -> None:
    """Write a run's file."""
    path = folder / record.job.path
    path.parent.mkdir(parents=True, exist_ok=True)
    content = record._asdict() | {"job": record.job._asdict()}
    write_whole(path, json.dumps(content, separators=(",", ":")) + "\n")


def read(path: Path) -> Record:
    """Read a run's file."""
    content: dict[str, Any] = json.loads(path.read_text())
    return Record(**content | {"job": Job(**content["job"])})


def read_all(folder: Path) -> dict[Job, Record]:
    """Every run that has finished."""
    found = [read(path) for path in sorted(folder.glob("*/*/*.json"))]
    return {record.job: record for record in found}
