"""Leaves as stacks of matrices, and calls over many leaves."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._matrices import buckets, newton_schulz
from fusionopt_jax._matrices.view import MatrixView
from tests import _compare

pytestmark = pytest.mark.usefixtures("quick_compilation")

few = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def views(draw):
    """Fields of a view: rank 2 to 5, any axes in any place, chunks that divide."""
    rank = draw(st.integers(2, 5))
    axes = draw(st.permutations(range(rank)))
    inputs = draw(st.integers(1, rank - 1))
    outputs = draw(st.integers(1, rank - inputs))
    chunks = draw(st.sampled_from([1, 2, 3]))
    side = draw(st.sampled_from(["input", "output"]))
    in_axes = tuple(axes[:inputs])
    out_axes = tuple(axes[inputs : inputs + outputs])
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    split = in_axes if side == "input" else out_axes
    shape[split[0]] *= chunks
    return tuple(shape), in_axes, out_axes, chunks, side


def entries(view):
    """A leaf in which every entry is another number."""
    return np.arange(np.prod(view.shape), dtype=np.float32).reshape(view.shape)


def by_hand(view):
    """The stack of a leaf, entry by entry."""
    leaf = entries(view)
    rows, columns = view.fused_shape
    fused = []
    for batch in np.ndindex(*(view.shape[axis] for axis in view.batch_axes)):
        matrix = np.empty((rows, columns))
        for i, row in enumerate(np.ndindex(*(view.shape[a] for a in view.in_axes))):
            for j, column in enumerate(
                np.ndindex(*(view.shape[a] for a in view.out_axes))
            ):
                index = [0] * leaf.ndim
                for axes, values in (
                    (view.batch_axes, batch),
                    (view.in_axes, row),
                    (view.out_axes, column),
                ):
                    for axis, value in zip(axes, values, strict=True):
                        index[axis] = value
                matrix[i, j] = leaf[tuple(index)]
        fused.extend(
            np.split(matrix, view.chunks, axis=0 if view.chunk_axis == "input" else 1)
        )
    return np.stack(fused)


@few
@hypothesis.given(fields=views())
def test_a_stack_holds_the_matrices_of_the_leaf(fields):
    view = MatrixView(*fields)
    stack = np.asarray(view.checked("leaf").to_stack(jnp.asarray(entries(view))))
    assert stack.shape == view.stack_shape
    np.testing.assert_array_equal(stack, by_hand(view))


@few
@hypothesis.given(fields=views())
def test_there_and_back(fields):
    view = MatrixView(*fields)
    leaf = jnp.asarray(entries(view))
    np.testing.assert_array_equal(view.from_stack(view.to_stack(leaf)), leaf)


def test_facts_of_a_fused_stack():
    view = MatrixView((4, 128, 384), (1,), (2,), chunks=3)
    assert view.batch_axes == (0,)
    assert view.fused_shape == (128, 384)
    assert view.matrix_shape == (128, 128)
    assert view.stack_shape == (12, 128, 128)
    assert not view.tall
    assert MatrixView((5, 3), (0,), (1,)).tall


def test_impossible_views_are_named():
    with pytest.raises(ValueError, match=r"'a/b' use an axis twice"):
        MatrixView((2, 3), (0,), (0,)).checked("a/b")
    with pytest.raises(ValueError, match=r"'qkv' of shape \(4, 10\).*`chunks`=3.*10"):
        MatrixView((4, 10), (0,), (1,), chunks=3).checked("qkv")


VIEWS = [
    MatrixView((6, 9), (0,), (1,), chunks=3),
    MatrixView((2, 6, 3), (1,), (2,)),
    MatrixView((3, 6), (0,), (1,)),
    MatrixView((5, 5), (0,), (1,)),
    MatrixView((2, 2, 3, 3), (0, 1, 2), (3,)),
]


def leaves():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=view.shape), jnp.float32) for view in VIEWS]


@jax.jit
def orthogonalize(stack):
    table = newton_schulz.coefficient_table("quintic", 2)
    return newton_schulz.newton_schulz(stack, table)


@pytest.mark.parametrize("bucketing", ["loop", "batch", "leaf", "auto"])
def test_every_bucketing_is_one_matrix_at_a_time(bucketing):
    results = jax.jit(
        lambda leaves: buckets.map_stacks(
            orthogonalize, leaves, VIEWS, bucketing=bucketing
        )
    )(leaves())
    for leaf, view, result in zip(leaves(), VIEWS, results, strict=True):
        assert result.shape == leaf.shape
        stack = view.to_stack(leaf)
        turned = stack.mT if view.tall else stack
        each = jnp.concatenate([orthogonalize(matrix[None]) for matrix in turned])
        expected = view.from_stack(each.mT if view.tall else each)
        # Two steps on entries below one, in another order of the sums.
        _compare.assert_within(result, expected, 2e-6)


@pytest.mark.parametrize(
    ("bucketing", "shapes"),
    [
        # Chunks of (6, 3), a stack of (6, 3) and a (3, 6), turned: one bucket of six.
        ("batch", [(6, 3, 6), (1, 5, 5), (1, 12, 3)]),
        # A loop goes through a stack where it lies.
        ("loop", [(1, 6, 3), (1, 6, 3), (1, 3, 6), (1, 5, 5), (1, 12, 3)]),
        ("leaf", [(3, 6, 3), (2, 6, 3), (1, 3, 6), (1, 5, 5), (1, 12, 3)]),
    ],
)
def test_equal_shapes_share_a_call(bucketing, shapes):
    seen = []

    def remember(stack):
        seen.append(stack.shape)
        return stack

    results = buckets.map_stacks(remember, leaves(), VIEWS, bucketing=bucketing)
    assert seen == shapes
    for leaf, result in zip(leaves(), results, strict=True):
        np.testing.assert_array_equal(result, leaf)


def test_dtypes_are_not_mixed_in_a_bucket():
    view = MatrixView((3, 6), (0,), (1,))
    mixed = [jnp.ones((3, 6), jnp.float32), jnp.ones((3, 6), jnp.bfloat16)]
    results = buckets.map_stacks(lambda s: s, mixed, [view, view], bucketing="batch")
    assert [result.dtype for result in results] == [jnp.float32, jnp.bfloat16]


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


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_backend_chooses_the_bucketing(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    expected = "loop" if platform == "cpu" else "batch"
    assert buckets.resolve_bucketing("auto") == expected
    assert buckets.resolve_bucketing("leaf") == "leaf"
