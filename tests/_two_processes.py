"""What each of two processes does in `test_checkpoints_of_processes.py`.

    python -m tests._two_processes PORT NUMBER FOLDER

Each has two CPU devices of a mesh of four. What it finds goes to standard output as one
line of JSON, for the test to judge.
"""

import json
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import fusionopt_jax as fo
from fusionopt_jax import checkpoints

ROUTING = fo.Routing(min_dim=8)


def main(port: str, number: int, folder: pathlib.Path) -> dict:
    """Save, damage, restore; what came of it."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    mesh = jax.make_mesh((4,), ("x",))

    def placed(values, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(
            values.shape, sharding, lambda index: values[index]
        )

    def parameters(step):
        kernel = step + np.arange(4096, dtype=np.float32).reshape(64, 64)
        return {"kernel": placed(kernel, "x", None), "bias": placed(np.ones(8, "f4"))}

    tx = fo.fusion_opt(1e-2, routing=ROUTING, components={"ns5", "sf"})
    init = jax.jit(tx.init)
    said: dict = {}
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2):
            params = parameters(step)
            # Of no other process: the key and the NumPy array lie here alone.
            extra = {
                "key": jax.random.key(step),
                "rows": np.arange(3) + step,
                "n": step,
            }
            checkpoints.save(
                manager, step, params, init(params), routing=ROUTING, extra=extra
            )
        manager.wait_until_finished()
        try:
            checkpoints.save(
                manager, 3, params, (), routing=ROUTING, extra={"n": number, "m": 0}
            )
        except ValueError as error:
            said["differing"] = str(error)

        def restored():
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always", checkpoints.DamagedCheckpointWarning)
                found = checkpoints.restore(
                    manager, params, init(params), routing=ROUTING, extra=extra
                )
            same = jax.tree.map(
                lambda a, b: bool(jnp.all(a == b)),
                (
                    found.params,
                    found.opt_state,
                    jax.random.key_data(found.extra["key"]),
                ),
                (
                    parameters(found.step),
                    init(parameters(found.step)),
                    jax.random.key_data(jax.random.key(found.step)),
                ),
            )
            return {
                "step": found.step,
                "same": all(jax.tree.leaves(same)),
                "rows": found.extra["rows"].tolist(),
                "n": found.extra["n"],
                "warnings": [
                    str(one.message)
                    for one in heard
                    if one.category is checkpoints.DamagedCheckpointWarning
                ],
            }

        said["good"] = restored()
        # What process 1 alone reads: of the kernel, the rows of its devices.
        multihost_utils.sync_global_devices("before the damage")
        if number == 1:
            said["spoilt"] = spoil(folder / "2")
        multihost_utils.sync_global_devices("after the damage")
        said["damaged"] = restored()
        try:
            checkpoints.restore(
                manager,
                params,
                init(params),
                routing=ROUTING,
                check=refuse if number == 1 else None,
            )
        except (KeyError, RuntimeError) as error:
            said["alone"] = [type(error).__name__, str(error)]
    return said


def spoil(folder: pathlib.Path) -> int:
    """Flip a bit in the middle of every file of arrays that process 1 wrote."""
    files = list((folder / "params" / "ocdbt.process_1" / "d").iterdir())
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return len(files)


def refuse(about: dict) -> None:
    """An error of one process."""
    raise KeyError("refused")


if __name__ == "__main__":
    found = main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
    sys.stdout.write(json.dumps(found) + "\n")
