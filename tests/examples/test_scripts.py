"""The numbered examples run as they stand, in seconds, and say what they promise."""

import runpy
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "promise"),
    [
        ("01_compose.py", "parameters apart by 0"),
        ("02_route.py", "9 x (128, 128)"),
    ],
)
def test_runs(script: str, promise: str, capsys: pytest.CaptureFixture[str]) -> None:
    # A user has JAX's default, by which a bias may be added to a batch as it is.
    with jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert promise in capsys.readouterr().out
