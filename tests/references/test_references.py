"""The NumPy references replayed against recordings of the published PyTorch code.

These tests involve no code of the package: they show that what the package is later
compared with is right.
"""

import numpy as np
import pytest

from tests import _compare, _golden
from tests.references import (
    fusion_torch,
    kl_shampoo,
    mona,
    muon,
    newton_schulz,
    normuon,
    polyak,
    schedule_free,
    shampoo,
)

NS_PARTS, NS_FLOOR = _golden.newton_schulz()


@pytest.mark.parametrize("case", list(NS_PARTS["in"]))
def test_newton_schulz(case):
    matrix = NS_PARTS["in"][case]
    # The recording of the float64 run resolves every operation: only the order of sums
    # differs, which rank-deficient inputs amplify to 2e-14.
    out = newton_schulz.orthogonalize(matrix)
    _compare.assert_within(out, NS_PARTS["out64"][case], 1e-12, case)
    one = newton_schulz.orthogonalize(matrix, steps=1)
    # One float32 step of numbers of order one.
    _compare.assert_within(one, NS_PARTS["out32_steps1"][case], 1e-6, case)
    tolerance = max(10 * NS_FLOOR[case], 1e-6)
    _compare.assert_within(out, NS_PARTS["out32_steps5"][case], tolerance, case)
    if case in NS_PARTS["fusion32"]:
        fusion = newton_schulz.orthogonalize(matrix, eps=1e-12)
        _compare.assert_within(fusion, NS_PARTS["fusion32"][case], tolerance, case)


def test_newton_schulz_acts_on_singular_values_alone(rng):
    matrix = rng.normal(size=(7, 5))
    # Two float64 routes to the same matrix.
    _compare.assert_within(
        newton_schulz.orthogonalize(matrix),
        newton_schulz.on_singular_values(matrix),
        1e-12,
    )


@pytest.mark.parametrize("case", ["muon_fp32", "muon_fp32_missing_grad"])
def test_muon(case):
    golden = _golden.load(case)
    grads, _ = _golden.without_missing(golden)
    runs = {}
    for name, param in golden.params0.items():
        runs[name], average = muon.trajectory(param, grads[name], **golden.hyper)
        _compare.assert_within(
            average, golden.state["momentum_buffer"][name], 1e-6, name
        )
    _compare.assert_follows(golden, runs)


@pytest.mark.parametrize("case", ["normuon_fp32", "normuon_fp32_missing_grad"])
def test_normuon(case):
    golden = _golden.load(case)
    grads, present = _golden.without_missing(golden)
    runs = {}
    for name, param in golden.params0.items():
        runs[name], average, moment = normuon.trajectory(
            param, grads[name], present=present, **golden.hyper
        )
        state = golden.state
        _compare.assert_within(average, state["momentum_buffer"][name], 1e-6, name)
        _compare.assert_within(
            moment, state["second_momentum_buffer"][name], 1e-6, name
        )
    _compare.assert_follows(golden, runs)


class UncorrectedRootMeanSquare:
    """g / (sqrt(v) + eps) with an average that is not bias-corrected."""

    def __init__(self, beta2, eps):
        self.beta2, self.eps, self.second = beta2, eps, 0.0

    def direction(self, gradient):
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient**2
        return gradient / (np.sqrt(self.second) + self.eps)


