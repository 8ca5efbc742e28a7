r"""Which steps to compute: the least error for each number of computed steps, exactly.

The error of a skipped step :math:`k` depends on the last :math:`m+1` computed steps
:math:`s_0 > s_1 > \dots > s_m` alone, for extrapolation of order :math:`m`. With the
residuals :math:`r_j` of a walk that skips nothing it is

.. math::
    e(k; s) = \frac{\|\sum_i w_i\, r_{s_i} - r_k\|}{\|r_k\|}
            = \sqrt{\frac{w^\top G\, w}{G_{kk}}}, \qquad
    G_{ij} = \langle r_i, r_j \rangle

where :math:`w` also holds the -1 of :math:`r_k`. So the inner products say all there is
to know, however large the residuals are. The sum of errors over a walk is a sum over
its runs of skipped steps, and the least one for each number of computed steps is a
shortest path whose places are the last :math:`m+1` computed steps.

NumPy alone; nothing here knows of networks.
"""

import itertools
from typing import NamedTuple

import numpy as np

from fusionopt_jax.dit.sampling.extrapolation import extrapolation_weights


class Walk(NamedTuple):
    """The best choice of a number of computed steps.

    Attributes:
        error: Sum of the errors of the skipped steps.
        mask: [steps] booleans, True where the step computes.
    """

    error: float
    mask: np.ndarray


def run_errors(
    products: np.ndarray,
    times: np.ndarray,
    order: int,
    longest: int,
    computed: np.ndarray,
) -> np.ndarray:
    r"""The summed error of each run of skipped steps, after each choice before it.

    Args:
        products: [streams, steps, steps], the inner products :math:`G` of one or more
            residuals; the error of a step is the mean of theirs.
        times: [steps], the model time of each step.
        order: :math:`m`.
        longest: Most steps that may be skipped in a row.
        computed: [steps] booleans, True where the step must compute.

    Returns:
        Float64 of shape [steps, gap, ..., run]: the last computed step, its distance
        from the one before and so on for `order` axes of `longest + 2` entries each,
        and how many steps are skipped after it, from 0 to `longest`. Infinite where
        there is no such choice.

    Example:
        >>> rising = np.arange(4.0)[None, :, None] + 1
        >>> free = np.zeros(4, bool)
        >>> products = rising @ rising.transpose(0, 2, 1)
        >>> run_errors(products, np.arange(4.0), 0, 2, free)[0].round(2).tolist()
        [0.0, 0.5, 1.17]
        >>> float(run_errors(products, np.arange(4.0), 1, 2, free)[1, 1, 2].round(6))
        0.0
    """
    steps = len(times)
    norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
    shape = (steps, *(longest + 2,) * order, longest + 1)
    errors = np.full(shape, np.inf)
    errors[..., 0] = 0.0
    for gaps in itertools.product(range(1, longest + 2), repeat=order):
        back = np.cumsum((0, *gaps))
        for run in range(1, longest + 1):
            last = np.arange(back[-1], steps - run)
            last = last[~computed[last + run]]
            if not last.size:
                continue
            nodes = last[:, None] - back
            weights = extrapolation_weights(times[nodes], times[last + run])
            # The last column takes the true residual away.
            weights = np.append(weights, np.full((len(last), 1), -1.0), axis=1)
            places = np.append(nodes, last[:, None] + run, axis=1)
            picked = products[:, places[:, :, None], places[:, None, :]]
            squares = np.einsum("ki,skij,kj->sk", weights, picked, weights)
            errors[last, *gaps, run] = np.mean(
                relative(np.sqrt(np.maximum(squares, 0.0)), norms[:, last + run]), 0
            )
    return np.cumsum(errors, axis=-1)


def relative(error: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """An error over a norm; nothing over nothing is 0, anything else over it infinite.

    Example:
        >>> relative(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 4.0])).tolist()
        [0.0, inf, 0.25]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0.0, 0.0, error / norm)


def best_walks(runs: np.ndarray) -> dict[int, Walk]:
    """The walk of least summed error for each number of computed steps.

    Args:
        runs: What `run_errors` returns.

    Returns:
        By the number of computed steps, from the fewest that are possible to all. The
        first `order + 1` steps compute.

    Example:
        >>> rising = np.arange(5.0)[None, :, None] + 1
        >>> products = rising @ rising.transpose(0, 2, 1)
        >>> runs = run_errors(products, np.arange(5.0), 0, 4, np.zeros(5, bool))
        >>> walks = best_walks(runs)
        >>> walks[2].mask.tolist(), round(walks[2].error, 3)
        ([True, False, True, False, False], 1.15)
    """
    steps, longest, order = len(runs), runs.shape[-1] - 1, runs.ndim - 2
    # Least error with the computed steps so far, by the last ones of them.
    best = np.full(runs.shape[:-1], np.inf)
    if steps > order:
        best[(order, *(1,) * order)] = 0.0
    choices: list[np.ndarray] = []
    walks = {}
    for count in range(order + 1, steps + 1):
        ends = np.full(best.shape, np.inf)
        for last in range(max(0, steps - 1 - longest), steps):
            ends[last] = best[last] + runs[last, ..., steps - 1 - last]
        place = np.unravel_index(np.argmin(ends), ends.shape)
        if np.isfinite(ends[place]):
            mask = np.zeros(steps, bool)
            mask[: order + 1] = True
            mask[_trace(tuple(map(int, place)), choices)] = True
            walks[count] = Walk(float(ends[place]), mask)
        best, choice = _one_more(best, runs)
        choices.append(choice)
    return walks


def _one_more(best: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One computed step more: the least errors, and what was chosen to reach each.

    That is the oldest distance that is forgotten, or at order 0 the newest.
    """
    longest, order = runs.shape[-1] - 1, runs.ndim - 2
    after = np.full_like(best, np.inf)
    choice = np.zeros(best.shape, np.int32)
    for gap in range(1, min(longest + 1, len(best) - 1) + 1):
        error = best[:-gap] + runs[:-gap, ..., gap - 1]
        if order:
            oldest = np.argmin(error, axis=-1, keepdims=True)
            after[gap:, gap] = np.take_along_axis(error, oldest, axis=-1)[..., 0]
            choice[gap:, gap] = oldest[..., 0]
        else:
            better = error < after[gap:]
            after[gap:][better] = error[better]
            choice[gap:][better] = gap
    return after, choice


def _trace(place: tuple[int, ...], choices: list[np.ndarray]) -> list[int]:
    """The computed steps that lead to a place, newest first."""
    steps = [place[0]]
    for choice in reversed(choices):
        last, *gaps = place
        gaps.append(int(choice[place]))
        place = (last - gaps[0], *gaps[1:])
        steps.append(place[0])
    return steps
