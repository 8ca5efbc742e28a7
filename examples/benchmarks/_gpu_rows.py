"""The groups of rows of `on_gpu.py`, out of what the other benchmarks measure with.

Each is a function of a `Plan` that yields one row after another, and looks at the time
that is left before it begins with something that it can do without.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import _gpu_peaks
import _measure as measure
import jax
import jax.numpy as jnp
import newton_schulz
import optimizer_step
import sampler
import train_step

from fusionopt_jax import dit

Row = dict[str, Any]

# A model that any machine runs in a moment, to try the script on.
SMALL = dit.DiTConfig(
    input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=10
)
# What takes longest to compile comes last.
STEPS = (
    "fusionopt SF-NorMuon",
    "optax.contrib.muon",
    "optax.adamw",
    "fusionopt SF-AdamW",
    "fusionopt SF-NorMuon + KL-Shampoo",
)
BUCKETINGS = "fusionopt ns5 (Muon)"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        small: Tiny shapes, for a machine without a GPU.
        rounds: Times each candidate runs.
        end: When to stop, on the clock of `time.monotonic`.
    """

    small: bool
    rounds: int
    end: float

    @property
    def seconds_left(self) -> float:
        """Until the end."""
        return self.end - time.monotonic()

    def config(self, preset: str) -> dit.DiTConfig:
        """A preset, or what stands for it."""
        return SMALL if self.small else dit.CONFIGS[preset]

    @property
    def dtype(self) -> Any:
        """Of activations: what CPUs multiply no faster they needn't round to."""
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def newton_schulz_rows(plan: Plan) -> Iterator[Row]:
    """Each dtype in both forms beside a plain product, and shares of the peak."""
    shapes = ((1152, 4608), (1152, 1152), (768, 3072), (384, 1536))
    count = 2 if plan.small else 28
    quintic = {"coefficients": "quintic", "steps": 5}
    chosen = {
        f"{dtype}, {method}": {**quintic, "method": method, "hot_dtype": dtype}
        for dtype in ("fp16", "bf16", "fp32")
        for method in ("gram", "plain")
    }
    kind = jax.devices()[0].device_kind
    for shape in ((16, 64),) if plan.small else shapes:
        if cut := _cut(plan, f"{shape[0]} x {shape[1]}", least=25):
            yield cut
            continue
        options = argparse.Namespace(count=count, rounds=plan.rounds)
        for row in newton_schulz.time_all(chosen, (shape,), options):
            dtype = row["variant"].split(",")[0]
            best = _gpu_peaks.peak(kind, dtype)
            rate = row["GFLOP/s"] / 1e3
            yield {
                "what": f"{count} of {row['shape']}, {row['variant']}",
                "ms": row["ms"],
                "low": row["low ms"],
                "high": row["high ms"],
                "TFLOP/s": rate,
                "of peak %": None if best is None else 100 * rate / best,
                "of plain product %": row["of plain product %"],
            }


def optimizer_rows(plan: Plan) -> Iterator[Row]:
    """A whole step of each optimizer on a DiT-B/2 with stacked blocks."""
    yield from _steps(plan, lambda _: STEPS, separate=False)


def bucketing_rows(plan: Plan) -> Iterator[Row]:
    """A loop over matrices against batches, blocks stacked or leaves of their own.

    The first of each pair is the default.
    """
    for separate in (False, True):
        layers = "separate blocks" if separate else "stacked blocks"
        if cut := _cut(plan, layers, least=40 if separate else 0):
            yield cut
            continue
        both = lambda names: [n for n in names if n.startswith(BUCKETINGS)]  # noqa: E731
        for row in _steps(plan, both, separate=separate):
            yield {**row, "what": f"{row['what']}, {layers}"}


