"""Time grids and coefficients against the papers' formulas and the recordings."""

import math
import pathlib

import numpy as np
import pytest

from fusionopt_jax.dit.sampling import ddim, ddpm, dpm_solver, flow, schedules
from tests._compare import assert_within
from tests.references import samplers as reference

RECORDED = pathlib.Path(__file__).parents[2] / "data" / "sampler_toy.npz"

# Float64 arithmetic of numbers of order one; a few roundings.
ROUNDING = 1e-12


def test_linear_alpha_bars_are_the_running_product():
    assert_within(schedules.linear_alpha_bars(), reference.alpha_bars(), ROUNDING)


def test_fewer_noise_levels_keep_the_total_noise():
    # Betas scale with 1/T; what remains differs by the second order of beta.
    long, short = schedules.linear_alpha_bars(1000), schedules.linear_alpha_bars(250)
    assert math.log(short[-1]) == pytest.approx(math.log(long[-1]), rel=0.05)


@pytest.mark.parametrize(
    ("respacing", "tag"),
    [("10", "ddpm10"), (10, "ddim10_spacing10"), ("ddim10", "ddim10")],
)
def test_respacing_is_that_of_the_recordings(respacing, tag):
    recorded = np.load(RECORDED)[f"{tag}/timestep_map"]
    np.testing.assert_array_equal(schedules.respace(respacing), recorded)


@pytest.mark.parametrize("count", [1, 2, 4, 7, 11, 50, 250, 999, 1000])
def test_even_respacing_runs_from_first_to_last(count):
    times = schedules.respace(count)
    assert len(times) == count
    assert times[0] == 0
    assert count == 1 or times[-1] == 999
    assert count == 1 or set(np.diff(times)) <= {
        math.floor(999 / (count - 1)),
        math.ceil(999 / (count - 1)),
    }


def test_250_and_ddim50_are_different_kinds_of_grid():
    assert schedules.respace("250").tolist()[:4] == [0, 4, 8, 12]
    assert schedules.respace("250")[-1] == 999
    assert schedules.respace("ddim50").tolist() == list(range(0, 1000, 20))


@pytest.mark.parametrize("count", [1, 3, 30, 50, 700, 1000])
def test_the_leading_grid_is_multiples_of_a_stride(count):
    stride = math.floor(1000 / count)
    expected = [stride * index for index in range(count)]
    assert schedules.respace(f"leading{count}").tolist() == expected
    if 1000 % count == 0:
        assert schedules.respace(f"ddim{count}").tolist() == expected


def test_sections_get_their_own_counts():
    times = schedules.respace("2,3,4")
    assert len(times) == 9
    # 1000 = 334 + 333 + 333: the first sections take what is left over.
    assert [
        int(np.sum((times >= a) & (times < b)))
        for a, b in [(0, 334), (334, 667), (667, 1000)]
    ] == [2, 3, 4]


@pytest.mark.parametrize(
    ("respacing", "error", "words"),
    [
        ("ddim3x", ValueError, "must look like"),
        ("leading", ValueError, "must look like"),
        ("leading1001", ValueError, "1001 of 1000"),
        ("", ValueError, "must look like"),
        ("0", ValueError, "must look like"),
        ("1001", ValueError, "1001 of 1000"),
        ("500,1,1", ValueError, "500 of 334"),
        ("ddim999", ValueError, "integer stride"),
        (2.5, TypeError, "respacing"),
        (True, TypeError, "respacing"),
    ],
)
def test_a_respacing_that_cannot_be_met_is_an_error(respacing, error, words):
    with pytest.raises(error, match=words):
        schedules.respace(respacing)


def test_shift_moves_flow_times_towards_the_noise():
    even, shifted = flow.flow_times(8), flow.flow_times(8, shift=3.0)
    assert shifted[0] == 1.0
    assert shifted[-1] == 0.0
    assert np.all(shifted[1:-1] > even[1:-1])
    # t' = s t / (1 + (s - 1) t) scales the odds t / (1 - t) by s.
    odds = shifted[1:-1] / (1 - shifted[1:-1])
    assert_within(odds, 3.0 * even[1:-1] / (1 - even[1:-1]), ROUNDING)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (5, 0.0), (5, -1.0)])
def test_flow_grids_out_of_range_are_errors(steps, shift):
    with pytest.raises(ValueError, match="must"):
        flow.flow_times(steps, shift)


@pytest.mark.parametrize("respacing", ["10", "ddim10", "1000"])
def test_ancestral_coefficients_are_the_product_of_two_gaussians(respacing):
    times = schedules.respace(respacing)
    bars = reference.alpha_bars()[times]
    table = ddpm.coefficients(times, "learned_range")
    for step, k in enumerate(range(len(times) - 1, 0, -1)):
        clean, noisy, variance = reference.posterior(bars[k], bars[k - 1])
        got = [
            table.mean_clean[step],
            table.mean_image[step],
            math.exp(table.log_variance_low[step]),
            math.exp(table.log_variance_high[step]),
        ]
        # 1 - bar cancels near t = 0, where bar is 0.9999: four digits of sixteen.
        assert_within(got, [clean, noisy, variance, 1 - bars[k] / bars[k - 1]], 1e-10)
    assert table.active.tolist() == [1.0] * (len(times) - 1) + [0.0]


def test_one_ancestral_step_has_finite_coefficients():
    for values in ddpm.coefficients(np.array([0]), "fixed_small"):
        assert np.isfinite(values).all()


def test_ddim_noise_at_eta_one_is_that_of_ddpm():
    times = schedules.respace(20)
    implicit = ddim.coefficients(times, eta=1.0)
    ancestral = ddpm.coefficients(times, "fixed_small")
    expected = np.exp(0.5 * ancestral.log_variance_low) * ancestral.active
    assert_within(implicit.deviation, expected, ROUNDING)


def test_logsnr_spacing_has_equal_steps():
    times = dpm_solver.solver_times(12, "logsnr")
    logs = np.interp(times, np.arange(1000), np.log(reference.alpha_bars()))
    steps = np.diff(dpm_solver.half_log_snr(logs))
    assert (times[0], times[-1]) == (999.0, 0.0)
    assert_within(steps, np.full(12, steps.mean()), 1e-9)


def test_multistep_without_extrapolation_is_ddim():
    # The first-order solver in half log SNR and DDIM are the same map (Lu et al. 2022,
    # section 4); DDIM at eta 0 on integer times is written independently above.
    times = schedules.respace("ddim10")
    solver = dpm_solver.coefficients(times[::-1].astype(np.float64))
    implicit = ddim.coefficients(times, eta=0.0)
    image, noise = 0.7, -0.3
    for step in range(len(times) - 1):
        clean = (image - solver.sigma[step] * noise) / solver.alpha[step]
        one = solver.decay[step] * image + solver.gain[step] * clean
        other = implicit.next_clean[step] * clean + implicit.next_noise[step] * noise
        assert one == pytest.approx(other, abs=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: ddim.coefficients(t, eta=1.5), "eta"),
        (lambda t: ddpm.coefficients(t, "learned"), "learned_range"),
        (lambda _: dpm_solver.solver_times(5, "snr"), "logsnr"),
        (lambda _: schedules.linear_alpha_bars(1), "steps"),
    ],
)
def test_settings_out_of_range_are_errors(unchecked_types, make, words):
    with pytest.raises(ValueError, match=words):
        make(schedules.respace(10))
