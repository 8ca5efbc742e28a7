"""The command `inspect`: what a model is made of, and what its cache would take."""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax._checks import did_you_mean
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit import latents
from fusionopt_jax.dit.cache.request import distinct_labels
from fusionopt_jax.dit.cache.size import cache_bytes, modulator_bytes, size_text
from fusionopt_jax.dit.commands.pipeline import class_name, describe_source, naming
from fusionopt_jax.dit.commands.weights import add_weights, check_source, read_model
from fusionopt_jax.dit.config import CONFIGS, DiTConfig
from fusionopt_jax.dit.network.model import init_params
from fusionopt_jax.dit.routing import ROUTING


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Args:
        parser: Of the command.
    """
    parser.set_defaults(prepare=prepare)
    add_weights(parser, required=False)
    add = parser.add_argument
    add("--model", help="a published size without weights, such as DiT-XL/2")
    add(
        "--steps",
        type=int,
        default=50,
        help="steps of the cache (default: 50)",
        metavar="N",
    )
    add(
        "--labels",
        type=int,
        default=1,
        help="distinct labels of it (default: 1)",
        metavar="N",
    )


def prepare(options: argparse.Namespace) -> Callable[[], object]:
    """Read the model, or look up its sizes.

    Args:
        options: With what `add_options` added.

    Returns:
        What prints it.

    Raises:
        ValueError: If there is not one model to look into, or it can't be read.
        ImportError: If a package is missing.
        OSError: If something is not there, or can't be read.
    """
    if (options.weights is None) == (options.model is None):
        raise ValueError("give either `--weights` or `--model`.")
    if options.weights is None:
        if options.model not in CONFIGS:
            raise ValueError(
                f"`--model` must be one of {', '.join(CONFIGS)}; got "
                f"{options.model!r}.{did_you_mean(options.model, CONFIGS)}"
            )
        config = CONFIGS[options.model]
        params = jax.eval_shape(lambda: init_params(config))
        text = describe(params, config, options.steps, options.labels)
        text += f"\nfor training:\n{ROUTING.table(params)}\n"
        return functools.partial(sys.stdout.write, text)
    kind = options.kind or "dit"
    check_source(options, kind)
    if class_name(options.weights) == "AutoencoderKL":
        text = describe_source(options.weights) + describe_decoder(options.weights)
    else:
        params, config = read_model(options, kind)
        text = f"{describe_source(options.weights)}\n{config}\n\n"
        text += describe(params, config, options.steps, options.labels)
        inner = options.weights / "vae"
        if inner.is_dir():
            text += f"\n{describe_decoder(inner)}"
        text += f"\nfor training:\n{ROUTING.table(params)}\n"
    return functools.partial(sys.stdout.write, text)


def describe_decoder(folder: pathlib.Path) -> str:
    """Sizes of the autoencoder between latents and pictures.

    Args:
        folder: Where it lies.

    Returns:
        A text of several lines.

    Raises:
        ValueError: If it can't be used.
        OSError: If it is not there, or can't be read.
    """
    with naming(folder):
        params, config = latents.from_diffusers(folder)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    parts = " and ".join(name for name in ("encoder", "decoder") if name in params)
    return f"autoencoder {folder}: {parts}, {count:,} parameters\n{config}\n"


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
        cache_bytes(config, steps, padded, dtype)
        for dtype in (jnp.float32, jnp.bfloat16)
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
