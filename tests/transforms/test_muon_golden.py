"""Muon from Optax pieces around `ns5`, against the published optimiser."""

import numpy as np
import optax
import pytest

import fusionopt_jax as fo
from tests import _compare, _golden, _replay

ROUTING = fo.Routing(
    [
        fo.Rule("W_stack", axes=fo.MatrixAxes(reduction_axis=-1, output_axis=-2)),
        fo.Rule("W_conv", axes=fo.MatrixAxes(reduction_axis=(1, 2, 3), output_axis=0)),
    ],
    layout="out_in",
    min_dim=1,
)


def published_conv_scale(kernel_shape):
    """The factor between the published scale of a convolution kernel and out/in.

    The published code orthogonalises (out, in kh kw) but takes the aspect ratio off the
    last two axes of the kernel as it lies, kh / kw. `ns5` uses the matrix it
    orthogonalised; this factor puts the published number in its place.
    """
    out, *rest = kernel_shape
    ours = max(1.0, out / np.prod(rest))
    theirs = max(1.0, kernel_shape[-2] / kernel_shape[-1])
    return float(np.sqrt(theirs / ours))


def muon(golden, **ns5_settings):
    """EMA momentum with Nesterov look-ahead, ns5, decoupled decay."""
    h = golden.hyper
    conv = published_conv_scale(golden.params0["W_conv"].shape)
    return optax.chain(
        # (1-b) g into t <- b t + g makes t the average m, and Nesterov's g + b t the
        # mix (1-b) g + b m.
        optax.scale(1 - h["momentum"]),
        optax.trace(h["momentum"], nesterov=True),
        fo.ns5(routing=ROUTING, scale="aspect", **ns5_settings),
        optax.stateless(lambda u, _: {**u, "W_conv": conv * u["W_conv"]}),
        optax.add_decayed_weights(h["weight_decay"]),
        optax.scale(-h["lr"]),
    )


@pytest.mark.parametrize("case", ["muon_fp32", "muon_fp32_missing_grad"])
def test_follows_the_published_code(case):
    golden = _golden.load(case)
    # A missing gradient counts as zero there: momentum and decay still move the
    # weights.
    grads, _ = _golden.without_missing(golden)
    paths, state, _ = _replay.run(muon(golden, hot_dtype="fp32"), golden.params0, grads)
    _compare.assert_follows(golden, paths)
    trace = optax.tree.get(state, "trace")
    for name, expected in golden.state["momentum_buffer"].items():
        _compare.assert_within(trace[name], expected, 1e-6, f"momentum of {name}")


def test_follows_the_published_bf16_code_loosely():
    golden = _golden.load("muon_bf16")
    paths, _, _ = _replay.run(
        muon(golden, hot_dtype="bf16"), golden.params0, golden.grads
    )
    # Two orders of the same roundings to eight bits: the recording ends up to 0.0072
    # from the recording in float32, in the kernel, which travels 0.28; this run up to
    # 0.0092, depending on what the compiler fuses. Together they are 0.0095 to 0.0164
    # apart.
    _compare.assert_follows(golden, paths, tolerance=0.02)
