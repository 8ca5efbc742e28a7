"""Going on from a trained model under a loss that pushes away from it.

The loss is that of the rectified flow less a weight times the mean square of how far
the velocities are from the reference's. At a weight of 1 and more it has no lower
bound. What is validated is the fit alone, without the negative term.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import fusionopt_jax as fo
from fusionopt_jax import dit

REFERENCE_STEPS = 400


def trained(workload: Any) -> Any:
    """The reference: the average after some steps of SF-NorMuon, on seed 0."""
    tx = fo.fusion_opt(8e-3, routing=workload.routing, weight_decay=0.05)
    params = workload.init(0)
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, count: jax.Array, train: Any) -> tuple[Any, Any]:
        gradients = jax.grad(workload.loss)(params, train, count, jnp.int32(0))
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for count in range(REFERENCE_STEPS):
        params, state = step(params, state, jnp.int32(count), workload.train)
    return fo.eval_params(state, params)


def distance(
    params: Any,
    reference: Any,
    config: dit.DiTConfig,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Mean square of the difference of two models' velocities on noisy images."""
    time_key, noise_key = jax.random.split(key)
    time = jax.nn.sigmoid(jax.random.normal(time_key, (len(images),)))
    share = time[:, None, None, None]
    noisy = (1 - share) * images + share * jax.random.normal(noise_key, images.shape)
    own, other = (
        dit.apply(weights, config, noisy, 1000 * time, labels)
        for weights in (params, reference)
    )
    return jnp.mean(jnp.square(own - jax.lax.stop_gradient(other)))
