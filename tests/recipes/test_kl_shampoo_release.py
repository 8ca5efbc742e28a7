"""`kl_shampoo_torch` against recordings of the published code.

The recordings hold one parameter of three axes as well, `W_3d`. The published code
gives such a tensor three coupled factors; in this library a leaf of three axes is a
stack of matrices (or, with a `Rule`, one matrix with joined axes), which is another
preconditioner: as a stack it ends 0.29 from the recorded weights, which travel 0.51.
The float64 reference follows that recording, see `tests/references/test_references.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare, _golden, _replay

MATRICES = ("W_square", "W_tall", "W_wide")


def only(golden, names=MATRICES):
    """A recording without the other parameters."""
    keep = lambda tree: {name: tree[name] for name in names}  # noqa: E731
    return golden._replace(
        params0=keep(golden.params0),
        grads=keep(golden.grads),
        params=keep(golden.params),
    )


def with_recorded_bases(tx, golden):
    """`tx` with the recorded bases in place of those that its first update ends with.

    The eigenvectors of the first, rank-deficient products are arbitrary in their null
    space. The recording is followed only from its own.
    """
    bases = {
        field: {name: jnp.asarray(golden.state[key][name])[None] for name in MATRICES}
        for field, key in (
            ("input_bases", "initial_Q0"),
            ("output_bases", "initial_Q1"),
        )
    }

    def update(updates, state, params=None, **extra_args):
        updates, new = tx.update(updates, state, params)
        injected = {
            field: {
                name: jnp.where(state.count == 0, recorded, getattr(new, field)[name])
                for name, recorded in of_side.items()
            }
            for field, of_side in bases.items()
        }
        return updates, new._replace(**injected)

    return optax.GradientTransformation(tx.init, update)


def run(golden, *, recorded_bases=True):
    """Weights after every step of the published optimiser, and the last state."""
    settings = {k: v for k, v in golden.hyper.items() if k != "cast_dtype"}
    if settings["shampoo_beta"] < 0:
        settings["shampoo_beta"] = None
    tx = fo.kl_shampoo_torch(**settings | {"betas": tuple(settings["betas"])})
    if recorded_bases:
        tx = with_recorded_bases(tx, golden)
    paths, state, _ = _replay.run(tx, golden.params0, golden.grads)
    return paths, state


@pytest.mark.parametrize(
    "case",
    [
        "kl_shampoo_f1",
        pytest.param("kl_shampoo_f1_damping", marks=pytest.mark.exhaustive),
        pytest.param("kl_shampoo_f1_noclamp_normgrads", marks=pytest.mark.exhaustive),
        "kl_shampoo_f3",
        pytest.param("kl_shampoo_f3_clamped", marks=pytest.mark.exhaustive),
        pytest.param("kl_shampoo_f3_damping", marks=pytest.mark.exhaustive),
    ],
)
def test_follows_the_published_code(case):
    golden = only(_golden.load(case))
    paths, state = run(golden)
    _compare.assert_follows(golden, paths)
    for side, values in enumerate((state.input_eigenvalues, state.output_eigenvalues)):
        for name in MATRICES:
            # Measured up to 2e-6 after twelve float32 updates.
            recorded = golden.state[f"eigen_sqrt_inv{side}"][name]
            _compare.assert_within(
                np.asarray(values[name][0], np.float64) ** -0.5 / recorded,
                np.ones_like(recorded),
                1e-5,
                f"eigenvalues {side} of {name}",
            )


def test_square_matrices_need_no_recorded_basis():
    golden = only(_golden.load("kl_shampoo_f3"), ["W_square"])
    paths, _ = run(golden, recorded_bases=False)
    # The first product of a square gradient has full rank: its eigenvectors are unique.
    _compare.assert_follows(golden, paths)


def test_follows_the_published_bf16_code_loosely():
    golden = only(_golden.load("kl_shampoo_f3_bf16"))
    paths, _ = run(golden)
    # The recording rounds every product to eight bits, this library none of them; the
    # float64 reference is 0.0045 away as well. The weights travel 0.5.
    _compare.assert_follows(golden, paths, tolerance=0.01)


def test_first_step_moves_nothing_and_starts_the_statistics(rng):
    params = {"w": jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)}
    tx = fo.kl_shampoo_torch(0.1)
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state, params)
    assert not np.asarray(updates["w"]).any()
    assert not np.asarray(new.average["w"]).any()
    assert np.asarray(new.input_factors["w"]).any()
    assert np.asarray(tx.update(params, new, params)[0]["w"]).any()


def test_rotations_do_not_matter(rng):
    """The bases start from eigenvectors, which turn with the gradients."""
    grads = rng.normal(size=(7, 6, 6)) * np.linspace(0.3, 2.0, 6)[:, None]
    left, right = (np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2))
    params = jnp.zeros((6, 6))
    tx = fo.kl_shampoo_torch(1.0, weight_decay=0.0, precondition_frequency=2)

    @jax.jit
    def changes(grads):
        step = lambda state, g: tx.update(g, state, params)[::-1]  # noqa: E731
        return jax.lax.scan(step, tx.init(params), grads)[1]

    plain = np.asarray(changes(jnp.asarray(grads, jnp.float32)), np.float64)
    turned = changes(jnp.asarray(left @ grads @ right, jnp.float32))
    # The rotated gradients are rounded anew; entries up to 10.
    _compare.assert_within(turned, left @ plain @ right, 3e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]` must lie in"),
        ({"shampoo_beta": -1}, "`shampoo_beta` must lie in"),
        ({"precondition_frequency": 0}, "`precondition_frequency` must be at least 1"),
        ({"init_factor": 0.0}, "`init_factor` must lie in"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        fo.kl_shampoo_torch(**settings)


def test_parameters_are_needed():
    tx = fo.kl_shampoo_torch()
    grads = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="decays the parameters"):
        tx.update(grads, tx.init(grads))
