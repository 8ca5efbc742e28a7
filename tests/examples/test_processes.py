"""The main job on a mesh and in several processes, one of which may be lost."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train_dit
from dit_training import data, devices, options, sampling, training
from jax.sharding import PartitionSpec as P

from tests import _compare

# A low rate: the optimiser normalises gradients that are nothing
# but rounding noise, and the rate scales what comes of their differences.
TINY = [
    *("--hidden-size", "32", "--depth", "1", "--num-heads", "4", "--batch-size", "8"),
    *("--steps", "6", "--eval-every", "2", "--learning-rate", "1e-4"),
]
ROOT = Path(train_dit.__file__).parents[1]
# Longer than JAX takes to notice a process that says nothing any more.
LOST_WITHIN = 6 * devices.HEARTBEAT_SECONDS


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixty images of 4x4 pixels in three classes, each with its own brightness."""
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).normal(size=(60, 4, 4))
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=labels[:, None, None] + 0.1 * noise, labels=labels)
    return path


def trained_here(images, folder, *arguments):
    """Parameters and state after a run in this process, without the sampling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sampling, "measure", lambda *_, **__: {"max_cache_difference": 0.0}
        )
        patch.setattr(train_dit, "summary_text", lambda *_: "")
        where = ["--data", str(images), "--out", str(folder)]
        assert train_dit.main([*TINY, *where, *arguments]) == 0
    return saved(folder)


def saved(folder):
    """The newest checkpoint of a run, read without the script's own code."""
    # What two processes have saved lies on devices that this one has not.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    items = {
        name: ocp.args.StandardRestore(fallback_sharding=here)
        for name in ("params", "opt_state")
    }
    with (
        ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager,
        jax.default_device(jax.devices()[0]),
    ):
        assert manager.latest_step() == 6
        restored = manager.restore(6, args=ocp.args.Composite(**items))
    return jax.tree.map(np.asarray, {name: restored[name] for name in items})


