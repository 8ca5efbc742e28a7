"""Which code of 8 or 16 bits suits a momentum that is orthogonalised next?

    python examples/benchmarks/state_codes.py

Trains the language model of the study, and repeats the momentum of some of its steps
with a state in each code, from recorded gradients. The table has the error of the
momentum and of the direction that `ns5` makes of it, relative to fp32, in the Frobenius
norm: the mean of all matrices.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _measure as measure
import jax
import jax.numpy as jnp
import numpy as np
import optax
from study import training, workloads
from study.records import Job
from tqdm import tqdm

import fusionopt_jax as fo
from fusionopt_jax import _codec

DECAY = 0.8
RATE, WEIGHT_DECAY = 0.016, 0.2
BLOCKS = (64, 128, 256, 4096)
DRAW = np.random.default_rng(0)

Code = Callable[[np.ndarray], np.ndarray]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prints the table and returns its rows."""
    parser = argparse.ArgumentParser(description="Compare codes of a momentum.")
    parser.add_argument("--first", type=int, default=300, help="steps before")
    parser.add_argument("--steps", type=int, default=40, help="steps that are repeated")
    options = parser.parse_args(arguments)
    start, history, routing = recorded(options.first, options.steps)
    rows = []
    for name, code in tqdm(codes().items(), unit="code"):
        momentum, direction = errors(code, start, history, routing)
        rows.append({"code": name, "momentum": momentum, "direction": direction})
    measure.print_table(rows)
    return rows


def recorded(first: int, steps: int) -> tuple[Any, list[Any], fo.Routing]:
    """The momentum after `first` steps, and the gradients of the matrices after it."""
    workload = workloads.get("lm")
    job = Job("lm", "sf_normuon", RATE, WEIGHT_DECAY, 1, first + steps)
    step, _ = training.compiled(job.workload, job.method, job.steps)
    params, state = training.start(job)
    gradient = jax.jit(
        lambda params, count: jax.grad(workload.loss)(
            params, workload.train, count, jnp.int32(1)
        )
    )
    settings = jnp.int32(1), jnp.float32(RATE), jnp.float32(WEIGHT_DECAY)
    labels = workload.routing.labels(params)
    start, history = None, []
    for count in map(jnp.int32, range(first + steps)):
        if count == first:
            start = jax.tree.map(np.asarray, optax.tree.get(state, "trace"))
        if count >= first:
            matrices = jax.tree.map(
                lambda label, leaf: (
                    np.asarray(leaf, np.float64)
                    if label == fo.routing.SPECTRAL
                    else optax.MaskedNode()
                ),
                labels,
                gradient(params, count),
            )
            history.append(matrices)
        params, state = step(params, state, count, workload.train, *settings)
    return start, history, workload.routing


def errors(
    code: Code, start: Any, history: list[Any], routing: fo.Routing
) -> tuple[float, float]:
    """How far momentum and direction are from fp32, at every eighth step."""
    tx = fo.ns5(routing=routing, coefficients="polar_express", eps=1e-12)
    orthogonalised = jax.jit(lambda tree: tx.update(tree, tx.init(tree))[0])
    exact = kept = start
    found: list[tuple[float, float]] = []
    for count, gradients in enumerate(history, start=1):
        summed = lambda m, g: DECAY * m.astype(np.float64) + g  # noqa: E731
        exact = jax.tree.map(summed, exact, gradients)
        momentum = jax.tree.map(summed, kept, gradients)
        kept = jax.tree.map(code, momentum)
        if count % 8:
            continue
        narrow = lambda tree: jax.tree.map(jnp.float32, tree)  # noqa: E731
        pairs = (
            (momentum, exact),
            (orthogonalised(narrow(momentum)), orthogonalised(narrow(exact))),
        )
        found.append(tuple(_relative(*pair) for pair in pairs))
    momentum_error, direction_error = np.mean(found, axis=0)
    return float(momentum_error), float(direction_error)


def _relative(tree: Any, exact: Any) -> float:
    """The mean of the relative errors of the leaves."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
    return float(
        np.mean(
            [np.linalg.norm(a - np.asarray(b)) / np.linalg.norm(b) for a, b in pairs]
        )
    )


def codes() -> dict[str, Code]:
    """What a momentum comes back as, by the names that the table shows."""

    def narrow(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)

    def drawn(x: np.ndarray) -> np.ndarray:
        seed = jnp.uint32(DRAW.integers(2**32))
        rounded = _codec.stochastic_bf16(jnp.asarray(x, jnp.float32), seed)
        return np.asarray(rounded, np.float64)

    found: dict[str, Code] = {"bf16, nearest": narrow, "bf16, stochastic": drawn}
    levels = {
        "linear": np.arange(-127, 128) / 127,
        "square": np.array([c * abs(c) for c in range(-127, 128)]) / 127**2,
        "table of bitsandbytes": _dynamic(),
    }
    for name, table in levels.items():
        for stochastic in (False, True):
            for size in BLOCKS if name == "square" and not stochastic else (128,):
                title = f"{name}, blocks of {size}" + ", stochastic" * stochastic
                found[title] = _in_blocks(table, size, stochastic=stochastic)
    return found


def _in_blocks(levels: np.ndarray, size: int, *, stochastic: bool) -> Code:
    """The nearest of some levels, or one of the two around by chance."""

    def code(x: np.ndarray) -> np.ndarray:
        length = x.shape[-1]
        while length > size and length % 2 == 0:
            length //= 2
        blocks = x.reshape(*x.shape[:-1], -1, length)
        scales = np.max(np.abs(blocks), axis=-1, keepdims=True)
        shares = blocks / np.where(scales > 0, scales, 1)
        above = np.clip(np.searchsorted(levels, shares), 1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        chance = (shares - low) / (high - low)
        limit = DRAW.random(chance.shape) if stochastic else 0.5
        return (np.where(chance > limit, high, low) * scales).reshape(x.shape)

    return code


def _dynamic() -> np.ndarray:
    """The 256 levels of 8-bit optimisers: an exponent of ten, the rest linear."""
    positive = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        positive += list(10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2)
    return np.unique([*positive, *(-level for level in positive if level < 1)])


if __name__ == "__main__":
    main()
