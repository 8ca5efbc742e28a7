"""How many steps does fusion need for the best loss that tuned AdamW reaches at all?

    python examples/benchmarks/compare_optimizers.py --out runs/compare

For every seed, AdamW with warm-up and cosine trains to the end with each learning rate;
the best validation loss that any of them shows at any evaluation is the target. Fusion,
with its one default setting and no schedule, then trains until an evaluation is at or
below the target. Both see the same model, the same initial weights, the same images in
the same order and the same noise. Each run is added to `results.json` as it ends, so a
comparison that was stopped goes on where it was when the command is repeated.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training import folders, optimizers, options, training
from dit_training.data import load
from dit_training.errors import RunError

ACCEPTED_RATIO = 0.7
STEPS = 1250
"""Of every run; twice the main job's, for AdamW's best is its last."""
SIZES = ("batch_size", "hidden_size", "depth")


class Run(NamedTuple):
    """One training run.

    Attributes:
        optimizer: its name.
        learning_rate: its peak.
        seed: of weights, order, times and noise.
        curve: pairs of step and validation loss.
        seconds: of training, compilation and validation excluded.
    """

    optimizer: str
    learning_rate: float
    seed: int
    curve: list[tuple[int, float]]
    seconds: float

    @property
    def best(self) -> tuple[float, int]:
        """The lowest validation loss and the first step that shows it."""
        return min((loss, step) for step, loss in self.curve)


class Bench:
    """The model, the data and the compiled functions that all runs share."""

    def __init__(self, settings: options.Settings) -> None:
        data = load(settings.data)
        self.settings = settings
        self.model = options.model_config(settings, data)
        self.images = jnp.asarray(data.train_images)
        self.labels = jnp.asarray(data.train_labels)
        self.held_out = (
            jnp.asarray(data.held_out_images),
            jnp.asarray(data.held_out_labels),
        )
        self.validation_loss = training.make_validation_loss(self.model)
        self.steps: dict[str, Callable[..., Any]] = {
            name: training.make_train_step(
                self.model,
                name,
                optimizers.horizon(name, settings.steps),
                settings.batch_size,
            )
            for name in ("adamw", "fusion")
        }

    def run(
        self, optimizer: str, rate: float, seed: int, target: float = -math.inf
    ) -> Run:
        """Train until the validation loss is at or below `target`, or to the end."""
        state = training.init_state(self.model, optimizer, seed)
        arguments = self.images, self.labels, jnp.int32(seed), jnp.float32(rate)
        # The first step compiles; its result is thrown away.
        copy = jax.tree.map(jnp.copy, state)
        jax.block_until_ready(self.steps[optimizer](copy, *arguments))

        curve: list[tuple[int, float]] = []
        seconds = 0.0
        started = time.perf_counter()
        title = f"{optimizer} {rate:g} seed {seed}"
        bar = tqdm(range(1, self.settings.steps + 1), title, unit="step")
        for step in bar:
            state, _, _ = self.steps[optimizer](state, *arguments)
            if step % self.settings.eval_every and step != self.settings.steps:
                continue
            jax.block_until_ready(state)
            seconds += time.perf_counter() - started
            params = optimizers.deployed(optimizer, state.opt_state, state.params)
            loss = float(self.validation_loss(params, *self.held_out))
            curve.append((step, loss))
            bar.set_postfix_str(f"validation {loss:.4f}")
            if loss <= target or not math.isfinite(loss):
                break
            started = time.perf_counter()
        bar.close()
        finite = [(step, loss) for step, loss in curve if math.isfinite(loss)]
        return Run(optimizer, rate, seed, finite, seconds)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if fusion needs more steps than is accepted."""
    given = parse(arguments)
    settings = options.Settings(
        **{
            name: getattr(given, name)
            for name in ("steps", "eval_every", "data", *SIZES)
        }
    )
    try:
        with folders.claimed(given.out):
            ratio = compare_all(given, Results(given.out, settings), Bench(settings))
    except RunError as error:
        print(f"compare_optimizers.py: error: {error}", file=sys.stderr)
        return 2
    print(f"median ratio of steps {ratio:.2f}, accepted up to {ACCEPTED_RATIO}")
    return 0 if ratio <= ACCEPTED_RATIO else 1


