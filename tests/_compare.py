"""Assertions in the words of the domain: a failure says what broke and by how much."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from tests import _golden


def assert_within(actual, expected, tolerance, what=""):
    """Largest absolute difference at most ``tolerance``, and everything finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    worst = float(np.max(np.abs(actual - expected), initial=0.0))
    assert worst <= tolerance, (
        f"{what}: differs by {worst:.3g}, allowed {tolerance:.3g}"
    )


def assert_trees_within(actual, expected, tolerance, what=""):
    """Every leaf of one tree within ``tolerance`` of the same leaf of the other."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(
        lambda path, a, e: assert_within(
            a, e, tolerance, what + jax.tree_util.keystr(path)
        ),
        actual,
        expected,
    )


def assert_trees_identical(actual, expected):
    """Same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, a in jax.tree_util.tree_leaves_with_path(actual):
        e = dict(jax.tree_util.tree_leaves_with_path(expected))[path]
        name = jax.tree_util.keystr(path)
        assert np.asarray(a).dtype == np.asarray(e).dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e), err_msg=name)


def assert_close_to_orthogonal(matrix, lowest, highest):
    """All singular values of every matrix of a stack lie in [lowest, highest]."""
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    assert values.min() >= lowest, f"smallest singular value {values.min():.4f}"
    assert values.max() <= highest, f"largest singular value {values.max():.4f}"


def assert_follows(
    golden: _golden.Golden,
    paths: Mapping[str, np.ndarray],
    *,
    tolerance: float | None = None,
):
    """The parameters after every step are the recorded ones.

    ``paths`` holds a stack of all steps for each parameter. The tolerance is the
    recording's own for each array (see ``Golden.tolerance``), or one number for all.
    """
    assert set(paths) == set(golden.params0)
    # Some recordings keep the trajectories of fewer parameters than they trained.
    for name in golden.params:
        path = paths[name]
        assert len(path) == _golden.STEPS
        for step in range(_golden.STEPS):
            assert_within(
                path[step],
                golden.params[name][step],
                golden.tolerance(f"param/{name}") if tolerance is None else tolerance,
                f"{golden.case} {name} after step {step}",
            )


def stacked(history: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A list of dicts of arrays as a dict of stacks."""
    return {name: np.stack([one[name] for one in history]) for name in history[0]}
