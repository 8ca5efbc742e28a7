"""NorMuon from Optax pieces around `ns5` and `normuon`, against the published code."""

import jax
import jax.numpy as jnp
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare, _golden, _replay

ROUTING = fo.Routing(
    [fo.Rule("W_stack", axes=fo.MatrixAxes(reduction_axis=-1, output_axis=-2))],
    layout="out_in",
    min_dim=1,
)


def decay_where_present(weight_decay):
    """Decoupled decay, left out on steps where `present` is 0."""

    def update(updates, state, params, *, present, **_):
        decay = lambda u, p: u + (weight_decay * present).astype(p.dtype) * p  # noqa: E731
        return jax.tree.map(decay, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def optimizer(hyper, **ns5_settings):
    """EMA momentum with Nesterov look-ahead, ns5, normuon, decay."""
    return optax.chain(
        optax.scale(1 - hyper["momentum"]),
        optax.trace(hyper["momentum"], nesterov=True),
        # The published code scales by the aspect ratio after the normalisation. A
        # factor in front of it comes out again, since the norm is restored.
        fo.ns5(routing=ROUTING, scale="aspect", **ns5_settings),
        fo.normuon(routing=ROUTING, b2=hyper["beta2"]),
        decay_where_present(hyper["weight_decay"]),
        optax.scale(-hyper["lr"]),
    )


@pytest.mark.parametrize("case", ["normuon_fp32", "normuon_fp32_missing_grad"])
def test_follows_the_published_code(case):
    golden = _golden.load(case)
    # A missing gradient counts as zero there, and that step has no decay.
    grads, present = _golden.without_missing(golden)
    paths, state, _ = _replay.run(
        optimizer(golden.hyper, hot_dtype="fp32"),
        golden.params0,
        grads,
        present=present,
    )
    _compare.assert_follows(golden, paths)
    moments = optax.tree.get(state, "second_moment")
    for name, expected in golden.state["second_momentum_buffer"].items():
        # Ours is of the update after the aspect factor.
        out, inputs = golden.params0[name].shape[-2:]
        ours = moments[name].reshape(expected.shape) / max(1.0, out / inputs)
        _compare.assert_within(ours, expected, 1e-6, f"moment of {name}")


def test_follows_the_published_bf16_code_loosely():
    golden = _golden.load("normuon_bf16")
    paths, _, _ = _replay.run(
        optimizer(golden.hyper, hot_dtype="bf16"),
        golden.params0,
        golden.grads,
        dtype=jnp.bfloat16,
        present=[1.0] * _golden.STEPS,
    )
    # Weights near 0.5 lie 2^-8 / 2 = 0.002 apart in bf16; momentum and update are
    # rounded as well, and each of twelve steps of 0.02 can fall on the other side. The
    # recording ends 0.026 from the exact trajectory, which travels 0.13 to 0.19; this
    # run 0.031 from the recording.
    _compare.assert_follows(golden, paths, tolerance=0.04)
