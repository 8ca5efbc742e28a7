"""Which polynomials of a Gram matrix orthogonalise best in half precision?

    python examples/derivations/half_precision.py
    python examples/derivations/half_precision.py --aol

In half precision one polynomial of R = XXᵀ can't do it, for rounding R drowns what is
below a few percent of the largest singular value (`gram_polynomial.py` has that one).
With a restart from X between them, two can: X ← q₁(XXᵀ)X, X ← q₂(XXᵀ)X. For every way
to share out the products between them

1. q₁ is fitted on scalars, from several random starts, so that the singular values in
   [low, 1] come as near together as may be, and q₂ on what q₁ makes of them, both by
   the minimax method of `gram_polynomial.py` and on a little more than that, where
   rounding puts some;
2. the pairs that bring [1e-3, 1] into [0.85, 1.15] orthogonalise a set of matrices by
   the library's own function, operands rounded to `--dtype` and sums in fp32;
3. those go that leave a singular value above 1.2 in any of many matrices with a few
   large directions along the axes, where roundings don't average out;
4. of the rest the pair is kept whose largest error against the polar factor UVᵀ of a
   float64 SVD, in units of the error of Polar Express, is smallest.

Several `low` are tried, since what lifts a singular value of 1e-3 also lifts rounding:
the smaller the slope at zero, the less noise fills the directions that a matrix lacks.
Tables compare the pairs with Polar Express and Muon's quintic in both forms. Then the
best of the pairs with the fewest products is printed as
`fusionopt_jax._matrices.gram_polynomial` has it. Rounding decides which of many
equally good pairs comes out on a machine.

With three polynomials and two restarts, the best odd polynomials after one another say
enough (`--schedules` of `gram_polynomial.py`): degrees 9, 17 and 17 take 8 products and
12a + 16 units of m³, which is more than 8a + 18 for every a ≥ 1; with one product less
they come within 0.22 of 1 and no nearer.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import gram_polynomial as scalar
import jax
import jax.numpy as jnp
import numpy as np
from gram_polynomial import Table

from fusionopt_jax._matrices import newton_schulz
from fusionopt_jax._matrices.gram_polynomial import GramMinimax, GramPolynomial

DTYPES = ("fp16", "bf16")
# By start: how the products are shared out, the lowest singular value, and what is
# tried as `low` in its units.
SPLITS = {
    "frobenius": ((4, 4), (3, 5), (5, 3), (4, 5), (5, 4), (5, 5)),
    "aol": ((3, 3), (2, 4), (4, 2), (3, 4), (4, 3), (4, 4)),
}
LOWEST = {"frobenius": 1e-3, "aol": 5e-3}
LOWS = (1.0, 1.03, 1.06, 1.3)
STEPS = {"frobenius": 5, "aol": 4}
ALLOWED = 0.15
ALLOWED_ROUNDED = 0.2
# How far beyond 1 rounding may leave the singular values of X, and those of q₁(R) X:
# q₁ is 25 to 50 at zero and 1 at one, and 2⁻¹² of the difference a hundredth, several
# times over; it came to 0.04 at most. Just beyond, q₂ has no bound.
BEYOND = (1.01, 1.15)

Pair = tuple[tuple[Table, np.ndarray], ...]


class Row(NamedTuple):
    """A schedule, where singular values end, and by dtype what rounding does.

    Attributes:
        name: What it is.
        costs: Operations for n/m of 1, 2 and 4, in units of m³.
        values: What the singular values that matter become.
        errors: ‖X − UVᵀ‖ / ‖UVᵀ‖ of each matrix.
        largest: The largest singular value of all outliers.
    """

    name: str
    costs: tuple[int, ...]
    values: np.ndarray
    errors: dict[str, np.ndarray]
    largest: dict[str, float]


class Problems(NamedTuple):
    """Matrices, their polar factors, and matrices with outliers."""

    names: tuple[str, ...]
    stack: np.ndarray
    polar: np.ndarray
    outliers: np.ndarray
    start: Any


def matrices(m: int, n: int, start: str, seed: int = 0) -> Problems:
    """Matrices of norm 1 and the polar factors that `start` makes of them."""
    rng = np.random.default_rng(seed)
    made = {"random": rng.normal(size=(m, n))}
    spectra = {
        "cond 1e2": np.geomspace(1, 1e-2, m),
        "cond 1e3": np.geomspace(1, 1e-3, m),
        "1 large": np.r_[1.0, 0.45 * np.geomspace(1, 1e-3, m - 1)],
        "low rank": (np.arange(m) < max(m // 8, 1)).astype(float),
    }
    for name, values in spectra.items():
        left, _, right = np.linalg.svd(rng.normal(size=(m, n)), full_matrices=False)
        made[name] = (left * values) @ right
    noise = rng.normal(size=(m, n))
    made["1 + noise"] = np.outer(*map(rng.normal, (0, 0), (1, 1), (m, n))) + 0.1 * noise
    # Along the axes roundings don't average out.
    made["1 row"] = np.r_[1.0, np.full(m - 1, 0.02)][:, None] * noise
    made["diagonal"] = np.eye(m, n) * np.geomspace(1, 1e-3, m)[:, None]
    pairs = [with_polar_factor(G, start) for G in made.values()]
    stack, polar = (np.stack(part) for part in zip(*pairs, strict=True))
    return Problems(tuple(made), stack, polar, outliers(rng), start)


def outliers(rng: np.random.Generator, count: int = 120) -> np.ndarray:
    """Small matrices of norm 1, some of whose rows are large."""
    made = []
    for i in range(count):
        rows = np.full(12, np.exp(rng.uniform(np.log(1e-4), 0)))
        rows *= rng.uniform(0.5, 1, 12) if i % 3 else 1
        rows[: rng.integers(1, 5)] = rng.uniform(0.5, 1)
        rows[0] = rng.uniform(0.05, 1)
        G = np.eye(12, 24) if i % 2 else rng.normal(size=(12, 24)) / np.sqrt(24)
        G = G * rows[:, None]
        made.append(G / np.linalg.norm(G))
    return np.stack(made).astype(np.float32)


def with_polar_factor(G: np.ndarray, start: str) -> tuple[np.ndarray, np.ndarray]:
    """G of norm 1 in fp32, and UVᵀ of that, or of what AOL's scale makes of it."""
    G = (G / np.linalg.norm(G)).astype(np.float32)
    scaled = G.astype(float)
    if start == "aol":
        scaled /= np.sqrt(np.abs(scaled @ scaled.T).sum(axis=1, keepdims=True))
    left, values, right = np.linalg.svd(scaled, full_matrices=False)
    return G, (left * (values > 1e-6 * values[0])) @ right


