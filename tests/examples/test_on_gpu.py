"""The benchmark for GPUs runs without one, and draws the conclusions that it should."""

import importlib
import json

import jax
import pytest


@pytest.fixture
def on_gpu(benchmark_script):
    return benchmark_script("on_gpu")


def run_here(on_gpu, tmp_path, *groups):
    """All of it but the processes."""

    def run(name, options, seconds):
        return on_gpu.measure_here(name, options, seconds)

    arguments = ["--small", "--rounds", "2", "--out", str(tmp_path), "--only", *groups]
    result = on_gpu.main(arguments, run)
    assert json.loads((tmp_path / "on_gpu.json").read_text()) == result
    text = (tmp_path / "on_gpu.md").read_text()
    assert jax.devices()[0].device_kind in text.splitlines()[0]
    assert (tmp_path / "on_gpu.png").read_bytes().startswith(b"\x89PNG")
    assert list(result["groups"]) == list(groups)
    for group in result["groups"].values():
        assert "failed" not in group
        assert all(row["what"] in text for row in group["rows"])
    # Nothing is concluded from tiny shapes.
    assert result["contradicted"] == result["goals"] == []
    return {name: group["rows"] for name, group in result["groups"].items()}


def test_rows_go_into_a_file_a_table_and_a_plot(on_gpu, tmp_path, monkeypatch):
    rows = [row("one", 2.0), {"what": "two", "left out": "3 s were left"}]
    name = "Newton-Schulz"
    module = importlib.import_module("_gpu_rows")
    monkeypatch.setitem(module.GROUPS, name, lambda plan: iter(rows))
    assert run_here(on_gpu, tmp_path, name) == {name: rows}
    assert "3 s were left" in (tmp_path / "on_gpu.md").read_text()


@pytest.mark.exhaustive
def test_every_group_runs_in_small(on_gpu, tmp_path):
    groups = run_here(on_gpu, tmp_path, *on_gpu.SHARES)
    assert list(importlib.import_module("_gpu_rows").GROUPS) == list(groups)
    for rows in groups.values():
        for line in rows:
            assert 0 < line["low"] <= line["ms"] <= line["high"]
    products = groups["Newton-Schulz"]
    assert len(products) == 6
    if jax.default_backend() == "cpu":
        assert {line["of peak %"] for line in products} == {None}
    names = [line["what"] for line in groups["sampler, DiT-XL/2"]]
    assert names == ["batch 1, scanned, computed", "batch 1, scanned, cached"]
    assert len(groups["optimizer step, DiT-B/2"]) == 5
    assert len(groups["loop and batch, DiT-B/2"]) == 4


def test_without_a_gpu_it_says_what_to_do(on_gpu, tmp_path):
    about = {"environment": {"backend": "cpu", "device": "cpu", "jax": "1"}, "rows": []}
    with pytest.raises(SystemExit, match=r"no GPU here.*jax\[cuda12\].*--small"):
        on_gpu.main(["--out", str(tmp_path)], lambda *_: about)
    assert not list(tmp_path.iterdir())


def test_it_ends_in_time(on_gpu, tmp_path):
    assert on_gpu.DEVICE_SECONDS + sum(on_gpu.SHARES.values()) <= 480
    options = on_gpu.argparse.Namespace(small=True, rounds=1)
    late = on_gpu.in_a_process("Newton-Schulz", options, 0.2)
    assert late == {"rows": [], "failed": "not done after 0 s"}


def test_what_there_is_no_time_for_is_named(on_gpu, tmp_path):
    rows = importlib.import_module("_gpu_rows")
    plan = rows.Plan(small=False, rounds=1, end=0.0)
    left_out = list(rows.sampler_rows(plan))
    assert [row["what"] for row in left_out] == [
        *(f"batch {batch}, unroll=False" for batch in (1, 8, 64)),
        "batch 1, unroll=True",
    ]
    assert {row["left out"] for row in left_out} == {"0 s were left"}


@pytest.mark.parametrize(
    ("kind", "half", "fp32"),
    [
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        # Names that are nearly those, of devices that aren't.
        ("NVIDIA L40S", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_are_of_known_devices_alone(on_gpu, kind, half, fp32):
    peak = importlib.import_module("_gpu_peaks").peak
    assert peak(kind, "fp16") == peak(kind, "bf16") == half
    assert peak(kind, "fp32") == fp32


def row(what, ms, spread=0.1, **more):
    return {"what": what, "ms": ms, "low": ms - spread, "high": ms + spread, **more}


def test_defaults_are_contradicted_by_more_than_the_spread(on_gpu):
    groups = {
        "Newton-Schulz": {
            "rows": [
                row("28 of 1152 x 4608, fp16, gram", 5.0, **{"of peak %": 61.0}),
                row("28 of 1152 x 4608, bf16, gram", 4.0),
                row("28 of 1152 x 4608, fp16, plain", 4.9, **{"of peak %": 75.0}),
            ]
        },
        "loop and batch, DiT-B/2": {
            "rows": [
                row("fusionopt ns5 (Muon), stacked blocks", 2.0),
                row("fusionopt ns5 (Muon), loop, stacked blocks", 1.0),
                row("fusionopt ns5 (Muon), separate blocks", 1.0),
                row("fusionopt ns5 (Muon), loop, separate blocks", 2.0),
            ]
        },
        "sampler, DiT-XL/2": {
            "rows": [
                row("batch 1, scanned, computed", 4.0, **{"saved %": 0.0}),
                row("batch 1, scanned, cached", 3.0, **{"saved %": 25.0}),
                {"what": "batch 1, unroll=True", "left out": "3 s were left"},
            ]
        },
    }
    hot_dtype, bucketing = on_gpu.contradicted(groups)
    assert "hot_dtype" in hot_dtype
    assert "bf16, gram' takes 4 ms" in hot_dtype
    assert "loop, stacked blocks' takes 1 ms" in bucketing
    peak, saved = on_gpu.goals(groups)
    assert "75 % of the peak" in peak
    assert "25.0 % of a step at batch 1" in saved
