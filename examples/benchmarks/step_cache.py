"""What does a step cache save, and what does it cost in quality?

    python examples/benchmarks/step_cache.py --model digits --out runs/step_cache

Trains small DiTs, and samples each of them with 10, 25 and 50 steps: as they are, with
step caches of 1.5 to 4 times fewer evaluations, and with so many evaluations of the
same sampler in fewer steps and of DPM-Solver++ or Heun, which is what one would do
instead. Of each it gives the Fréchet distance to held-out images over five seeds, the
distance of the images to those of the same noise without a step cache, and the latency
at batch 1 and 8.

`--model digits` has two models of 1.3 million weights on handwritten digits, one whose
velocity Euler follows and one whose noise DDIM takes away: some minutes of training
each on two CPU cores, and an hour in all. `--model glyphs` has one of 11 million for
DDIM, on 32x32 pictures of characters: an hour of training, and an hour of the rest.

Every figure is written to `step_cache.json` or `step_cache_glyphs.json` as it comes,
and a repeated command goes on from there; models are kept in `models`. `--only latency`
measures times alone, which wants a machine that does nothing else; `--only tables`
prints the tables of what has been measured.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _measure as measure
import _step_cache_models as models
import _step_cache_pictures as pictures
import _step_cache_tables as tables
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit_training import folders, options, quality
from dit_training.data import Dataset

from fusionopt_jax import dit
from fusionopt_jax.dit.sampling.calibrate import Residuals, measure_residuals

RATIOS = (1.5, 2.0, 3.0, 4.0)
SEEDS = range(5)
STEPS = (50, 25, 10)

ORDER = 1
"""Order of the extrapolation that is recommended."""


class Case(NamedTuple):
    """One way to sample.

    Attributes:
        start: "ddim" or "euler", the sampler that is to be made faster.
        steps: its steps.
        kind: one of `tables.KINDS`.
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
        order = f" of order {self.order}" if self.kind in tables.CACHED else ""
        return f"{self.start} {self.steps}, {self.kind}{order}, {self.ratio:g}x"

    @property
    def evaluations(self) -> int:
        """How often the network is computed; for branches, their share of it."""
        if self.kind == "every n-th step":
            return sum(dit.StepCache.every(self.steps, int(self.ratio), order=1).mask)
        count = round(self.steps / self.ratio)
        return count - count % 2 if self.kind == "Heun" else count


def cases(
    start: str, steps: int, ratios: tuple[float, ...], variants: bool
) -> Iterator[Case]:
    """Everything that is measured of one sampler."""
    yield Case(start, steps)
    for ratio in ratios:
        yield Case(start, steps, "step cache", ratio, ORDER)
        yield Case(start, steps, "fewer steps", ratio)
        if start == "ddim":
            yield Case(start, steps, "DPM-Solver++", ratio)
    if variants:
        if start == "euler":
            for ratio in ratios:
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
    """A model, the judge of its images, and what has been measured already."""

    def __init__(self, given: Any) -> None:
        self.out: Path = given.out
        self.model = models.MODELS[given.model]
        self.ratios: tuple[float, ...] = tuple(given.ratios)
        self.path = self.out / f"step_cache{self.model.suffix}.json"
        self.results: dict[str, Any] = {
            "model": given.model,
            "training_steps": self.model.settings.steps,
            "images": self.model.images,
            "quality": {},
            "latency": {},
            "masks": {},
        }
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            for name in ("model", "training_steps", "images"):
                if kept.get(name) != self.results[name]:
                    sys.exit(
                        f"{self.path} has {name} = {kept.get(name)}, not "
                        f"{self.results[name]}; give another --out"
                    )
            self.results |= kept
        self.trained: dict[str, Any] = {}
        self.measured: dict[tuple[str, int, str], Residuals] = {}
        self.drawn: dict[Any, np.ndarray] = {}

    @functools.cached_property
    def data(self) -> Dataset:
        """The images."""
        return self.model.load()

    @functools.cached_property
    def config(self) -> dit.DiTConfig:
        """The sizes of the network."""
        return options.model_config(self.model.settings, self.data)

    @functools.cached_property
    def judge(self) -> quality.Judge:
        """Fitted to the real images."""
        return quality.fit_judge(self.data)

    @property
    def labels(self) -> jax.Array:
        """Of the images of a seed."""
        return jnp.arange(self.model.images) % self.config.num_classes

    def cases(self, start: str, steps: int) -> list[Case]:
        """Everything that is measured of one sampler."""
        variants = (start, steps) in self.model.variants
        return list(cases(start, steps, self.ratios, variants))

    def params(self, start: str) -> Any:
        """The weights for a sampler, trained if need be."""
        if start not in self.trained:
            self.trained[start] = models.trained(
                self.model.settings,
                models.PREDICTED[start],
                self.config,
                self.data,
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
        if case.kind not in tables.CACHED:
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
                np.array(self.model.calibration),
                branches=case.kind == "branches",
                cfg_scale=1.0,
            )
        return self.measured[about]

    def noise(self, seed: int) -> jax.Array:
        """Where the images of a seed start."""
        side, channels = self.config.input_size, self.config.in_channels
        shape = (self.model.images, side, side, channels)
        return jax.random.normal(jax.random.key(1000 + seed), shape)

    def images(self, case: Case, seed: int) -> np.ndarray:
        """What a case draws of a seed, on the host.

        Fewer steps of one sampler are all steps of another: those are drawn once.
        """
        about = (case.start, sampler_of(case), self.step_cache(case), seed)
        if about not in self.drawn:
            noise = self.noise(seed)
            self.drawn[about] = np.asarray(self.sample(case, noise, self.labels))
        return self.drawn[about]

    def sample(self, case: Case, noise: jax.Array, labels: jax.Array) -> jax.Array:
        """What a case draws."""
        return dit.sample(
            self.params(case.start),
            self.config,
            None,
            noise,
            labels,
            sampler_of(case),
            1.0,
            step_cache=self.step_cache(case),
        )