@contextlib.contextmanager
def processes(images, folder, count, *arguments, killed=None):
    """Start a run in several processes, the last of which may die before a step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
        # Most of their time would be XLA's.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.examples._training_process"),
                str(killed if killed and number == count - 1 else 0),
                *TINY,
                *("--data", str(images), "--out", str(folder)),
                *("--processes", str(count), "--process-id", str(number)),
                *("--coordinator", f"127.0.0.1:{port}", *arguments),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def trained_together(images, folder, count, *arguments):
    """Parameters and state after a run in several processes, and what they printed."""
    with processes(images, folder, count, *arguments) as started:
        said = [process.communicate(timeout=500) for process in started]
        for process, (_, errors) in zip(started, said, strict=True):
            assert process.returncode == 0, errors
    return saved(folder), [output for output, _ in said]


MESHES = {2: "data=2", 4: "data=2,fsdp=2"}


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(2, marks=pytest.mark.exhaustive),
        # Four processes on two cores take minutes.
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_processes_end_where_one_does_and_survive_the_loss_of_one(
    count, images, tmp_path
):
    mesh = ("--mesh", MESHES[count])
    whole, said = trained_together(images, tmp_path / "whole", count, *mesh)
    assert f"({MESHES[count].replace(',', ', ')}) of {count} processes" in said[0]
    assert all("weights" not in output for output in said[1:])

    alone = trained_here(images, tmp_path / "alone")
    # What is promised. The weights move by 1e-4 in each of six steps.
    _compare.assert_trees_within(whole, alone, 1e-5, "several processes")
    on_mesh = trained_here(images, tmp_path / "mesh", *mesh)
    _compare.assert_trees_within(on_mesh, alone, 1e-5, "one process, a mesh")
    start = jax.eval_shape(
        lambda: training.init_state(model_of(images), "fusion", 0).params
    )
    assert jax.tree.structure(start) == jax.tree.structure(alone["params"])
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - b).max(),
        training.init_state(model_of(images), "fusion", 0).params,
        alone["params"],
    )
    # Several times what may differ: the test would notice a step that is left out.
    assert np.median(jax.tree.leaves(moved)) > 5e-5

    killed = tmp_path / "killed"
    with processes(images, killed, count, *mesh, killed=5) as started:
        said = [process.communicate(timeout=LOST_WITHIN) for process in started]
    assert started[-1].returncode == -9
    for process, (_, errors) in zip(started[:-1], said[:-1], strict=True):
        # The script's own error, or JAX's if that notices first.
        ours = process.returncode == 3 and "lost another process" in errors
        theirs = process.returncode == -6 and "another task died" in errors
        assert ours or theirs, (process.returncode, errors)
    assert not (killed / "summary.json").exists()
    resumed, _ = trained_together(images, killed, count, "--resume")
    chex.assert_trees_all_equal(resumed, whole)


def model_of(images):
    """The model that the tiny settings make for the images."""
    settings, _ = options.resolve(
        options.parse([*TINY, "--data", str(images), "--out", "unused"])
    )
    return options.model_config(settings, data.load(str(images)))


@pytest.mark.exhaustive
def test_a_step_fed_to_a_mesh_is_that_of_one_device(images, tmp_path):
    arguments = ("--steps", "1", "--eval-every", "1")
    given = [*TINY, *arguments, "--data", str(images), "--out", str(tmp_path)]
    settings, _ = options.resolve(options.parse([*given, "--mesh", "data=2,fsdp=4"]))
    model, loaded = model_of(images), data.load(str(images))
    placed = devices.placement(devices.start(settings.mesh, 1), settings, model)
    state = placed.first_state(lambda: training.init_state(model, "fusion", 0))
    kernel = state.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", None)
    arrays = loaded.train_images, loaded.train_labels
    seed, rate = np.int32(0), np.float32(1e-4)

    rows = training.rows_on_host(0, 0, len(arrays[0]), settings.batch_size)
    batch = placed.feed(*arrays, rows=rows)
    assert batch[0].addressable_shards[0].data.shape == (1, 4, 4, 1)
    step = training.make_fed_step(model, "fusion", 0, placed.state)
    after, loss, size = step(state, *batch, seed, rate)
    assert after.params["blocks"]["mlp"]["fc1"]["kernel"].sharding == kernel.sharding

    one_device = training.make_train_step(model, "fusion", 0, settings.batch_size)
    fresh = training.init_state(model, "fusion", 0)
    expected = one_device(fresh, *arrays, seed, rate)
    # A loss near 1 in float32, summed up in another order, and weights that move by
    # 1e-4.
    _compare.assert_within(loss, expected[1], 1e-6)
    _compare.assert_within(size, expected[2], 1e-5)
    _compare.assert_trees_within(after, expected[0], 1e-5)
    collected = placed.collected(after.params)
    chex.assert_trees_all_equal(collected, jax.tree.map(np.asarray, after.params))


def test_the_host_finds_the_rows_of_a_step():
    order_key, _ = jax.random.split(jax.random.key(7))
    for step in (0, 3, 4, 11):
        np.testing.assert_array_equal(
            training.rows_on_host(7, step, 20, 5),
            training.batch_rows(order_key, np.int32(step), 20, 5),
        )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mesh", "data=2,fdsp=4"], "'fdsp=4' is no axis; give each of data, fsdp"),
        (["--mesh", "data=2,data=4"], "'data=4' is no axis"),
        (["--mesh", "data=0"], "'data=0' is no axis"),
        (["--mesh", "data=16"], "it has 16 devices, and there are 8 (cpu)"),
        (["--mesh", "data=3"], "--batch-size 8: the 3 devices along the mesh axes"),
        (["--mesh", "tensor=7"], "which the 7 devices along 'tensor' can't share"),
        (["--processes", "2"], "give each its --process-id, and all of them the"),
        (["--process-id", "1"], "give --processes as well"),
        (["--processes", "2", "--process-id", "2", "--coordinator", "127.0.0.1:1"],
         "--process-id 2: must lie in [0, 1]"),
    ],
)  # fmt: skip
def test_what_can_not_be_shared_is_one_line(
    arguments, expected, images, tmp_path, capsys
):
    where = ["--data", str(images), "--out", str(tmp_path / "run")]
    assert train_dit.main([*TINY, *where, *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_of_before_there_were_meshes_has_none(images, tmp_path):
    given = [*TINY, "--data", str(images), "--out", str(tmp_path), "--mesh", "data=2"]
    settings, _ = options.resolve(options.parse(given))
    assert options.settings_in(vars(settings))["mesh"] == "data=2"
    before = {name: value for name, value in vars(settings).items() if name != "mesh"}
    assert options.settings_in(before)["mesh"] is None
