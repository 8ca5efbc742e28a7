"""The command line of `train_dit.py`, and the settings that come out of it."""

import argparse
import dataclasses
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import fusionopt_jax as fo
from dit_training import checkpoints, folders, optimizers
from dit_training.autoencoder import Autoencoder
from dit_training.data import Dataset
from dit_training.errors import RunError
from fusionopt_jax import dit


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every option of a run, resolved; the field names are those of the options."""

    optimizer: str = "fusion"
    learning_rate: float = math.nan
    steps: int = 600
    seed: int = 0
    eval_every: int = 100
    mesh: str | None = None
    data: str = "digits"
    latents: str | None = None
    batch_size: int = 64
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    patch_size: int = 2
    label_dropout: float = 0.1
    sampling_steps: int = 25
    guidance: float = 1.5
    generated: int = 500


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; an option that was not given is None."""
    given = command_line().parse_args(arguments)
    together = given.process_id is not None, given.coordinator is not None
    if given.processes > 1 and not all(together):
        raise RunError(
            f"--processes {given.processes}: give each its --process-id, and all of "
            "them the same --coordinator HOST:PORT"
        )
    if given.processes == 1 and any(together):
        raise RunError("--process-id and --coordinator: give --processes as well")
    return given


def command_line() -> argparse.ArgumentParser:
    """Every option, with the text of its help."""
    default = Settings()
    parser = OneLineParser(
        prog="train_dit.py",
        description="Train a small diffusion transformer on labelled images, sample it "
        "through its modulator cache, and measure how good the samples are.",
        epilog="Every run writes a folder: config.json, metrics.csv (a row per step), "
        "loss.png, samples.png, summary.json and checkpoints/. Ctrl-C writes a "
        "checkpoint and stops; --resume goes on from it as if nothing had happened.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    run = parser.add_argument_group("the run")
    run.add_argument(
        "--out",
        type=Path,
        help="folder of the run (default: runs/dit-OPTIMIZER, numbered if taken)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out, bit for bit (without --out: the newest one "
        f"under {folders.RUNS}/); its settings are taken over. More --steps are "
        "possible with the schedule-free optimizers",
    )
    run.add_argument(
        "--data",
        metavar="SOURCE",
        help="'digits' (scikit-learn's 8x8 handwritten digits, no download), a folder "
        "with one subfolder of images per class, or an .npz file with `images` "
        "[N, H, W(, C)] and integer `labels` [N] (default: digits)",
    )
    run.add_argument(
        "--latents",
        metavar="FOLDER",
        help="train on latents of the images instead of on pixels: the folder of a "
        "published autoencoder (AutoencoderKL of diffusers), or of a pipeline that has "
        "one. The images are encoded once, and samples.png is decoded",
    )
    run.add_argument(
        "--seed", type=integer(0), help="of everything random (default: 0)"
    )

    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--mesh",
        metavar="AXES",
        help="divide the work among devices, such as data=2,fsdp=4: data and fsdp "
        "divide the batch, fsdp the weights too, tensor the inside of each block. A "
        "CPU is split into as many devices (default: one device, or with --processes "
        "data=ALL)",
    )
    devices.add_argument(
        "--processes",
        type=integer(1),
        default=1,
        metavar="N",
        help="how many processes run this command together, each with a --process-id "
        "of its own and the rest alike; --out is a folder that all of them see "
        "(default: 1)",
    )
    devices.add_argument(
        "--process-id", type=integer(0), metavar="I", help="which of them: 0 to N - 1"
    )
    devices.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 can be reached, with a free port, such as "
        "10.0.0.1:1234; the same for all",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--optimizer",
        choices=optimizers.NAMES,
        help="fusion: NorMuon on the matrices, Adam on the rest, schedule-free; "
        "adamw, muon: Optax's, with warm-up and cosine; sf-adamw: schedule-free AdamW "
        "(default: fusion)",
    )
    rates = ", ".join(f"{n} {r:g}" for n, r in optimizers.LEARNING_RATES.items())
    training.add_argument(
        "--learning-rate",
        type=number(0.0),
        help=f"peak learning rate, for fusion and muon that of the matrices (default: "
        f"{rates})",
    )
    training.add_argument(
        "--steps",
        type=integer(1),
        help=f"updates in all, resumed ones included (default: {default.steps})",
    )
    training.add_argument(
        "--batch-size",
        type=integer(1),
        help=f"images per update (default: {default.batch_size})",
    )
    training.add_argument(
        "--eval-every",
        type=integer(1),
        metavar="STEPS",
        help="how often to measure the validation loss and to write a checkpoint "
        f"(default: {default.eval_every})",
    )
    training.add_argument(
        "--label-dropout",
        type=number(0.0, 1.0),
        help="share of labels replaced by the null label, which guidance needs "
        f"(default: {default.label_dropout})",
    )

    model = parser.add_argument_group("model")
    for name, text in (
        (
            "hidden-size",
            "width of a token; below 128 no weight is a spectral matrix "
            "unless it is fused",
        ),
        ("depth", "number of blocks"),
        ("num-heads", "attention heads"),
        ("patch-size", "side of a patch in pixels"),
    ):
        value = getattr(default, name.replace("-", "_"))
        model.add_argument(
            f"--{name}", type=integer(1), help=f"{text} (default: {value})"
        )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--sampling-steps",
        type=integer(1),
        help=f"Euler steps (default: {default.sampling_steps})",
    )
    sampling.add_argument(
        "--guidance",
        type=number(1.0),
        help="classifier-free guidance in samples.png; 1 is none, and what the quality "
        f"figures always use (default: {default.guidance})",
    )
    sampling.add_argument(
        "--generated",
        type=integer(2),
        metavar="IMAGES",
        help=f"images behind the quality figures (default: {default.generated})",
    )
    return parser