def orthogonalised(
    table: Any, stack: np.ndarray, start: Any, dtype: Any, **settings: Any
) -> np.ndarray:
    """What the library makes of a stack."""
    # One operation after the other: to compile each table would take longer.
    with jax.disable_jit():
        found = newton_schulz.newton_schulz(
            jnp.asarray(stack),
            table,
            eps=0,
            preconditioner=start,
            hot_dtype=dtype,
            platforms=("cpu",),
            **settings,
        )
    return np.asarray(found, float)


def errors(table: Any, problems: Problems, dtype: str, **settings: Any) -> np.ndarray:
    """‖X − UVᵀ‖ / ‖UVᵀ‖ of each matrix."""
    found = orthogonalised(table, problems.stack, problems.start, dtype, **settings)
    norm = lambda stack: np.linalg.norm(stack, axis=(-2, -1))  # noqa: E731
    return norm(found - problems.polar) / norm(problems.polar)


def largest(table: Any, problems: Problems, dtype: str, **settings: Any) -> float:
    """The largest singular value that outliers end with."""
    found = orthogonalised(table, problems.outliers, problems.start, dtype, **settings)
    finite = np.isfinite(found).all()
    return float(np.linalg.norm(found, 2, axis=(-2, -1)).max()) if finite else np.inf


