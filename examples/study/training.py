"""One run: train, validate, judge."""

import math
import platform
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo
from fusionopt_jax.iterates import schedule_free_states
from study import workloads
from study.records import Job, Record
from study.table import METHODS


def run(job: Job, progress: Callable[[int], None] = lambda _: None) -> Record:
    """Train from the start to the end; `progress` is called every 50 steps.

    A run ends early where its validation loss is no number: none comes back from that.
    """
    # On a CPU that of the processor, which other programs hardly change.
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    began = clock()
    workload = workloads.get(job.workload)
    step, deployed = compiled(job.workload, job.method, job.steps)
    validate = _validation(job.workload)
    arguments = (
        workload.train,
        jnp.int32(job.seed),
        jnp.float32(job.rate),
        jnp.float32(job.decay),
    )
    params, state = start(job)
    state_bytes, param_bytes = _bytes(state), _bytes(params)
    # The first call compiles; its result is thrown away.
    copies = jax.tree.map(jnp.copy, (params, state))
    jax.block_until_ready(step(*copies, jnp.int32(0), *arguments))

    # Tuning looks at the end alone.
    eval_every = workloads.EVAL_EVERY if job.seed else workloads.TUNING_EVAL_EVERY
    curve: list[float] = []
    step_sizes: list[float] = []
    seconds, started = 0.0, clock()
    for count in range(job.steps):
        params, state = step(params, state, jnp.int32(count), *arguments)
        if (count + 1) % workloads.EVAL_EVERY:
            continue
        jax.block_until_ready((params, state))
        seconds += clock() - started
        if (count + 1) % eval_every == 0:
            loss = float(validate(deployed(params, state), workload.held_out))
            if not math.isfinite(loss):
                break
            curve.append(_short(loss))
        factor = optax.tree.get(state, "factor_used")
        if factor is None:
            factor = optax.tree.get(state, "step_size")
        step_sizes += [] if factor is None else [_short(factor)]
        progress(count + 1)
        started = clock()

    figures: dict[str, float] = {}
    if workload.judge and job.seed and len(curve) * eval_every == job.steps:
        found = workload.judge(deployed(params, state))
        figures = {name: _short(value) for name, value in found.items()}
    return Record(
        job=job,
        eval_every=eval_every,
        curve=curve,
        step_sizes=step_sizes,
        figures=figures,
        seconds=round(seconds, 2),
        total_seconds=round(clock() - began, 2),
        state_bytes=state_bytes,
        param_bytes=param_bytes,
        data=workload.digest,
        versions=versions(),
    )


def start(job: Job) -> tuple[Any, Any]:
    """Fresh weights, the same for every method, and the state for them."""
    workload = workloads.get(job.workload)
    params = workload.init(job.seed)
    return params, _init_state(job.workload, job.method)(params)


@lru_cache
def _init_state(workload: str, method: str) -> Callable[[Any], Any]:
    # No optimiser's first state depends on its rate, decay or horizon.
    return jax.jit(
        lambda params: _build(workload, method, 1.0, 0.1, 100, params).init(params)
    )


def _build(
    name: str, method: str, rate: Any, decay: Any, steps: int, params: Any
) -> Any:
    workload = workloads.get(name)
    return METHODS[method].optimizer(workload, rate, decay, steps, params)


@lru_cache
def compiled(
    name: str, method: str, steps: int
) -> tuple[Callable[..., tuple[Any, Any]], Callable[[Any, Any], Any]]:
    """One training step, and what makes the weights to deploy.

    Seed, rate and decay are arguments of the compiled step, so that all runs of a row
    on a workload share one. Parameters and state are donated.
    """
    workload = workloads.get(name)

    def step(
        params: Any,
        state: Any,
        count: jax.Array,
        train: Any,
        seed: jax.Array,
        rate: jax.Array,
        decay: jax.Array,
    ) -> tuple[Any, Any]:
        loss, gradients = jax.value_and_grad(workload.loss)(params, train, count, seed)
        tx = _build(name, method, rate, decay, steps, params)
        updates, state = tx.update(gradients, state, params, value=loss)
        return jax.tree.map(jnp.add, params, updates), state

    def deployed(params: Any, state: Any) -> Any:
        averaged = schedule_free_states(state)
        return fo.eval_params(state, params) if averaged else params

    return jax.jit(step, donate_argnums=(0, 1)), jax.jit(deployed)


@lru_cache
def _validation(name: str) -> Callable[[Any, Any], jax.Array]:
    return jax.jit(workloads.get(name).validate)


@lru_cache
def versions() -> dict[str, str]:
    """What a run depends on beside its settings."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "optax")},
        "fusionopt_jax": fo.__version__,
        "device": jax.devices()[0].device_kind,
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _short(number: Any) -> float:
    """A number to five figures, which is less than a seed changes."""
    return float(f"{float(number):.5g}")
