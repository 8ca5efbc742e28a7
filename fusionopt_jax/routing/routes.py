"""What a routing says of the leaves of a tree: as a table to read, and to compare."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from fusionopt_jax._matrices.view import MatrixView

# Raise it where the meaning of the fields changes.
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Route:
    """What a routing says of one leaf.

    Attributes:
        path: The leaf's slash-joined path.
        shape: Its shape.
        label: The group it belongs to.
        view: Its matrices, or `None` if it has none.
        reason: Why, in words.
        scale: Factor on its learning rate.
    """

    path: str
    shape: tuple[int, ...]
    label: str
    view: MatrixView | None
    reason: str
    scale: float = 1.0

    @property
    def description(self) -> str:
        """Label and matrices in one line, such as `spectral 36x(128, 128)`."""
        if self.view is None:
            return self.label
        return f"{self.label} {_matrices(self.view, 'x')}"

    @property
    def axes(self) -> str:
        """Which axes make the matrices, such as `inputs (1,), outputs (2,)`."""
        if self.view is None:
            return ""
        text = f"inputs {self.view.in_axes}, outputs {self.view.out_axes}"
        if self.view.chunks != 1:
            text += f", chunks {self.view.chunks} of the {self.view.chunk_axis}s"
        return text


def table(routes: Sequence[Route]) -> str:
    """The split as text; factors on the learning rate in a column if there are any."""
    scaled = any(route.scale != 1 for route in routes)
    rows = [("path", "shape", "label", "matrices", "why", *["rate"] * scaled)]
    for route in routes:
        matrices = ""
        if route.view is not None:
            matrices = _matrices(route.view, " x ")
        rows.append(
            (
                route.path,
                str(route.shape),
                route.label,
                matrices,
                route.reason,
                *[f"x {route.scale:g}" if route.scale != 1 else ""] * scaled,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, _totals(routes)])


def _matrices(view: MatrixView, times: str) -> str:
    """How many matrices of which shape, such as `1x(128, 128) + 2x(128, 64)`."""
    runs = itertools.groupby(view.stacks, lambda stack: stack.matrix)
    return " + ".join(
        f"{sum(stack.count for stack in run)}{times}{matrix}" for matrix, run in runs
    )


def _totals(routes: Sequence[Route]) -> str:
    """One line with the leaves and parameters of each label."""
    counts: dict[str, list[int]] = {}
    for route in routes:
        entry = counts.setdefault(route.label, [0, 0])
        entry[0] += 1
        entry[1] += math.prod(route.shape)
    return "; ".join(
        f"{label}: {leaves} {'leaf' if leaves == 1 else 'leaves'}, {size:,} parameters"
        for label, (leaves, size) in sorted(counts.items())
    )


def fingerprint(routes: Sequence[Route]) -> str:
    """The split as one string: of each leaf its group, its matrices and their axes."""
    leaves = {route.path: [route.description, route.axes] for route in routes}
    return json.dumps(
        {"format": _FORMAT, "leaves": leaves}, sort_keys=True, separators=(",", ":")
    )


def check(routes: Sequence[Route], saved: str) -> None:
    """Require that a saved fingerprint is that of these routes.

    Raises:
        ValueError: If it is none, or leaves differ; it lists them.
    """
    moved = [
        f"  {path}: saved as {was}, now {is_now}"
        for path, was, is_now in differences(routes, saved)
    ]
    if moved:
        raise ValueError(
            "The checkpoint was written under another routing. These leaves moved:\n"
            + "\n".join(moved)
            + "\nRestore with the routing that it was written with, or start the "
            "optimiser state anew."
        )


def differences(routes: Sequence[Route], saved: str) -> list[tuple[str, str, str]]:
    """The leaves that a saved fingerprint has otherwise, and both sides in words.

    Raises:
        ValueError: If it is no fingerprint.
    """
    before = _read(saved)
    now = _read(fingerprint(routes))
    return [
        (path, was, is_now)
        for path in sorted({*now, *before})
        for was, is_now in [_difference(before.get(path), now.get(path))]
        if was != is_now
    ]


def _read(text: str) -> dict[str, list[str]]:
    """The leaves of a fingerprint."""
    try:
        found: Any = json.loads(text)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"The saved routing fingerprint can't be read ({error}); it must be the "
            "string that `Routing.fingerprint` returned."
        ) from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            "The saved routing fingerprint can't be read: another version of this "
            "library wrote it, and 0.1 left out along which axes the matrices lie. If "
            "you know that they are the same, replace it by "
            "`routing.fingerprint(params)`."
        )
    return found["leaves"]


def _difference(was: list[str] | None, now: list[str] | None) -> tuple[str, str]:
    """Both sides in words, with the axes where only they differ."""
    if was is None or now is None or was[0] != now[0]:
        return (was or ["absent"])[0], (now or ["absent"])[0]
    first, second = ("; ".join(filter(None, side)) for side in (was, now))
    return first, second
