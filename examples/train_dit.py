"""Train a small diffusion transformer with SF-NorMuon and sample it from a cache.

    python examples/train_dit.py                        # digits, about two minutes
    python examples/train_dit.py --steps 1250           # the same for longer
    python examples/train_dit.py --optimizer adamw      # to compare optimizers
    python examples/train_dit.py --data my_images       # one subfolder per class
    python examples/train_dit.py --data my_images --latents vae      # in its latents
    python examples/train_dit.py --mesh data=2,fsdp=4   # on eight devices
    python examples/train_dit.py --resume               # continue after Ctrl-C

The parts are in `dit_training/`, one subject per file; this file puts them together.
"""

import contextlib
import json
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dit_training import (
    autoencoder,
    devices,
    folders,
    optimizers,
    options,
    report,
    sampling,
    training,
)
from dit_training.checkpoints import Checkpoints
from dit_training.data import Dataset, load
from dit_training.errors import RunError
from jax.sharding import Mesh
from tqdm import tqdm

from fusionopt_jax import dit

FETCH_EVERY = 10
"""Steps between two looks at the losses: a look waits for the device."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        given = options.parse(arguments)
        if given.processes > 1:
            devices.join(given.coordinator, given.processes, given.process_id)
        settings, folder = options.resolve(given)
        mesh = devices.start(settings.mesh, given.processes)
        run(settings, folder, mesh, resume=given.resume)
    except RunError as error:
        print(f"train_dit.py: error: {error}", file=sys.stderr)
        return devices.left(2)
    except OSError as error:
        print(
            f"train_dit.py: error: {error}; what was written before is kept",
            file=sys.stderr,
        )
        return devices.left(2)
    except KeyboardInterrupt as stopped:
        if str(stopped):
            # All of them have stopped at this step.
            devices.part()
        print(f"stopped; {str(stopped) or 'what was written is kept'}", file=sys.stderr)
        return devices.left(130)
    except Exception as error:
        if not devices.several():
            raise
        lost = devices.lost(error)
        if lost is None:
            traceback.print_exc()
            return devices.left(1)
        print(f"train_dit.py: error: {lost}", file=sys.stderr)
        return devices.left(3)
    return 0


def run(
    settings: options.Settings, folder: Path, mesh: Mesh | None, *, resume: bool
) -> None:
    """Train, sample, measure; everything worth keeping lands in `folder`."""
    coder = None
    if settings.latents is not None:
        coder = autoencoder.load(settings.latents)
    data = load(settings.data, keep_bytes=coder is not None)
    model = options.model_config(settings, data, coder)
    placed = None if mesh is None else devices.placement(mesh, settings, model)
    first = devices.is_first()
    with folders.claimed(folder) if first else contextlib.nullcontext():
        if not resume and folders.has_checkpoint(folder):
            raise RunError(
                f"--out {folder}: it already holds a run; continue it with --resume, "
                "or give another folder"
            )
        config = options.full_config(settings, data, model, coder)
        with contextlib.closing(
            Checkpoints(folder / "checkpoints", config)
        ) as checkpoints:
            state = first_state(settings, model, placed, checkpoints, resume)
            if first:
                # Only now: a refused --resume must leave the folder as it was.
                write_json(folder / "config.json", config)
                print(summary_of_start(settings, data, state.params, mesh))
            if coder is not None:
                with devices.first_before_others("latents"):
                    data = coder.encoded(data, folder / "latents.npz")
            metrics = (
                report.MetricsFile(folder / "metrics.csv", int(state.step))
                if first
                else report.NoMetrics()
            )
            state = train(
                state, settings, model, placed, data, metrics, checkpoints, folder
            )
        params = optimizers.deployed(settings.optimizer, state.opt_state, state.params)
        if placed is not None:
            params = placed.collected(params)
        # The rest is for one device. Others that waited for it would do so too long.
        devices.part()
        if first:
            measure(params, settings, model, data, folder, coder)


def first_state(
    settings: options.Settings,
    model: dit.DiTConfig,
    placed: devices.Placement | None,
    checkpoints: Checkpoints,
    resume: bool,
) -> training.TrainState:
    """A fresh state, or that of the checkpoint to go on from."""
    start = partial(training.init_state, model, settings.optimizer, settings.seed)
    if not resume:
        return start() if placed is None else placed.first_state(start)
    state = checkpoints.restore(
        jax.eval_shape(start) if placed is None else placed.shapes
    )
    if int(state.step) > settings.steps:
        raise RunError(
            f"--steps {settings.steps}: {checkpoints.folder} is at step "
            f"{int(state.step)} already; give at least as many"
        )
    return state if placed is None else placed.restored(state)


def steps_and_loss(
    settings: options.Settings,
    model: dit.DiTConfig,
    placed: devices.Placement | None,
    data: Dataset,
) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """`(state, step) -> (state, loss, step size)`, and `params -> validation loss`."""
    horizon = optimizers.horizon(settings.optimizer, settings.steps)
    seed, rate = np.int32(settings.seed), np.float32(settings.learning_rate)
    arrays = data.train_images, data.train_labels
    held_out = data.held_out_images, data.held_out_labels
    validation_loss = training.make_validation_loss(model)
    if placed is None:
        arrays, held_out = jax.tree.map(jnp.asarray, (arrays, held_out))
        step_on_all = training.make_train_step(
            model, settings.optimizer, horizon, settings.batch_size
        )
        return (
            lambda state, _: step_on_all(state, *arrays, seed, rate),
            lambda params: validation_loss(params, *held_out),
        )
    held_out = placed.feed(*held_out, rows=np.arange(len(held_out[0])))
    step_on_batch = training.make_fed_step(
        model, settings.optimizer, horizon, placed.state
    )

    def fed_step(state: training.TrainState, step: int) -> Any:
        """One step, each process handing over what its devices take of the batch."""
        rows = training.rows_on_host(
            settings.seed, step - 1, len(arrays[0]), settings.batch_size
        )
        return step_on_batch(state, *placed.feed(*arrays, rows=rows), seed, rate)

    return fed_step, lambda params: validation_loss(params, *held_out)


def train(
    state: training.TrainState,
    settings: options.Settings,
    model: dit.DiTConfig,
    placed: devices.Placement | None,
    data: Dataset,
    metrics: report.MetricsFile | report.NoMetrics,
    checkpoints: Checkpoints,
    folder: Path,
) -> training.TrainState:
    """Make the steps that are left; a checkpoint is written only of finite numbers."""
    train_step, validation_loss = steps_and_loss(settings, model, placed, data)
    done = int(state.step)
    started = time.perf_counter() - metrics.last.seconds
    pending: list[tuple[jax.Array, jax.Array]] = []
    with (
        interruptible() as interrupted,
        tqdm(
            total=settings.steps,
            initial=done,
            unit="step",
            smoothing=0.1,
            disable=not devices.is_first(),
        ) as bar,
    ):
        for step in range(done + 1, settings.steps + 1):
            state, loss, step_size = train_step(state, step)
            pending.append((loss, step_size))
            evaluating = step % settings.eval_every == 0 or step == settings.steps
            looking = evaluating or len(pending) == FETCH_EVERY
            # Several processes stop at the same step: they ask when they look anyway.
            asking = looking or not devices.several()
            stopping = asking and devices.agreed(interrupted.is_set())
            if not (stopping or looking):
                continue

            rows = [
                report.Row(number, float(loss), float(step_size), None, elapsed)
                for elapsed in [time.perf_counter() - started]
                for number, (loss, step_size) in enumerate(
                    jax.device_get(pending), step + 1 - len(pending)
                )
            ]
            pending = []
            check_losses(rows, metrics, folder, checkpoints)
            if stopping or evaluating:
                params = optimizers.deployed(
                    settings.optimizer, state.opt_state, state.params
                )
                if evaluating:
                    rows[-1] = rows[-1]._replace(
                        validation_loss=float(validation_loss(params)),
                        seconds=time.perf_counter() - started,
                    )
            # Before the checkpoint: a row too many is dropped on resume, a missing one
            # would stay missing.
            metrics.add(rows)
            if (stopping or evaluating) and not checkpoints.save(state, params):
                raise diverged("a weight", step, folder, checkpoints)
            bar.update(len(rows))
            bar.set_postfix_str(
                f"loss {rows[-1].loss:.3f}, rate x {rows[-1].step_size:.2f}"
            )
            if stopping:
                raise KeyboardInterrupt(
                    f"step {step} is saved, continue with --resume --out {folder}"
                )
    return state


def measure(
    params: Any,
    settings: options.Settings,
    model: dit.DiTConfig,
    data: Dataset,
    folder: Path,
    coder: autoencoder.Autoencoder | None,
) -> None:
    """Sample the deployed weights and judge them; the figures land in summary.json."""
    rows = report.read_metrics(folder / "metrics.csv")
    report.plot_losses(rows, settings.optimizer, folder / "loss.png")
    validation = [
        row.validation_loss for row in rows if row.validation_loss is not None
    ]
    summary = {
        "optimizer": settings.optimizer,
        "steps": settings.steps,
        "validation_loss": validation[-1],
        **sampling.measure(
            params,
            model,
            data,
            settings,
            folder / "samples.png",
            decode=None if coder is None else coder.decode,
        ),
        "training_seconds": rows[-1].seconds,
    }
    write_json(folder / "summary.json", summary)
    print(summary_text(summary, folder))
    if summary["max_cache_difference"] > sampling.CACHE_TOLERANCE:
        raise RunError(
            f"samples with and without the cache differ by "
            f"{summary['max_cache_difference']:.1e}, more than "
            f"{sampling.CACHE_TOLERANCE:g}; please report it with {folder}/config.json"
        )


def check_losses(
    rows: list[report.Row],
    metrics: report.MetricsFile | report.NoMetrics,
    folder: Path,
    checkpoints: Checkpoints,
) -> None:
    """Stop at the first loss that is no number; the rows up to it are kept."""
    for place, row in enumerate(rows):
        if not math.isfinite(row.loss):
            metrics.add(rows[: place + 1])
            raise diverged(f"the loss ({row.loss})", row.step, folder, checkpoints)


def diverged(what: str, step: int, folder: Path, checkpoints: Checkpoints) -> RunError:
    """The error for numbers that are NaN or infinite."""
    last = checkpoints.latest()
    kept = (
        "no checkpoint had been written yet"
        if last is None
        else f"the last good checkpoint is {folder / 'checkpoints' / str(last)}"
    )
    return RunError(
        f"{what} is not finite at step {step}; {kept}; start again with a lower "
        "--learning-rate"
    )


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a request to stop after the step; a second one stops at once."""
    requested = threading.Event()

    def request(_signal: int, _frame: object) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    # Elsewhere than in the main thread signals can't be caught, nor do they arrive.
    signals = (
        (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    previous = {number: signal.signal(number, request) for number in signals}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def summary_of_start(
    settings: options.Settings, data: Dataset, params: Any, mesh: Mesh | None
) -> str:
    """What is about to be trained, on what, and where."""
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    where = ""
    if mesh is not None:
        axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        where = (
            f"; {mesh.size} devices ({axes}) of {jax.process_count()} "
            f"process{'es' if jax.process_count() > 1 else ''}"
        )
    return (
        f"{len(data.train_images)} images of {len(data.class_names)} classes to train "
        f"on, {len(data.held_out_images)} held out; {weights:,} weights; "
        f"{settings.optimizer}, learning rate {settings.learning_rate:g}{where}"
    )


def summary_text(summary: dict, folder: Path) -> str:
    """The figures of summary.json for people."""
    cache = (
        f"{summary['cached_seconds']:.2f} s with the cache (and "
        f"{summary['cache_build_seconds']:.2f} s to build it), "
        f"{summary['uncached_seconds']:.2f} s without; largest difference "
        f"{summary['max_cache_difference']:.1e}"
    )
    return "\n".join(
        [
            f"validation loss   {summary['validation_loss']:.4f} after "
            f"{summary['steps']} steps, {summary['training_seconds']:.0f} s",
            f"label accuracy    {summary['label_accuracy']:.3f} of "
            f"{summary['generated_images']} unguided samples (held-out real images "
            f"{summary['label_accuracy_real']:.3f})",
            f"Fréchet distance  {summary['frechet_distance']:.2f} (real training "
            f"images {summary['frechet_distance_real']:.2f}, class means "
            f"{summary['frechet_distance_class_means']:.2f})",
            f"sampling          {summary['timed_images']} guided images: {cache}",
            f"written to        {folder}",
        ]
    )


def write_json(path: Path, content: dict) -> None:
    """Write a readable JSON file."""
    folders.write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
