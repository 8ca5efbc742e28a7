"""The pictures of `step_cache.py`."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _step_cache_tables import NAMES, mean_and_error
from matplotlib.figure import Figure

STYLES = {
    "step cache": ("#1f5fa8", "o", "step cache, order 1"),
    "fewer steps": ("#c0392b", "s", "fewer steps"),
    "DPM-Solver++": ("#7f8c8d", "^", "DPM-Solver++(2M)"),
    "Heun": ("#8e44ad", "v", "Heun"),
}


def samples(drawn: Mapping[Any, np.ndarray], path: Path) -> None:
    """A row of images for each case; those of a column began with the same noise."""
    # By kind, and the more evaluations the higher.
    kinds = list(dict.fromkeys(case.kind for case in drawn))
    cases = sorted(drawn, key=lambda case: (kinds.index(case.kind), case.ratio))
    strips = [
        np.concatenate(
            [np.pad(image[..., 0], 1, constant_values=-1) for image in drawn[case]],
            axis=1,
        )
        for case in cases
    ]
    figure = Figure(figsize=(5.8, 0.36 * len(cases)))
    axes = figure.add_axes((0.36, 0.01, 0.63, 0.98))
    axes.imshow(np.concatenate(strips), cmap="gray_r", vmin=-1, vmax=1)
    height = len(strips[0])
    axes.set_yticks(
        [height * (row + 0.5) - 0.5 for row in range(len(cases))],
        [f"{case.kind}: {case.evaluations} evaluations" for case in cases],
        fontsize=8,
    )
    for row, (above, below) in enumerate(itertools.pairwise(cases), 1):
        if above.kind != below.kind:
            axes.axhline(height * row - 0.5, color="#1f5fa8", linewidth=1)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def curves(
    quality: Mapping[str, Any], starts: Sequence[tuple[str, int]], path: Path
) -> None:
    """Fréchet distance and distance to the uncached images against evaluations."""
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
        mean, error = mean_and_error(whole["frechet"])
        top, bottom = grid[0][column], grid[1][column]
        top.axhspan(mean - error, mean + error, color="#dddddd")
        top.axhline(mean, color="#444444", linewidth=1, label=f"all {steps} steps")
        for kind, (colour, marker, label) in STYLES.items():
            points = sorted(
                (
                    row["evaluations"],
                    *mean_and_error(row["frechet"]),
                    *mean_and_error(row["distance"]),
                )
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
        top.set_title(f"{NAMES[start]}, {steps} steps")
        top.set_ylabel("Fréchet distance")
        bottom.set_ylabel("distance to all steps")
        bottom.set_xlabel("evaluations of the network")
        bottom.set_yscale("log")
        top.legend(fontsize=8)
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")
