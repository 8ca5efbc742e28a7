"""What a run needs to go on, and writing it in the background."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import fusionopt_jax as fo
from fusionopt_jax import checkpoints

ROUTING = fo.Routing(min_dim=8)


def parameters():
    return {"kernel": jnp.arange(128, dtype=jnp.float32).reshape(16, 8)}


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        yield manager


def everything(seed):
    """All that a run may want to find again: every kind of leaf that `extra` takes."""
    mesh = jax.make_mesh((8,), ("x",))
    divided = NamedSharding(mesh, PartitionSpec("x"))
    generator = np.random.default_rng(seed)
    generator.normal(size=seed)
    return {
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), (2, 3)),
        # Integers of 128 bits, and a string.
        "rows": generator.bit_generator.state,
        "position": np.int64(2**40 + seed),
        "wide": np.arange(3) / 3 + seed,
        "half": jnp.asarray([seed, jnp.nan], jnp.bfloat16),
        "divided": jax.device_put(jnp.arange(16.0) + seed, divided),
        "plain": [True, seed, -0.0, float("nan"), "épo\n", b"\xff\x00", None],
    }


def leaves_as_bytes(tree):
    """The type and the bits of every leaf."""
    return [
        (jax.random.key_impl(leaf), np.asarray(jax.random.key_data(leaf)).tobytes())
        if isinstance(leaf, jax.Array)
        and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else (leaf.dtype, np.asarray(leaf).tobytes())
        if hasattr(leaf, "dtype")
        else (type(leaf), repr(leaf))
        for leaf in jax.tree.leaves(tree)
    ]


def test_the_users_own_tree_comes_back_bit_for_bit(manager):
    params, extra = parameters(), everything(3)
    checkpoints.save(manager, 1, params, (), routing=ROUTING, extra=extra)
    found = checkpoints.restore(
        manager, params, (), routing=ROUTING, extra=everything(0)
    )
    assert jax.tree.structure(found.extra) == jax.tree.structure(extra)
    assert leaves_as_bytes(found.extra) == leaves_as_bytes(extra)
    assert found.extra["divided"].sharding == extra["divided"].sharding
    assert not found.extra["key"].committed
    # The shape of a key will do, and who asks for nothing gets nothing.
    shapes = {**extra, "key": jax.eval_shape(lambda: jax.random.key(0))}
    found = checkpoints.restore(manager, params, (), routing=ROUTING, extra=shapes)
    assert leaves_as_bytes(found.extra) == leaves_as_bytes(extra)
    found = checkpoints.restore(manager, params, (), routing=ROUTING)
    assert found.extra is None


def test_another_tree_of_the_user_is_refused(manager):
    params = parameters()
    checkpoints.save(manager, 1, params, (), routing=ROUTING)
    with pytest.raises(ValueError, match="saved without `extra`"):
        checkpoints.restore(manager, params, (), routing=ROUTING, extra={"n": 1})
    checkpoints.save(manager, 2, params, (), routing=ROUTING, extra={"n": 1})
    for other, said in (({"n": 1.0}, "n: saved as int, wanted as float"), ({}, "n: ")):
        with pytest.raises(ValueError, match=f"another `extra` .*\n  {said}"):
            checkpoints.restore(manager, params, (), routing=ROUTING, extra=other)
    with pytest.raises(TypeError, match="can't hold leaf 'when' of type"):
        checkpoints.save(
            manager,
            3,
            params,
            (),
            routing=ROUTING,
            extra={"when": np.datetime64(1, "s")},
        )
    with pytest.raises(ValueError, match="two leaves of the name 'a/b'"):
        checkpoints.save(
            manager, 3, params, (), routing=ROUTING, extra={"a": {"b": 1}, "a/b": 2}
        )


def test_a_write_in_the_background_sees_neither_donation_nor_change(manager):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    start = np.arange(2**19, dtype=np.float32).reshape(512, 1024)
    params = {"kernel": jax.device_put(start, sharding)}
    seen = np.arange(4)
    advance = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
    checkpoints.save(manager, 1, params, (), routing=ROUTING, extra={"seen": seen})
    params = advance(params)
    # What is being written may be copied instead; all after it is donated.
    for _ in range(3):
        before, params = params, advance(params)
        assert before["kernel"].is_deleted()
    seen += 1
    found = checkpoints.restore(
        manager, params, (), routing=ROUTING, extra={"seen": seen}
    )
    np.testing.assert_array_equal(found.params["kernel"], start)
    assert found.extra["seen"].tolist() == [0, 1, 2, 3]


@contextlib.contextmanager
def files_of_at_most(size):
    """Let writing fail past a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("waits", ["wait_until_finished", "save", "restore"])
def test_what_fails_in_the_background_is_raised(waits, tmp_path):
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)))}
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        checkpoints.save(manager, 1, params, (), routing=ROUTING)
        manager.wait_until_finished()
        with files_of_at_most(2**16):
            checkpoints.save(manager, 2, params, (), routing=ROUTING)
            wait = {
                "wait_until_finished": manager.wait_until_finished,
                "save": lambda: checkpoints.save(
                    manager, 3, params, (), routing=ROUTING
                ),
                "restore": lambda: checkpoints.restore(
                    manager, params, (), routing=ROUTING
                ),
            }[waits]
            with pytest.raises((OSError, ValueError), match=r"kernel|large|write"):
                wait()
    # What was half written is no checkpoint, and the one before it is good.
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        found = checkpoints.restore(manager, params, (), routing=ROUTING)
        assert (found.step, found.skipped) == (1, {})