def compare_all(given: argparse.Namespace, results: "Results", bench: Bench) -> float:
    """Make the runs that are not there yet; the median ratio of steps."""
    rows = []
    for seed in given.seeds:
        adamw = [
            results.get("adamw", rate, seed)
            or results.add(bench.run("adamw", rate, seed))
            for rate in given.adamw_learning_rates
        ]
        target = min(run.best[0] for run in adamw if run.curve)
        rate = given.fusion_learning_rate
        fusion = results.get("fusion", rate, seed) or results.add(
            bench.run("fusion", rate, seed, -math.inf if given.full else target)
        )
        rows.append(compare(adamw, fusion))
        results.write(rows)
        print(table(rows))
    plot(results.runs, given.out / "curves.png")
    return results.write(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Steps that fusion needs for AdamW's best validation loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = options.Settings()
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument(
        "--adamw-learning-rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3]
    )
    parser.add_argument(
        "--fusion-learning-rate",
        type=float,
        default=optimizers.LEARNING_RATES["fusion"],
    )
    parser.add_argument(
        "--full", action="store_true", help="train fusion to the end as well"
    )
    for name in ("data", *SIZES):
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value
        )
    return parser.parse_args(arguments)


class Results:
    """`results.json`: the settings, every run so far, and the comparison per seed."""

    def __init__(self, folder: Path, settings: options.Settings) -> None:
        self.path = folder / "results.json"
        self.settings = {
            name: getattr(settings, name)
            for name in ("steps", "eval_every", "data", *SIZES)
        }
        self.runs: list[Run] = []
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            before = saved["settings"]
            if before != self.settings:
                raise RunError(
                    f"{self.path} comes from other settings ({before}); "
                    "give the same ones or another --out"
                )
            self.runs = [Run(**run) for run in saved["runs"]]

    def get(self, optimizer: str, rate: float, seed: int) -> Run | None:
        """A run of an earlier call."""
        wanted = (optimizer, rate, seed)
        return next((run for run in self.runs if run[:3] == wanted), None)

    def add(self, run: Run) -> Run:
        """Keep a run."""
        self.runs.append(run)
        self.write([])
        return run

    def write(self, seeds: list[dict[str, Any]]) -> float:
        """Write the file; returns the median ratio of steps over the seeds."""
        ratio = statistics.median([row["ratio"] for row in seeds] or [math.nan])
        content = {
            "settings": self.settings,
            "median_ratio": ratio if math.isfinite(ratio) else None,
            "accepted_ratio": ACCEPTED_RATIO,
            "seeds": [
                row | {"ratio": row["ratio"] if row["fusion_steps"] else None}
                for row in seeds
            ],
            "runs": [run._asdict() for run in self.runs],
        }
        folders.write_whole(self.path, json.dumps(content, indent=1) + "\n")
        return ratio


def compare(adamw: list[Run], fusion: Run) -> dict[str, Any]:
    """AdamW's best over its learning rates, and when fusion was as good."""
    best = min((run for run in adamw if run.curve), key=lambda run: run.best)
    loss, steps = best.best
    reached = [step for step, value in fusion.curve if value <= loss]
    return {
        "seed": fusion.seed,
        "adamw_learning_rate": best.learning_rate,
        "adamw_best_loss": loss,
        "adamw_steps": steps,
        "fusion_learning_rate": fusion.learning_rate,
        "fusion_best_loss": fusion.best[0],
        "fusion_steps": reached[0] if reached else None,
        "ratio": reached[0] / steps if reached else math.inf,
        "adamw_seconds_per_step": best.seconds / best.curve[-1][0],
        "fusion_seconds_per_step": fusion.seconds / fusion.curve[-1][0],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison for people."""
    lines = ["seed  AdamW rate  best loss  at step  fusion at step  ratio  s/step"]
    for row in rows:
        lines.append(
            f"{row['seed']:4d}  {row['adamw_learning_rate']:10g}  "
            f"{row['adamw_best_loss']:9.4f}  {row['adamw_steps']:7d}  "
            f"{row['fusion_steps'] or 'never':>14}  {row['ratio']:5.2f}  "
            f"{row['adamw_seconds_per_step']:.3f}, {row['fusion_seconds_per_step']:.3f}"
        )
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """All validation curves; one colour per setting, one line per seed."""
    settings = sorted({(run.optimizer, run.learning_rate) for run in runs})
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, setting in enumerate(settings):
        same = [run for run in runs if run[:2] == setting and run.curve]
        for place, run in enumerate(same):
            axes.plot(
                *zip(*run.curve, strict=True),
                color=f"C{number}",
                alpha=0.8,
                linewidth=1.2,
                label="_" * (place > 0) + f"{setting[0]} {setting[1]:g}",
            )
    axes.set(xlabel="step", ylabel="validation loss", yscale="log")
    axes.set_ylim(top=0.8)
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:.2g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
