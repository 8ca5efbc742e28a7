"""The options that say where weights come from, and the weights they lead to."""

import argparse
import pathlib
from typing import Literal, NamedTuple

from fusionopt_jax._types import Params
from fusionopt_jax.dit.commands.pipeline import naming
from fusionopt_jax.dit.commands.progress import progress_bar
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.sampling.flow import Convention
from fusionopt_jax.dit.weights.diffusers import from_diffusers
from fusionopt_jax.dit.weights.pytorch import from_pytorch


class Kind(NamedTuple):
    """What a model was trained to predict, which its weights do not show.

    Attributes:
        read_as: The `kind` of `from_pytorch`.
        convention: Of the samplers that follow a velocity; None for models that predict
            the noise.
        text: What it is, for messages.
    """

    read_as: Literal["dit", "sit", "repa"]
    convention: Convention | None
    text: str


KINDS = {
    "dit": Kind("dit", None, "the published DiT, which predicts the noise"),
    "sit": Kind("sit", "data_at_one", "SiT"),
    "repa": Kind("repa", "noise_at_one", "REPA"),
    "flow": Kind("dit", "noise_at_one", "a DiT trained with rectified_flow_loss"),
}
"""What `--kind` may say."""


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
        help="a folder as diffusers writes it, of a pipeline or of its transformer, or "
        "a .pt, .bin, .safetensors or .npz file of the published form",
        metavar="PATH",
    )
    add(
        "--kind",
        choices=tuple(KINDS),
        help="what the model is, since weights don't show it: "
        + "; ".join(f"{name}, {kind.text}" for name, kind in KINDS.items()),
    )
    add(
        "--frequency-shift",
        type=int,
        choices=(0, 1),
        help="of a folder: 1 for a model that was trained in diffusers, whose time "
        "features differ from the published code's (default: 0)",
    )
    add(
        "--num-heads",
        type=int,
        help="of a file: attention heads, for widths not published",
        metavar="N",
    )
    add(
        "--entry",
        help='of a file: part of a training checkpoint, such as "ema"',
        metavar="NAME",
    )


def check_source(options: argparse.Namespace, kind: str) -> None:
    """Require weights that are there, and options that have an effect on them.

    Args:
        options: With what `add_weights` added.
        kind: A name of `KINDS`.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If an option has no effect on a file, or on a folder.
    """
    path = options.weights
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    if path.is_dir():
        unused, what = ("num_heads", "entry"), "a folder, whose config.json says all"
        if KINDS[kind].read_as != "dit":
            raise ValueError(
                f"`--kind {kind}` is for a file, since diffusers has no {kind}; "
                f"{path} is a folder."
            )
    else:
        unused, what = ("frequency_shift",), "a file, which is not from diffusers"
    for name in unused:
        if getattr(options, name) is not None:
            raise ValueError(
                f"`--{name.replace('_', '-')}` has no effect: {path} is {what}; leave "
                "it out."
            )


def read_model(options: argparse.Namespace, kind: str) -> tuple[Params, DiTConfig]:
    """The parameters and sizes of the model that the options name.

    Args:
        options: With what `add_weights` added.
        kind: A name of `KINDS`.

    Returns:
        Parameters and config.

    Raises:
        ValueError: If the weights can't be used.
        ImportError: If a package is missing.
        OSError: If something is missing from a folder, or can't be read.
    """
    path = options.weights
    with progress_bar("reading the weights", "B") as progress, naming(path):
        if path.is_dir():
            shift = options.frequency_shift or 0
            return from_diffusers(path, frequency_shift=shift, progress=progress)
        return from_pytorch(
            path,
            options.num_heads,
            entry=options.entry,
            kind=KINDS[kind].read_as,
            progress=progress,
        )
