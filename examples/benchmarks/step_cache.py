"""What does a step cache save, and what does it cost in quality?

    python examples/benchmarks/step_cache.py --out runs/step_cache

Trains two DiTs of 1.3 million weights on handwritten digits (about five minutes each on
two CPU cores; a folder that has them is read), one whose velocity Euler follows and one
whose noise DDIM takes away, and samples each of them with 10, 25 and 50 steps: as they
are, with step caches of 1.5 to 4 times fewer evaluations, and with so many evaluations
of the same sampler in fewer steps and of DPM-Solver++ or Heun, which is what one would
do instead. Of each it gives the Fréchet distance to held-out images over five seeds,
the distance of the images to those of the same noise without a step cache, and the
latency at batch 1 and 8.

It takes about an hour on two cores. Every figure is written to `step_cache.json` as it
comes, and a repeated command goes on from there. `--only latency` measures times alone,
which wants a machine that does nothing else.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import _measure as measure
import _step_cache_models as models
import _step_cache_pictures as pictures
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training import folders, options, quality
from dit_training.data import load

from fusionopt_jax import dit
from fusionopt_jax.dit.sampling.calibrate import Residuals, measure_residuals

RATIOS = (1.5, 2.0, 3.0, 4.0)
SEEDS = range(5)
IMAGES = 500
CALIBRATION_LABELS = np.arange(20) % 10
OBJECTIVES = {"euler": "flow", "ddim": "diffusion"}
STEPS = (50, 25, 10)
IN_DETAIL = (("ddim", 50), ("euler", 25))
"""Where other orders, even steps and branches apart are measured too."""

ORDER = 1
"""Order of the extrapolation that is recommended."""

CACHED = ("step cache", "branches", "every n-th step")
"""Kinds that have a step cache: calibrated, for all blocks together or for branches
apart, or without a calibration."""


class Case(NamedTuple):
    """One way to sample.

    Attributes:
        start: "ddim" or "euler", the sampler that is to be made faster.
        steps: its steps.
        kind: "uncached", one of `CACHED`, "fewer steps", "DPM-Solver++" or
            "Heun".
        ratio: how many times fewer evaluations.
        order: of the extrapolation; 0 where there is none.
    """

    start: str
    steps: int
    kind: str = "uncached"
    ratio: float = 1.0
    order: int = 0

    @property
    def name(self) -> str:
        """What the results are kept under."""
        order = f" of order {self.order}" if self.kind in CACHED else ""
        return f"{self.start} {self.steps}, {self.kind}{order}, {self.ratio:g}x"

    @property
    def evaluations(self) -> int:
        """How often the network is computed; for branches, their share of it."""
        if self.kind == "every n-th step":
            return sum(dit.StepCache.every(self.steps, int(self.ratio), order=1).mask)
        count = round(self.steps / self.ratio)
        return count - count % 2 if self.kind == "Heun" else count


def cases(start: str, steps: int) -> Iterator[Case]:
    """Everything that is measured of one sampler."""
    yield Case(start, steps)
    for ratio in RATIOS:
        yield Case(start, steps, "step cache", ratio, ORDER)
        yield Case(start, steps, "fewer steps", ratio)
        if start == "ddim":
            yield Case(start, steps, "DPM-Solver++", ratio)
    if (start, steps) in IN_DETAIL:
        if start == "euler":
            for ratio in RATIOS:
                yield Case(start, steps, "Heun", ratio)
        yield Case(start, steps, "step cache", 2.0, 2)
        yield Case(start, steps, "step cache", 3.0, 2)
        yield Case(start, steps, "step cache", 2.0, 0)
        yield Case(start, steps, "every n-th step", 2.0, ORDER)
        yield Case(start, steps, "every n-th step", 3.0, ORDER)
        yield Case(start, steps, "branches", 2.0, ORDER)


def sampler_of(case: Case) -> dit.Sampler:
    """The sampler of a case."""
    if case.kind == "DPM-Solver++":
        return dit.Sampler.dpm_solver_pp_2m(case.evaluations)
    if case.kind == "Heun":
        # Two evaluations a step.
        return dit.Sampler.heun(case.evaluations // 2)
    steps = case.evaluations if case.kind == "fewer steps" else case.steps
    make = {"ddim": dit.Sampler.ddim, "euler": dit.Sampler.euler}[case.start]
    return make(steps)


class Bench:
    """The models, the judge, and what has been measured already."""

    def __init__(self, given: Any) -> None:
        self.out: Path = given.out
        self.data = load("digits")
        self.config = options.model_config(options.Settings(), self.data)
        self.path = self.out / "step_cache.json"
        self.results: dict[str, Any] = {
            "training_steps": given.training_steps,
            "quality": {},
            "latency": {},
            "masks": {},
        }
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["training_steps"] != given.training_steps:
                sys.exit(
                    f"{self.path} is of models trained for {kept['training_steps']} "
                    "steps; give that --training-steps, or another --out"
                )
            self.results |= kept
        self.training_steps: int = given.training_steps
        self.trained: dict[str, Any] = {}
        self.measured: dict[tuple[str, int, str], Residuals] = {}
        self.labels = jnp.arange(IMAGES, dtype=jnp.int32) % self.config.num_classes

    def params(self, start: str) -> Any:
        """The weights for a sampler, trained if need be."""
        if start not in self.trained:
            self.trained[start] = models.trained(
                OBJECTIVES[start],
                self.config,
                self.data,
                self.training_steps,
                self.out / "models",
            )
        return self.trained[start]

    def write(self) -> None:
        """Keep what there is."""
        self.results["environment"] = measure.environment()
        self.out.mkdir(parents=True, exist_ok=True)
        folders.write_whole(self.path, json.dumps(self.results, indent=1) + "\n")

    def step_cache(self, case: Case) -> dit.StepCache | None:
        """Calibrated once; its masks are kept."""
        if case.kind not in CACHED:
            return None
        if case.kind == "every n-th step":
            return dit.StepCache.every(case.steps, int(case.ratio), order=case.order)
        kept = self.results["masks"]
        if case.name not in kept:
            chosen = self.residuals(case).choose(
                fraction=case.evaluations / case.steps, order=case.order
            )
            names = ("mask", "attention", "mlp")
            masks = {name: getattr(chosen, name) for name in names}
            kept[case.name] = {k: v for k, v in masks.items() if v is not None}
        return dit.StepCache(**kept[case.name], order=case.order)

    def residuals(self, case: Case) -> Residuals:
        """Measured once for each sampler, of the blocks together and of branches."""
        about = (case.start, case.steps, case.kind)
        if about not in self.measured:
            self.measured[about] = measure_residuals(
                self.params(case.start),
                self.config,
                sampler_of(case),
                CALIBRATION_LABELS,
                branches=case.kind == "branches",
                cfg_scale=1.0,
            )
        return self.measured[about]

    def noise(self, seed: int, count: int = IMAGES) -> jax.Array:
        """Where the images of a seed start."""
        side, channels = self.config.input_size, self.config.in_channels
        shape = (IMAGES, side, side, channels)
        return jax.random.normal(jax.random.key(1000 + seed), shape)[:count]

    def images(self, case: Case, noise: jax.Array) -> np.ndarray:
        """What a case draws, on the host."""
        return np.asarray(self.sample(case, noise))

    def sample(self, case: Case, noise: jax.Array) -> jax.Array:
        """What a case draws."""
        return dit.sample(
            self.params(case.start),
            self.config,
            None,
            noise,
            self.labels[: len(noise)],
            sampler_of(case),
            1.0,
            step_cache=self.step_cache(case),
        )


def measure_quality(bench: Bench, start: str, steps: int) -> None:
    """Fréchet distances and distances to the images without a step cache."""
    judge = quality.fit_judge(bench.data)
    whole = Case(start, steps)
    uncached: list[np.ndarray] = []
    for case in cases(start, steps):
        if case.name in bench.results["quality"]:
            continue
        if not uncached:
            uncached = [bench.images(whole, bench.noise(seed)) for seed in SEEDS]
        drawn = uncached
        if case != whole:
            drawn = [bench.images(case, bench.noise(seed)) for seed in SEEDS]
        bench.results["quality"][case.name] = {
            **case._asdict(),
            "evaluations": case.evaluations,
            "frechet": [quality.frechet_distance(judge, images) for images in drawn],
            "distance": [
                float(np.sqrt(np.mean((images - exact) ** 2)))
                for images, exact in zip(drawn, uncached, strict=True)
            ],
        }
        bench.write()
        print(case.name, bench.results["quality"][case.name]["frechet"], flush=True)


def measure_latency(bench: Bench, start: str, steps: int, rounds: int) -> None:
    """All ways to sample in turn, at batch 1 and 8."""
    chosen = [
        case
        for case in cases(start, steps)
        if case.kind not in CACHED or case.order == ORDER
    ]
    for batch in (1, 8):
        noise = bench.noise(0, batch)

        def draw(case: Case, noise: jax.Array = noise) -> Callable[[], jax.Array]:
            return lambda: bench.sample(case, noise)

        times = measure.interleave({case.name: draw(case) for case in chosen}, rounds)
        whole = times[Case(start, steps).name].median
        for name, time in times.items():
            row = bench.results["latency"].setdefault(name, {})
            row[str(batch)] = {
                **{key: 1e3 * value for key, value in time._asdict().items()},
                "faster": whole / time.median,
            }
        bench.write()


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each case that was judged."""
    rows = []
    for name, row in results["quality"].items():
        frechet, distance = row["frechet"], row["distance"]
        latency = results["latency"].get(name, {})
        rows.append(
            {
                "case": name,
                "evaluations": row["evaluations"],
                "Fréchet": statistics.mean(frechet),
                "s.e.": statistics.stdev(frechet) / len(frechet) ** 0.5,
                "distance": statistics.mean(distance),
                **{
                    f"{what} {batch}": latency.get(batch, {}).get(key)
                    for batch in ("1", "8")
                    for what, key in (("ms", "median"), ("times faster", "faster"))
                },
            }
        )
    return rows


