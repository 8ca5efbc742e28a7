"""Whether a transformation returns a direction, found out by running it.

A direction has a positive sign and no learning rate, as `optax.scale_by_adam` has it; a
complete optimiser such as `optax.adam` returns what is to be added to the parameters.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fusionopt_jax._optax import TransformLike, accepting_extra_args
from fusionopt_jax._types import Params


class Direction(optax.GradientTransformationExtraArgs):
    """A transformation whose maker answers for its being a direction."""


def check_direction(component: str, inner: TransformLike) -> bool:
    """Refuse a transformation that goes against the gradient.

    Returns:
        Whether there was an answer; if there was none, because it takes neither a
        vector nor a matrix, `check_direction_on` asks again once the tree is known.

    Raises:
        ValueError: If it goes against the gradient.
    """
    if isinstance(inner, Direction):
        return True
    vector, matrix = jnp.ones(64), jnp.eye(8)
    return any(
        _answers(component, inner, {"probe": gradient}) for gradient in (vector, matrix)
    )


def check_direction_on(component: str, inner: TransformLike, params: Params) -> None:
    """The same on a tree like the parameters, whose axes are made short."""
    # As there is nothing to compute with in what describes an array.
    if not jax.tree.leaves(params):
        return
    # Divided by 2, 3, 4 and 6, as chunks ask for.
    short = lambda leaf: jnp.ones([min(n, 12) for n in leaf.shape], leaf.dtype)  # noqa: E731
    with jax.ensure_compile_time_eval():
        gradient = jax.tree.map(short, params)
    _answers(component, inner, gradient)


def _answers(component: str, inner: TransformLike, gradient: Any) -> bool:
    """Whether the transformation runs on such a gradient; then its sign is right."""
    steps = _first_steps(inner, gradient)
    if steps is None:
        return False
    for leaf in zip(*steps, strict=True):
        signs = [np.sign(along) for along in leaf if along != 0]
        # Every time, since what adds noise may go either way once.
        if signs and max(signs) < 0:
            raise ValueError(
                f"`{component}` needs a direction inside, of positive sign and without "
                "a learning rate, but this transformation goes against the gradient, "
                "as a complete optimiser does: training would climb. Give it what the "
                "optimiser is made of, `optax.scale_by_adam()` in place of "
                "`optax.adam(rate)`, `optax.identity()` in place of `optax.sgd(rate)`, "
                "and the rate as `learning_rate`."
            )
    return True


def _first_steps(inner: TransformLike, gradient: Any) -> list[list[float]] | None:
    """For each step and leaf, the inner product of the gradient and the update."""
    tx = accepting_extra_args(inner)
    steps = []
    try:
        # The numbers are known here, also while a program around this is traced.
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # At zero, so that a weight decay says nothing.
            params = jax.tree.map(jnp.zeros_like, gradient)
            state = tx.init(params)
            # Several, as a warm-up may begin at a rate of zero.
            for _ in range(3):
                updates, state = tx.update(
                    gradient, state, params, value=jnp.ones([], jnp.float32)
                )
                products = jax.tree.map(jnp.vdot, updates, gradient)
                steps.append([float(along) for along in jax.tree.leaves(products)])
    except Exception:
        # It needs something beside a gradient, or other leaves than these.
        return None
    return steps
