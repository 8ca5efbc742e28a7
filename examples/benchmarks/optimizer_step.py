"""What does one optimizer step cost, and how near is it to what it has to cost?

    python examples/benchmarks/optimizer_step.py

Every optimizer gets the same tree (a DiT with its blocks stacked for `lax.scan`), the
same matrices, the same gradients, donated parameters and state; they take turns. Beside
the times stand compile time, temporary and state bytes per parameter, and two floors:
the operations of all matrix products at the rate that a plain product of the same
shapes reaches in the same rounds, and the bytes that have to be read and written at the
rate of a plain pass over memory.
"""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import _measure as measure
import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo
from fusionopt_jax import dit
from fusionopt_jax._matrices.newton_schulz import (
    cheaper_method,
    coefficient_table,
    newton_schulz_flops,
    resolve_hot_dtype,
)
from fusionopt_jax._matrices.platform import PLATFORMS

RATE = 1e-3
DEPTHS = (12, 28, 56)
# On CPUs XLA starts as many operations at once as it can, which keeps many of their
# results alive; its other schedule keeps few. Accelerators have one schedule only.
LOW_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
FRUGAL = (
    "fusionopt SF-NorMuon",
    "fusionopt SF-NorMuon, int8 state",
    "fusionopt SF-AdamW",
    "optax.contrib.muon, rolled",
)


def shapes_of(config: dit.DiTConfig, *, separate: bool) -> Any:
    """Shapes of a DiT's parameters, blocks stacked or each with leaves of its own."""
    params = jax.eval_shape(lambda: dit.init_params(config))
    if not separate:
        return params
    blocks = params.pop("blocks")
    for layer in range(config.depth):
        params[f"block_{layer}"] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), blocks
        )
    return params


def muon_dimensions(params: Any) -> Any:
    """The same matrices for `optax.contrib.muon` and `rollfast` as for this library."""
    routing = routing_of(params)

    def dimensions(path: Any, leaf: Any) -> Any:
        route = routing.route(path, leaf)
        if route.label != fo.routing.SPECTRAL or route.view is None:
            return None
        return optax.contrib.MuonDimensionNumbers(
            route.view.in_axes[0], route.view.out_axes[0]
        )

    return jax.tree_util.tree_map_with_path(dimensions, params)


def routing_of(params: Any) -> fo.Routing:
    """Every matrix of a block as one matrix, stacked or not."""
    return fo.Routing(stacked=("blocks",) if "blocks" in params else ())


def candidates(params: Any) -> dict[str, optax.GradientTransformationExtraArgs]:
    """All optimizers, by the names that the table shows."""
    routing = routing_of(params)
    muon = lambda **settings: optax.contrib.muon(  # noqa: E731
        RATE, muon_weight_dimension_numbers=muon_dimensions, **settings
    )
    spectral = lambda *inner: optax.multi_transform(  # noqa: E731
        {
            "spectral": optax.chain(optax.trace(0.95), *inner),
            "scalar": optax.scale_by_adam(),
        },
        routing.labels,
    )
    # The bucketing that isn't the default here.
    other = "batch" if jax.default_backend() == "cpu" else "loop"
    direction = optax.scale_by_rms(0.99, bias_correction=True)
    found = {
        "fusionopt SF-NorMuon": fo.fusion_opt(RATE, routing=routing),
        "fusionopt SF-NorMuon, AOL, 4 steps": fo.fusion_opt(
            RATE,
            routing=routing,
            settings={"ns5": {"preconditioner": "aol", "steps": 4}},
        ),
        "fusionopt SF-NorMuon, one polynomial": fo.fusion_opt(
            RATE,
            routing=routing,
            settings={"ns5": {"coefficients": "gram_minimax"}},
        ),
        "fusionopt SF-NorMuon, AOL, one polynomial": fo.fusion_opt(
            RATE,
            routing=routing,
            settings={"ns5": {"preconditioner": "aol", "coefficients": "gram_minimax"}},
        ),
        "fusionopt SF-NorMuon, bf16 state": fo.fusion_opt(
            RATE, routing=routing, state_dtype="bf16"
        ),
        "fusionopt SF-NorMuon, int8 state": fo.fusion_opt(
            RATE, routing=routing, state_dtype="int8"
        ),
        "fusionopt NorMuon": fo.fusion_opt(
            RATE, components={"ns5", "normuon"}, routing=routing, polyak_rule=None
        ),
        "fusionopt NorMuon, one polynomial": fo.fusion_opt(
            RATE,
            components={"ns5", "normuon"},
            routing=routing,
            polyak_rule=None,
            settings={"ns5": {"coefficients": "gram_minimax"}},
        ),
        "fusionopt ns5 (Muon)": optax.chain(
            spectral(fo.ns5(routing=routing)), optax.scale(-RATE)
        ),
        f"fusionopt ns5 (Muon), {other}": optax.chain(
            spectral(fo.ns5(routing=routing, bucketing=other)), optax.scale(-RATE)
        ),
        "fusionopt SF-NorMuon + KL-Shampoo": fo.fusion_opt(
            RATE, components={"ns5", "normuon", "sf", "shampoo"}, routing=routing
        ),
        "fusionopt SF-NorMuon + KL-Shampoo, every step": fo.fusion_opt(
            RATE,
            components={"ns5", "normuon", "sf", "shampoo"},
            routing=routing,
            settings={"shampoo": {"b2": 0.9, "update_every": 1}},
        ),
        "fusionopt SF-AdamW": fo.schedule_free(
            optax.chain(direction, optax.add_decayed_weights(1e-2)), RATE
        ),
        "optax.adamw": optax.adamw(RATE),
        "optax schedule_free_adamw": optax.contrib.schedule_free_adamw(
            RATE, weight_decay=1e-2
        ),
        "optax.contrib.muon": muon(),
        "optax.contrib.muon, rolled": muon(ns_coeffs="dion"),
    }
    if (normuon := rollfast_normuon()) is not None:
        found["rollfast NorMuon"] = normuon
    return {
        name: optax.with_extra_args_support(optimizer)
        for name, optimizer in found.items()
    }