def rounding(table: Any, problems: Problems, **settings: Any) -> tuple[Any, Any]:
    """Both by dtype."""
    return (
        {dtype: errors(table, problems, dtype, **settings) for dtype in DTYPES},
        {dtype: largest(table, problems, dtype, **settings) for dtype in DTYPES},
    )


def known(name: str, method: Any, problems: Problems) -> Row:
    """What the library's steps do."""
    start = problems.start
    table = newton_schulz.coefficient_table(name, STEPS[start])
    safety = newton_schulz.safety_factor(name)
    values = grid(start) / safety
    for a, b, c in table:
        values = a * values + b * values**3 + c * values**5
    return Row(
        f"{name}, {method}",
        costs(table, method),
        values,
        *rounding(table, problems, method=method, safety=safety),
    )


def costs(table: Any, method: Any) -> tuple[int, ...]:
    """Operations for n/m of 1, 2 and 4, in units of m³."""
    return tuple(
        newton_schulz.newton_schulz_flops(1, a, table, method, "bf16")
        for a in (1, 2, 4)
    )


def grid(start: str) -> np.ndarray:
    """The singular values that have to end near 1."""
    return scalar.grid(LOWEST[start], 1.0, 2000)


def as_row(split: Sequence[int], pair: Pair, problems: Problems) -> Row:
    """What a pair does."""
    table = as_table(pair)
    return Row(
        f"{split[0]} + {split[1]} products",
        costs(table, "gram"),
        on_values(pair, grid(problems.start)),
        *rounding(table, problems),
    )


def as_table(pair: Pair) -> GramMinimax:
    """The library's form of a pair."""
    row = lambda part: tuple(float(f"{value:.9g}") for value in part)  # noqa: E731
    halves = tuple(
        GramPolynomial(
            tuple((row(p[a:b]), row(p[b:c])) for a, b, c in table.rows),
            row(p[table.last :]),
        )
        for table, p in pair
    )
    return GramMinimax(halves[0], halves)


def on_values(pair: Pair, x: np.ndarray) -> np.ndarray:
    """What a pair makes of singular values."""
    for table, p in pair:
        x = table.values(p, x)
    return x


def stretched(table: Table, p: np.ndarray, factor: float) -> np.ndarray:
    """The polynomial of x / factor: 2x² − 1 becomes (2x² − 1)/f² + 1/f² − 1."""
    p = p.copy()
    parts = [(a, b) for row in table.rows for a, b in itertools.pairwise(row)]
    for start, _ in [*parts, (table.last, table.size)]:
        p[start] += p[start + 1] * (factor**-2 - 1)
        p[start + 1] *= factor**-2
    p[table.last :] /= factor
    return p


