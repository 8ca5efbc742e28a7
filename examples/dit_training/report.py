"""What a run leaves for people to look at: a table, a curve and a grid of images."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dit_training.errors import RunError
from dit_training.folders import write_whole

COLUMNS = 10
ROWS = 4
TILE = 64
GAP = 6


class Row(NamedTuple):
    """One training step.

    Attributes:
        step: 1 for the first update.
        loss: of the step's batch, before the update.
        step_size: the factor on the learning rate.
        validation_loss: after the update, at the deployed weights; None where it was
            not measured.
        seconds: of training so far, compilation and validation included.
    """

    step: int
    loss: float
    step_size: float
    validation_loss: float | None
    seconds: float


class MetricsFile:
    """`metrics.csv`, one row per step, written as the run goes."""

    def __init__(self, path: Path, upto: int):
        """Keep the rows of the first `upto` steps, so that a resumed run adds on."""
        kept = [row for row in read_metrics(path) if row.step <= upto]
        self.last = kept[-1] if kept else Row(0, 0.0, 0.0, None, 0.0)
        self.path = path
        write_whole(path, ",".join(Row._fields) + "\n" + "".join(map(line_of, kept)))

    def add(self, rows: list[Row]) -> None:
        """Append rows; they are in the file when this returns."""
        with self.path.open("a", newline="") as file:
            file.write("".join(map(line_of, rows)))
        self.last = rows[-1] if rows else self.last


class NoMetrics:
    """What the processes that write no file have in its place."""

    last = Row(0, 0.0, 0.0, None, 0.0)

    def add(self, rows: list[Row]) -> None:
        """Leave it to the process that writes."""


def line_of(row: Row) -> str:
    """A row as it stands in the file."""
    measured = "" if row.validation_loss is None else f"{row.validation_loss:.7g}"
    return (
        f"{row.step},{row.loss:.7g},{row.step_size:.7g},{measured},{row.seconds:.2f}\n"
    )


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`; none where there is no such file."""
    if not path.exists():
        return []
    text = path.read_text()
    # A process that was killed while it wrote leaves part of a row behind.
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines()[1:], start=2):
        try:
            step, loss, step_size, measured, seconds = line.split(",")
            validation = float(measured) if measured else None
            rows.append(
                Row(
                    int(step), float(loss), float(step_size), validation, float(seconds)
                )
            )
        except ValueError as error:
            raise RunError(
                f"{path}, line {number}: {line!r} is no row of it; correct or remove it"
            ) from error
    return rows


def plot_losses(rows: list[Row], title: str, path: Path) -> None:
    """Training loss (a running mean over it) and validation loss against steps."""
    steps = np.array([row.step for row in rows])
    losses = np.array([row.loss for row in rows])
    window = max(len(rows) // 40, 1)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    measured = [row for row in rows if row.validation_loss is not None]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.85", linewidth=0.8, label="training batch")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label="training, mean")
    axes.plot(
        [row.step for row in measured],
        [row.validation_loss for row in measured],
        "o-",
        color="tab:red",
        label="validation, deployed weights",
    )
    axes.set(xlabel="step", ylabel="rectified-flow loss", title=title, yscale="log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:.2g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_samples(
    real: np.ndarray, generated: np.ndarray, names: list[str], path: Path, title: str
) -> None:
    """Rows of real images above rows of generated ones, one column per class.

    Args:
        real: `[rows, columns, H, W, C]` in [-1, 1].
        generated: the same shape, drawn by the model.
        names: a heading per column.
        path: the PNG file to write.
        title: a line above the grid.
    """
    columns, tile = real.shape[1], tile_side(real)
    figure = Figure(figsize=(0.75 * columns + 0.6, 0.75 * 2 * len(real) + 0.8))
    for position, tiles, label in (
        (0.50, real, "real"),
        (0.02, generated, "generated"),
    ):
        axes = figure.add_axes((0.07, position, 0.92, 0.41))
        axes.imshow(montage(tiles), cmap="gray", vmin=0, vmax=255, aspect="auto")
        axes.set_ylabel(label, fontsize=12)
        axes.set_yticks([])
        axes.set_xticks(
            [tile / 2 + column * (tile + GAP) for column in range(columns)],
            names if label == "real" else [""] * columns,
        )
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120 * tile / TILE)


def tile_side(tiles: np.ndarray) -> int:
    """Pixels a side that an image is shown with: its own, but at least `TILE`."""
    return max(TILE, tiles.shape[2])


def montage(tiles: np.ndarray) -> np.ndarray:
    """Upscaled images side by side on white, bytes `[height, width(, 3)]`."""
    rows, columns = tiles.shape[:2]
    tile = tile_side(tiles)
    pitch = tile + GAP
    colour = tiles.shape[-1] == 3
    canvas = np.full(
        (rows * pitch - GAP, columns * pitch - GAP) + (3,) * colour, 255, np.uint8
    )
    for row in range(rows):
        for column in range(columns):
            pixels = np.clip((tiles[row, column] + 1) * 127.5, 0, 255).astype(np.uint8)
            picture = Image.fromarray(pixels if colour else pixels[..., 0])
            top, left = row * pitch, column * pitch
            canvas[top : top + tile, left : left + tile] = np.asarray(
                picture.resize((tile, tile), Image.Resampling.BICUBIC)
            )
    return canvas
