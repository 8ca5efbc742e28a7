"""What a compiled program's text says of its collectives."""

import collections
import re

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
_SHAPE = re.compile(r"f32\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def computations(text: str) -> dict[str, str]:
    """The text of each computation of a program, by its name; `ENTRY` is the first."""
    found = {}
    for part in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"(?:%([\w.\-]+)|ENTRY)", part)
        if name:
            found[name[1] or "ENTRY"] = part
    return found


def _called(text: str) -> set[str]:
    """The computations that another one calls."""
    names = set(_CALLED.findall(text))
    for branches in _BRANCHES.findall(text):
        names.update(re.findall(r"%([\w.\-]+)", branches))
    return names


def in_loops(text: str) -> list[str]:
    """The collectives that a program runs inside of a loop, at any depth."""
    known = computations(text)
    waiting = set()
    for part in known.values():
        for line in part.splitlines():
            if " while(" in line:
                waiting |= _called(line)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= _called(known[name]) - seen
    return [match for name in seen for match in _COLLECTIVE.findall(known[name])]


def exchanges(text: str) -> dict[str, int]:
    """The collectives that move stacks of matrices, by their kind.

    A stack has three axes, which an exchange may have split.

    The other collectives of a step add up or fetch vectors and scalars: norms, mean
    squares of neurons, one entry of each leaf for `eval_params`.
    """
    lines = (line for part in computations(text).values() for line in part.splitlines())
    found = filter(None, map(_exchange, lines))
    return dict(collections.Counter(found))


def exchanges_in_turn(text: str) -> int:
    """How many exchanges of stacks wait for each other, at most.

    Those that are side by side, with nothing to compute in between, count as one.
    """
    turns: dict[str, int] = {}
    for line in computations(text)["ENTRY"].splitlines():
        made = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line)
        if made:
            read = re.findall(r"%([\w.\-]+)", line[made.end() :])
            before = max((turns.get(name, 0) for name in read), default=0)
            turns[made[1]] = before + (_exchange(line) is not None)
    return max(turns.values())


def _exchange(line: str) -> str | None:
    """The kind of collective by which an instruction moves stacks of matrices."""
    kind = _COLLECTIVE.search(line)
    # That one fetches an entry of a leaf, from the device that has it.
    if kind is None or kind[1] == "collective-permute":
        return None
    axes = [shape.split(",") for shape in _SHAPE.findall(line[: kind.start()])]
    moves = any(len(sizes) > 2 and {*sizes} != {"1"} for sizes in axes)
    return kind[1] if moves else None