@pytest.mark.parametrize(
    "case",
    [
        "sf_adamw_reference",
        "sf_adamw_reference_decay_at_z_inner",
        "sf_adamw_fast",
        "sf_adamw_fast_noforeach",
        "sf_adamw_paper",
        "sf_sgd_reference",
        "sf_sgd_fast",
    ],
)
def test_schedule_free(case):
    golden = _golden.load(case)
    h = golden.hyper
    lr = schedule_free.warmed_up(h["lr"], h["warmup_steps"])
    scheduled = lr
    if case == "sf_adamw_paper":
        # The code of the paper moves Adam's bias correction into the learning rate.
        def scheduled(t):
            return lr(t) * np.sqrt(1 - h["betas"][1] ** (t + 1))

    runs = {}
    for name, param in golden.params0.items():
        beta = h["momentum"] if "sgd" in case else h["betas"][0]
        if "sgd" in case:
            direction = np.asarray
        elif case == "sf_adamw_paper":
            direction = UncorrectedRootMeanSquare(h["betas"][1], h["eps"]).direction
        else:
            direction = schedule_free.Adam(
                param.shape,
                beta1=h.get("inner_momentum", 0.0),
                beta2=h["betas"][1],
                eps=h["eps"],
            ).direction
        runs[name], z, x, averaging = schedule_free.trajectory(
            param,
            golden.grads[name],
            direction,
            lr=scheduled,
            beta=beta,
            weight_decay=h["weight_decay"],
            decay_at="z" if h.get("decay_at_z") else "y",
            power=h["weight_lr_power"],
            r=h["r"],
        )
        for key, sequence in (("z", z), ("x", x)):
            tolerance = golden.tolerance(f"state/{key}/{name}")
            _compare.assert_within(
                sequence[-1], golden.state[key][name], tolerance, f"{key} {name}"
            )
    _compare.assert_follows(golden, runs)
    # The recorded scalars are float64: the same arithmetic.
    assert averaging.weight_sum == pytest.approx(
        golden.scalars["weight_sum"][-1], rel=1e-12
    )
    assert averaging.lr_max == pytest.approx(golden.scalars["lr_max"][-1], rel=1e-12)


SF_PLUS = [
    "sf_plus_pbeta0.0",
    "sf_plus_pbeta0.0_zero_f",
    "sf_plus_pbeta0.9",
    "sf_plus_pbeta0.9_noanneal_r2",
]


@pytest.mark.parametrize("case", SF_PLUS)
def test_schedule_free_plus(case):
    golden = _golden.load(case)
    history, averaging = polyak.schedule_free_plus(
        golden.params0,
        golden.grads,
        golden.scalars["loss"],
        corrected_twice=True,
        **golden.hyper,
    )
    _compare.assert_follows(golden, _compare.stacked(history["y"]))
    # The norm behind these is a float32 sum in the recording.
    np.testing.assert_allclose(
        history["lr"], golden.scalars["scheduled_lr"], rtol=1e-5, atol=1e-8
    )
    assert averaging.weight_sum == pytest.approx(
        golden.scalars["weight_sum"][-1], rel=1e-4
    )


def kl_settings(golden):
    """The recorded arguments that have a meaning in arithmetic."""
    return {k: v for k, v in golden.hyper.items() if k != "cast_dtype"}


def recorded_bases(golden, name):
    """The recorded eigenbases of the first statistics.

    The first statistics of a matrix that is not square have a null space, in which the
    eigenvectors a library returns are arbitrary; the recording is followed only from
    its own.
    """
    axes = golden.params0[name].ndim
    return [golden.state[f"initial_Q{axis}"][name] for axis in range(axes)]


@pytest.mark.parametrize(
    "case",
    [
        "kl_shampoo_f1",
        "kl_shampoo_f1_damping",
        "kl_shampoo_f1_noclamp_normgrads",
        "kl_shampoo_f3",
        "kl_shampoo_f3_damping",
        "kl_shampoo_f3_clamped",
    ],
)
def test_kl_shampoo(case):
    golden = _golden.load(case)
    runs = {}
    for name, param in golden.params0.items():
        runs[name], factors = kl_shampoo.trajectory(
            param,
            golden.grads[name],
            bases=recorded_bases(golden, name),
            **kl_settings(golden),
        )
        for axis in range(param.ndim):
            # Relative to the largest entry; measured up to 2e-6 after twelve float32
            # updates of a factor.
            factor = factors.factors[axis]
            _compare.assert_within(
                factor / np.abs(factor).max(),
                golden.state[f"GG{axis}"][name] / np.abs(factor).max(),
                1e-5,
                f"factor {axis} of {name}",
            )
            _compare.assert_within(
                factors.values[axis] ** -0.5
                / golden.state[f"eigen_sqrt_inv{axis}"][name],
                np.ones(param.shape[axis]),
                1e-5,
                f"eigenvalues {axis} of {name}",
            )
    _compare.assert_follows(golden, runs)


@pytest.mark.parametrize("name", ["W_square", "W_3d"])
def test_kl_shampoo_from_its_own_eigenvectors(name):
    golden = _golden.load("kl_shampoo_f3")
    path, _ = kl_shampoo.trajectory(
        golden.params0[name], golden.grads[name], **kl_settings(golden)
    )
    # The first factors have full rank here, so nothing has to be taken from the
    # recording, whose noise without that was 3.3e-7.
    _compare.assert_within(path, golden.params[name], 3.3e-6, name)


