"""The options that say where weights come from, and the weights they lead to."""

import argparse
import pathlib

from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.weights.pytorch import from_pytorch


def add_weights(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options that say where weights come from.

    Args:
        parser: Of the command.
        required: Whether it needs weights.
    """
    add = parser.add_argument_group("weights").add_argument
    add(
        "--weights",
        required=required,
        type=pathlib.Path,
        help="a .pt, .safetensors or .npz file of the published form",
        metavar="PATH",
    )
    add(
        "--num-heads",
        type=int,
        help="attention heads, for widths not published",
        metavar="N",
    )
    add("--entry", help='part of a training checkpoint, such as "ema"', metavar="NAME")


def read_weights(options: argparse.Namespace) -> tuple[Params, DiTConfig]:
    """The parameters and sizes of the model that the options name.

    Args:
        options: With what `add_weights` added.

    Returns:
        Parameters and config.
    """
    return from_pytorch(options.weights, options.num_heads, entry=options.entry)
