"""What a program says before any compiler has seen it, for whatever platform it is."""

import collections
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

_FUNCTION = re.compile(r"func\.func (?:public |private )?@([\w.\-]+)\(")
_CALL = re.compile(r"(?<!\w)call @([\w.\-]+)\(")
_KIND = re.compile(r'"?(?:stablehlo|chlo)\.(\w+)"?')
_DOT = re.compile(
    r"stablehlo\.dot_general .*? : \((tensor<\S+>), (tensor<\S+>)\) -> (tensor<\S+>)"
)


class Operation(NamedTuple):
    """An operation, and what it is inside of.

    Attributes:
        kind: Its name, such as `dot_general`.
        line: Its text.
        inside: `"while"` and `"case"` for each loop and branch around it. A case of one
            branch is none: a choice of the platform is written so.
    """

    kind: str
    line: str
    inside: tuple[str, ...]


class Tensor(NamedTuple):
    """The type of an array."""

    shape: tuple[int, ...]
    dtype: str


class _Node(NamedTuple):
    line: str
    regions: list[list["_Node"]]


def program(function: Callable[..., Any], *args: Any, platform: str) -> str:
    """The text of what `jax.export` makes of a function for a platform."""
    exported = jax.export.export(jax.jit(function), platforms=[platform])(*args)
    return str(exported.mlir_module())


def operations(text: str) -> Iterator[Operation]:
    """All operations of a program, those of called functions once for each call."""
    functions = {
        name[1]: node
        for module in _nodes(text)
        for node in itertools.chain(*module.regions)
        if (name := _FUNCTION.search(node.line))
    }

    def walk(nodes: list[_Node], inside: tuple[str, ...]) -> Iterator[Operation]:
        for node in nodes:
            kind = _KIND.search(node.line)
            if kind:
                yield Operation(kind[1], node.line, inside)
            if called := _CALL.search(node.line):
                yield from walk(functions[called[1]].regions[0], inside)
            around = inside
            if kind and (kind[1] == "while" or len(node.regions) > 1):
                around = (*inside, kind[1])
            for region in node.regions:
                yield from walk(region, around)

    yield from walk(functions["main"].regions[0], ())


def count(text: str, kind: str) -> int:
    """How many operations there are of a kind."""
    return sum(operation.kind == kind for operation in operations(text))


def products(text: str) -> collections.Counter[tuple[Tensor, Tensor, Tensor]]:
    """Left and right factor and result of all matrix products."""
    found = (_DOT.search(o.line) for o in operations(text) if o.kind == "dot_general")
    return collections.Counter(
        tuple(_tensor(match[i]) for i in (1, 2, 3)) for match in found
    )


def custom_calls(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """The name of each call into a library or to the host, and what it is inside of."""
    return [
        (re.search(r"custom_call @([\w.$]+)", operation.line)[1], operation.inside)
        for operation in operations(text)
        if operation.kind == "custom_call"
    ]


def _tensor(text: str) -> Tensor:
    *axes, dtype = text.removeprefix("tensor<").removesuffix(">").split("x")
    return Tensor(tuple(map(int, axes)), dtype)


def _nodes(text: str) -> list[_Node]:
    """The lines of a text as a tree: what is between braces belongs to a line."""
    top: list[_Node] = []
    open_regions = [top]
    for line in map(
        str.strip, re.sub(r" loc\(.*\)$", "", text, flags=re.M).splitlines()
    ):
        closes = line.startswith("}")
        if closes:
            open_regions.pop()
        if line.endswith("{"):
            here = open_regions[-1]
            # `cond {`, `} do {` and `}, {` are regions of the operation before them.
            if closes or line == "cond {":
                here[-1].regions.append([])
            else:
                here.append(_Node(line, [[]]))
            open_regions.append(here[-1].regions[-1])
        elif not closes and line:
            open_regions[-1].append(_Node(line, []))
    return top
