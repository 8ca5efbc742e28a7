"""The diversity example warm-starts three optimisers and reports on each of them."""

import importlib.util
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "03_diversity.py"


@pytest.mark.exhaustive
def test_reports_every_optimiser(capsys):
    spec = importlib.util.spec_from_file_location("diversity", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = ["--depth", "1", "--batch-size", "8", "--samples", "20"]
    rows = script.main(["--reference-steps", "3", "--steps", "2", *sizes])

    assert [row["optimiser"] for row in rows] == [
        "reference",
        "AdamW",
        "SF-NorMuon",
        "full",
    ]
    assert all(row["finite"] for row in rows)
    distances = [row["distance"] for row in rows]
    # The reference is no distance from itself, and every other one has moved.
    assert distances[0] == 0
    assert all(math.isfinite(one) and one > 0 for one in distances[1:])
    printed = capsys.readouterr().out
    assert "spectral/KLShampooState" in printed
    assert "spectral/MONAState" in printed
