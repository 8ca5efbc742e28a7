"""The tables of the step cache are what its results say."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    return importlib.import_module("_step_cache_tables")


def row(kind, evaluations, frechet, order=0, ratio=2.0):
    """What is kept of one way to sample."""
    return {
        "start": "ddim",
        "steps": 8,
        "kind": kind,
        "ratio": ratio,
        "order": order,
        "evaluations": evaluations,
        "frechet": frechet,
        "distance": [0.1, 0.3],
    }


def test_figures_by_hand(tables):
    times = {"median": 12.4, "low": 11.6, "high": 13.0, "faster": 1.96}
    results = {
        "quality": {
            "few": row("fewer steps", 4, [2.0, 6.0]),
            "cached": row("step cache", 4, [0.0, 3.0], order=1),
            "all": row("uncached", 8, [1.0, 3.0], ratio=1.0),
        },
        "latency": {"cached": {"1": times}},
    }
    *_, whole, cached, few = tables.detailed(results, "ddim", 8).splitlines()
    # Of two numbers the standard error is half of their difference.
    assert whole == "| 8 | all 8 steps | 2.00 ± 1.00 | 0 | 0 |  |  |"
    assert cached == (
        "| 4 | step cache, order 1 | 1.50 ± 1.50 | -0.50 ± 0.50 | 0.200 | "
        "12 (12–13), 2.0× |  |"
    )
    assert few == "| 4 | fewer steps | 4.00 ± 2.00 | +2.00 ± 1.00 | 0.200 |  |  |"
    *_, whole, ratio = tables.overview(results, [("ddim", 8)]).splitlines()
    assert whole == "| DDIM, 8 steps | 8 | 2.00 ± 1.00 | | |"
    assert ratio == "| 2× | 4 | 1.50 | 4.00 |  |"


@pytest.mark.parametrize(
    ("file", "detailed", "others"),
    [
        (
            "step_cache.json",
            [("ddim", 50), ("euler", 25)],
            [("ddim", 25), ("ddim", 10), ("euler", 50), ("euler", 10)],
        ),
        ("step_cache_glyphs.json", [("ddim", 50)], []),
    ],
)
def test_the_page_has_them(tables, file, detailed, others):
    docs = ROOT / "docs"
    results = json.loads((docs / "images" / file).read_text())
    page = (docs / "sampling.md").read_text()
    for start, steps in detailed:
        assert tables.detailed(results, start, steps) in page
    assert tables.overview(results, others) in page
