"""Which polynomial of a Gram matrix orthogonalises in the fewest products?

    python examples/derivations/gram_polynomial.py
    python examples/derivations/gram_polynomial.py --schedules

Wanted is a q with |σ q(σ²) − 1| as small as may be for every σ in [1e-3, 1]. What can
be computed with N products of matrices is a table (Jarlebring & Lorentzon, arXiv
2504.01500): with Y₀ = I and Y₁ = 2R − I,

    Yᵢ₊₁ = (Σⱼ aᵢⱼ Yⱼ)(Σⱼ bᵢⱼ Yⱼ),   i = 1 … N,      q(R) = Σⱼ cⱼ Yⱼ ,

of degree up to 2ᴺ. On singular values it is a smooth function of a, b and c, so it is
fitted like one, in float64 on scalars:

1. two steps x ← x h(x²), as of Polar Express but of degrees 33 and 65 with 4 and 5
   products each, make a table of 12 products;
2. all of its coefficients are fitted together, by least squares whose weights follow
   the errors (Lawson's algorithm), which ends where the largest errors are equal;
3. products are taken out: one factor of a product is drawn towards a constant while the
   rest is fitted; then the product is a sum of others;
4. coefficients are set to zero as long as the rest makes up for them.

What is printed last is the table as `fusionopt_jax._matrices.gram_polynomial` has it.
Many are as good; rounding decides, from one machine to another, which one comes out.
`--schedules` prints what compositions of odd polynomials could reach instead.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog

LOWEST = 1e-3
# Rounding may leave singular values of a matrix of norm 1 a little above 1.
HIGHEST = 1.001
# On the squares of all coefficients. While products are taken out they may grow; in the
# end large ones that cancel would cost bits.
RIDGE = 1e-4
LAST_RIDGE = 3e-3
SCHEDULES = (
    (5, 5, 5, 5, 5),
    (5, 5, 5, 5),
    (9, 9, 17),
    (5, 17, 17),
    (9, 17, 17),
    (17, 17, 17),
    (33, 33),
    (33, 65),
)


class Table:
    """Where each coefficient lies in a vector of them; values and derivatives."""

    def __init__(self, products: int) -> None:
        self.products = products
        ends = np.cumsum([0] + [2 * (i + 2) for i in range(products)])
        self.rows = [
            (int(start), int(start) + i + 2, int(start) + 2 * (i + 2))
            for i, start in enumerate(ends[:-1])
        ]
        self.last = int(ends[-1])
        self.size = self.last + products + 2

    def values(self, p: np.ndarray, x: np.ndarray) -> np.ndarray:
        """X q(x²)."""
        return self.forward(p, x)[0]

    def forward(self, p: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """X q(x²), all Y, and both factors of each product."""
        Y = np.empty((self.products + 2, len(x)))
        Y[0], Y[1] = 1, 2 * x * x - 1
        factors = np.empty((2, self.products, len(x)))
        for i, (start, middle, end) in enumerate(self.rows):
            factors[0, i] = p[start:middle] @ Y[: i + 2]
            factors[1, i] = p[middle:end] @ Y[: i + 2]
            Y[i + 2] = factors[0, i] * factors[1, i]
        return x * (p[self.last :] @ Y), Y, factors

    def derivatives(
        self, p: np.ndarray, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """X q(x²), and its derivatives by the coefficients, one a row."""
        values, Y, (left, right) = self.forward(p, x)
        J = np.empty((self.size, len(x)))
        J[self.last :] = Y
        # ∂q/∂Y, from the last Y to the first.
        adjoint = np.repeat(p[self.last :, None], len(x), axis=1)
        for i in reversed(range(self.products)):
            start, middle, end = self.rows[i]
            by_left, by_right = adjoint[i + 2] * right[i], adjoint[i + 2] * left[i]
            J[start:middle] = by_left * Y[: i + 2]
            J[middle:end] = by_right * Y[: i + 2]
            adjoint[: i + 2] += np.outer(p[start:middle], by_left)
            adjoint[: i + 2] += np.outer(p[middle:end], by_right)
        return values, x * J


def grid(low: float, high: float, count: int) -> np.ndarray:
    """Points that are dense where a polynomial turns fast: near the ends."""
    cosines = high * np.cos(np.linspace(0, np.pi / 2, count + 2)[:-1])
    points = [np.geomspace(low, high, count), cosines[cosines > low], [low, high]]
    return np.unique(np.concatenate(points))


def largest_error(table: Table, p: np.ndarray, x: np.ndarray) -> float:
    """The largest |x q(x²) − 1|."""
    return float(np.max(np.abs(table.values(p, x) - 1)))


def fit(
    table: Table,
    p: np.ndarray,
    x: np.ndarray,
    *,
    rounds: int,
    first: int = 40,
    inner: int = 4,
    ridge: float | np.ndarray = RIDGE,
    free: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """Levenberg–Marquardt with Lawson's weights; the best error, and where it was."""
    free = np.arange(table.size) if free is None else free
    ridge = np.broadcast_to(ridge, table.size)[free] ** 2
    weights, damping = np.ones(len(x)), 1e-2
    best = np.inf, p

    def cost(p: np.ndarray) -> float:
        residual = (table.values(p, x) - 1) * weights
        return float(residual @ residual + ridge @ p[free] ** 2)

    for i in range(rounds + 1):
        if i:
            error = np.abs(table.values(p, x) - 1)
            if error.max() < best[0]:
                best = float(error.max()), p
            weights = weights * np.sqrt(error / error.max() + 0.02)
            weights = weights / np.sqrt(np.mean(weights**2))
            damping = max(damping, 1e-6)
        current = cost(p)
        for _ in range(inner if i else first):
            values, J = table.derivatives(p, x)
            J = J[free] * weights
            gradient = J @ ((values - 1) * weights) + ridge * p[free]
            H = J @ J.T + np.diag(ridge)
            for _ in range(8):
                damped = H + damping * np.diag(np.diag(H))
                new = p.copy()
                try:
                    new[free] -= np.linalg.solve(damped, gradient)
                except np.linalg.LinAlgError:
                    return best
                new_cost = cost(new)
                if new_cost < current:
                    break
                damping *= 4
            else:
                break
            gain = (current - new_cost) / current
            p, current, damping = new, new_cost, max(damping / 5, 1e-13)
            if gain < 1e-6:
                break
    error = largest_error(table, p, x)
    return (error, p) if error < best[0] else best


