"""The command `sample`: from weights and labels to a grid of pictures."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from fusionopt_jax._checks import check_number
from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.build import build_cache, strip_modulators
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.cache.request import distinct_labels
from fusionopt_jax.dit.cache.size import cache_bytes, modulator_bytes, size_text
from fusionopt_jax.dit.commands.decoder import (
    DTYPES,
    Decoder,
    add_decoder,
    read_decoder,
)
from fusionopt_jax.dit.commands.labels import read_labels
from fusionopt_jax.dit.commands.pipeline import (
    check_scheduler,
    class_count,
    label_names,
)
from fusionopt_jax.dit.commands.progress import progress_bar
from fusionopt_jax.dit.commands.weights import (
    KINDS,
    add_weights,
    check_source,
    read_model,
)
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.embeddings import check_labels
from fusionopt_jax.dit.pictures import check_target, save_images
from fusionopt_jax.dit.sampling import METHODS, Sampler
from fusionopt_jax.dit.sampling.flow import Convention
from fusionopt_jax.dit.sampling.sample import sample
from fusionopt_jax.dit.sampling.step_cache import StepCache

_METHODS = tuple(method.method for method in METHODS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser: Of the command.
    """
    parser.set_defaults(prepare=prepare)
    add_weights(parser, required=True)
    add_decoder(parser)
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--labels",
        required=True,
        help="classes with commas between: numbers, such as 207,360, or names, if the "
        "folder of the weights has them",
    )
    add("--count", type=int, default=1, help="images per label (default: 1)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add(
        "--out",
        required=True,
        type=pathlib.Path,
        help="a .png grid, or .npy images",
        metavar="FILE",
    )
    add(
        "--columns",
        type=int,
        help="of the grid, which is filled column by column (default: one a label)",
        metavar="N",
    )
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--sampler",
        type=_method,
        choices=_METHODS,
        help=f"{', '.join(_METHODS)}, or how one of them begins (default: ddim, and "
        "euler for the kinds sit, repa and flow)",
        metavar="METHOD",
    )
    add(
        "--steps",
        default="50",
        help="number, or a respacing such as ddim50 (default: 50)",
    )
    # Settings of some methods only: what is not given keeps the method's default.
    add("--shift", type=float, help="time shift of euler and heun", metavar="S")
    add("--eta", type=float, help="randomness of ddim, in [0, 1]")
    add("--spacing", help="grid of dpm_solver_pp_2m: time or logsnr")
    add("--diffusion", help="noise of sit_sde: sigma, linear, constant or decreasing")
    add("--norm", type=float, help="amount of that noise")
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="cut predictions to [-1, 1], which is for pixels, or do not (default)",
    )
    add(
        "--cfg",
        "--cfg-scale",
        type=float,
        default=4.0,
        help="guidance scale; 1 is none (default: 4)",
        metavar="S",
    )
    add(
        "--cfg-channels",
        type=int,
        choices=(3,),
        help="guide only the first 3 channels, as the published code does",
    )
    add(
        "--step-cache",
        type=int,
        help="compute the network in every N-th step only, and extrapolate it in the "
        "others: an approximation",
        metavar="N",
    )
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="type of the products")
    add(
        "--cache",
        action=argparse.BooleanOptionalAction,
        help="replace the modulators by a cache, or compute them in every step; "
        "without either, there is a cache where it is no larger than they are",
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """All that sampling takes, checked.

    Attributes:
        options: The command line.
        params: Of the model; without the modulators if there is a cache of them, so
            that nothing keeps them in memory.
        config: Its sizes.
        cache: Of the modulators, if there is one.
        labels: Of every image.
        sampler: The walk.
        step_cache: The steps that compute the network, if not all do.
        decoder: What makes pictures of latents, if anything.
        columns: Of the grid.
    """

    options: argparse.Namespace
    params: Params
    config: DiTConfig
    cache: TimeConditioningCache | None
    labels: Int[np.ndarray, " images"]
    sampler: Sampler
    step_cache: StepCache | None
    decoder: Decoder | None
    columns: int

    def __call__(self) -> None:
        """Sample, decode, and write the pictures."""
        sampled = self.sampled()
        if self.decoder is None:
            images, enlarge = np.asarray(sampled), 4
        else:
            images, enlarge = self.decoder.decode(sampled), 1
        note = save_images(
            self.options.out, images, columns=self.columns, enlarge=enlarge
        )
        if self.decoder is None and self.config.in_channels not in (1, 3):
            note += "; `--decoder` makes pictures of them"
        sys.stdout.write(f"{self.options.out}: {note}\n")

    def sampled(self) -> Float[Array, "images height width channels"]:
        """What the model makes of noise and labels."""
        options, config = self.options, self.config
        noise_key, step_key = jax.random.split(jax.random.key(options.seed))
        size = config.input_size
        shape = (len(self.labels), size, size, config.in_channels)
        with progress_bar("sampling", total=self.sampler.steps) as progress:
            return sample(
                self.params,
                config,
                self.cache,
                jax.random.normal(noise_key, shape),
                self.labels,
                self.sampler,
                options.cfg,
                cfg_channels=options.cfg_channels,
                step_cache=self.step_cache,
                key=step_key,
                dtype=DTYPES[options.dtype],
                progress=progress,
                donate=True,
            )


def prepare(options: argparse.Namespace) -> Callable[[], object]:
    """Check all that is asked for and read the weights.

    What costs nothing to check comes first, so that nobody waits for a file of
    gigabytes to be told of a wrong ending.

    Args:
        options: With what `add_options` added.

    Returns:
        What samples and writes the pictures.

    Raises:
        ValueError: If a setting is wrong, does not fit the others, or the weights.
        ImportError: If a package is missing.
        OSError: If a file can't be read, or the pictures could not be written.
    """
    if options.count < 1:
        raise ValueError(f"`--count` must be at least 1, got {options.count}.")
    if not 0 <= options.seed < 2**32:
        raise ValueError(
            f"`--seed` must lie between 0 and {2**32 - 1}, got {options.seed}: a key "
            "has no more bits."
        )
    check_number("--cfg", options.cfg, low=0.0)
    if options.cfg_channels is not None and options.cfg == 1.0:
        raise ValueError("`--cfg-channels` has no effect with `--cfg 1`; leave it out.")
    method, kind = _method_and_kind(options)
    sampler = _sampler(options, method, KINDS[kind].convention)
    step_cache = _step_cache(options.step_cache, sampler.steps)
    check_source(options, kind)
    check_target(options.out)
    names = label_names(options.weights)
    labels = read_labels(options.labels, names.by_label, names.absence)
    classes = class_count(options.weights)
    if classes is not None:
        check_labels(DiTConfig(num_classes=classes), labels)
    columns = len(labels) if options.columns is None else options.columns
    images = len(labels) * options.count
    if not 1 <= columns <= images:
        raise ValueError(
            f"`--columns` must lie between 1 and the {images} images, got {columns}."
        )
    check_scheduler(
        options.weights, sampler, flow=_follows_a_flow(method), clip=options.clip
    )
    decoder = read_decoder(options)
    params, config = read_model(options, kind)
    if decoder is not None:
        decoder.check(config)
    check_labels(config, labels)
    if options.cfg != 1.0 and not config.has_null_label:
        raise ValueError(
            "the model has no null label, which guidance needs; give `--cfg 1`."
        )
    if sampler.reads_variance and not config.learn_sigma:
        sampler = dataclasses.replace(sampler, variance="fixed_small")
    if names.by_label:
        known = (f"{label} ({names.by_label.get(label, '')})" for label in labels)
        sys.stdout.write(f"labels: {', '.join(known)}\n")
    cache, times = None, sampler.eval_times()
    if _wants_cache(options.cache, config, len(times), labels):
        # The size was judged, or overruled, just before.
        cache = build_cache(params, config, times, labels, force=True)
        params = strip_modulators(params)
    return Request(
        options,
        params,
        config,
        cache,
        np.repeat(labels, options.count),
        sampler,
        step_cache,
        decoder,
        columns,
    )


def _wants_cache(
    asked: bool | None, config: DiTConfig, steps: int, labels: np.ndarray
) -> bool:
    """Whether to sample with a cache, and one line that says which and why."""
    count = len(distinct_labels(config, labels))
    size, modulators = cache_bytes(config, steps, count), modulator_bytes(config)
    wanted = size <= modulators if asked is None else asked
    reason = (
        f"{steps} steps x {count} labels take {size_text(size)}, "
        f"{'more' if size > modulators else 'no more'} than the "
        f"{size_text(modulators)} of modulators that they replace"
    )
    if asked is not None:
        reason = f"asked for; {reason}"
    sys.stdout.write(f"{'cache' if wanted else 'no cache'}: {reason}\n")
    return wanted


def _step_cache(distance: int | None, steps: int) -> StepCache | None:
    """The steps that compute, and one line that says how many."""
    if distance is None:
        return None
    if not 2 <= distance <= steps:
        raise ValueError(
            f"`--step-cache` must lie between 2 and the {steps} steps, got {distance}."
        )
    if steps == 2:
        raise ValueError(
            "`--step-cache` has no effect on 2 steps, since the first two compute; "
            "leave it out."
        )
    step_cache = StepCache.every(steps, distance, order=1)
    computed = round(steps * step_cache.fraction)
    sys.stdout.write(
        f"step cache: {computed} of {steps} steps compute the network, which is an "
        "approximation\n"
    )
    return step_cache


def _method(text: str) -> str:
    """The sampler whose name begins like this, if it is one."""
    found = [name for name in _METHODS if name.startswith(text)]
    return found[0] if len(found) == 1 else text


def _follows_a_flow(method: type[Sampler]) -> bool:
    """Whether a method expects a velocity rather than the noise."""
    return "convention" in {field.name for field in dataclasses.fields(method)}


def _method_and_kind(options: argparse.Namespace) -> tuple[type[Sampler], str]:
    """The method, and the kind of model; what is not given follows from the other."""
    kind = options.kind or "dit"
    default = "euler" if KINDS[kind].convention else "ddim"
    make: type[Sampler] = getattr(Sampler, options.sampler or default)
    flow = _follows_a_flow(make)
    if options.kind is None and make is Sampler.sit_sde:
        raise ValueError(f"{make.method} needs `--kind`: sit, repa or flow.")
    if options.kind is None and flow:
        kind = "flow"
        sys.stdout.write(
            f"kind: flow, {KINDS[kind].text}; give `--kind` for SiT or REPA\n"
        )
    if flow != (KINDS[kind].convention is not None):
        fitting = [
            other.method for other in METHODS if _follows_a_flow(other) is not flow
        ]
        raise ValueError(
            f"`--sampler {make.method}` can't sample {KINDS[kind].text}; use one of "
            f"{', '.join(fitting)}."
        )
    return make, kind


def _sampler(
    options: argparse.Namespace, make: type[Sampler], convention: Convention | None
) -> Sampler:
    """The sampler with the settings that the options give."""
    known = {field.name for field in dataclasses.fields(make) if field.init}
    settings: dict[str, Any] = {
        name: value
        for name in ("shift", "eta", "spacing", "clip", "diffusion", "norm")
        if (value := getattr(options, name)) is not None
    }
    for name in settings.keys() - known:
        raise ValueError(f"`--{name}` has no effect on {make.method}; leave it out.")
    if convention is not None:
        settings["convention"] = convention
    if "respacing" in known:
        settings["respacing"] = options.steps
    elif options.steps.isdecimal():
        settings["steps"] = int(options.steps)
    else:
        raise ValueError(
            f"`--steps` must be a whole number for {make.method}, got "
            f"{options.steps!r}."
        )
    try:
        return make(**settings)
    except ValueError as error:
        # Under the names of the options.
        text = str(error).replace("`respacing`", "`--steps`")
        for name in settings:
            text = text.replace(f"`{name}`", f"`--{name}`")
        raise ValueError(text) from error
