"""State that goes through Orbax and comes back as it was, or not at all."""

import contextlib
import gc
import re
import subprocess
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fusionopt_jax as fo
from fusionopt_jax import checkpoints
from fusionopt_jax.checkpoints.echoes import without_echoes

ROUTING = fo.Routing(min_dim=8)


def parameters(scale=1.0):
    """Two leaves, one of them a matrix."""
    kernel = scale * jnp.arange(128, dtype=jnp.float32).reshape(16, 8)
    return {"kernel": kernel, "bias": scale * jnp.ones(8, jnp.bfloat16)}


def built(**settings):
    """An optimiser of a few components, which needs no loss."""
    settings = {"components": {"ns5", "sf"}, "polyak_rule": None} | settings
    return fo.fusion_opt(1e-2, routing=ROUTING, **settings)


def after_a_step(tx, params):
    """Parameters and state whose numbers are not those of `init`."""
    updates, state = tx.update(params, tx.init(params), params)
    return optax.apply_updates(params, updates), state


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        yield manager


@pytest.fixture
def saved(manager):
    """A manager with one checkpoint, and what is in it."""
    params, state = after_a_step(built(), parameters())
    deployed = fo.eval_params(state, params)
    assert checkpoints.save(
        manager,
        3,
        params,
        state,
        routing=ROUTING,
        deployed=deployed,
        about={"sizes": (1, 2), 5: None},
    )
    return manager, params, state, deployed


def test_everything_comes_back_bit_for_bit(saved):
    manager, params, state, deployed = saved
    # Shapes are enough, and no committed arrays come of them: a compiled step that
    # took `init`'s arrays takes the restored ones.
    target = jax.eval_shape(parameters)
    found = checkpoints.restore(
        manager, target, jax.eval_shape(built().init, target), routing=ROUTING
    )
    assert found.step == 3
    assert found.about == {"sizes": [1, 2], "5": None}
    assert found.skipped == {}
    chex.assert_trees_all_equal(found.params, params)
    chex.assert_trees_all_equal(found.opt_state, state)
    leaves = jax.tree.leaves((found.params, found.opt_state))
    assert not any(leaf.committed for leaf in leaves)
    chex.assert_trees_all_equal(checkpoints.restore_deployed(manager, target), deployed)
    assert checkpoints.read_about(manager) == found.about


def test_a_step_that_the_manager_skips_is_not_written(saved):
    manager, params, state, _ = saved
    assert not checkpoints.save(manager, 2, params, state, routing=ROUTING)


@pytest.mark.parametrize("axis", [0, 1])
def test_restored_with_the_shardings_of_the_target(manager, axis):
    mesh = jax.make_mesh((8,), ("x",))

    def placed(spec):
        shardings = {
            "kernel": NamedSharding(mesh, PartitionSpec(*spec)),
            "bias": NamedSharding(mesh, PartitionSpec()),
        }
        return jax.device_put(parameters(), shardings)

    rows = placed(("x", None))
    tx = built(components={"ns5"})
    _, state = after_a_step(tx, rows)
    checkpoints.save(manager, 1, rows, state, routing=ROUTING)
    target = placed([("x", None), (None, "x")][axis])
    wanted = tx.init(target)
    found = checkpoints.restore(manager, target, wanted, routing=ROUTING)
    chex.assert_trees_all_equal(found.params, rows)
    chex.assert_trees_all_equal(found.opt_state, state)
    assert found.params["kernel"].sharding == target["kernel"].sharding
    for leaf, like in zip(
        jax.tree.leaves(found.opt_state), jax.tree.leaves(wanted), strict=True
    ):
        assert leaf.committed == like.committed
        assert not leaf.committed or leaf.sharding == like.sharding


def test_states_without_arrays_and_with_random_keys(manager):
    params = parameters()
    tx = optax.chain(optax.scale(2.0), optax.add_noise(0.1, 0.5, jax.random.key(1)))
    for step, state in enumerate((optax.scale(2.0).init(params), tx.init(params))):
        checkpoints.save(manager, step, params, state, routing=ROUTING)
        found = checkpoints.restore(manager, params, state, routing=ROUTING)
        chex.assert_trees_all_equal(found.opt_state, state)


