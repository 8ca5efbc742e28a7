"""Arrays that are computed once more from what they were made of, in place of kept.

Every kernel of XLA for CPUs writes one array. Where two arrays are replaced, each by
what both old ones and some others say, the kernel that comes second finds one of them
overwritten, and XLA makes a copy of it first; what both read and no kernel holds alone
is stored as well. Neither is needed if the second kernel starts again from what the
first one has read and nobody has overwritten.

Elsewhere one kernel writes both, and nothing here changes the program.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    jaxpr_as_fun,
)
from jax.interpreters import ad, batching, mlir, partial_eval

from fusionopt_jax._types import Array, Scalar

# What makes an entry of the same entry of other arrays. Everything else is kept.
_ENTRYWISE = """
    abs add and broadcast_in_dim cbrt ceil clamp complex conj convert_element_type copy
    cos div eq erf exp exp2 expm1 floor ge gt imag integer_pow is_finite le log log1p
    logistic lt max min mul ne neg not or pow real reduce_precision rem round rsqrt
    select_n sign sin sqrt square sub tan tanh xor
"""


class Origin(NamedTuple):
    """How an array is made of others, entry by entry.

    Attributes:
        arrays: What it is made of; itself, where it is made in another way.
        again: Makes it of them.
    """

    arrays: list[Array]
    again: Callable[..., Array]


def with_origins(
    function: Callable[..., tuple[Any, Any]], *args: Any
) -> tuple[tuple[Any, Any], list[Origin]]:
    """`function(*args)`, and how the arrays of its first result are made.

    Args:
        function: Returns two trees. What is in the second is stored, so that the first
            may be made of it.
        *args: Trees of traced arrays.

    Returns:
        The results, and an `Origin` for each leaf of the first.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    structure = jax.tree.structure(shape)
    count = jax.tree.structure(shape[0]).num_leaves
    stored = {var for var in jaxpr.outvars[count:] if isinstance(var, Var)}
    made = {
        var: number
        for number, equation in enumerate(jaxpr.eqns)
        for var in equation.outvars
        if var not in stored
    }
    parts = [_part(jaxpr, made, result) for result in jaxpr.outvars[:count]]
    found = list(dict.fromkeys(var for part in parts for var in part.invars))
    # The values on the way are results too.
    whole = jaxpr.replace(outvars=[*jaxpr.outvars, *found])
    values = jaxpr_as_fun(ClosedJaxpr(whole, closed.consts))(*jax.tree.leaves(args))
    results = jax.tree.unflatten(structure, values[: len(jaxpr.outvars)])
    known = dict(zip(found, values[len(jaxpr.outvars) :], strict=True))
    return results, [
        Origin([known[var] for var in part.invars], _evaluation(part)) for part in parts
    ]


def _evaluation(part: Jaxpr) -> Callable[..., Array]:
    run = jaxpr_as_fun(ClosedJaxpr(part, ()))
    return lambda *arrays: run(*arrays)[0]


def _part(jaxpr: Jaxpr, made: dict[Var, int], result: Var | Literal) -> Jaxpr:
    """The equations by which a result is made, back to what is not made entrywise."""
    numbers: set[int] = set()
    inputs: dict[Var, None] = {}
    like: Any = result.aval
    waiting = [result]
    while waiting:
        var = waiting.pop()
        if isinstance(var, Literal) or var in inputs:
            continue
        number = made.get(var)
        array: Any = var.aval
        alike = array.shape == like.shape
        if number is None or not alike or not _entrywise(jaxpr.eqns[number]):
            inputs[var] = None
        elif number not in numbers:
            numbers.add(number)
            waiting.extend(jaxpr.eqns[number].invars)
    part = jaxpr.replace(
        constvars=[],
        invars=list(inputs),
        outvars=[result],
        eqns=[jaxpr.eqns[number] for number in sorted(numbers)],
        effects=set(),
    )
    # A function of many leaves that is jitted by itself makes the others too.
    pruned, used = partial_eval.dce_jaxpr(part, [True])
    needed = [var for var, is_used in zip(part.invars, used, strict=True) if is_used]
    return pruned.replace(invars=needed)


def _entrywise(equation: JaxprEqn) -> bool:
    """Whether an equation makes arrays by operations on the entries of others."""
    inner = equation.params.get("jaxpr")
    if isinstance(inner, ClosedJaxpr):
        names: Iterable[str] = (one.primitive.name for one in inner.jaxpr.eqns)
    else:
        names = (equation.primitive.name,)
    return all(name in _ENTRYWISE.split() for name in names)


def afterwards(
    written: Array, scalar: Scalar, *arrays: Array
) -> tuple[Scalar, list[Array]]:
    """A scalar and arrays as they are, of which a CPU makes something new later.

    What is computed of them there is computed by itself, even if it has been before,
    and if it depends on the scalar, not until `written` is.
    """
    later, *others = _afterwards_p.bind(written, scalar, *arrays)
    return later, others


def _on_cpu(written: Array, scalar: Array, *arrays: Array) -> list[Array]:
    if written.size:
        start = [size // 2 for size in written.shape]
        entry = jax.lax.slice(written, start, [at + 1 for at in start]).reshape(())
        # Never, which XLA doesn't see.
        never = jnp.real(entry) > jnp.inf
        scalar = jax.lax.select_n(never, scalar, jnp.zeros_like(scalar))
    # Or XLA would find that it has computed the same before.
    return [scalar, *jax.lax.optimization_barrier(arrays)]


_afterwards_p = Primitive("afterwards")
_afterwards_p.multiple_results = True
_afterwards_p.def_impl(lambda _, *values: list(values))
_afterwards_p.def_abstract_eval(lambda _, *values: list(values))
mlir.register_lowering(_afterwards_p, lambda _, __, *values: list(values))
mlir.register_lowering(
    _afterwards_p, mlir.lower_fun(_on_cpu, multiple_results=True), platform="cpu"
)
ad.primitive_jvps[_afterwards_p] = lambda primals, tangents: (
    _afterwards_p.bind(*primals),
    list(tangents[1:]),
)
batching.primitive_batchers[_afterwards_p] = lambda values, axes: (
    _afterwards_p.bind(*values),
    list(axes[1:]),
)
