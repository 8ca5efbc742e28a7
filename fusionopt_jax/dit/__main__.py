"""Sample a diffusion transformer, or look into one, from the command line.

python -m fusionopt_jax.dit sample --weights model.pt --labels 207,360 --steps 50
    --cfg 4 --out grid.png
python -m fusionopt_jax.dit inspect --weights model.pt
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax import __version__
from fusionopt_jax._checks import did_you_mean
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.build import build_cache, strip_modulators
from fusionopt_jax.dit.cache.request import distinct_labels
from fusionopt_jax.dit.cache.size import cache_bytes, modulator_bytes, size_text
from fusionopt_jax.dit.config import CONFIGS, DiTConfig
from fusionopt_jax.dit.network.model import init_params
from fusionopt_jax.dit.pictures import check_target, save_images
from fusionopt_jax.dit.routing import ROUTING
from fusionopt_jax.dit.sampling import METHODS, Sampler
from fusionopt_jax.dit.sampling.sample import sample
from fusionopt_jax.dit.weights.pytorch import from_pytorch

_METHODS = tuple(method.method for method in METHODS)

_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `python -m fusionopt_jax.dit`; None reads `sys.argv`.

    Returns:
        The exit code: 0, or 1 after an error, whose message goes to standard error.

    Example:
        >>> main(["inspect", "--model", "DiT-S/9"])
        1
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    """The two commands and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m fusionopt_jax.dit",
        description="Sample a diffusion transformer, or look into one.",
    )
    parser.add_argument(
        "--version", action="version", version=f"fusionopt_jax {__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    _add_sample(commands.add_parser("sample", help="sample images of given labels"))
    _add_inspect(
        commands.add_parser("inspect", help="sizes of a model and of its cache")
    )
    return parser


def _add_weights(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Options that say where weights come from."""
    parser.add_argument(
        "--weights",
        required=required,
        type=pathlib.Path,
        help="a .pt, .safetensors or .npz file of the published form",
    )
    parser.add_argument(
        "--num-heads", type=int, help="attention heads, for widths not published"
    )
    parser.add_argument("--entry", help='part of a training checkpoint, such as "ema"')


def _add_sample(parser: argparse.ArgumentParser) -> None:
    """Options of the command `sample`."""
    parser.set_defaults(run=_sample)
    _add_weights(parser, required=True)
    add = parser.add_argument
    add("--labels", required=True, help="comma-separated classes, such as 207,360")
    add("--count", type=int, default=1, help="images per label (default: 1)")
    add(
        "--sampler",
        type=_method,
        choices=_METHODS,
        default="ddim",
        help=f"{', '.join(_METHODS)}, or how one of them begins; euler and heun are "
        "for flow models (default: ddim)",
        metavar="METHOD",
    )
    add("--steps", default="50", help="number, or a respacing such as ddim50")
    # Settings of some methods only: what is not given keeps the method's default.
    add("--shift", type=float, help="time shift of euler and heun")
    add("--eta", type=float, help="randomness of ddim, in [0, 1]")
    add("--spacing", help="grid of dpm_solver_pp_2m: time or logsnr")
    add(
        "--clip",
        action="store_true",
        default=None,
        help="cut predictions to [-1, 1]; for pixels",
    )
    add("--cfg", type=float, default=4.0, help="guidance scale; 1 is none (default: 4)")
    add(
        "--cfg-channels",
        type=int,
        choices=(3,),
        help="guide only the first 3 channels, as the published code does",
    )
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--dtype", choices=tuple(_DTYPES), default="fp32", help="type of the products")
    add(
        "--cache",
        action=argparse.BooleanOptionalAction,
        help="replace the modulators by a cache, or compute them in every step; "
        "without either, there is a cache where it is no larger than they are",
    )
    add("--out", required=True, type=pathlib.Path, help="a .png grid, or .npy images")


def _sample(options: argparse.Namespace) -> None:
    """The command `sample`."""
    labels = np.repeat(_labels(options.labels), options.count)
    if labels.size == 0:
        raise ValueError(f"`--count` must be at least 1, got {options.count}.")
    sampler = _sampler(options)
    # A file that can't be written should not cost a sampling run.
    check_target(options.out)
    params, config = from_pytorch(
        options.weights, options.num_heads, entry=options.entry
    )
    if sampler.reads_variance and not config.learn_sigma:
        sampler = dataclasses.replace(sampler, variance="fixed_small")
    cache = None
    if _wants_cache(options.cache, config, len(sampler.host_times()), labels):
        # The size was judged, or overruled, just before.
        cache = build_cache(params, config, sampler.eval_times(), labels, force=True)
        params = strip_modulators(params)
    noise_key, step_key = jax.random.split(jax.random.key(options.seed))
    shape = (len(labels), config.input_size, config.input_size, config.in_channels)
    images = sample(
        params,
        config,
        cache,
        jax.random.normal(noise_key, shape),
        labels,
        sampler,
        options.cfg,
        cfg_channels=options.cfg_channels,
        key=step_key,
        dtype=_DTYPES[options.dtype],
        progress=_show_progress if sys.stderr.isatty() else None,
        donate=True,
    )
    note = save_images(
        options.out, np.asarray(images), columns=len(labels) // options.count
    )
    sys.stdout.write(f"{options.out}: {note}\n")


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


def _labels(text: str) -> np.ndarray:
    """The labels of a comma-separated list."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"`--labels` must be whole numbers with commas between, got {text!r}."
        )
    return np.array([int(part) for part in parts], np.int32)


def _method(text: str) -> str:
    """The sampler whose name begins like this, if it is one."""
    found = [name for name in _METHODS if name.startswith(text)]
    return found[0] if len(found) == 1 else text


def _sampler(options: argparse.Namespace) -> Sampler:
    """The sampler that the options ask for."""
    make = getattr(Sampler, options.sampler)
    known = {field.name for field in dataclasses.fields(make) if field.init}
    settings = {
        name: value
        for name in ("shift", "eta", "spacing", "clip")
        if (value := getattr(options, name)) is not None
    }
    for name in settings.keys() - known:
        raise ValueError(
            f"`--{name}` has no effect on {options.sampler}; leave it out."
        )
    if "respacing" in known:
        return make(respacing=options.steps, **settings)
    if not options.steps.isdecimal():
        raise ValueError(
            f"`--steps` must be a whole number for {options.sampler}, got "
            f"{options.steps!r}."
        )
    return make(steps=int(options.steps), **settings)


def _show_progress(step: int, total: int) -> None:
    """One line that is written over."""
    end = "\n" if step == total else ""
    sys.stderr.write(f"\rstep {step} of {total}{end}")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    """Options of the command `inspect`."""
    parser.set_defaults(run=_inspect)
    _add_weights(parser, required=False)
    add = parser.add_argument
    add("--model", help="a published size without weights, such as DiT-XL/2")
    add("--steps", type=int, default=50, help="steps of the cache (default: 50)")
    add("--labels", type=int, default=1, help="distinct labels of it (default: 1)")


def _inspect(options: argparse.Namespace) -> None:
    """The command `inspect`."""
    if (options.weights is None) == (options.model is None):
        raise ValueError("give either `--weights` or `--model`.")
    if options.model is None:
        params, config = from_pytorch(
            options.weights, options.num_heads, entry=options.entry
        )
    else:
        if options.model not in CONFIGS:
            raise ValueError(
                f"`--model` must be one of {', '.join(CONFIGS)}; got "
                f"{options.model!r}.{did_you_mean(options.model, CONFIGS)}"
            )
        config = CONFIGS[options.model]
        params = jax.eval_shape(lambda: init_params(config))
    sys.stdout.write(describe(params, config, options.steps, options.labels))
    sys.stdout.write(f"\nfor training:\n{ROUTING.table(params)}\n")


def describe(params: Params, config: DiTConfig, steps: int, labels: int) -> str:
    """Sizes of a model, of its modulators, and of the cache that replaces them.

    Args:
        params: Parameters, or their shapes.
        config: Sizes of the model.
        steps: Steps of the cache.
        labels: Distinct labels of a request, without the null label.

    Returns:
        A text of several lines.

    Example:
        >>> config = DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
        >>> print(describe(init_params(config), config, 10, 1).splitlines()[-1])
        a cache is smaller than the modulators while steps x labels < 33
    """
    leaves = named_leaves(params)
    rows = [
        (
            name,
            "x".join(str(size) for size in leaf.shape),
            str(leaf.dtype),
            leaf.size,
        )
        for name, leaf in leaves
    ]
    total = sum(row[3] for row in rows)
    size = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    table = [
        f"{name:<34}{shape:>18}{dtype:>10}{count:>13,}{count / total:>7.1%}"
        for name, shape, dtype, count in rows
    ]
    padded = len(distinct_labels(config, np.arange(labels)))
    full, half = (
        cache_bytes(config, steps, padded, dtype) for dtype in _DTYPES.values()
    )
    modulators = modulator_bytes(config)
    lines = [
        *table,
        "",
        f"{total:,} parameters, {size_text(size)}",
        f"image {config.input_size}x{config.input_size}x{config.in_channels}, "
        f"{config.num_tokens} tokens, {config.num_classes} classes, "
        f"learned variance: {'yes' if config.learn_sigma else 'no'}",
        f"modulators {size_text(modulators)} in fp32, "
        f"{modulators / 4 / total:.0%} of the parameters",
        f"cache of {steps} steps x {padded} labels (with the null label and padding): "
        f"{size_text(full)} in fp32, {size_text(half)} in bf16",
        "a cache is smaller than the modulators while steps x labels < "
        f"{config.hidden_size + 1}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
