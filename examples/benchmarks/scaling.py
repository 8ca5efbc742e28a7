"""What does a step cost on 8, 64 and 512 devices, and which exchange takes longest?

    python examples/benchmarks/scaling.py            # the tables, from formulas
    python examples/benchmarks/scaling.py --check 8  # the same of compiled programs
    python examples/benchmarks/scaling.py --schedule v5e:2x4  # of a TPU's program

The check compiles steps of small networks for as many forced host devices, without
running anything, and puts what XLA says of the programs beside the formulas.
The schedule is that of a program for TPUs, which the package `libtpu` compiles without
one: in which order exchanges start and end and loops run. `docs/scaling.md` explains
the formulas.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import _measure as measure
import _program as programs
import _scaling as model
import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fusionopt_jax as fo

DEVICES = (8, 64, 512)
OPTIMISERS = {"SF-NorMuon": model.SF_NORMUON, "full set": model.FULL_SET}
# Bytes a second into one device, all of its links together, as vendors give them.
LINKS = {
    "NVLink 450 GB/s": 450e9,
    "TPU v5e ICI 200 GB/s": 200e9,
    "InfiniBand 50 GB/s": 50e9,
    "10 GbE 1.25 GB/s": 1.25e9,
}
# Operations a second that a device sustains: training in bf16, Newton-Schulz in half
# precision, KL-Shampoo in full fp32. Assumptions, of about an H100.
TRAINING_RATE, ITERATION_RATE, FP32_RATE = 400e12, 400e12, 40e12

# The columns of the two tables.
COSTS = (
    "network",
    "devices",
    "parameters, gradients GB",
    "state GB",
    "temporary GB",
    "training TFLOP",
    "optimiser TFLOP",
    "training receives GB",
    "optimiser receives GB",
)
STATES = ("network", "devices", *(f"{name}, state GB" for name in OPTIMISERS))
TIMES = ("network", "devices", "training ms", "optimiser ms", *LINKS)

# For the check: stacks that the devices share evenly, one that they don't.
SMALL = {
    "even": model.Network(
        {
            "qkv": model.Stack(16, 64, 192),
            "proj": model.Stack(16, 64, 64),
            "down": model.Stack(16, 256, 64),
        },
        rest=0,
        width=64,
        depth=16,
        sequence=64,
    ),
    "uneven": model.Network(
        {"up": model.Stack(12, 64, 256), "down": model.Stack(12, 256, 64)},
        rest=0,
        width=64,
        depth=12,
        sequence=64,
    ),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables, or the check, and returns what it printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=int, metavar="DEVICES", help="compile as well")
    parser.add_argument(
        "--schedule", metavar="TOPOLOGY", help="as v5e:2x4, with libtpu"
    )
    parser.add_argument("--network", choices=model.NETWORKS, help="for the schedule")
    parser.add_argument(
        "--state-dtype", choices=model.STATE_DTYPES, default="fp32", help="to check"
    )
    parser.add_argument("--only", choices=OPTIMISERS, help="check this optimiser alone")
    parser.add_argument("--tokens", type=int, default=8192, help="on each device")
    options = parser.parse_args(arguments)
    if options.check:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.check)
        checks = [
            check(name, network, optimiser, options.check, options.state_dtype)
            for name, network in SMALL.items()
            for optimiser in ([options.only] if options.only else OPTIMISERS)
        ]
        measure.print_table(checks)
        return {"checks": checks}
    if options.schedule:
        network = model.NETWORKS.get(options.network, SMALL["even"])
        # The leaves that are no matrices are left out of the program.
        row, steps = schedule(options.schedule, network._replace(rest=0))
        print(*steps, sep="\n")
        measure.print_table([row])
        return {"checks": [row], "schedule": steps}
    rows, states = table(options.tokens), state_table()
    print(f"With {options.tokens} tokens of the batch on each device.\n")
    print(markdown(rows, COSTS), markdown(rows, TIMES), sep="\n\n")
    print(f"\nState in {', '.join(model.STATE_DTYPES)}:\n\n{markdown(states, STATES)}")
    return {"rows": rows, "states": states}


def table(tokens: int) -> list[dict[str, Any]]:
    """Bytes, operations and milliseconds, a row for each number of devices.

    What depends on the optimiser is a list, in the order of `OPTIMISERS`.
    """
    rows = []
    for name, network in model.NETWORKS.items():
        for devices in DEVICES:
            costs = [
                model.cost(network, components, devices, tokens=tokens)
                for components in OPTIMISERS.values()
            ]
            first = costs[0]
            row: dict[str, Any] = {
                "network": name,
                "devices": devices,
                "parameters, gradients GB": (first.parameters + first.gradients) / 1e9,
                "state GB": [cost.state / 1e9 for cost in costs],
                "temporary GB": [cost.temporaries / 1e9 for cost in costs],
                "training TFLOP": first.training_flops / 1e12,
                "optimiser TFLOP": [
                    (cost.optimiser_flops + cost.preconditioner_flops) / 1e12
                    for cost in costs
                ],
                "training receives GB": first.training_bytes / 1e9,
                "optimiser receives GB": [cost.optimiser_bytes / 1e9 for cost in costs],
                "training ms": 1e3 * first.training_flops / TRAINING_RATE,
                "optimiser ms": [
                    1e3 * cost.optimiser_flops / ITERATION_RATE
                    + 1e3 * cost.preconditioner_flops / FP32_RATE
                    for cost in costs
                ],
            }
            for link, rate in LINKS.items():
                sizes = [
                    first.training_bytes,
                    *(cost.optimiser_bytes for cost in costs),
                ]
                row[link] = [1e3 * size / rate for size in sizes]
            rows.append(row)
    return rows


def state_table() -> list[dict[str, Any]]:
    """Gigabytes of state by `state_dtype`, in the order of `STATE_DTYPES`."""
    return [
        {"network": name, "devices": devices}
        | {
            f"{optimiser}, state GB": [
                model.held_state(network, components, devices, dtype) / 1e9
                for dtype in model.STATE_DTYPES
            ]
            for optimiser, components in OPTIMISERS.items()
        }
        for name, network in model.NETWORKS.items()
        for devices in DEVICES[:1]
    ]


def markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A table as the documentation has it."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return " / ".join(map(cell, value))
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
        return str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check(
    name: str,
    network: model.Network,
    optimiser: str,
    devices: int,
    state_dtype: str = "fp32",
) -> dict[str, Any]:
    """Formulas beside what XLA says of the step's program."""
    components = OPTIMISERS[optimiser]
    mesh = jax.make_mesh(
        (devices,),
        ("x",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    program = compiled(network, components, mesh, state_dtype=state_dtype)
    row = compared(program, network, components, devices, state_dtype)
    return {"network": name, "optimiser": optimiser, **row}


def compared(
    program: Any,
    network: model.Network,
    components: Sequence[str],
    devices: int,
    state_dtype: str = "fp32",
) -> dict[str, Any]:
    """The figures of a program, each after that of the formula."""
    memory = program.memory_analysis()
    read = programs.read(program.as_text())
    cost = model.cost(
        network, components, devices, hot_dtype="fp32", state_dtype=state_dtype
    )
    sums = read.received.get("all-reduce", 0.0)
    return {
        "held": cost.parameters + cost.gradients + cost.state,
        "held, XLA": float(memory.argument_size_in_bytes),
        "temporary": cost.temporaries,
        "temporary, XLA": float(memory.temp_size_in_bytes),
        "MFLOP": (cost.optimiser_flops + cost.preconditioner_flops) / 1e6,
        "MFLOP, XLA": read.flops / 1e6,
        "received": cost.optimiser_bytes,
        "received, XLA": sum(read.received.values()) - sums,
        "sums, XLA": sums,
    }


def schedule(topology: str, network: model.Network) -> tuple[dict[str, Any], list[str]]:
    """The check of a TPU's program of SF-NorMuon, and its exchanges and loops."""
    jax.config.update("jax_platforms", "cpu")
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = topologies.make_mesh(described, (len(described.devices),), ("x",))
    early = {"xla_tpu_enable_async_all_to_all": "true"}
    program = compiled(network, model.SF_NORMUON, mesh, early)
    row = compared(program, network, model.SF_NORMUON, mesh.size)
    # A TPU's products are convolutions within fusions.
    row.pop("MFLOP, XLA")
    return row, programs.schedule(program.as_text())


def compiled(
    network: model.Network,
    components: Sequence[str],
    mesh: Any,
    options: dict[str, str] | None = None,
    state_dtype: Any = "fp32",
) -> Any:
    """The optimiser's step for parameters that are divided among all devices."""
    everywhere = NamedSharding(mesh, P())
    params = {
        name: placed((stack.count, stack.inputs, stack.outputs), mesh)
        for name, stack in network.stacks.items()
    }
    routing = fo.Routing(stacked=tuple(params), min_dim=1)
    tx = fo.fusion_opt(
        1e-3, components=components, routing=routing, state_dtype=state_dtype
    )
    shapes = jax.eval_shape(tx.init, params)
    own = jax.jit(tx.init).lower(params).compile().output_shardings

    def as_stored(leaf: Any, sharding: Any) -> Any:
        if len(sharding.device_set) < mesh.size:
            sharding = everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(as_stored, shapes, own)

    def step(params: Any, state: Any, grads: Any, loss: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, params, loss).compile(options)


def placed(shape: Sequence[int], mesh: Any) -> jax.ShapeDtypeStruct:
    """The shape of a stack whose matrices are divided along their rows."""
    sharding = NamedSharding(mesh, P(None, "x", None))
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=sharding)


if __name__ == "__main__":
    main()