def resolve(given: argparse.Namespace) -> tuple[Settings, Path]:
    """Fill the options that were not given: from the run to continue, or by default."""
    options = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(Settings)
        if getattr(given, field.name) is not None
    }
    if given.resume:
        folder = given.out or folders.newest_run()
        options = saved_options(folder) | options
    else:
        folder = given.out or folders.free_folder(options.get("optimizer", "fusion"))
    settings = Settings(**options)
    if math.isnan(settings.learning_rate):
        rate = optimizers.LEARNING_RATES[settings.optimizer]
        settings = dataclasses.replace(settings, learning_rate=rate)
    if settings.guidance != 1 and not settings.label_dropout:
        raise RunError(
            "--label-dropout 0: a model that never sees the null label can't be "
            "guided; add --guidance 1"
        )
    return settings, folder


def saved_options(folder: Path) -> dict[str, Any]:
    """The settings of a run, as its config.json or its newest checkpoint has them."""
    path = folder / "config.json"
    if not folders.has_checkpoint(folder):
        raise RunError(
            f"--resume: {folder} holds no checkpoint to continue from; start the run "
            "without --resume"
        )
    try:
        return settings_in(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"train_dit.py: {path} cannot be read ({error!r}); taking the settings "
            "from the checkpoint",
            file=sys.stderr,
        )
    return settings_in(checkpoints.saved_config(folder / "checkpoints"))


def settings_in(config: dict[str, Any]) -> dict[str, Any]:
    """The options among all that config.json says."""
    # Not every run said that it has no autoencoder and no mesh.
    config = {"latents": None, "mesh": None} | config
    return {field.name: config[field.name] for field in dataclasses.fields(Settings)}


def model_config(
    settings: Settings, data: Dataset, autoencoder: Autoencoder | None = None
) -> dit.DiTConfig:
    """The model's sizes: the options, and what the images or latents dictate."""
    side, channels = data.train_images.shape[2:]
    kind = f"image side of {side} pixels"
    if autoencoder is not None:
        _, side, channels = autoencoder.latent_shape(data.train_images, settings.data)
        kind = f"latent side of {side}"
    if side % settings.patch_size:
        fitting = [size for size in range(1, side + 1) if side % size == 0]
        raise RunError(
            f"--patch-size {settings.patch_size}: it does not divide the {kind}; give "
            f"one of {', '.join(map(str, fitting))}"
        )
    try:
        return dit.DiTConfig(
            input_size=side,
            patch_size=settings.patch_size,
            in_channels=channels,
            hidden_size=settings.hidden_size,
            depth=settings.depth,
            num_heads=settings.num_heads,
            class_dropout_prob=settings.label_dropout,
            num_classes=len(data.class_names),
            learn_sigma=False,
        )
    except ValueError as error:
        raise RunError(str(error)) from error


def full_config(
    settings: Settings,
    data: Dataset,
    model: dit.DiTConfig,
    autoencoder: Autoencoder | None,
) -> dict[str, Any]:
    """What config.json says: the options, and all that follows from them."""
    packages = ("jax", "optax", "flax", "numpy", "scikit-learn")
    return dataclasses.asdict(settings) | {
        "model": dataclasses.asdict(model),
        "autoencoder": None if autoencoder is None else autoencoder.about(),
        "dataset": {
            "digest": data.digest,
            "classes": list(data.class_names),
            "train_images": len(data.train_images),
            "held_out_images": len(data.held_out_images),
        },
        "versions": {"fusionopt-jax": fo.__version__}
        | {name: version(name) for name in packages},
    }


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other error of the script."""

    def error(self, message: str) -> NoReturn:
        """Hand the complaint to the one place that prints errors."""
        raise RunError(f"{message}; see --help")


def integer(low: int) -> Any:
    """An argument type: a whole number from `low` up."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {low}, got {text!r}"
            )
        return value

    return convert


def number(low: float, high: float = math.inf) -> Any:
    """An argument type: a finite number in [low, high]."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            limit = (
                f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            )
            raise argparse.ArgumentTypeError(
                f"must be a finite number {limit}, got {text!r}"
            )
        return value

    return convert