def fits(
    products: int, low: float, high: float, rng: np.random.Generator, starts: int
) -> list[tuple[float, np.ndarray]]:
    """The best of several fits on [low, high], by their errors."""
    table = Table(products)
    found = [scalar.one_step(products, low / high, rng) for _ in range(starts)]
    found = sorted(found, key=lambda fit: fit[0])[: max(starts // 3, 2)]
    found = [
        scalar.refined(table, p, low / high, 3, ridge=scalar.LAST_RIDGE)
        for _, p in found
    ]
    return sorted(
        [(error, stretched(table, p, high)) for error, p in found],
        key=lambda fit: fit[0],
    )


def pairs(
    split: Sequence[int], low: float, rng: np.random.Generator, starts: int
) -> list[Pair]:
    """Pairs that are each minimax after the other, from several starts."""
    firsts = fits(split[0], low, BEYOND[0], rng, starts)
    # One that leaves values twice as far apart is another local minimum.
    firsts = [(error, p) for error, p in firsts if 1 - error > (1 - firsts[0][0]) / 1.2]
    error = max(error for error, _ in firsts)
    seconds = fits(split[1], (1 - error) / (1 + error), BEYOND[1], rng, starts)
    tables = [Table(products) for products in split]
    made = []
    for (error, first), (_, second) in itertools.product(firsts, seconds):
        first = first.copy()
        first[tables[0].last :] /= 1 + error
        made.append(((tables[0], first), (tables[1], second)))
    return made


def best_pair(
    split: Sequence[int],
    problems: Problems,
    express: np.ndarray,
    dtype: str,
    options: argparse.Namespace,
) -> tuple[float, Pair]:
    """The pair with the smallest of its largest errors in units of `express`."""
    lowest = LOWEST[problems.start]
    best: tuple[float, Pair] | None = None
    near: tuple[float, Pair] | None = None
    for low in LOWS:
        rng = np.random.default_rng(options.seed)
        for pair in pairs(split, low * lowest, rng, options.starts):
            values = on_values(pair, grid(problems.start))
            apart = float(np.max(np.abs(values - 1)))
            if near is None or apart < near[0]:
                near = apart, pair
            if apart > ALLOWED:
                continue
            table = as_table(pair)
            if largest(table, problems, dtype) > 1 + ALLOWED_ROUNDED:
                continue
            found = errors(table, problems, dtype)
            worst = float(np.max(found / express))
            if best is None or worst < best[0]:
                best = worst, pair
        # With a larger `low` a few more values end near 1, and not the lowest.
        if near is not None and near[0] > 1.3 * ALLOWED:
            break
    assert near is not None
    return best or (np.inf, near[1])


def show(rows: Sequence[Row], problems: Problems) -> None:
    """Errors, one table for each dtype."""
    for dtype in DTYPES:
        m, n = problems.stack.shape[1:]
        print(f"\n{dtype}, {m} x {n}: distance from the polar factor, relative")
        print(f"{'':22}" + "".join(f"{name:>10}" for name in problems.names))
        for row in rows:
            found = row.errors[dtype]
            print(f"{row.name:22}" + "".join(f"{error:10.3g}" for error in found))


def main() -> None:
    """Searches and prints."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--aol", action="store_true", help="AOL's start")
    arguments.add_argument("--dtype", choices=DTYPES, default="fp16", help="chosen by")
    arguments.add_argument("--split", type=int, nargs=2, help="this one alone")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--starts", type=int, default=12)
    arguments.add_argument("--small", type=int, nargs=2, default=[96, 384])
    arguments.add_argument("--large", type=int, nargs=2, default=[384, 1152])
    options = arguments.parse_args()
    # Trials far off overflow, and are refused.
    np.seterr(all="ignore")
    start = "aol" if options.aol else "frobenius"
    small, large = (matrices(*shape, start) for shape in (options.small, options.large))
    names = list(itertools.product(("quintic", "polar_express"), ("plain", "gram")))
    rows = [known(*name, small) for name in names]
    express = rows[-1].errors[options.dtype]
    best: dict[tuple[int, ...], tuple[float, Pair]] = {}
    for split in [tuple(options.split)] if options.split else SPLITS[start]:
        begun = time.perf_counter()
        best[split] = best_pair(split, small, express, options.dtype, options)
        worst, pair = best[split]
        rows.append(as_row(split, pair, small))
        print(f"{split}: {worst:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)

    print("\noperations in units of m^3, singular values, largest of outliers")
    print(f"{'':22}   n = m      2 m     4 m   lowest  highest     fp16     bf16")
    for row in rows:
        cost = "".join(f"{cost:8}" for cost in row.costs)
        most = "".join(f"{row.largest[dtype]:9.3g}" for dtype in DTYPES)
        low, high = row.values.min(), row.values.max()
        print(f"{row.name:22}{cost}{low:9.3f}{high:9.3f}{most}")
    show(rows, small)
    rows = [known(*name, large) for name in names]
    rows += [as_row(split, pair, large) for split, (_, pair) in best.items()]
    show(rows, large)

    kept = {split: found for split, found in best.items() if found[0] < np.inf}
    if not kept:
        print("\nnone is allowed")
        return
    fewest = min(sum(split) for split in kept)
    _, pair = min(
        (found for split, found in kept.items() if sum(split) == fewest),
        key=lambda found: found[0],
    )
    for table, p in pair:
        print()
        scalar.show(table, p)


if __name__ == "__main__":
    main()
