"""The derivation of the Gram polynomial, on problems with known answers."""

import numpy as np
import pytest
from derivations import gram_polynomial


def test_derivatives_are_those_of_the_values():
    table = gram_polynomial.Table(3)
    rng = np.random.default_rng(0)
    p, direction = rng.normal(size=(2, table.size))
    x = gram_polynomial.grid(0.01, 1.0, 20)
    step = 1e-6 * direction
    numeric = (table.values(p + step, x) - table.values(p - step, x)) / 2e-6
    values, J = table.derivatives(p, x)
    np.testing.assert_array_equal(values, table.values(p, x))
    # Central differences of smooth functions of size 10: 1e-12 of them, and rounding.
    np.testing.assert_allclose(direction @ J, numeric, atol=1e-6)


@pytest.mark.parametrize(("products", "degree"), [(1, 5), (2, 9)])
def test_fits_are_as_good_as_linear_programming(products, degree):
    """One and two products make every polynomial of degree 2 and 4."""
    found = [
        gram_polynomial.one_step(products, 0.1, np.random.default_rng(seed))[0]
        for seed in range(4)
    ]
    best = gram_polynomial.best_odd(degree, 0.1)
    # Lawson's weights come near the best error and never below it, but for the grids.
    assert best - 1e-3 < min(found) < 1.02 * best


def test_tables_are_composed_and_shortened_without_changing_values():
    rng = np.random.default_rng(1)
    x = gram_polynomial.grid(1e-2, 1.0, 30)
    steps = [(1, 0.5, rng.normal(size=7)), (2, 0.0, rng.normal(size=14))]
    table, p = gram_polynomial.composed(steps)
    assert table.products == 6
    first = gram_polynomial.Table(1).values(steps[0][2], x) / 1.5
    second = gram_polynomial.Table(2).values(steps[1][2], first)
    np.testing.assert_allclose(table.values(p, x), second, rtol=1e-9, atol=1e-9)

    start, middle, _ = table.rows[4]
    p[start + 1 : middle] = 0
    shorter, q = gram_polynomial.without(table, p, 4, 0)
    assert shorter.products == 5
    expected = table.values(p, x)
    np.testing.assert_allclose(shorter.values(q, x), expected, rtol=1e-9, atol=1e-9)


def test_more_products_do_better():
    rng = np.random.default_rng(0)
    errors = [gram_polynomial.one_step(n, 0.05, rng)[0] for n in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
