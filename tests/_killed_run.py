"""A small training run on a mesh, which `test_killed_runs.py` kills and starts again.

    python -m tests._killed_run FOLDER STEPS EVERY

Everything that a step depends on is in the checkpoint: weights, state, a key that each
step splits, a NumPy generator that draws the rows, and how many it has drawn. A
checkpoint is written in the background every few steps, while the arrays in it are
donated to the next ones. Each step is one line on standard output. The last weights go
to FOLDER/final.npz.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

import fusionopt_jax as fo
from fusionopt_jax import checkpoints

ROUTING = fo.Routing(min_dim=8, stacked=["layers"])
DIVIDED = {
    "layers": {"kernel": PartitionSpec(None, "a", "b"), "bias": PartitionSpec()},
    "head": PartitionSpec("b", None),
}
ROWS = 64


def say(text: str) -> None:
    """One line that is there before the next thing happens."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(folder: pathlib.Path, steps: int, every: int) -> None:
    """Train from the last good checkpoint, or from the start, to the end."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), DIVIDED)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(ROWS, 32)).astype(np.float32)
    params = {
        "layers": {
            "kernel": rng.normal(size=(2, 32, 32)).astype(np.float32) / 6,
            "bias": np.zeros((2, 32), np.float32),
        },
        "head": rng.normal(size=(32, 16)).astype(np.float32) / 6,
    }
    params = jax.device_put(params, shardings)
    tx = fo.fusion_opt(1e-2, routing=ROUTING)
    # One program for every step, the first after a start too: what is not divided lies
    # on the whole mesh from the start, and stays there. Another program may round in
    # another way.
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda leaf: (
            leaf
            if isinstance(leaf.sharding, NamedSharding)
            else jax.device_put(leaf, everywhere)
        ),
        tx.init(params),
    )

    def loss_fn(params, rows, key):
        hidden = rows + 0.1 * jax.random.normal(key, rows.shape)
        for layer in range(2):
            kernel = params["layers"]["kernel"][layer]
            hidden = jnp.tanh(hidden @ kernel + params["layers"]["bias"][layer][None])
        return jnp.mean((hidden @ params["head"] - rows[:, :16]) ** 2)

    def train_step(params, state, rows, key):
        loss, grads = jax.value_and_grad(loss_fn)(params, rows, key)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    placed = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    train_step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=placed)
    key = jax.device_put(jax.random.key(1), everywhere)
    generator, drawn, first = np.random.default_rng(2), 0, 0

    def extra():
        return {"key": key, "rows": generator.bit_generator.state, "drawn": drawn}

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        if manager.latest_step() is not None:
            found = checkpoints.restore(
                manager, params, state, routing=ROUTING, extra=extra()
            )
            params, state, first = found.params, found.opt_state, found.step
            key, drawn = found.extra["key"], found.extra["drawn"]
            generator.bit_generator.state = found.extra["rows"]
        say(f"from {first}")
        for step in range(first + 1, steps + 1):
            rows = data[generator.choice(ROWS, size=16, replace=False)]
            drawn += len(rows)
            key, own = jax.random.split(key)
            params, state = train_step(params, state, rows, own)
            if step % every == 0:
                checkpoints.save(
                    manager, step, params, state, routing=ROUTING, extra=extra()
                )
            jax.block_until_ready(params)
            say(f"step {step}")
    assert train_step._cache_size() <= 1
    leaves = jax.tree.leaves((params, state, jax.random.key_data(key)))
    np.savez(folder / "final.npz", *map(np.asarray, leaves), drawn=drawn)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_num_cpu_devices", 8)
    # The first run compiles for those that are killed.
    jax.config.update("jax_compilation_cache_dir", sys.argv[1] + "/../compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    run(pathlib.Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