def rollfast_normuon() -> optax.GradientTransformation | None:
    """NorMuon of the package rollfast, where a version that has it is installed."""
    if importlib.util.find_spec("rollfast") is None:
        return None
    rollfast = importlib.import_module("rollfast")
    if not hasattr(rollfast, "normuon"):
        return None

    def dimensions(params: Any) -> Any:
        """The matrices that the others have too; without it all leaves of two axes."""
        return jax.tree.map(
            lambda axes: rollfast.MatrixDimensionNumbers(*axes),
            muon_dimensions(params),
            is_leaf=lambda node: isinstance(node, optax.contrib.MuonDimensionNumbers),
        )

    return rollfast.normuon(RATE, normuon_weight_dimension_numbers=dimensions)


def step_of(optimizer: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """A whole step: direction, state and the new parameters."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(
            grads, state, params, value=jnp.asarray(1.0, jnp.float32)
        )
        return optax.apply_updates(params, updates), state

    return step


class Runner:
    """An optimizer with its parameters and its state, which every call advances."""

    def __init__(
        self,
        compiled: measure.Compiled,
        optimizer: optax.GradientTransformationExtraArgs,
        params: Any,
        grads: Any,
    ) -> None:
        self._step = compiled.call
        self._params = jax.tree.map(jnp.copy, params)
        self._state = jax.jit(optimizer.init)(params)
        self._grads = grads

    def __call__(self) -> Any:
        """One step."""
        self._params, self._state = self._step(self._params, self._state, self._grads)
        return self._params, self._state


def matrix_shapes(params: Any) -> dict[tuple[int, int], int]:
    """How many matrices of each shape, small side first, the step orthogonalises."""
    counts: dict[tuple[int, int], int] = {}
    for route in routing_of(params).routes(params):
        if route.label == fo.routing.SPECTRAL and route.view is not None:
            for stack in route.view.stacks:
                small, large = sorted(stack.matrix)
                counts[small, large] = counts.get((small, large), 0) + stack.count
    return counts


def operations(params: Any, method: str = "auto") -> int:
    """Operations of all Newton-Schulz products of one step of five steps."""
    table = coefficient_table("polar_express", 5)
    platform = jax.default_backend()
    dtype = resolve_hot_dtype("auto", platform if platform in PLATFORMS else "other")
    return sum(
        count
        * newton_schulz_flops(
            m,
            n,
            table,
            cheaper_method(m, n, table, dtype) if method == "auto" else "plain",
            dtype,
        )
        for (m, n), count in matrix_shapes(params).items()
    )


def depth_table(preset: str, options: dict[str, str]) -> list[dict[str, Any]]:
    """Compile time and program length of the full step by depth; nothing runs."""
    rows = []
    for depth in DEPTHS:
        config = dataclasses.replace(dit.CONFIGS[preset], depth=depth)
        params = shapes_of(config, separate=False)
        optimizer = candidates(params)["fusionopt SF-NorMuon"]
        state = jax.eval_shape(optimizer.init, params)
        compiled = measure.compile_function(
            step_of(optimizer), params, state, params, donate=(0, 1), options=options
        )
        rows.append({"blocks": depth, **compiled.costs})
    return rows


def main() -> None:
    """Measures, prints, writes."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--preset", default="DiT-S/2", choices=sorted(dit.CONFIGS))
    arguments.add_argument("--separate", action="store_true", help="layers not stacked")
    arguments.add_argument("--only", default="", help="a regular expression")
    arguments.add_argument("--no-times", action="store_true", help="compile only")
    options = arguments.parse_args()
    config = dit.CONFIGS[options.preset]
    shapes = shapes_of(config, separate=options.separate)
    size = measure.tree_size(shapes)
    cpu = jax.default_backend() == "cpu"

    params = grads = None
    if not options.no_times:
        params = measure.random_like(shapes, seed=0)
        grads = measure.random_like(shapes, seed=1)
    rows: list[dict[str, Any]] = []
    runners: dict[str, Callable[[], Any]] = {}
    for name, optimizer in candidates(shapes).items():
        if not re.search(options.only, name):
            continue
        state = jax.eval_shape(optimizer.init, shapes)
        arguments_of = (shapes, state, shapes)
        variants = {name: {}}
        if cpu and name in FRUGAL:
            variants[f"{name}, low memory"] = LOW_MEMORY
        for variant, compiler_options in variants.items():
            compiled = measure.compile_function(
                step_of(optimizer),
                *arguments_of,
                donate=(0, 1),
                options=compiler_options,
            )
            rows.append(
                {
                    "optimizer": variant,
                    "compile s": compiled.compile_seconds,
                    "compile CPU s": compiled.compile_cpu_seconds,
                    "HLO lines": compiled.hlo_lines,
                    "temp B/param": compiled.temporary_bytes / size,
                    "state B/param": measure.tree_bytes(state) / size,
                }
            )
            if params is not None:
                runners[variant] = Runner(compiled, optimizer, params, grads)
        print(f"compiled {name}", flush=True)

    result: dict[str, Any] = {
        "environment": measure.environment(),
        "preset": options.preset,
        "separate": options.separate,
        "parameters": size,
        "gflop": operations(shapes) / 1e9,
        "gflop_plain": operations(shapes, "plain") / 1e9,
        "rows": rows,
    }
    if params is not None:
        time_all(result, rows, runners, shapes, size, options)
    measure.print_table(rows)
    if not options.separate and not options.only:
        result["depth"] = depth_table(options.preset, {})
        measure.print_table(result["depth"])
    name = "optimizer_step_separate" if options.separate else "optimizer_step"
    measure.save(options.out, name, result)


