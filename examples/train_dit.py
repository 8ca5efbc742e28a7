"""Train a small diffusion transformer with SF-NorMuon and sample it from a cache.

    python examples/train_dit.py                        # digits, about five minutes
    python examples/train_dit.py --optimizer adamw      # to compare optimizers
    python examples/train_dit.py --data my_images       # one subfolder per class
    python examples/train_dit.py --data my_images --latents vae      # in its latents
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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from dit_training import (
    autoencoder,
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
from tqdm import tqdm

from fusionopt_jax import dit

FETCH_EVERY = 10
"""Steps between two looks at the losses: a look waits for the device."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        given = options.parse(arguments)
        settings, folder = options.resolve(given)
        run(settings, folder, resume=given.resume)
    except RunError as error:
        print(f"train_dit.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"train_dit.py: error: {error}; what was written before is kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stopped:
        print(f"stopped; {str(stopped) or 'what was written is kept'}", file=sys.stderr)
        return 130
    return 0


def run(settings: options.Settings, folder: Path, *, resume: bool) -> None:
    """Train, sample, measure; everything worth keeping lands in `folder`."""
    coder = None
    if settings.latents is not None:
        coder = autoencoder.load(settings.latents)
    data = load(settings.data, keep_bytes=coder is not None)
    model = options.model_config(settings, data, coder)
    with folders.claimed(folder):
        if not resume and folders.has_checkpoint(folder):
            raise RunError(
                f"--out {folder}: it already holds a run; continue it with --resume, "
                "or give another folder"
            )
        config = options.full_config(settings, data, model, coder)
        with contextlib.closing(
            Checkpoints(folder / "checkpoints", config)
        ) as checkpoints:
            state = first_state(settings, model, checkpoints, resume)
            # Written only now: a refused --resume must leave the folder as it was.
            write_json(folder / "config.json", config)
            weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            print(
                f"{len(data.train_images)} images of {len(data.class_names)} classes "
                f"to train on, {len(data.held_out_images)} held out; {weights:,} "
                f"weights; {settings.optimizer}, learning rate "
                f"{settings.learning_rate:g}"
            )
            if coder is not None:
                data = coder.encoded(data, folder / "latents.npz")
            metrics = report.MetricsFile(folder / "metrics.csv", int(state.step))
            state = train(state, settings, model, data, metrics, checkpoints, folder)
        measure(state, settings, model, data, folder, coder)


def first_state(
    settings: options.Settings,
    model: dit.DiTConfig,
    checkpoints: Checkpoints,
    resume: bool,
) -> training.TrainState:
    """A fresh state, or that of the checkpoint to go on from."""
    start = partial(training.init_state, model, settings.optimizer, settings.seed)
    if not resume:
        return start()
    state = checkpoints.restore(jax.eval_shape(start))
    if int(state.step) > settings.steps:
        raise RunError(
            f"--steps {settings.steps}: {checkpoints.folder} is at step "
            f"{int(state.step)} already; give at least as many"
        )
    return state


def train(
    state: training.TrainState,
    settings: options.Settings,
    model: dit.DiTConfig,
    data: Dataset,
    metrics: report.MetricsFile,
    checkpoints: Checkpoints,
    folder: Path,
) -> training.TrainState:
    """Make the steps that are left; a checkpoint is written only of finite numbers."""
    train_step = training.make_train_step(
        model,
        settings.optimizer,
        optimizers.horizon(settings.optimizer, settings.steps),
        settings.batch_size,
    )
    validation_loss = training.make_validation_loss(model)
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    held_out = jnp.asarray(data.held_out_images), jnp.asarray(data.held_out_labels)
    seed, rate = jnp.int32(settings.seed), jnp.float32(settings.learning_rate)

    done = int(state.step)
    started = time.perf_counter() - metrics.last.seconds
    pending: list[tuple[jax.Array, jax.Array]] = []
    with (
        interruptible() as interrupted,
        tqdm(total=settings.steps, initial=done, unit="step", smoothing=0.1) as bar,
    ):
        for step in range(done + 1, settings.steps + 1):
            state, loss, step_size = train_step(state, images, labels, seed, rate)
            pending.append((loss, step_size))
            stopping = interrupted.is_set()
            evaluating = step % settings.eval_every == 0 or step == settings.steps
            if not (stopping or evaluating or len(pending) == FETCH_EVERY):
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
                        validation_loss=float(validation_loss(params, *held_out)),
                        seconds=time.perf_counter() - started,
                    )
            # Before the checkpoint: a row too many is dropped on resume, a missing one
            # would stay missing.
            metrics.add(rows)
            if (stopping or evaluating) and not checkpoints.save(state, params):
                raise diverged("a weight", step, folder, checkpoints)
            bar.update(len(rows))
            bar.set_postfix_str(f"loss {rows[-1].loss:.3f}, γ {rows[-1].step_size:.2f}")
            if stopping:
                raise KeyboardInterrupt(
                    f"step {step} is saved, continue with --resume --out {folder}"
                )
    return state


def measure(
    state: training.TrainState,
    settings: options.Settings,
    model: dit.DiTConfig,
    data: Dataset,
    folder: Path,
    coder: autoencoder.Autoencoder | None,
) -> None:
    """Sample the deployed weights and judge them; the figures land in summary.json."""
    rows = report.read_metrics(folder / "metrics.csv")
    report.plot_losses(rows, settings.optimizer, folder / "loss.png")
    params = optimizers.deployed(settings.optimizer, state.opt_state, state.params)
    validation = [
        row.validation_loss for row in rows if row.validation_loss is not None
    ]
    summary = {
        "optimizer": settings.optimizer,
        "steps": int(state.step),
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
    metrics: report.MetricsFile,
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
