"""Runs an Optax transformation over recorded gradients, as one compiled scan."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def run(
    tx: optax.GradientTransformation,
    params0: Mapping[str, np.ndarray],
    grads: Mapping[str, np.ndarray],
    *,
    dtype: Any = jnp.float32,
    start: Callable[[Any], Any] = lambda state: state,
    **extra_args: np.ndarray,
) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Step over all gradients.

    Args:
        tx: A complete optimiser: its updates are added to the parameters.
        params0: Where to start.
        grads: A stack of all steps for each parameter.
        dtype: Of parameters and gradients.
        start: Changes the first state before the first step.
        extra_args: A stack of all steps for each extra argument of `update`.

    Returns:
        A stack of the parameters after every step for each of them, the last state, and
        the states after every step stacked.
    """
    params = {name: jnp.asarray(p, dtype) for name, p in params0.items()}
    steps = {name: jnp.asarray(stack, dtype) for name, stack in grads.items()}
    extra = {
        name: jnp.asarray(stack, jnp.float32) for name, stack in extra_args.items()
    }
    update = optax.with_extra_args_support(tx).update

    def step(carry, inputs):
        params, state = carry
        gradient, extra = inputs
        updates, state = update(gradient, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    @jax.jit
    def whole(params, steps, extra):
        return jax.lax.scan(step, (params, start(tx.init(params))), (steps, extra))

    (_, state), (paths, states) = whole(params, steps, extra)
    as_numpy = lambda stack: np.asarray(stack, np.float64)  # noqa: E731
    return {name: as_numpy(path) for name, path in paths.items()}, state, states