def time_all(
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    runners: dict[str, Callable[[], Any]],
    shapes: Any,
    size: int,
    options: Any,
) -> None:
    """Times the optimizers among plain products and passes; fills in `result`."""
    products = {
        f"product {m} x {n}": measure.plain_products(m, n, count)
        for (m, n), count in matrix_shapes(shapes).items()
        if count > 1
    }
    passing, pass_bytes = measure.copy_pass(size)
    names = [*runners, *products, "pass over memory"]
    calls = [*runners.values(), *(run for run, _ in products.values()), passing]
    times = measure.interleave(dict(zip(names, calls, strict=True)), options.rounds)
    flops = sum(count for _, count in products.values())
    rate = flops / sum(times[name].median for name in products)
    bandwidth = pass_bytes / times["pass over memory"].median
    floor = result["gflop"] * 1e9 / rate
    result |= {
        "product_gflops": rate / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        "flop_floor_s": floor,
        "adamw_byte_floor_s": 28 * size / bandwidth,
        "times": {name: time._asdict() for name, time in times.items()},
    }
    for row in rows:
        time = times[row["optimizer"]]
        row["ms"] = 1e3 * time.median
        row["spread %"] = 100 * time.spread
        row["over FLOP floor"] = time.median / floor
    print(
        f"{result['gflop']:.0f} GFLOP a step ({result['gflop_plain']:.0f} by the plain "
        f"iteration); plain products {rate / 1e9:.0f} GFLOP/s: floor "
        f"{1e3 * floor:.0f} ms; memory {bandwidth / 1e9:.1f} GB/s"
    )
    measure.bar_plot(
        options.out,
        "optimizer_step",
        f"One optimizer step, {options.preset}, {result['environment']['device']}",
        "milliseconds (median, quartiles)",
        {
            row["optimizer"]: tuple(1e3 * t for t in times[row["optimizer"]])
            for row in rows
        },
        ("FLOP floor", 1e3 * floor),
    )


if __name__ == "__main__":
    main()
