"""The command `inspect`: what a model is made of, and what its cache would take."""

import argparse
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fusionopt_jax._checks import did_you_mean
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.request import distinct_labels
from fusionopt_jax.dit.cache.size import cache_bytes, modulator_bytes, size_text
from fusionopt_jax.dit.commands.weights import add_weights, read_weights
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


def prepare(options: argparse.Namespace) -> Callable[[], None]:
    """Read the model, or look up its sizes.

    Args:
        options: With what `add_options` added.

    Returns:
        What prints it.

    Raises:
        ValueError: If there is not one model to look into, or it can't be read.
    """
    if (options.weights is None) == (options.model is None):
        raise ValueError("give either `--weights` or `--model`.")
    if options.model is None:
        params, config = read_weights(options)
    else:
        if options.model not in CONFIGS:
            raise ValueError(
                f"`--model` must be one of {', '.join(CONFIGS)}; got "
                f"{options.model!r}.{did_you_mean(options.model, CONFIGS)}"
            )
        config = CONFIGS[options.model]
        params = jax.eval_shape(lambda: init_params(config))
    text = describe(params, config, options.steps, options.labels)

    def show() -> None:
        """Print the sizes and the routing."""
        sys.stdout.write(f"{text}\nfor training:\n{ROUTING.table(params)}\n")

    return show


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