def test_kl_shampoo_in_bf16():
    golden = _golden.load("kl_shampoo_f3_bf16")
    runs = {
        name: kl_shampoo.trajectory(
            param,
            golden.grads[name],
            bases=recorded_bases(golden, name),
            **kl_settings(golden),
        )[0]
        for name, param in golden.params0.items()
    }
    # The recording rounds every product to eight bits; 2^-8 of steps that add up to a
    # travel of 0.5 is 0.002, and the factors carry the rounding on. Measured 0.0045.
    _compare.assert_follows(golden, runs, tolerance=0.01)


FUSION = [
    "fusion_ns5",
    "fusion_ns5-mona",
    "fusion_ns5-normuon-sf",
    "fusion_ns5-normuon-sf-mona",
    "fusion_full_period3",
    "fusion_shampoo-sf_period3",
    "fusion_ns5-normuon-sf_evenloss_warmup",
    "fusion_ns5-normuon-sf_extremeloss",
    "fusion_ns5-normuon-sf_noloss",
]


def fusion_run(golden):
    """The reference on a recorded run of FusionOpt."""
    losses = [
        float(loss) if used else None
        for loss, used in zip(
            golden.scalars["loss"], golden.scalars["loss_used"], strict=True
        )
    ]
    hyper = golden.extra["defaults"] | golden.hyper
    del hyper["hot_dtype"]
    return fusion_torch.trajectory(
        golden.params0,
        golden.grads,
        losses,
        components=set(golden.extra["components"]),
        scalar_wd=golden.extra["scalar_wd"],
        spectral_wd=golden.extra["spectral_wd"],
        **hyper,
    )


@pytest.mark.parametrize("case", FUSION)
def test_fusion_torch(case):
    golden = _golden.load(case)
    history, ratios, fast = fusion_run(golden)
    _compare.assert_follows(golden, _compare.stacked(history))
    # The recorded averages are float32.
    np.testing.assert_allclose(ratios, golden.scalars["gamma_ratio"], rtol=2e-6)
    for name, z in golden.state.get("z", {}).items():
        tolerance = golden.tolerance(f"state/z/{name}")
        _compare.assert_within(fast[name], z, tolerance, f"z of {name}")


@pytest.mark.parametrize(
    "case", ["fusion_ns5-normuon-sf_bf16", "fusion_full_period3_bf16"]
)
def test_fusion_torch_in_bf16(case):
    golden = _golden.load(case)
    history, _, _ = fusion_run(golden)
    # Newton-Schulz in bf16 is 0.02 to 0.05 away from float32 per step (measured on the
    # recordings of ns5), the steps are up to 0.06 long and the errors of twelve of them
    # add like a random walk. The weights travel 0.7. Measured 0.015.
    _compare.assert_follows(golden, _compare.stacked(history), tolerance=0.03)


@pytest.mark.parametrize("alpha", [0.2, -5.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_mona_needs_one_buffer(rng, alpha, weighted):
    grads = rng.normal(size=(10, 3, 4))
    beta = 0.9
    accelerated, accelerations = mona.trajectory(
        grads, alpha=alpha, beta=beta, weighted=weighted
    )
    weight = 1 - beta if weighted else 1.0
    average = np.zeros_like(grads[0])
    for t, gradient in enumerate(grads):
        # A = w (g - EMA of the earlier gradients): the two forms agree to rounding.
        _compare.assert_within(
            accelerations[t], weight * (gradient - average), 1e-13, f"step {t}"
        )
        _compare.assert_within(
            accelerated[t],
            gradient + alpha * weight * (gradient - average),
            1e-13 * (1 + abs(alpha)),
            f"step {t}",
        )
        average = beta * average + (1 - beta) * gradient


def test_shampoo_powers_whiten(rng):
    factor = rng.normal(size=(5, 20))
    factor = factor @ factor.T
    root = shampoo.power(factor, -0.25)
    # Four inverse quarter powers undo the matrix, in float64.
    _compare.assert_within(np.linalg.matrix_power(root, 4) @ factor, np.eye(5), 1e-10)
