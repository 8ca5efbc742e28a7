"""The pictures of `step_cache.py`."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

STYLES = {
    "step cache": ("#1f5fa8", "o", "step cache, order 1"),
    "fewer steps": ("#c0392b", "s", "fewer steps"),
    "DPM-Solver++": ("#7f8c8d", "^", "DPM-Solver++(2M)"),
    "Heun": ("#8e44ad", "v", "Heun"),
}


def samples(drawn: Mapping[Any, np.ndarray], path: Path) -> None:
    """A row of images for each case; those of a column began with the same noise."""
    figure = Figure(figsize=(7.2, 0.47 * len(drawn)), layout="constrained")
    rows = figure.subplots(len(drawn), 1)
    for axes, (case, images) in zip(rows, drawn.items(), strict=True):
        strip = np.concatenate([np.pad(image[..., 0], 1) for image in images], axis=1)
        axes.imshow(strip, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        what = case.kind if case.ratio == 1 else f"{case.kind}, {case.ratio:g}×"
        axes.set_title(
            f"{what}: {case.evaluations}", loc="left", fontsize=8, x=-0.42, y=0.2
        )
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def curves(quality: Mapping[str, Any], path: Path) -> None:
    """Fréchet distance and distance to the uncached images against evaluations."""
    starts = [("ddim", 50), ("euler", 25)]
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col")
    for column, (start, steps) in enumerate(starts):
        rows = [
            row
            for row in quality.values()
            if (row["start"], row["steps"]) == (start, steps)
        ]
        whole = next((row for row in rows if row["kind"] == "uncached"), None)
        if whole is None:
            continue
        mean, error = spread(whole["frechet"])
        top, bottom = grid[0][column], grid[1][column]
        top.axhspan(mean - error, mean + error, color="#dddddd")
        top.axhline(mean, color="#444444", linewidth=1, label=f"all {steps} steps")
        for kind, (colour, marker, label) in STYLES.items():
            points = sorted(
                (row["evaluations"], *spread(row["frechet"]), *spread(row["distance"]))
                for row in rows
                if row["kind"] == kind and row["order"] in (0, 1)
                if kind != "step cache" or row["order"] == 1
            )
            if not points:
                continue
            count, frechet, error, distance, _ = zip(*points, strict=True)
            style = {"color": colour, "marker": marker, "label": label}
            top.errorbar(count, frechet, yerr=error, capsize=2, **style)
            bottom.plot(count, distance, **style)
        top.set_title(f"{start.upper() if start == 'ddim' else 'Euler'}, {steps} steps")
        top.set_ylabel("Fréchet distance")
        bottom.set_ylabel("distance to all steps")
        bottom.set_xlabel("evaluations of the network")
        bottom.set_yscale("log")
        top.legend(fontsize=8)
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