def sampler_rows(plan: Plan) -> Iterator[Row]:
    """DiT-XL/2 with a cache of modulators and without one, milliseconds a step."""
    preset, steps = "DiT-XL/2", 2 if plan.small else 10
    cases = [(1, 0), (8, 0), (64, 0), (1, 1)]
    for batch, unroll in [(1, 0)] if plan.small else cases:
        # Writing 28 blocks out is what takes longest to compile.
        what = f"batch {batch}, unroll={bool(unroll)}"
        if cut := _cut(plan, what, least=60 if unroll else 20):
            yield cut
            continue
        options = argparse.Namespace(steps=steps, unroll=[unroll], rounds=plan.rounds)
        for row in sampler.time_preset(
            preset, batch, plan.dtype, options, plan.config(preset)
        ):
            yield {
                "what": f"batch {batch}, {row['blocks']}, {row['modulators']}",
                "ms": row["ms a step"],
                "low": row["low"],
                "high": row["high"],
                "saved %": row["saved %"],
            }


def train_rows(plan: Plan) -> Iterator[Row]:
    """Loss and gradient of a DiT-B/2, and a whole SF-NorMuon step."""
    config = plan.config("DiT-B/2")
    batch = 2 if plan.small else 64
    shapes = jax.eval_shape(lambda: dit.init_params(config))
    params = measure.random_like(shapes, seed=0)
    images = jnp.ones((batch, *(2 * [config.input_size]), config.in_channels))
    labels = jnp.zeros(batch, jnp.int32)
    runs: dict[str, Callable[[], Any]] = {}
    whole, optimizer = train_step.whole_step(config, plan.dtype, shapes, images, labels)
    runs["whole SF-NorMuon step"] = train_step.Stepper(
        whole.call, params, optimizer, images, labels
    )
    for name, settings in {"": {}, ", rematerialised": {"remat": True}}.items():
        what = f"loss and gradient{name}"
        if cut := _cut(plan, what, least=30):
            yield cut
            continue
        loss = train_step.loss_of(config, dtype=plan.dtype, **settings)
        call = measure.compile_function(
            jax.value_and_grad(loss), shapes, images, labels
        ).call
        runs[what] = lambda call=call: call(params, images, labels)
    for what, times in measure.interleave(runs, plan.rounds).items():
        yield _row(f"{what}, batch {batch}", times)


GROUPS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "Newton-Schulz": newton_schulz_rows,
    "sampler, DiT-XL/2": sampler_rows,
    "optimizer step, DiT-B/2": optimizer_rows,
    "loop and batch, DiT-B/2": bucketing_rows,
    "training step, DiT-B/2": train_rows,
}
"""Names of the groups, in the order in which they are measured."""


def _steps(
    plan: Plan, choose: Callable[[Iterable[str]], Iterable[str]], *, separate: bool
) -> Iterator[Row]:
    """A step of each chosen optimizer, in turn, compiled in the order given."""
    shapes = optimizer_step.shapes_of(plan.config("DiT-B/2"), separate=separate)
    params = measure.random_like(shapes, seed=0)
    grads = measure.random_like(shapes, seed=1)
    known = optimizer_step.candidates(shapes)
    runners: dict[str, Callable[[], Any]] = {}
    temporary = {}
    slowest = 0.0
    for name in choose(known):
        optimizer = known[name]
        # As long as the slowest took, and as long again to run them all.
        if runners and (cut := _cut(plan, name, least=2 * slowest)):
            yield cut
            continue
        before = time.monotonic()
        state = jax.eval_shape(optimizer.init, shapes)
        compiled = measure.compile_function(
            optimizer_step.step_of(optimizer), shapes, state, shapes, donate=(0, 1)
        )
        runners[name] = optimizer_step.Runner(compiled, optimizer, params, grads)
        temporary[name] = compiled.temporary_bytes / measure.tree_size(shapes)
        slowest = max(slowest, time.monotonic() - before)
    for name, times in measure.interleave(runners, plan.rounds).items():
        yield {**_row(name, times), "temp B/param": temporary[name]}


def _row(what: str, times: measure.Times) -> Row:
    """A line of the table."""
    median, low, high = (1e3 * seconds for seconds in times)
    return {"what": what, "ms": median, "low": low, "high": high}


def _cut(plan: Plan, what: str, *, least: float) -> Row | None:
    """What stands for a row that there is no time for."""
    if plan.small or plan.seconds_left >= least:
        return None
    return {"what": what, "left out": f"{max(plan.seconds_left, 0):.0f} s were left"}
