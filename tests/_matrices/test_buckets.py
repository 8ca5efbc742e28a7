"""Calls of a function of stacks over many leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._matrices import buckets, newton_schulz
from fusionopt_jax._matrices.platform import PLATFORMS
from fusionopt_jax._matrices.view import MatrixView
from tests import _compare

VIEWS = [
    MatrixView((6, 9), (0,), (1,), chunks=3),
    MatrixView((2, 6, 3), (1,), (2,)),
    MatrixView((3, 6), (0,), (1,)),
    MatrixView((5, 5), (0,), (1,)),
    MatrixView((2, 2, 3, 3), (0, 1, 2), (3,)),
    MatrixView((2, 6, 9), (1,), (2,), chunks=(6, 3)),
]


def leaves():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=view.shape), jnp.float32) for view in VIEWS]


@functools.partial(jax.jit, static_argnames="platforms")
def orthogonalize(stack, *, platforms=PLATFORMS):
    table = newton_schulz.coefficient_table("quintic", 2)
    return newton_schulz.newton_schulz(stack, table, platforms=platforms)


@pytest.mark.parametrize("bucketing", ["loop", "batch", "leaf", "auto"])
def test_every_bucketing_is_one_matrix_at_a_time(bucketing):
    results = jax.jit(
        lambda leaves: buckets.map_stacks(
            orthogonalize, leaves, VIEWS, bucketing=bucketing
        )
    )(leaves())
    for leaf, view, result in zip(leaves(), VIEWS, results, strict=True):
        assert result.shape == leaf.shape
        stacks = []
        for stack in view.to_stacks(leaf):
            tall = stack.shape[1] > stack.shape[2]
            turned = stack.mT if tall else stack
            each = jnp.concatenate([orthogonalize(matrix[None]) for matrix in turned])
            stacks.append(each.mT if tall else each)
        # Two steps on entries below one, in another order of the sums.
        _compare.assert_within(result, view.from_stacks(stacks), 2e-6)


SINGLES = [(1, 3, 6), (1, 5, 5), (1, 12, 3)]


@pytest.mark.parametrize(
    ("bucketing", "shapes"),
    [
        # Three chunks of (6, 3) and a (3, 6), turned: one bucket of four. What an axis
        # of the leaf counts is a stack already.
        ("batch", [(4, 3, 6), (2, 6, 3), *SINGLES[1:], (2, 6, 6), (2, 6, 3)]),
        # A loop goes through a stack where it lies.
        ("loop", [*[(1, 6, 3)] * 2, (1, 6, 6), (1, 6, 3), *SINGLES]),
        ("leaf", [(3, 6, 3), (2, 6, 3), *SINGLES, (2, 6, 6), (2, 6, 3)]),
    ],
)
def test_equal_shapes_share_a_call(bucketing, shapes):
    seen = []

    def remember(stack, *, platforms):
        assert platforms == PLATFORMS
        seen.append(stack.shape)
        return stack

    results = buckets.map_stacks(remember, leaves(), VIEWS, bucketing=bucketing)
    assert seen == shapes
    for leaf, result in zip(leaves(), results, strict=True):
        np.testing.assert_array_equal(result, leaf)


def test_dtypes_are_not_mixed_in_a_bucket():
    view = MatrixView((3, 6), (0,), (1,))
    mixed = [jnp.ones((3, 6), jnp.float32), jnp.ones((3, 6), jnp.bfloat16)]
    results = buckets.map_stacks(
        lambda s, **_: s, mixed, [view, view], bucketing="batch"
    )
    assert [result.dtype for result in results] == [jnp.float32, jnp.bfloat16]


def step(stacks, state, ids, scale, *, platforms):
    """Stacks scaled along either side by what is remembered, which doubles."""
    stack, other = stacks
    rows, columns, _ = state
    result = scale * (stack + other) * rows[:, :, None] * columns[:, None, :]
    return result, (2 * rows, 2 * columns, ids)


@pytest.mark.parametrize("bucketing", ["loop", "batch", "leaf"])
def test_each_matrix_has_its_state_and_its_number(bucketing):
    rng = np.random.default_rng(1)
    states = [
        tuple(
            (
                jnp.asarray(rng.normal(size=(stack.count, stack.inputs)), jnp.float32),
                jnp.asarray(rng.normal(size=(stack.count, stack.outputs)), jnp.float32),
                jnp.zeros(stack.count, jnp.int32),
            )
            for stack in view.stacks
        )
        for view in VIEWS
    ]
    results, new_states = jax.jit(
        lambda first, second, states, scale: buckets.map_stateful(
            step,
            [first, second],
            VIEWS,
            states=states,
            scalars=[scale],
            keys=[100 * i for i in range(len(VIEWS))],
            turn_state=lambda state: (state[1], state[0], state[2]),
            bucketing=bucketing,
        )
    )(leaves(), [10 * leaf for leaf in leaves()], states, jnp.float32(3))
    for i, (view, leaf) in enumerate(zip(VIEWS, leaves(), strict=True)):
        expected, number = [], 100 * i
        for k, stack in enumerate(view.to_stacks(leaf)):
            rows, columns, _ = states[i][k]
            expected.append(33 * stack * rows[:, :, None] * columns[:, None, :])
            new_rows, new_columns, ids = new_states[i][k]
            np.testing.assert_array_equal(new_rows, 2 * rows)
            np.testing.assert_array_equal(new_columns, 2 * columns)
            np.testing.assert_array_equal(ids, number + np.arange(stack.shape[0]))
            number += stack.shape[0]
        # Five roundings of float32 in another order.
        np.testing.assert_allclose(results[i], view.from_stacks(expected), rtol=1e-6)


def test_no_leaves_are_no_calls():
    assert buckets.map_stacks(lambda stack: 1 / 0, [], []) == []


def test_the_program_does_not_grow_with_the_number_of_matrices():
    def length(count):
        view = MatrixView((3, 6), (0,), (1,))
        program = jax.make_jaxpr(
            lambda leaves: buckets.map_stacks(
                orthogonalize, leaves, [view] * count, bucketing="loop"
            )
        )([jnp.ones((3, 6))] * count)
        dots = str(program).count("dot_general")
        return dots

    assert length(8) == length(2) > 0


def test_the_platform_chooses_the_bucketing():
    """One version a platform, each of which knows what it may be compiled for."""
    seen = {}

    def remember(stack, *, platforms):
        seen.setdefault(platforms, []).append(stack.shape)
        return stack

    call = lambda leaves: buckets.map_stacks(remember, leaves, VIEWS)  # noqa: E731
    jax.jit(call).trace(leaves())
    shapes = {("cpu",): (1, 3, 6), ("gpu", "other"): (4, 3, 6)}
    assert seen.keys() == shapes.keys()
    for platforms, shape in shapes.items():
        assert shape in seen[platforms]

    for platform in PLATFORMS:
        assert buckets.resolve_bucketing("leaf", platform) == "leaf"
        assert buckets.resolve_bucketing("auto", platform, devices=2) == "batch"


def test_outside_of_jit_one_version_is_traced():
    seen = set()

    def remember(stack, *, platforms):
        seen.add(platforms)
        return stack

    buckets.map_stacks(remember, leaves(), VIEWS)
    assert len(seen) == 1
