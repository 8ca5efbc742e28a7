"""Draw images through the modulator cache, time it, and judge the result."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_training import quality, report
from dit_training.data import Dataset
from dit_training.options import Settings
from fusionopt_jax import dit

CACHE_TOLERANCE = 1e-5
"""Largest difference of a pixel in [-1, 1] between cached and uncached sampling."""

SUMMARY_KEYS = (
    "label_accuracy",
    "frechet_distance",
    "cached_seconds",
    "uncached_seconds",
    "max_cache_difference",
)
"""The figures that come first, in this order."""

CHUNK = 250
"""Most images in one call, so that memory does not grow with the request."""


def measure(
    params: Any,
    config: dit.DiTConfig,
    data: Dataset,
    settings: Settings,
    grid: Path,
    *,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Draw the grid and the images to judge; the figures of summary.json.

    Args:
        params: The deployed weights, modulators included.
        config: The model's sizes.
        data: Real images, to show beside the generated ones and to compare with.
        settings: Sampling steps, guidance, number of images, seed.
        grid: The PNG file to write.
        decode: From latents to images to show; None shows the data as they are.

    Returns:
        The keys of summary.json from `label_accuracy` on.
    """
    sampler = dit.Sampler.euler(steps=settings.sampling_steps)
    figures, images = compare_cache(params, config, sampler, settings)

    columns = min(config.num_classes, report.COLUMNS)
    real, generated = (
        shown.reshape(report.ROWS, columns, *shown.shape[1:])
        for shown in (
            part if decode is None else decode(part)
            for part in (real_rows(data, columns), images)
        )
    )
    report.plot_samples(
        real,
        generated,
        list(data.class_names[:columns]),
        grid,
        f"{settings.optimizer}, {settings.steps} steps, guidance {settings.guidance:g}",
    )
    figures |= judge(params, config, sampler, data, settings)
    return {name: figures[name] for name in SUMMARY_KEYS} | figures


def judge(
    params: Any,
    config: dit.DiTConfig,
    sampler: dit.Sampler,
    data: Dataset,
    settings: Settings,
) -> dict[str, Any]:
    """Label accuracy and Fréchet distance of unguided images, and what to expect."""
    labels = np.arange(settings.generated, dtype=np.int32) % config.num_classes
    # Forced: for all classes it is larger than the modulators of a small model, but the
    # images to judge are those of the cache.
    cache = dit.build_cache(params, config, sampler.eval_times(), labels, force=True)
    weights = dit.strip_modulators(params)
    noise = draw_noise(config, settings.seed, 1, len(labels))
    images = np.concatenate(
        [
            dit.sample(
                weights,
                config,
                cache,
                noise[first : first + CHUNK],
                labels[first : first + CHUNK],
                sampler,
                cfg_scale=1.0,
            )
            for first in range(0, len(labels), CHUNK)
        ]
    )
    model = quality.fit_judge(data)
    means = np.stack(
        [
            data.train_images[data.train_labels == label].mean(0)
            for label in range(config.num_classes)
        ]
    )
    return {
        "label_accuracy": quality.label_accuracy(model, images, labels),
        "frechet_distance": quality.frechet_distance(model, images),
        "generated_images": len(labels),
        "label_accuracy_real": quality.label_accuracy(
            model, data.held_out_images, data.held_out_labels
        ),
        "frechet_distance_real": quality.frechet_distance(model, data.train_images),
        "frechet_distance_class_means": quality.frechet_distance(model, means[labels]),
    }


def compare_cache(
    params: Any, config: dit.DiTConfig, sampler: dit.Sampler, settings: Settings
) -> tuple[dict[str, Any], np.ndarray]:
    """Draw the grid with and without the cache: seconds and difference, and images."""
    columns = min(config.num_classes, report.COLUMNS)
    labels = np.tile(np.arange(columns, dtype=np.int32), report.ROWS)
    noise = draw_noise(config, settings.seed, 0, len(labels))

    def draw(weights: Any, cache: dit.TimeConditioningCache | None) -> jax.Array:
        return dit.sample(
            weights,
            config,
            cache,
            noise,
            labels,
            sampler,
            cfg_scale=settings.guidance,
        )

    # Forced for the comparison: it is larger than the modulators of a model this small.
    cache, build_seconds = timed(
        lambda: dit.build_cache(
            params, config, sampler.eval_times(), labels, force=True
        )
    )
    stripped = dit.strip_modulators(params)
    cached, cached_seconds = timed(lambda: draw(stripped, cache))
    uncached, uncached_seconds = timed(lambda: draw(params, None))
    figures = {
        "cached_seconds": cached_seconds,
        "uncached_seconds": uncached_seconds,
        "max_cache_difference": float(jnp.max(jnp.abs(cached - uncached))),
        "cache_build_seconds": build_seconds,
        "timed_images": len(labels),
    }
    return figures, np.asarray(cached)


def draw_noise(config: dit.DiTConfig, seed: int, purpose: int, count: int) -> jax.Array:
    """Where sampling starts; independent of everything that training drew."""
    key = jax.random.fold_in(jax.random.key(seed), 2**31 + purpose)
    side = config.input_size
    return jax.random.normal(key, (count, side, side, config.in_channels))


def real_rows(data: Dataset, columns: int) -> np.ndarray:
    """The first held-out images of each class, repeated where there are too few.

    They lie row by row, as the generated ones do.
    """
    picks = [
        np.resize(np.flatnonzero(data.held_out_labels == label), report.ROWS)
        for label in range(columns)
    ]
    return data.held_out_images[np.stack(picks, axis=1).ravel()]


def timed(draw: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the seconds that it takes once compiled."""
    jax.block_until_ready(draw())
    started = time.perf_counter()
    result = jax.block_until_ready(draw())
    return result, time.perf_counter() - started
