"""The benchmark of the decoder fills both of its tables."""

import importlib.util
import json
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_both_tables_are_filled(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location("decoder", SCRIPTS / "decoder.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = ["--small", "--pixels", "16", "32", "--side", "16"]
    result = script.main([*sizes, "--out", str(tmp_path)])

    small, large = result["memory"]
    assert large["whole MiB"] > small["whole MiB"] > 0
    # A tile of four latents is eight pixels, and the program holds the image beside it.
    assert 0 < large["tile=4 MiB"] < large["whole MiB"]
    bfloat16, *tiled = result["differences"]
    assert bfloat16["dtype"] == "bfloat16"
    assert [(row["tile"], row["overlap"]) for row in tiled] == [
        (8, 0),
        (8, 2),
        (4, 0),
        (4, 1),
    ]
    for row in result["differences"]:
        assert 0 < row["root mean square"] < row["largest"]
    assert json.loads((tmp_path / "decoder.json").read_text()) == result
    assert "tile=4 MiB" in capsys.readouterr().out
