"""What a compiled program says of itself: operations and exchanged bytes of a device.

XLA's `cost_analysis` counts the body of a loop once; here it counts as often as the
program says that it runs.
"""

import collections
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"\n(?=%|ENTRY)")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(?:f|s|u|bf)(\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations|true_computation"
    r"|false_computation)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'known_trip_count"?:?=?\{"n":"(\d+)"')
COLLECTIVES = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
)


class Program(NamedTuple):
    """What one device does.

    Attributes:
        flops: of all matrix products.
        received: bytes, by kind of collective.
        unknown_loops: loops with products whose number of rounds the program doesn't
            say; each counts once.
    """

    flops: int
    received: dict[str, float]
    unknown_loops: int


def read(text: str) -> Program:
    """Reads the text of a compiled program."""
    computations, entry = {}, ""
    for part in _COMPUTATION.split(text):
        if found := re.match(r"(ENTRY )?%([\w.\-]+)", part):
            computations[found[2]] = part.splitlines()[1:]
            entry = found[2] if found[1] else entry
    received: collections.Counter[str] = collections.Counter()
    unknown = 0

    def walk(name: str, times: int) -> int:
        nonlocal unknown
        total, sizes, started = 0, {}, {}
        for line in computations[name]:
            if not (found := _INSTRUCTION.match(line)):
                continue
            own, shape, kind, rest = found.groups()
            sizes[own] = dims(shape)
            if kind == "dot":
                total += times * product(sizes, sizes[own], rest)
            elif kind.endswith("-start"):
                started[own] = rest
            elif (kind := kind.removesuffix("-done")) in COLLECTIVES:
                # The end of an exchange has its result, its start the groups.
                groups = started.get(re.findall(r"%([\w.\-]+)", rest)[0], rest)
                received[kind] += times * bytes_received(kind, shape, groups)
            rounds = _TRIPS.search(rest)
            inner = 0
            for names in _CALLED.findall(rest):
                for called in re.findall(r"%([\w.\-]+)", names):
                    inner += walk(called, times * int(rounds[1] if rounds else 1))
            unknown += kind == "while" and not rounds and inner > 0
            total += inner
        return total

    return Program(walk(entry, 1), dict(received), unknown)


def schedule(text: str) -> list[str]:
    """Starts and ends of exchanges, and loops, in the order of a scheduled program."""
    wanted = re.compile(rf"({'|'.join(COLLECTIVES)})(-start|-done)?|while")
    lines = text[text.index("\nENTRY") :].splitlines()
    found = [match for line in lines if (match := _INSTRUCTION.match(line))]
    return [f"{m[3]} {m[1]} {m[2][:60]}" for m in found if wanted.fullmatch(m[3])]


def dims(shape: str) -> list[int]:
    """The axes of the first array of a shape."""
    found = _SHAPE.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def product(sizes: dict[str, list[int]], result: list[int], rest: str) -> int:
    """Operations of a `dot`."""
    left = sizes[re.findall(r"%([\w.\-]+)", rest)[0]]
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    summed = [left[int(axis)] for axis in axes[1].split(",")] if axes else []
    return 2 * math.prod(result) * math.prod(summed)


def bytes_received(kind: str, shape: str, rest: str) -> float:
    """Bytes that one device gets from others, by the best known algorithm."""
    size = sum(
        int(bits) // 8 * math.prod(int(axis) for axis in axes.split(",") if axis)
        for bits, axes in _SHAPE.findall(shape)
    )
    others = 1 - 1 / group_size(rest)
    return {
        "all-to-all": size * others,
        "all-gather": size * others,
        "all-reduce": 2 * size * others,
        "reduce-scatter": size * (group_size(rest) - 1),
        "collective-permute": float(size),
    }[kind]


def group_size(rest: str) -> int:
    """How many devices take part together."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    # Groups along the axes of a mesh, as `mesh['axis_0'=8,'axis_1'=1], dims {axis_0}`.
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,? ?\{([^}]*)\})?", rest):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        named = re.findall(r"\w+", found[2] or "") or list(axes)
        return math.prod(int(axes[name]) for name in named)
    return 1
