"""What holds for every input: invariants of the components, on drawn matrices.

Shapes are few, so that compiled functions are shared; the values are drawn.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare
from tests.references import mona, newton_schulz

few = hypothesis.settings(
    max_examples=5, deadline=None, derandomize=True, database=None
)
seeds = st.integers(0, 2**32 - 1)
SHAPES = [(6, 6), (4, 7), (7, 4), (1, 5)]

# Products of matrices of a few rows with entries below one, five steps deep, in
# float32: each step can triple an error of 6e-8.
ROUNDING = 3e-5


@functools.cache
def compiled(name, routing=None, **settings):
    """One update of a component from its first state, compiled once per shape."""
    tx = getattr(fo, name)(routing=routing, **settings)
    return jax.jit(lambda g: tx.update(g, tx.init(g))[0])


def orthogonalize(matrix, routing=None, **settings):
    settings = {"hot_dtype": "fp32", "eps": 0.0} | settings
    updates = {"w": jnp.asarray(matrix, jnp.float32)}
    return np.asarray(compiled("ns5", routing, **settings)(updates)["w"])


def normalize(matrix, routing=None, **settings):
    updates = {"w": jnp.asarray(matrix, jnp.float32)}
    return np.asarray(compiled("normuon", routing, **settings)(updates)["w"])


def draw(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_singular_values(seed, shape, lowest):
    """A matrix with singular values between ``lowest`` and 1."""
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = rng.uniform(lowest, 1.0, size=len(left.T))
    values[0], values[-1] = 1.0, lowest
    return (left * values) @ right


def reachable(lowest, highest, rows):
    """Bounds of the scalar iteration on the interval that the norm leaves."""
    a, b, c = rows[0]
    s = np.linspace(lowest, highest, 20001)
    for step in range(5):
        a, b, c = rows[min(step, len(rows) - 1)]
        s = a * s + b * s**3 + c * s**5
    return s.min(), s.max()


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
@pytest.mark.parametrize("method", ["plain", "gram"])
@few
@hypothesis.given(seed=seeds)
def test_singular_values_stay_in_the_bounds_of_the_polynomial(shape, method, seed):
    lowest = 0.1
    matrix = with_singular_values(seed, shape, lowest)
    # Dividing by the norm puts every value between lowest / sqrt(rank) and 1.
    low, high = reachable(lowest / np.sqrt(min(shape)), 1.0, [newton_schulz.QUINTIC])
    assert low > 0.6
    assert high < 1.3
    out = orthogonalize(matrix, method=method)
    # Rounding of the iteration, and of the float64 bounds on a grid.
    _compare.assert_close_to_orthogonal(out, low - 1e-3, high + 1e-3)


@few
@hypothesis.given(seed=seeds)
def test_polar_express_is_closer_to_the_polar_factor(seed):
    matrix = with_singular_values(seed, (6, 6), 0.1)
    polar = newton_schulz.polar_factor(matrix)
    error = lambda out: np.linalg.norm(out - polar)  # noqa: E731
    express = orthogonalize(matrix, coefficients="polar_express")
    assert error(express) < error(orthogonalize(matrix))


@pytest.mark.parametrize("shape", SHAPES)
@few
@hypothesis.given(seed=seeds)
def test_singular_vectors_are_kept(shape, seed):
    matrix = with_singular_values(seed, shape, 0.1)
    expected = newton_schulz.on_singular_values(matrix, eps=0.0)
    _compare.assert_within(orthogonalize(matrix), expected, ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
@few
@hypothesis.given(seed=seeds)
def test_transpose(shape, seed):
    matrix = draw(seed, shape)
    _compare.assert_within(orthogonalize(matrix.T), orthogonalize(matrix).T, ROUNDING)


@pytest.mark.parametrize("component", [orthogonalize, normalize])
@few
@hypothesis.given(seed=seeds)
def test_a_stack_is_its_slices(component, seed):
    stack = draw(seed, (3, 4, 7))
    slices = np.stack([component(matrix) for matrix in stack])
    _compare.assert_within(component(stack), slices, ROUNDING)


@pytest.mark.parametrize("component", [orthogonalize, normalize])
@pytest.mark.parametrize(
    ("side", "layout", "axis"),
    [
        ("output", "in_out", 1),
        ("input", "in_out", 0),
        ("output", "out_in", 0),
        ("input", "out_in", 1),
    ],
)
@few
@hypothesis.given(seed=seeds)
def test_chunks_are_slices(component, side, layout, axis, seed):
    parts = [draw(seed + i, (4, 7)) for i in range(3)]
    chunked = fo.Routing(
        [fo.Rule("w", axes=fo.MatrixAxes(chunks=3, chunk_axis=side))],
        layout=layout,
        min_dim=1,
    )
    whole = fo.Routing(layout=layout, min_dim=1)
    fused = component(np.concatenate(parts, axis=axis), chunked)
    slices = np.concatenate([component(part, whole) for part in parts], axis=axis)
    _compare.assert_within(fused, slices, ROUNDING)


@few
@hypothesis.given(seed=seeds)
def test_the_layout_is_a_transpose(seed):
    matrix = draw(seed, (4, 7))
    out_in = fo.Routing(layout="out_in", min_dim=1)
    for settings in ({"scale": "aspect"}, {"scale": "rms"}):
        _compare.assert_within(
            orthogonalize(matrix.T, out_in, **settings),
            orthogonalize(matrix, **settings).T,
            ROUNDING,
        )
    _compare.assert_within(normalize(matrix.T, out_in), normalize(matrix).T, ROUNDING)


@few
@hypothesis.given(seed=seeds, exponent=st.integers(-12, 12))
def test_the_scale_of_the_gradient_is_lost(seed, exponent):
    matrix = draw(seed, (4, 7))
    # A norm of 1e-12 and of 1e12 squared lie inside the range of float32.
    _compare.assert_within(
        orthogonalize(10.0**exponent * matrix), orthogonalize(matrix), ROUNDING
    )


@few
@hypothesis.given(seed=seeds, exponent=st.integers(-6, 6))
def test_normuon_scales_with_its_input(seed, exponent):
    matrix, factor = draw(seed, (4, 7)), 10.0**exponent
    # Relative to the factor; eps=1e-10 is 1e-4 of the smallest scale.
    _compare.assert_within(
        normalize(factor * matrix, eps=0.0) / factor,
        normalize(matrix, eps=0.0),
        ROUNDING,
    )


@pytest.mark.parametrize("component", [orthogonalize, normalize])
@few
@hypothesis.given(seed=seeds)
def test_neurons_have_no_order(component, seed):
    matrix = draw(seed, (4, 7))
    order = np.random.default_rng(seed).permutation(7)
    permuted = component(matrix[:, order])
    _compare.assert_within(permuted, component(matrix)[:, order], ROUNDING)


@few
@hypothesis.given(seed=seeds)
def test_normuon_restores_the_norm(seed):
    stack = draw(seed, (3, 4, 7))
    before = np.linalg.norm(stack, axis=(1, 2))
    after = np.linalg.norm(normalize(stack), axis=(1, 2))
    # A sum of 28 squares in float32.
    np.testing.assert_allclose(after, before, rtol=1e-5)


@few
@hypothesis.given(seed=seeds)
def test_normuon_makes_neurons_equal_at_first(seed):
    matrix = draw(seed, (4, 7))
    norms = np.linalg.norm(normalize(matrix), axis=0)
    # Every output neuron, a column here, is divided by its own root mean square.
    np.testing.assert_allclose(norms, np.full(7, norms.mean()), rtol=1e-5)


@functools.cache
def norms_over_time(restore_norm):
    """A compiled run of ns5 and normuon on one constant gradient: norms of 30 steps."""
    orthogonal = fo.ns5(hot_dtype="fp32")
    normal = fo.normuon(restore_norm=restore_norm)

    def step(state, gradient):
        update, first = orthogonal.update({"w": gradient}, state[0])
        update, second = normal.update(update, state[1])
        return (first, second), jnp.linalg.norm(update["w"])

    @jax.jit
    def run(gradient):
        state = (orthogonal.init({"w": gradient}), normal.init({"w": gradient}))
        return jax.lax.scan(
            step, state, jnp.broadcast_to(gradient, (30, *gradient.shape))
        )[1]

    return run


@few
@hypothesis.given(seed=seeds)
def test_the_first_step_is_as_long_as_later_ones(seed):
    gradient = jnp.asarray(draw(seed, (4, 7)))
    norms = np.asarray(norms_over_time(True)(gradient))
    np.testing.assert_allclose(norms, np.full(30, norms[0]), rtol=1e-5)
    # Without the restored norm, the zero start of the average shows: 1/sqrt(1 - b^t).
    norms = np.asarray(norms_over_time(False)(gradient))
    expected = np.sqrt(28) / np.sqrt(1 - 0.95 ** np.arange(1, 31))
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


@functools.cache
def accelerate(alpha, beta, weighted):
    tx = fo.mona(alpha=alpha, b1=beta, weighted=weighted)

    def step(state, gradient):
        update, state = tx.update({"w": gradient}, state)
        return state, update["w"]

    return jax.jit(lambda grads: jax.lax.scan(step, tx.init({"w": grads[0]}), grads)[1])


@pytest.mark.parametrize("alpha", [0.2, -3.0])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("weighted", [True, False])
@few
@hypothesis.given(seed=seeds)
def test_one_buffer_of_mona_is_two(alpha, beta, weighted, seed):
    grads = draw(seed, (20, 3, 4))
    expected, _ = mona.trajectory(grads, alpha=alpha, beta=beta, weighted=weighted)
    # Entries up to (1 + 2 |alpha|) times 4, in float32.
    _compare.assert_within(
        accelerate(alpha, beta, weighted)(jnp.asarray(grads)), expected, 1e-5
    )


@few
@hypothesis.given(seed=seeds)
def test_mona_has_no_effect_on_a_steady_gradient(seed):
    gradient = draw(seed, (3, 4))
    grads = jnp.broadcast_to(jnp.asarray(gradient), (80, 3, 4))
    # The average of 80 equal gradients at decay 0.5 is that gradient in float32.
    out = accelerate(-3.0, 0.5, True)(grads)
    _compare.assert_within(out[-1], gradient, 1e-6)


@few
@hypothesis.given(seed=seeds, b1=st.floats(0.125, 1.0, width=32))
def test_the_three_sequences_of_schedule_free(seed, b1):
    grads = draw(seed, (6, 3, 4))
    tx = fo.schedule_free(
        # The identity: every gradient is a direction.
        optax.identity(),
        0.1,
        b1=float(b1),
    )
    params = {"w": jnp.asarray(draw(seed + 1, (3, 4)))}
    state = tx.init(params)
    z = x = np.asarray(params["w"], np.float64)
    for t, gradient in enumerate(grads):
        updates, state = tx.update({"w": jnp.asarray(gradient)}, state, params)
        params = {"w": params["w"] + updates["w"]}
        z = z - 0.1 * gradient
        # Equal weights: x is the mean of all z so far.
        x = x + (z - x) / (t + 1)
    # x is recovered from y by dividing through b1: so is the rounding of y.
    tolerance = 3e-6 / b1
    _compare.assert_within(params["w"], (1 - b1) * z + b1 * x, 3e-6)
    _compare.assert_within(fo.fast_params(state, params)["w"], z, 3e-6)
    _compare.assert_within(fo.eval_params(state, params)["w"], x, tolerance)


@functools.cache
def whiten():
    """A compiled run of KL-Shampoo: what it returns at the fifth of five gradients."""
    # Staggered, the two sides would renew their bases at different steps.
    tx = fo.kl_shampoo(sides="both", update_every=2, stagger=False)

    def step(state, gradient):
        update, state = tx.update({"w": gradient}, state)
        return state, update["w"]

    def run(grads):
        return jax.lax.scan(step, tx.init({"w": grads[0]}), grads)[1][-1]

    return jax.jit(run)


def preconditioned(grads):
    return np.asarray(whiten()(jnp.asarray(grads, jnp.float32)))


# Five float32 steps with square roots of estimated eigenvalues between them, on entries
# up to 4; measured 6e-6.
WHITENED_ROUNDING = 1e-4

# Factors of matrices that aren't square lack full rank at first, and forever if the
# gradients stay the same: none of the basis may be made of rounding.
whitened_shapes = st.sampled_from([(5, 5), (4, 6), (5, 6), (3, 8), (8, 3)])


@few
@hypothesis.given(
    seed=seeds,
    factor=st.floats(1e-3, 1e3),
    shape=whitened_shapes,
    repeated=st.booleans(),
)
def test_any_factor_on_all_gradients_is_lost_in_kl_shampoo(
    seed, factor, shape, repeated
):
    grads = draw(seed, (1 if repeated else 5, *shape))
    grads = np.broadcast_to(grads, (5, *shape))
    _compare.assert_within(
        preconditioned(factor * grads), preconditioned(grads), WHITENED_ROUNDING
    )


@few
@hypothesis.given(seed=seeds, shape=whitened_shapes)
def test_kl_shampoo_of_the_transpose(seed, shape):
    grads = draw(seed, (5, *shape))
    _compare.assert_within(
        preconditioned(np.swapaxes(grads, 1, 2)),
        preconditioned(grads).T,
        WHITENED_ROUNDING,
    )


@few
@hypothesis.given(seed=seeds, shape=whitened_shapes)
def test_kl_shampoo_of_reordered_neurons(seed, shape):
    grads = draw(seed, (5, *shape))
    rng = np.random.default_rng(seed)
    rows, columns = (rng.permutation(d) for d in shape)
    _compare.assert_within(
        preconditioned(grads[:, rows][:, :, columns]),
        preconditioned(grads)[rows][:, columns],
        WHITENED_ROUNDING,
    )
