r"""The weights with which a skipped step extrapolates from the computed ones.

With the residuals :math:`r_k, r_{k-1}, \dots` computed last, at model times
:math:`t_k, t_{k-1}, \dots`, and Newton's divided differences :math:`r[\cdot]` of them,
a skipped step at time :math:`t` uses

.. math::
    r(t) = \sum_{i=0}^{m} r[t_k, \dots, t_{k-i}] \prod_{j<i} (t - t_{k-j})
         = \sum_{i=0}^{m} w_i\, r_{k-i}, \qquad
    w_i = \prod_{j \ne i} \frac{t - t_{k-j}}{t_{k-i} - t_{k-j}}

of order :math:`m`: 0 uses the last residual as it is, 1 extends a line, 2 a parabola.
The weights :math:`w_i` depend on times alone; the host computes them before the walk.

Source:
    Liu et al. 2025, "From Reusing to Forecasting: Accelerating Diffusion Models with
    TaylorSeers", which takes differences of computed features at even distances; over
    uneven ones, Newton's polynomial is what they are of.
"""

import itertools
from typing import Any

import numpy as np


def extrapolation(times: np.ndarray, mask: Any, order: int) -> np.ndarray:
    r"""The weights :math:`w_i` of the residuals; the equation heads this module.

    Args:
        times: [steps], the model time of each step's evaluation.
        mask: [steps] or [steps, ...] booleans, True where the step computes.
        order: :math:`m`; the first m + 1 steps must compute.

    Returns:
        Float64 of the mask's shape and [order + 1], newest residual first; 1, 0, ...
        where the step computes.

    Raises:
        ValueError: If steps share a time and the order is above 0.

    Example:
        >>> extrapolation(np.array([4.0, 3.0, 1.0]), [True, True, False], 1).tolist()
        [[1.0, 0.0], [1.0, 0.0], [3.0, -2.0]]
    """
    if order and len(set(times.tolist())) < len(times):
        raise ValueError(
            "the sampler evaluates the network at one time in several steps, where "
            "nothing can be extrapolated; give the step cache order=0."
        )
    mask = np.asarray(mask)
    weights = np.zeros((*mask.shape, order + 1))
    weights[..., 0] = 1.0
    for step, *rest in np.argwhere(~mask).tolist():
        nodes = times[source_steps(mask[(slice(None), *rest)], step, order)]
        weights[step, *rest] = extrapolation_weights(nodes, times[step])
    return weights


def extrapolation_weights(nodes: np.ndarray, time: np.ndarray | float) -> np.ndarray:
    """The weights of residuals at distinct times; the equation heads this module.

    Args:
        nodes: [..., order + 1], the times of the residuals.
        time: [...], the time to extrapolate to.

    Returns:
        Float64 of the shape of `nodes`.

    Example:
        >>> extrapolation_weights(np.array([3.0, 4.0]), 1.0).tolist()
        [3.0, -2.0]
    """
    weights = np.ones(nodes.shape)
    for i, j in itertools.permutations(range(nodes.shape[-1]), 2):
        weights[..., i] *= (time - nodes[..., j]) / (nodes[..., i] - nodes[..., j])
    return weights


def source_steps(mask: np.ndarray, step: int, order: int) -> np.ndarray:
    """The steps whose residuals a skipped step is extrapolated from, newest first.

    Args:
        mask: [steps] booleans.
        step: A step that is skipped.
        order: Order of the extrapolation.

    Returns:
        [order + 1] integers.

    Example:
        >>> source_steps(np.array([True, True, False, True, False]), 4, 1).tolist()
        [3, 1]
    """
    return np.flatnonzero(mask[:step])[::-1][: order + 1]