def main() -> None:
    """Trains, measures, prints, draws."""
    arguments = measure.parser(__doc__)
    arguments.set_defaults(out=Path("runs/step_cache"))
    arguments.add_argument("--only", choices=("quality", "latency", "pictures"))
    arguments.add_argument(
        "--starts", nargs="*", default=list(OBJECTIVES), choices=OBJECTIVES
    )
    arguments.add_argument("--steps", nargs="*", type=int, default=STEPS)
    arguments.add_argument("--training-steps", type=int, default=1250)
    given = arguments.parse_args()
    bench = Bench(given)
    for start in given.starts:
        for steps in given.steps:
            if given.only in (None, "quality"):
                measure_quality(bench, start, steps)
            if given.only in (None, "latency"):
                measure_latency(bench, start, steps, given.rounds)
    measure.print_table(table(bench.results))
    if given.only in (None, "pictures"):
        for start, steps in IN_DETAIL:
            drawn = {
                case: bench.images(case, bench.noise(0, 10))
                for case in cases(start, steps)
                if case.kind not in CACHED[1:]
                and (case.kind != "step cache" or case.order == ORDER)
            }
            pictures.samples(drawn, given.out / f"step_cache_{start}.png")
        pictures.curves(bench.results["quality"], given.out / "step_cache_curves.png")


if __name__ == "__main__":
    main()