def test_another_routing_is_refused_with_what_moved(saved):
    manager, params, _, _ = saved
    other = fo.Routing(min_dim=8, force_scalar=["kernel"])
    tx = fo.fusion_opt(1e-2, routing=other, components={"ns5", "sf"}, polyak_rule=None)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"kernel: saved as spectral.*, now scalar"):
        checkpoints.restore(manager, params, state, routing=other)


def test_the_same_split_along_other_axes_is_refused(manager):
    params = {"kernel": jnp.eye(16)}
    routing = fo.Routing(min_dim=8)
    checkpoints.save(manager, 1, params, (), routing=routing)
    other = fo.Routing(min_dim=8, layout="out_in")
    with pytest.raises(ValueError, match="kernel: saved as"):
        checkpoints.restore(manager, params, (), routing=other)


def test_another_set_of_components_is_refused_and_sent_to_warm_start(saved):
    manager, params, state, _ = saved
    wanted = built(components={"ns5", "mona"})
    with pytest.raises(
        ValueError,
        match=r"no state of spectral/MONAState; nothing takes that of "
        r"ScheduleFreeState\. .*`warm_start",
    ):
        checkpoints.restore(manager, params, wanted.init(params), routing=ROUTING)
    # The way it names.
    old = checkpoints.restore(manager, params, state, routing=ROUTING)
    fo.warm_start(built(components={"ns5", "mona", "sf"}), old.params, old.opt_state)


def test_other_shapes_and_dtypes_are_refused(saved):
    manager, params, state, _ = saved
    wider = {**params, "bias": jnp.ones(9)}
    with pytest.raises(
        ValueError,
        match=r"`params` .*\n  bias: saved as bfloat16\[8\], wanted as float32\[9\]",
    ):
        checkpoints.restore(manager, wider, state, routing=ROUTING)
    half = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim else leaf, state
    )
    with pytest.raises(ValueError, match="holds another `opt_state`"):
        checkpoints.restore(manager, params, half, routing=ROUTING)


def test_the_check_sees_about_first(saved):
    manager, _, _, _ = saved

    def refuse(about):
        raise KeyError(about["sizes"][1])

    with pytest.raises(KeyError, match="2"):
        checkpoints.restore(manager, {}, (), routing=ROUTING, check=refuse)


def test_nothing_there_and_nothing_deployed(manager):
    with pytest.raises(FileNotFoundError, match="No checkpoint in"):
        checkpoints.read_about(manager)
    params = parameters()
    checkpoints.save(manager, 1, params, (), routing=ROUTING)
    with pytest.raises(FileNotFoundError, match=r"of step 7 in .*; there is 1"):
        checkpoints.restore(manager, params, (), routing=ROUTING, step=7)
    with pytest.raises(ValueError, match="without `deployed`"):
        checkpoints.restore_deployed(manager, params)


def flip(folder, item):
    """Flip a bit in the middle of the data of one item."""
    files = [path for path in (folder / item).rglob("*") if path.parent.name == "d"]
    for path in files or [next((folder / item).glob("*"))]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("item", ["params", "opt_state", "extra", "about"])
def test_the_newest_good_one_with_a_warning(item, tmp_path):
    folder = tmp_path.resolve()
    tx = built()
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2):
            params, state = after_a_step(tx, parameters(step))
            extra = {"key": jax.random.key(step)}
            checkpoints.save(manager, step, params, state, routing=ROUTING, extra=extra)
    flip(folder / "2", item)
    with ocp.CheckpointManager(folder) as manager:
        with pytest.warns(
            checkpoints.DamagedCheckpointWarning, match="step 2 in .* is damaged: "
        ):
            found = checkpoints.restore(
                manager, params, state, routing=ROUTING, extra=extra
            )
        assert found.step == 1
        assert list(found.skipped) == [2]
        assert found.extra["key"] == jax.random.key(1)
        expected = after_a_step(tx, parameters(1))
        chex.assert_trees_all_equal((found.params, found.opt_state), expected)
        with pytest.raises(checkpoints.DamagedCheckpointError, match="step 2, "):
            checkpoints.restore(
                manager, params, state, routing=ROUTING, step=2, extra=extra
            )


