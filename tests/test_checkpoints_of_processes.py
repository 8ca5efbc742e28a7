"""Several processes save and restore together, and agree on what is damaged."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("shared")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests._two_processes", str(port), str(n), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[1],
        )
        for n in range(2)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors
    # Gloo says on the same stream whom it has found.
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


@pytest.mark.exhaustive
def test_both_restore_what_was_saved(found):
    for one in found:
        assert one["good"] == {
            "step": 2,
            "same": True,
            "rows": [2, 3, 4],
            "n": 2,
            "warnings": [],
        }


@pytest.mark.exhaustive
def test_what_one_finds_damaged_is_damaged_for_both(found):
    assert found[1]["spoilt"] > 0
    for one in found:
        assert one["damaged"]["step"] == 1
        assert one["damaged"]["same"]
        (warning,) = one["damaged"]["warnings"]
        assert "step 2 in " in warning
        assert "(process 1)" in warning or "hold other numbers" in warning


@pytest.mark.exhaustive
def test_what_differs_between_them_is_refused_by_name(found):
    for one in found:
        assert "different things: extra/n. " in one["differing"]


@pytest.mark.exhaustive
def test_an_error_of_one_ends_both(found):
    assert found[0]["alone"][0] == "RuntimeError"
    assert "Process 1 of 2 can't go on (KeyError: 'refused')" in found[0]["alone"][1]
    assert found[1]["alone"][0] == "KeyError"