def one_step(
    products: int, low: float, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """The best h of a step x h(x²) on [low, 1] from a random start."""
    table = Table(products)
    p = np.zeros(table.size)
    for i, (start, middle, end) in enumerate(table.rows):
        if i:
            p[start:end] = 0.3 * rng.normal(size=end - start)
            p[[start, middle]] -= 0.7
        p[[middle - 1, end - 1]] += 1.4  # Near Chebyshev's doubling, 2Y² − I.
    p[table.last :] = rng.normal(size=products + 2)
    return fit(table, p, grid(low, 1.0, 120), rounds=25, first=30)


def composed(
    steps: Sequence[tuple[int, float, np.ndarray]],
) -> tuple[Table, np.ndarray]:
    """One table of several steps `(products, error, coefficients)`; 3 more for each."""
    count = sum(products for products, _, _ in steps) + 3 * (len(steps) - 1)
    rows: list[np.ndarray] = []

    def combined(*terms: tuple[np.ndarray, float]) -> np.ndarray:
        return sum(factor * term for term, factor in terms)

    def unit(i: int) -> np.ndarray:
        return np.eye(count + 2)[i]

    def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        width = len(rows) // 2 + 2
        rows.extend([left[:width], right[:width]])
        return unit(width)

    identity, R, Q = unit(0), 0.5 * (unit(0) + unit(1)), unit(0)
    for number, (products, error, p) in enumerate(steps):
        table = Table(products)
        Y = [identity, 2 * R - identity]
        for start, middle, end in table.rows:
            left = combined(*zip(Y, p[start:middle], strict=True))
            Y.append(product(left, combined(*zip(Y, p[middle:end], strict=True))))
        H = combined(*zip(Y, p[table.last :], strict=True))
        if number == len(steps) - 1:
            Q = product(Q, H) if number else H
            break
        H = H / (1 + error)
        Q = product(Q, H) if number else H
        R = product(product(R, H), H)
    return Table(count), np.concatenate([*rows, Q])


def without(
    table: Table, p: np.ndarray, row: int, side: int
) -> tuple[Table, np.ndarray]:
    """The same with a product that has a constant factor written as a sum."""
    start, middle, end = table.rows[row]
    factors = p[start:middle], p[middle:end]
    as_sum = factors[1 - side] * factors[side][0]

    def rewritten(coefficients: np.ndarray) -> np.ndarray:
        if len(coefficients) <= row + 2:
            return coefficients
        result = np.delete(coefficients, row + 2)
        result[: row + 2] += coefficients[row + 2] * as_sum
        return result

    kept = [
        rewritten(p[a:b])
        for i, (start, middle, end) in enumerate(table.rows)
        if i != row
        for a, b in ((start, middle), (middle, end))
    ]
    return Table(table.products - 1), np.concatenate(
        [*kept, rewritten(p[table.last :])]
    )


def eliminated(
    table: Table, p: np.ndarray, x: np.ndarray
) -> tuple[float, Table, np.ndarray]:
    """The best table with one product less, among all that can be taken out."""
    best: tuple[float, Table, np.ndarray] = (np.inf, table, p)
    # Early products carry all that follows and never can.
    for row in range(table.products - 1, table.products // 2, -1):
        for side in (0, 1):
            start, middle, end = table.rows[row]
            drawn = slice(start + 1, middle) if side == 0 else slice(middle + 1, end)
            tried = p
            for strength in np.geomspace(1e-4, 30, 22):
                ridge = np.full(table.size, RIDGE)
                ridge[drawn] = strength
                _, tried = fit(table, tried, x, rounds=1, first=25, ridge=ridge)
            tried = tried.copy()
            tried[drawn] = 0
            smaller, start_p = without(table, tried, row, side)
            error, fitted = fit(smaller, start_p, x, rounds=40)
            if error < best[0]:
                best = error, smaller, fitted
            print(f"  without product {row}, {side}: {error:.4f}", flush=True)
    return best


def refined(
    table: Table, p: np.ndarray, low: float, rounds: int, **settings: Any
) -> tuple[float, np.ndarray]:
    """Fitted on, on another grid each time, so that nothing hides between points."""
    fine = grid(low, HIGHEST, 3000)
    best = largest_error(table, p, fine), p
    for i in range(rounds):
        x = grid(low, HIGHEST, 240 + 17 * i)
        _, p = fit(table, p, x, rounds=30, first=15, **settings)
        error = largest_error(table, p, fine)
        if error < best[0]:
            best = error, p
    return best


def sparse(
    table: Table, p: np.ndarray, low: float, allowed: float
) -> tuple[float, np.ndarray]:
    """Coefficients set to zero, the least felt first, while the rest is fitted."""
    x, fine = grid(low, HIGHEST, 150), grid(low, HIGHEST, 3000)
    needed = np.zeros(table.size, bool)
    while True:
        _, J = table.derivatives(p, x)
        felt = np.abs(p) * np.sqrt(np.mean(J**2, axis=1))
        felt[needed | (p == 0)] = np.inf
        i = int(np.argmin(felt))
        if not np.isfinite(felt[i]):
            return largest_error(table, p, fine), p
        free = np.flatnonzero(p)
        free = free[free != i]
        tried = p.copy()
        for share in (0.5, 0.2, 0.0):
            tried[i] = share * p[i]
            error, tried = fit(
                table, tried, x, rounds=4, first=12, free=free, ridge=LAST_RIDGE
            )
        if error < allowed and largest_error(table, tried, fine) < 1.1 * allowed:
            p = tried
        else:
            needed[i] = True


def schedules() -> None:
    """Errors of odd polynomials that are each the best after those before it."""
    print("degrees, products of m³ in Gram form, largest error")
    # Powers by Paterson–Stockmeyer; degree 17 by Sastre's scheme.
    cost = {5: 1, 9: 2, 17: 3, 33: 4, 65: 5}
    for degrees in SCHEDULES:
        low = LOWEST
        for degree in degrees:
            error = best_odd(degree, low)
            low = (1 - error) / (1 + error)
        products = sum(cost[degree] for degree in degrees) + 3 * (len(degrees) - 1)
        print(f"{degrees!s:24} {products:3} {error:.4f}")


def best_odd(degree: int, low: float) -> float:
    """The error of the best odd polynomial on [low, 1], by linear programming."""
    x = grid(low, 1.0, 1200)
    powers = np.arange(1, degree + 1, 2)
    T = np.cos(np.outer(np.arccos(np.clip(x, -1, 1)), powers))
    one = np.ones((len(x), 1))
    found = linprog(
        np.r_[np.zeros(len(powers)), 1],
        np.block([[T, -one], [-T, -one]]),
        np.r_[np.ones(len(x)), -np.ones(len(x))],
        bounds=[(None, None)] * len(powers) + [(0, None)],
    )
    return float(found.x[-1])


def show(table: Table, p: np.ndarray) -> None:
    """The table as source."""
    number = lambda value: f"{value:.9g}" if value else "0.0"  # noqa: E731
    row = lambda part: "(" + ", ".join(map(number, part)) + ")"  # noqa: E731
    for start, middle, end in table.rows:
        print(f"    ({row(p[start:middle])}, {row(p[middle:end])}),")
    print(f"    {row(p[table.last :])}")


def main() -> None:
    """Derives and prints."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--schedules", action="store_true")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--low", type=float, default=LOWEST, help="lowest σ")
    arguments.add_argument("--steps", type=int, nargs="+", default=[4, 5])
    arguments.add_argument("--products", type=int, default=11)
    arguments.add_argument("--allowed", type=float, default=0.1)
    options = arguments.parse_args()
    if options.schedules:
        schedules()
        return
    # Trials far off overflow, and are refused.
    np.seterr(all="ignore")
    rng = np.random.default_rng(options.seed)
    low, steps = options.low, []
    for products in options.steps:
        starts = [one_step(products, low, rng) for _ in range(10)]
        error, p = min(starts, key=lambda found: found[0])
        steps.append((products, error, p))
        low = (1 - error) / (1 + error)
        print(f"step with {products} products: {error:.4f}", flush=True)
    table, p = composed(steps)
    x = grid(options.low, 1.0, 160)
    error, p = fit(table, p, x, rounds=80)
    print(f"{table.products} products: {error:.4f}", flush=True)
    while table.products > options.products:
        error, table, p = eliminated(table, p, x)
        print(f"{table.products} products: {error:.4f}", flush=True)
    low = options.low
    error, p = refined(table, p, low, 20, ridge=LAST_RIDGE)
    print(f"small coefficients: {error:.4f}", flush=True)
    error, p = sparse(table, p, low, options.allowed)
    free = np.flatnonzero(p)
    error, p = refined(table, p, low, 4, ridge=LAST_RIDGE, free=free)
    print(f"{np.count_nonzero(p)} of {table.size} coefficients: {error:.4f}")
    show(table, p)


if __name__ == "__main__":
    main()