def test_other_numbers_of_the_right_form_are_noticed(manager):
    """What no checksum of a file can see: whole arrays of another checkpoint."""
    params = parameters()
    checkpoints.save(manager, 1, params, (), routing=ROUTING)
    checkpoints.save(manager, 2, parameters(2.0), (), routing=ROUTING)
    manager.wait_until_finished()
    one, two = (manager.directory / str(step) / "params" for step in (1, 2))
    two.rmtree()
    one.rename(two)
    with pytest.raises(
        checkpoints.DamagedCheckpointError,
        match=re.escape("2 of its arrays hold other numbers than were saved, params/"),
    ):
        checkpoints.restore(manager, params, (), routing=ROUTING, step=2)


def test_checkpoints_of_other_programs_are_refused(manager):
    params = parameters()
    manager.save(1, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    with pytest.raises(checkpoints.DamagedCheckpointError, match="step 1, it"):
        checkpoints.restore(manager, params, (), routing=ROUTING)


def test_the_page_holds_a_complete_program(tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    program = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        exec(compile(program, str(page), "exec"), {})
        assert f"step {step} of {{'learning_rate': 0.008}}" in capsys.readouterr().out


async def async_serialize():
    """What Orbax makes of a write, by its name."""

    async def write_fragment():
        pass

    return write_fragment()


async def of_the_user():
    """What no checkpoint has to do with."""


def leave_unfinished():
    """A write and something else that never begin."""
    with contextlib.suppress(StopIteration):
        async_serialize().send(None)
    of_the_user()
    gc.collect()


def test_what_an_error_left_unfinished_is_quiet_and_nothing_else_is(monkeypatch):
    heard = []
    monkeypatch.setattr(
        sys, "unraisablehook", lambda found: heard.append(str(found.exc_value))
    )
    leave_unfinished()
    assert len(heard) == 2
    with pytest.raises(OSError, match="full"), without_echoes():
        raise OSError("the disk is full")
    heard.clear()
    leave_unfinished()
    # Where warnings are errors it is the hook that must know them.
    warnings.simplefilter("error")
    leave_unfinished()
    assert heard == ["coroutine 'of_the_user' was never awaited"] * 2


class Store:
    """As Orbax calls what reads the shapes of arrays."""

    async def _get_array_metadatas(self):
        """Never begins."""


def test_shapes_that_nobody_reads_any_more_are_quiet(monkeypatch):
    heard = []
    monkeypatch.setattr(
        sys, "unraisablehook", lambda found: heard.append(str(found.exc_value))
    )
    warnings.simplefilter("error")
    with without_echoes():
        Store()._get_array_metadatas()
        gc.collect()
    assert heard == []
    # Outside of it a warning is a warning.
    Store()._get_array_metadatas()
    gc.collect()
    assert heard == ["coroutine 'Store._get_array_metadatas' was never awaited"]


def test_without_orbax_the_extra_is_named():
    program = (
        "import sys; sys.modules['orbax'] = None; import fusionopt_jax\n"
        "assert 'fusionopt_jax.checkpoints' not in sys.modules\n"
        "import fusionopt_jax.checkpoints"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert 'pip install "fusionopt-jax[checkpoints]"' in ended.stderr.splitlines()[-1]


def test_eight_bytes_are_compared_in_full(manager):
    state = {"seconds": np.float64(1.0) + np.arange(2) * 1e-16}
    checkpoints.save(manager, 1, {}, state, routing=fo.Routing())
    found = checkpoints.restore(manager, {}, state, routing=fo.Routing())
    assert found.opt_state["seconds"].dtype == np.float64