def measure_quality(bench: Bench, steps: Sequence[int]) -> None:
    """Fréchet distances and distances to the images without a step cache."""
    every = [
        case
        for start in bench.model.starts
        for count in steps
        for case in bench.cases(start, count)
    ]
    # One ratio of all samplers after the other, since that is a table's row.
    order = dict.fromkeys((1.0, *bench.ratios, *RATIOS))
    for case in sorted(every, key=lambda case: list(order).index(case.ratio)):
        if case.name in bench.results["quality"]:
            continue
        whole = Case(case.start, case.steps)
        uncached = [bench.images(whole, seed) for seed in SEEDS]
        drawn = [bench.images(case, seed) for seed in SEEDS]
        labels = np.asarray(bench.labels)
        bench.results["quality"][case.name] = {
            **case._asdict(),
            "evaluations": case.evaluations,
            "frechet": [quality.frechet_distance(bench.judge, part) for part in drawn],
            "distance": [
                float(np.sqrt(np.mean((images - exact) ** 2)))
                for images, exact in zip(drawn, uncached, strict=True)
            ],
            "accuracy": [
                quality.label_accuracy(bench.judge, part, labels) for part in drawn
            ],
        }
        bench.write()
        print(case.name, bench.results["quality"][case.name]["frechet"], flush=True)


def measure_latency(bench: Bench, start: str, steps: int, rounds: int) -> None:
    """All ways to sample in turn, at batch 1 and 8."""
    chosen = [
        case
        for case in bench.cases(start, steps)
        if case.kind not in tables.CACHED or case.order == ORDER
    ]
    for batch in (1, 8):
        noise, labels = bench.noise(0)[:batch], bench.labels[:batch]

        def draw(
            case: Case, noise: jax.Array = noise, labels: jax.Array = labels
        ) -> Callable[[], jax.Array]:
            return lambda: bench.sample(case, noise, labels)

        times = measure.interleave({case.name: draw(case) for case in chosen}, rounds)
        whole = times[Case(start, steps).name].median
        for name, time in times.items():
            row = bench.results["latency"].setdefault(name, {})
            row[str(batch)] = {
                **{key: 1e3 * value for key, value in time._asdict().items()},
                "faster": whole / time.median,
            }
        bench.write()


def draw(bench: Bench) -> None:
    """Images of the same noise side by side, and quality against evaluations."""
    shown, suffix = jnp.array(bench.model.shown), bench.model.suffix
    noise, labels = bench.noise(0)[shown], bench.labels[shown]
    for start, steps in bench.model.detailed:
        drawn = {
            case: np.asarray(bench.sample(case, noise, labels))
            for case in bench.cases(start, steps)
            if case.kind not in tables.CACHED[1:]
            and (case.kind != "step cache" or case.order == ORDER)
        }
        name = f"step_cache{suffix}_{start}{steps if suffix else ''}.png"
        pictures.samples(drawn, bench.out / name)
    curves = bench.out / f"step_cache{suffix}_curves.png"
    pictures.curves(bench.results["quality"], bench.model.detailed, curves)


def print_tables(bench: Bench) -> None:
    """The tables of the documentation."""
    results = bench.results
    measured = {(row["start"], row["steps"]) for row in results["quality"].values()}
    detailed = [pair for pair in bench.model.detailed if pair in measured]
    for start, steps in detailed:
        print(f"\n{tables.NAMES[start]}, {steps} steps:\n")
        print(tables.detailed(results, start, steps))
    rest = sorted(measured - set(detailed), key=lambda pair: (pair[0], -pair[1]))
    print("\nWith other numbers of steps:\n")
    print(tables.overview(results, rest))


def main() -> None:
    """Trains, measures, draws, prints."""
    arguments = measure.parser(__doc__)
    arguments.set_defaults(out=Path("runs/step_cache"))
    arguments.add_argument("--model", choices=models.MODELS, default="digits")
    parts = ("quality", "latency", "pictures", "tables")
    arguments.add_argument("--only", choices=parts)
    arguments.add_argument("--steps", nargs="*", type=int, default=STEPS)
    arguments.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    given = arguments.parse_args()
    bench = Bench(given)
    if given.only in (None, "quality"):
        measure_quality(bench, given.steps)
    if given.only in (None, "latency"):
        for start, steps in bench.model.detailed:
            if steps in given.steps:
                measure_latency(bench, start, steps, given.rounds)
    if given.only in (None, "pictures"):
        draw(bench)
    print_tables(bench)


if __name__ == "__main__":
    main()
