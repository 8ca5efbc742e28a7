"""Leaves as stacks of matrices."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax._matrices.view import MatrixView

few = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def views(draw):
    """Fields of a view: rank 2 to 5, any axes in any place, chunks that divide."""
    rank = draw(st.integers(2, 5))
    axes = draw(st.permutations(range(rank)))
    inputs = draw(st.integers(1, rank - 1))
    outputs = draw(st.integers(1, rank - inputs))
    chunks = draw(st.sampled_from([1, 2, 3, (1, 2), (2, 2), (3, 1, 1)]))
    side = draw(st.sampled_from(["input", "output"]))
    in_axes = tuple(axes[:inputs])
    out_axes = tuple(axes[inputs : inputs + outputs])
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    split = in_axes if side == "input" else out_axes
    if isinstance(chunks, int):
        shape[split[0]] *= chunks
    else:
        for axis in split:
            shape[axis] = 1
        shape[split[0]] = sum(chunks)
    return tuple(shape), in_axes, out_axes, chunks, side


def entries(view):
    """A leaf in which every entry is another number."""
    return np.arange(np.prod(view.shape), dtype=np.float32).reshape(view.shape)


def by_hand(view):
    """The stacks of a leaf, entry by entry."""
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
        axis = 0 if view.chunk_axis == "input" else 1
        if isinstance(view.chunks, int):
            fused.extend(np.split(matrix, view.chunks, axis=axis))
        else:
            fused.append(np.split(matrix, np.cumsum(view.chunks)[:-1], axis=axis))
    if isinstance(view.chunks, int):
        return [np.stack(fused)]
    return [np.stack(parts) for parts in zip(*fused, strict=True)]


@few
@hypothesis.given(fields=views())
def test_stacks_hold_the_matrices_of_the_leaf(fields):
    view = MatrixView(*fields).checked("leaf")
    stacks = view.to_stacks(jnp.asarray(entries(view)))
    assert tuple(stack.shape for stack in stacks) == view.stacks
    for stack, expected in zip(stacks, by_hand(view), strict=True):
        np.testing.assert_array_equal(stack, expected)


@few
@hypothesis.given(fields=views())
def test_there_and_back(fields):
    view = MatrixView(*fields).checked("leaf")
    leaf = jnp.asarray(entries(view))
    np.testing.assert_array_equal(view.from_stacks(view.to_stacks(leaf)), leaf)


def test_facts_of_a_fused_stack():
    view = MatrixView((4, 128, 384), (1,), (2,), chunks=3)
    assert view.batch_axes == (0,)
    assert view.fused_shape == (128, 384)
    assert view.stacks == ((12, 128, 128),)
    assert view.count == 12


def test_unequal_parts_are_stacks_of_their_own():
    view = MatrixView((4, 128, 256), (1,), (2,), chunks=(128, 64, 64))
    assert view.stacks == ((4, 128, 128), (4, 128, 64), (4, 128, 64))
    assert view.count == 12
    assert view.from_state(view.to_state("qkv")) == ("q", "k", "v")
    equal = MatrixView((4, 128, 192), (1,), (2,), chunks=(64, 64, 64)).checked("qkv")
    assert equal.stacks == ((12, 128, 64),)
    assert equal.from_state(equal.to_state(["all"])) == ("all",)


@pytest.mark.parametrize(
    ("shape", "tall"), [((5, 3), True), ((3, 5), False), ((4, 4), False)]
)
def test_tall_matrices_have_more_inputs(shape, tall):
    (stack,) = MatrixView(shape, (0,), (1,)).stacks
    assert stack.tall == tall
    assert stack.matrix == shape


def test_impossible_views_are_named():
    with pytest.raises(ValueError, match=r"'a/b' use an axis twice"):
        MatrixView((2, 3), (0,), (0,)).checked("a/b")
    with pytest.raises(ValueError, match=r"'qkv' of shape \(4, 10\).*`chunks`=3.*10"):
        MatrixView((4, 10), (0,), (1,), chunks=3).checked("qkv")
    with pytest.raises(
        ValueError, match=r"'qkv' of shape \(4, 10\).*`chunks`=\(4, 4\).*8.*10"
    ):
        MatrixView((4, 10), (0,), (1,), chunks=(4, 4)).checked("qkv")
    with pytest.raises(ValueError, match=r"'qkv' of shape \(4, 10\).*`block`=4.*10"):
        MatrixView((4, 10), (0,), (1,)).in_blocks(4, "qkv")


def test_blocks_are_equal_chunks():
    view = MatrixView((128, 256), (0,), (1,))
    assert view.in_blocks(64, "q") == MatrixView((128, 256), (0,), (1,), chunks=4)
