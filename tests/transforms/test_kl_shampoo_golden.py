"""`kl_shampoo` against recordings of the published code, and of FusionOpt's Shampoo.

The recordings hold one parameter of three axes as well, `W_3d`. The published code
gives such a tensor three coupled factors; in this library a leaf of three axes is a
stack of matrices (or, with a `Rule`, one matrix with joined axes), which is another
preconditioner. The float64 reference follows that recording, see
`tests/references/test_references.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare, _golden, _replay

MATRICES = ("W_square", "W_tall", "W_wide")


def matrices_of(golden):
    """The recording without the tensor of three axes."""
    keep = lambda tree: {name: tree[name] for name in MATRICES}  # noqa: E731
    return golden._replace(
        params0=keep(golden.params0),
        grads=keep(golden.grads),
        params=keep(golden.params),
    )


def optimizer(golden, **settings):
    """The published optimiser: EMA momentum, and decay after the update."""
    h = golden.hyper
    decay = h["betas"][1] if h["shampoo_beta"] < 0 else h["shampoo_beta"]
    kl = fo.kl_shampoo(
        optax.chain(optax.scale(1 - h["betas"][0]), optax.trace(h["betas"][0])),
        b2=decay,
        sides="both",
        update_every=h["precondition_frequency"],
        stagger=False,
        first_step="skip",
        first_basis="eigh",
        eps=h["eps"],
        damping=h["eps"] if h.get("using_damping") else 0.0,
        scaling="absolute",
        max_inverse_root=4000.0 if h.get("using_clamping", True) else None,
        **settings,
    )
    normalise = optax.identity()
    if h.get("normalize_grads"):
        normalise = optax.stateless_with_tree_map(
            lambda u, _: u / (1e-30 + jnp.sqrt(jnp.mean(u * u)))
        )
    rate, weight_decay = h["lr"], h["weight_decay"]
    return optax.chain(
        kl,
        normalise,
        # (p - lr u)(1 - lr wd) = p - lr ((1 - lr wd) u + wd p).
        optax.scale(1 - rate * weight_decay),
        optax.add_decayed_weights(weight_decay),
        optax.scale(-rate),
    )


def paths(golden, inject=MATRICES, **settings):
    """Weights after every step, from the recorded first bases of `inject` on.

    The first gradient starts the statistics and moves nothing. The eigenvectors of its
    rank-deficient products are arbitrary in their null space, where those of the
    recording are put in their place.
    """
    tx = optimizer(golden, **settings)
    params = {name: jnp.asarray(p) for name, p in golden.params0.items()}
    first = {name: jnp.asarray(stack[0]) for name, stack in golden.grads.items()}
    _, (state, *others) = jax.jit(tx.update)(first, tx.init(params), params)
    recorded = {
        field: {name: jnp.asarray(golden.state[key][name])[None] for name in inject}
        for field, key in (
            ("input_bases", "initial_Q0"),
            ("output_bases", "initial_Q1"),
        )
    }
    state = state._replace(
        input_bases=state.input_bases | recorded["input_bases"],
        output_bases=state.output_bases | recorded["output_bases"],
    )
    rest = {name: stack[1:] for name, stack in golden.grads.items()}
    stacks, last, _ = _replay.run(
        tx, golden.params0, rest, start=lambda _: (state, *others)
    )
    whole = {
        name: np.concatenate([golden.params0[name][None], stack])
        for name, stack in stacks.items()
    }
    return whole, last[0]


@pytest.mark.parametrize(
    "case",
    [
        "kl_shampoo_f1",
        "kl_shampoo_f1_damping",
        "kl_shampoo_f1_noclamp_normgrads",
        "kl_shampoo_f3",
        "kl_shampoo_f3_clamped",
        "kl_shampoo_f3_damping",
    ],
)
def test_follows_the_published_code(case):
    golden = matrices_of(_golden.load(case))
    stacks, state = paths(golden)
    _compare.assert_follows(golden, stacks)
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
    golden = matrices_of(_golden.load("kl_shampoo_f3"))
    only = lambda tree: {"W_square": tree["W_square"]}  # noqa: E731
    golden = golden._replace(
        params0=only(golden.params0),
        grads=only(golden.grads),
        params=only(golden.params),
    )
    stacks, _ = paths(golden, inject=())
    # The first product of a square gradient has full rank: its eigenvectors are unique.
    _compare.assert_follows(golden, stacks)


def test_follows_the_published_bf16_code_loosely():
    golden = matrices_of(_golden.load("kl_shampoo_f3_bf16"))
    stacks, _ = paths(golden)
    # The recording rounds every product to eight bits, this library none of them; the
    # float64 reference is 0.0045 away as well. The weights travel 0.5.
    _compare.assert_follows(golden, stacks, tolerance=0.01)


def test_follows_the_powers_of_fusion_opt():
    golden = _golden.load("fusion_shampoo-sf_period3")
    settings = golden.extra["defaults"] | golden.hyper
    tx = fo.kl_shampoo(
        optax.trace(settings["mu"]),
        statistics="gram",
        b2=settings["beta_k"],
        exponent=-0.25,
        damping=settings["shampoo_delta"],
        scaling="absolute",
        sides="both",
        update_every=settings["eigen_period"],
        stagger=False,
    )
    grads = {name: golden.grads[name] for name in golden.state["P_L"]}
    zeros = {name: np.zeros_like(stack[0]) for name, stack in grads.items()}
    _, state, _ = _replay.run(tx, zeros, grads)
    for key, powers in (("P_L", state.input_bases), ("P_R", state.output_bases)):
        for name, expected in golden.state[key].items():
            # Directions without gradients so far have the power (1e-4)^(-1/4) = 10, and
            # rounding at 1e-7 of the largest eigenvalue (near 20) turns into 1e-2 / 4
            # of that.
            _compare.assert_within(
                powers[name][0] / 10, expected / 10, 5e-3, f"{key} of {name}"
            )
