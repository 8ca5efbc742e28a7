"""What does a DiT's training step cost, with its blocks looped over or written out?

    python examples/benchmarks/train_step.py

Loss and gradient of a DiT, once with `lax.scan` over the stacked blocks, once unrolled,
once rematerialised, and with a whole SF-NorMuon step behind the gradient: time, compile
time for two depths, temporary bytes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import _measure as measure
import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo
from fusionopt_jax import dit

DEPTHS = (12, 28)


def loss_of(config: dit.DiTConfig, **settings: Any) -> Callable[..., jax.Array]:
    """Mean square of the prediction: every weight gets a gradient."""

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        times = jnp.full(images.shape[0], 500.0)
        prediction = dit.apply(params, config, images, times, labels, **settings)
        return jnp.mean(jnp.square(prediction))

    return loss


def main() -> None:
    """Measures, prints, writes."""
    arguments = measure.parser(__doc__)
    arguments.add_argument("--preset", default="DiT-S/2", choices=sorted(dit.CONFIGS))
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--input-size", type=int, default=16, help="16: 64 tokens")
    arguments.add_argument("--skip-unrolled", action="store_true")
    options = arguments.parse_args()
    base = dataclasses.replace(
        dit.CONFIGS[options.preset], input_size=options.input_size
    )
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    modes: dict[str, dict[str, Any]] = {
        "scanned": {},
        "scanned, remat": {"remat": True},
    }
    if not options.skip_unrolled:
        modes["unrolled"] = {"unroll": True}

    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    images = jnp.ones((options.batch_size, *(2 * [base.input_size]), base.in_channels))
    labels = jnp.zeros(options.batch_size, jnp.int32)
    for depth in DEPTHS:
        config = dataclasses.replace(base, depth=depth)
        shapes = jax.eval_shape(lambda config=config: dit.init_params(config))
        params = measure.random_like(shapes, seed=0) if depth == DEPTHS[0] else None
        for name, settings in modes.items():
            if name == "unrolled" and depth != DEPTHS[0]:
                continue
            compiled = measure.compile_function(
                jax.value_and_grad(loss_of(config, dtype=dtype, **settings)),
                shapes,
                images,
                labels,
            )
            rows.append(row_of(f"loss and gradient, {name}", depth, compiled))
            if params is not None:
                runs[rows[-1]["what"]] = lambda call=compiled.call, p=params: call(
                    p, images, labels
                )
        whole, optimizer = whole_step(config, dtype, shapes, images, labels)
        rows.append(row_of("whole SF-NorMuon step, scanned", depth, whole))
        if params is not None:
            runs[rows[-1]["what"]] = Stepper(
                whole.call, params, optimizer, images, labels
            )

    times = measure.interleave(runs, options.rounds)
    for row in rows:
        if row["blocks"] == DEPTHS[0]:
            row["ms"] = 1e3 * times[row["what"]].median
            row["spread %"] = 100 * times[row["what"]].spread
    measure.print_table(rows)
    environment = measure.environment()
    measure.bar_plot(
        options.out,
        "train_step",
        f"{options.preset}, batch {options.batch_size}, {base.num_tokens} tokens, "
        f"{environment['device']}",
        "milliseconds (median, quartiles)",
        {name: tuple(1e3 * t for t in time) for name, time in times.items()},
    )
    measure.save(options.out, "train_step", {"environment": environment, "rows": rows})


def row_of(what: str, depth: int, compiled: measure.Compiled) -> dict[str, Any]:
    """A line of the table, without times."""
    return {
        "what": what,
        "blocks": depth,
        "compile s": compiled.compile_seconds,
        "compile CPU s": compiled.compile_cpu_seconds,
        "HLO lines": compiled.hlo_lines,
        "temp MB": compiled.temporary_bytes / 1e6,
        "ms": None,
        "spread %": None,
    }


def whole_step(
    config: dit.DiTConfig, dtype: Any, shapes: Any, images: Any, labels: Any
) -> tuple[measure.Compiled, Any]:
    """Gradient and update as one program, and its optimizer."""
    optimizer = fo.fusion_opt(1e-3, routing=fo.Routing(stacked=("blocks",)))
    value_and_grad = jax.value_and_grad(loss_of(config, dtype=dtype))

    def step(params: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        loss, grads = value_and_grad(params, images, labels)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, shapes)
    compiled = measure.compile_function(
        step, shapes, state, images, labels, donate=(0, 1)
    )
    return compiled, optimizer


class Stepper:
    """Training that goes on from call to call."""

    def __init__(
        self, call: Any, params: Any, optimizer: Any, images: Any, labels: Any
    ) -> None:
        self._call, self._batch = call, (images, labels)
        self._params = jax.tree.map(jnp.copy, params)
        self._state = jax.jit(optimizer.init)(params)

    def __call__(self) -> Any:
        """One step."""
        self._params, self._state = self._call(self._params, self._state, *self._batch)
        return self._params


if __name__ == "__main__":
    main()
