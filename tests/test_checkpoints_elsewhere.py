"""Checkpoints that go on elsewhere: other devices, other optimisers, other programs."""

import pathlib
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fusionopt_jax as fo
from fusionopt_jax import checkpoints

ROUTING = fo.Routing(min_dim=8, stacked=["layers"])
SF_NORMUON = ("ns5", "normuon", "sf")
FULL = ("ns5", "normuon", "mona", "shampoo", "sf")
SPECS = {
    "layers": {"kernel": PartitionSpec("x", None, None), "bias": PartitionSpec()},
    "head": PartitionSpec(None, "x"),
}


def parameters(scale=1.0):
    """A stack of matrices and a single one, the same on every machine."""
    rng = np.random.default_rng(5)
    params = {
        "layers": {
            "kernel": scale * rng.normal(size=(8, 16, 24)),
            "bias": np.ones((8, 24)),
        },
        "head": rng.normal(size=(24, 16)),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def optimizer(components, routing=ROUTING):
    return fo.fusion_opt(1e-2, components=components, routing=routing)


def placed(params, devices):
    """Parameters divided among the first few devices."""
    mesh = jax.make_mesh(
        (devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return jax.device_put(params, shardings)


def after_steps(tx, params, count=2):
    """Parameters and state whose numbers are not those of `init`."""
    update, state = jax.jit(tx.update), tx.init(params)
    for number in range(count):
        grads = jax.tree.map(jnp.sin, optax.tree.scale(2.0 + number, params))
        updates, state = update(grads, state, params, value=jnp.float32(2.0))
        params = optax.apply_updates(params, updates)
    return params, state


def marked(state):
    """A state of other numbers than `init` makes, which differ between its leaves."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(
        structure,
        [leaf + leaf.dtype.type(place) for place, leaf in enumerate(leaves, 1)],
    )


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        yield manager


def identical(first, second):
    """Whether two trees are the same to the last bit."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "components", [SF_NORMUON, FULL], ids=["SF-NorMuon", "full set"]
)
def test_saved_on_eight_devices_and_restored_on_fewer(components, manager, tmp_path):
    tx = optimizer(components)
    params, state = after_steps(tx, placed(parameters(), 8))
    wanted = jax.device_get(fo.eval_params(state, params))
    checkpoints.save(manager, 2, params, state, routing=ROUTING)
    for devices in (1, 2, 4):
        target = placed(parameters(), devices)
        found = checkpoints.restore(manager, target, tx.init(target), routing=ROUTING)
        assert found.params["head"].sharding == target["head"].sharding
        assert identical(found.opt_state, state)
        assert identical(fo.eval_params(found.opt_state, found.params), wanted)


OTHER_COUNT = """
import pathlib, sys
import jax, numpy as np, orbax.checkpoint as ocp
jax.config.update("jax_num_cpu_devices", 2)
import fusionopt_jax as fo
from fusionopt_jax import checkpoints
from tests import test_checkpoints_elsewhere as here
tx = here.optimizer(sys.argv[2].split(","))
target = here.placed(here.parameters(), 2)
with ocp.CheckpointManager(sys.argv[1]) as manager:
    found = checkpoints.restore(manager, target, tx.init(target), routing=here.ROUTING)
average = fo.eval_params(found.opt_state, found.params)
sys.stdout.write(checkpoints.weights_digest(average))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "components", [SF_NORMUON, FULL], ids=["SF-NorMuon", "full set"]
)
def test_restored_where_there_are_two_devices(components, manager):
    tx = optimizer(components)
    params, state = after_steps(tx, placed(parameters(), 8))
    checkpoints.save(manager, 2, params, state, routing=ROUTING)
    manager.wait_until_finished()
    ended = subprocess.run(
        [sys.executable, "-c", OTHER_COUNT, manager.directory, ",".join(components)],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
    )
    digest = checkpoints.weights_digest(fo.eval_params(state, params))
    assert ended.stdout == digest, ended.stderr[-2000:]


def test_going_on_with_other_components(manager):
    old, new = optimizer(SF_NORMUON), optimizer(("ns5", "normuon", "mona", "sf"))
    params = placed(parameters(), 8)
    state = marked(old.init(params))
    checkpoints.save(manager, 2, params, state, routing=ROUTING)
    # No old optimiser, and other devices: the new state and the folder are all.
    target = placed(parameters(), 4)
    with pytest.raises(ValueError, match=r"no state of spectral/MONAState.*warm_start"):
        checkpoints.restore(manager, target, new.init(target), routing=ROUTING)
    found = checkpoints.restore(
        manager, target, new.init(target), routing=ROUTING, warm_start=new
    )
    assert identical(found.params, params)
    assert identical(found.opt_state, fo.warm_start(new, params, state))
    assert found.report == fo.warm_start_report(new, params, state)
    assert found.report.started == ("spectral/MONAState",)
    assert found.opt_state.z["head"].sharding == target["head"].sharding


def test_another_optimiser_starts_from_the_saved_weights(manager):
    """Not from those that `opt_state` was made of."""
    old, new = optimizer(("ns5",)), optimizer(("ns5", "sf"))
    params = parameters(2.0)
    state = marked(old.init(params))
    checkpoints.save(manager, 2, params, state, routing=ROUTING)
    fresh = new.init(parameters(3.0))
    found = checkpoints.restore(
        manager, parameters(), fresh, routing=ROUTING, warm_start=new
    )
    assert identical(fo.fast_params(found.opt_state, found.params), params)


def test_an_average_that_only_the_new_one_keeps(manager):
    old = fo.schedule_free(optax.scale_by_adam(b1=0.0), 1e-2)
    new = fo.schedule_free(optax.scale_by_adam(b1=0.0), 1e-2, keep_average=True)
    params, state = after_steps(old, parameters())
    checkpoints.save(manager, 2, params, state, routing=ROUTING)
    found = checkpoints.restore(
        manager, params, new.init(params), routing=ROUTING, warm_start=new
    )
    assert found.opt_state.x is not None
    assert identical(found.opt_state.x, fo.eval_params(state, params))


def test_going_on_under_another_routing(manager):
    other = fo.Routing(min_dim=8, stacked=["layers"], force_scalar=["head"])
    old, new = optimizer(SF_NORMUON), optimizer(SF_NORMUON, other)
    params = parameters()
    state = marked(old.init(params))
    checkpoints.save(manager, 2, params, state, routing=ROUTING)
    fresh = new.init(params)
    with pytest.raises(ValueError, match=r"(?s)head: saved as spectral.*`warm_start`"):
        checkpoints.restore(manager, params, fresh, routing=other)
    found = checkpoints.restore(manager, params, fresh, routing=other, warm_start=new)
    assert found.report.moved == ("head",)
    # What belongs to the weights goes on, also of the leaf that moved.
    assert identical(found.opt_state.z, state.z)
    groups = found.opt_state.inner_state.inner_states
    before = state.inner_state.inner_states
    adam = optax.tree.get(groups["scalar"], "mu")
    assert not np.any(adam["head"])
    assert identical(
        adam["layers"]["bias"], optax.tree.get(before["scalar"], "mu")["layers"]["bias"]
    )
    assert identical(
        optax.tree.get(groups["spectral"], "trace")["layers"]["kernel"],
        optax.tree.get(before["spectral"], "trace")["layers"]["kernel"],
    )


def test_what_warm_start_refuses_is_refused(manager):
    params = {"w": jnp.ones((8, 8))}
    checkpoints.save(manager, 1, params, (), routing=fo.Routing())
    tx = optax.trace(0.9)
    with pytest.raises(ValueError, match="nothing to carry"):
        checkpoints.restore(
            manager, params, tx.init(params), routing=fo.Routing(), warm_start=tx
        )
    with pytest.raises(ValueError, match="must be a state of the optimiser"):
        checkpoints.restore(manager, params, (), routing=fo.Routing(), warm_start=tx)


def test_random_keys_of_the_old_state_are_carried_or_dropped(manager):
    noise = [optax.add_noise(0.1, 0.5, jax.random.key(seed)) for seed in (1, 2)]
    old = optax.chain(optax.trace(0.9), noise[0])
    params, routing = {"w": jnp.ones((8, 8))}, fo.Routing()
    state = old.init(params)
    checkpoints.save(manager, 1, params, state, routing=routing)
    for rest in ((noise[1],), ()):
        new = optax.chain(optax.trace(0.9), *rest, fo.mona())
        found = checkpoints.restore(
            manager, params, new.init(params), routing=routing, warm_start=new
        )
        assert found.report == fo.warm_start_report(new, params, state)
        if rest:
            assert found.opt_state[1].rng_key == state[1].rng_key


def test_a_damaged_old_state_is_noticed(manager):
    old, new = optax.trace(0.9), optax.chain(fo.mona(), optax.trace(0.9))
    params = {"w": jnp.ones((8, 8))}
    for step in (1, 2):
        state = old.update(params, old.init(params))[1]
        state = optax.tree.scale(step, state)
        checkpoints.save(manager, step, params, state, routing=fo.Routing())
    manager.wait_until_finished()
    one, two = (manager.directory / str(step) / "opt_state" for step in (1, 2))
    two.rmtree()
    one.rename(two)
    with pytest.raises(checkpoints.DamagedCheckpointError, match="hold other numbers"):
        checkpoints.restore(
            manager,
            params,
            new.init(params),
            routing=fo.Routing(),
            step=2,
            warm_start=new,
        )


def half_written(folder):
    """What a kill leaves behind: everything but the last file."""
    (folder / "commit_success.txt").unlink(missing_ok=True)
    (folder / "_CHECKPOINT_METADATA").unlink()
    (folder / "params" / "manifest.ocdbt").unlink()


def foreign(folder):
    """Files of another program under the name of a step."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "commit_success.txt").write_text("")
    (folder / "model.bin").write_bytes(b"weights")


def of_every_array(change):
    """Change the data of all arrays in the middle."""

    def damage(folder):
        files = [path for path in folder.rglob("*") if path.parent.name == "d"]
        assert files
        for path in files:
            content = path.read_bytes()
            path.write_bytes(change(content, len(content) // 2))

    return damage


DAMAGE = {
    "truncated": of_every_array(lambda content, at: content[:at]),
    "corrupted": of_every_array(
        lambda content, at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    ),
    "deleted": lambda folder: shutil.rmtree(folder / "opt_state"),
    "half written": half_written,
    "foreign": foreign,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_divided_checkpoint_written_in_the_background(kind, tmp_path):
    tx = optimizer(("sf",))
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        for step in (1, 2):
            params = placed(parameters(step), 8)
            state = tx.init(params)
            checkpoints.save(manager, step, params, state, routing=ROUTING)
    DAMAGE[kind](tmp_path / "2")
    with (
        ocp.CheckpointManager(tmp_path.resolve()) as manager,
        warnings.catch_warnings(record=True) as heard,
    ):
        warnings.simplefilter("always", checkpoints.DamagedCheckpointWarning)
        # The rest goes on with four devices.
        target = placed(parameters(), 4)
        found = checkpoints.restore(manager, target, tx.init(target), routing=ROUTING)
    assert found.step == 1
    assert identical(found.params, parameters(1))
    told = [
        one for one in heard if one.category is checkpoints.DamagedCheckpointWarning
    ]
    assert len(told) == 1
    assert list(found.skipped) == [2]
