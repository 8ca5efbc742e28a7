"""The search for polynomials in half precision, on tiny settings."""

import importlib
from pathlib import Path

import numpy as np
import pytest

DERIVATIONS = Path(__file__).parents[2] / "examples" / "derivations"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DERIVATIONS)
        yield importlib.import_module("half_precision")


def test_polynomials_are_stretched(script):
    table = script.Table(3)
    p = np.random.default_rng(0).normal(size=table.size)
    x = np.linspace(0.1, 1.2, 9)
    stretched = script.stretched(table, p, 1.2)
    expected = table.values(p, x / 1.2)
    np.testing.assert_allclose(table.values(stretched, x), expected, rtol=1e-9)


def test_the_second_polynomial_covers_what_the_first_leaves(script):
    made = script.pairs((2, 3), 0.02, np.random.default_rng(0), starts=4)
    assert made
    x = script.scalar.grid(0.02, 1.0, 200)
    for pair in made:
        (first, p), (second, q) = pair
        between = first.values(p, x)
        # Scaled to at most 1, up to how much one start is better than another.
        assert 0 < between.min() < between.max() < 1.01
        np.testing.assert_array_equal(
            second.values(q, between), script.on_values(pair, x)
        )
        assert np.abs(script.on_values(pair, x) - 1).max() < 0.25


@pytest.mark.parametrize("start", ["frobenius", "aol"])
def test_references_are_polar_factors(script, start):
    problems = script.matrices(6, 9, start)
    for name, G, polar in zip(
        problems.names, problems.stack, problems.polar, strict=True
    ):
        values = np.linalg.svd(polar, compute_uv=False)
        assert np.all((np.abs(values - 1) < 1e-9) | (values < 1e-9)), name
        np.testing.assert_allclose(np.linalg.norm(G), 1, rtol=1e-6)
    assert np.isfinite(problems.outliers).all()


def test_it_runs_and_prints(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "SPLITS", {"frobenius": ((1, 1), (2, 3))})
    monkeypatch.setattr(script, "LOWS", (1.0,))
    monkeypatch.setitem(script.LOWEST, "frobenius", 0.05)
    sizes = ["--small", "6", "9", "--large", "8", "8", "--starts", "3"]
    monkeypatch.setattr("sys.argv", ["half_precision.py", *sizes])
    script.main()
    printed = capsys.readouterr().out
    assert "polar_express, gram" in printed
    assert "bf16, 8 x 8" in printed
    # One product each is too few; two and three end with the factors of five products.
    assert "(1, 1): inf" in printed
    assert printed.count("    ((") == 5
