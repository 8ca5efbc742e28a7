r"""The noise schedule of training, and the time grids of sampling.

Everything here is host arithmetic in float64 on a handful of numbers per step. A
sampler casts the result once, to the type of its images, and feeds it to its loop, so
no schedule is recomputed, in lower precision, inside the compiled program.

Two families share the module:

- *Diffusion.* :math:`x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon`
  with the linear :math:`\beta` of the published DiT, over `TRAINING_STEPS` integer
  times.
- *Rectified flow.* :math:`x_t = (1-t)\,x_0 + t\,\epsilon` for :math:`t\in[0,1]`; the
  network sees `FLOW_TIME_SCALE` times :math:`t`, so that one time embedding serves both
  families.
"""

from typing import Literal, TypeAlias

import numpy as np

from fusionopt_jax import _checks

TRAINING_STEPS = 1000
"""Number of noise levels that the published DiT was trained on."""

FLOW_TIME_SCALE = 1000.0
"""What a flow time in [0, 1] is multiplied by before the network sees it."""

Variance: TypeAlias = Literal["learned_range", "fixed_small", "fixed_large"]
"""Where ancestral sampling takes the variance of a step from."""

Spacing: TypeAlias = Literal["time", "logsnr"]
"""Whether DPM-Solver++ steps evenly in time or in the log signal-to-noise ratio."""


def linear_alpha_bars(steps: int = TRAINING_STEPS) -> np.ndarray:
    r"""Cumulative signal fractions of the linear noise schedule.

    :math:`\bar\alpha_t = \prod_{i\le t}(1-\beta_i)` with :math:`\beta` running linearly
    from :math:`0.1/T` to :math:`20/T`, where :math:`T` is `steps`: from 1e-4 to 2e-2 at
    the default.

    Args:
        steps: Number of noise levels, at least 2.

    Returns:
        Float64 of shape [steps], falling from almost 1 to almost 0.

    Raises:
        ValueError: If `steps` is below 2.

    Example:
        >>> linear_alpha_bars()[0].round(6)
        np.float64(0.9999)

    Source:
        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", section 4. The
        scaling with the number of steps is that of the published code of Dhariwal &
        Nichol 2021.
    """
    _checks.check_integer("steps", steps, low=2)
    scale = TRAINING_STEPS / steps
    betas = np.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=np.float64)
    return np.cumprod(1.0 - betas)


def respace(respacing: str | int, steps: int = TRAINING_STEPS) -> np.ndarray:
    """The times that a shortened diffusion visits, in rising order.

    Three forms. `250` or `"250"` spreads that many times evenly from the first to the
    last. `"10,20,30"` cuts the times into equal sections and spreads a count over each.
    `"ddim50"` strides by an integer from time 0, so it never reaches the last time. The
    first and the third are different grids: 10 steps are 0, 111, ..., 999 in the first
    form and 0, 100, ..., 900 in the third.

    Args:
        respacing: The grid as above, at most `steps` times.
        steps: Number of noise levels the network was trained on.

    Returns:
        Int64 of shape [times], strictly rising.

    Raises:
        TypeError: If `respacing` is neither a string nor an integer.
        ValueError: If it can't be read, or asks for more times than there are, or if no
            integer stride gives the asked number of DDIM times.

    Example:
        >>> respace("5").tolist(), respace("ddim5").tolist()
        ([0, 250, 500, 749, 999], [0, 200, 400, 600, 800])

    Source:
        Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models",
        section 4; the DDIM form after Song et al. 2021, appendix D.2.
    """
    if isinstance(respacing, bool) or not isinstance(respacing, str | int):
        raise TypeError(
            "`respacing` must be a number of steps or a string such as '250' or "
            f"'ddim50', got {respacing!r}."
        )
    text = str(respacing).strip()
    if text.startswith("ddim"):
        return _strided(_count(text[len("ddim") :], text), steps)
    counts = [_count(part, text) for part in text.split(",")]
    size, extra = divmod(steps, len(counts))
    pieces = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (1 if section < extra else 0)
        if count > length:
            raise ValueError(
                f"`respacing` {text!r} asks for {count} of {length} times; ask for at "
                f"most {length}."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Published code adds the stride up; the sum, not a product, decides how an
        # exact half rounds, and with it which weights a time sees.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        pieces.append(start + np.rint(offsets).astype(np.int64))
        start += length
    return np.concatenate(pieces)


def flow_times(steps: int, shift: float = 1.0) -> np.ndarray:
    r"""The time grid of a rectified flow, from noise to image.

    :math:`t_i = s\,u_i/(1+(s-1)\,u_i)` with :math:`u_i = 1-i/N`, where :math:`N` is
    `steps` and :math:`s` is `shift`.

    Args:
        steps: Number of steps, at least 1.
        shift: Positive; above 1 it spends more steps near the noise, which larger
            images need. The default leaves the grid even.

    Returns:
        Float64 of shape [steps + 1], from 1 to 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> flow_times(4).tolist(), flow_times(2, shift=3.0).tolist()
        ([1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.75, 0.0])

    Source:
        Esser et al. 2024, "Scaling Rectified Flow Transformers", equation 23.
    """
    _checks.check_integer("steps", steps, low=1)
    _checks.check_positive("shift", shift)
    even = 1.0 - np.arange(steps + 1) / steps
    return shift * even / (1.0 + (shift - 1.0) * even)


def multistep_times(steps: int, spacing: Spacing) -> np.ndarray:
    r"""The fractional times of DPM-Solver++(2M), from noise to image.

    Args:
        steps: Number of steps, at least 1.
        spacing: `"time"` divides the times 999 to 0 evenly, the usual choice for
            latents; `"logsnr"` divides :math:`\lambda =
            \log(\sqrt{\bar\alpha}/\sqrt{1-\bar\alpha})` evenly.

    Returns:
        Float64 of shape [steps + 1], from 999 to 0. Between two integer times,
        :math:`\log\bar\alpha` is linear.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> multistep_times(3, "time").tolist()
        [999.0, 666.0, 333.0, 0.0]

    Source:
        Lu et al. 2022, "DPM-Solver", section 3.4 and appendix D.4.
    """
    _checks.check_integer("steps", steps, low=1)
    _checks.check_choice("spacing", spacing, ("time", "logsnr"))
    last = TRAINING_STEPS - 1.0
    if spacing == "time":
        return np.linspace(last, 0.0, steps + 1)
    logs = np.log(linear_alpha_bars())
    ends = half_log_snr(logs[[-1, 0]])
    wanted = np.linspace(ends[0], ends[1], steps + 1)
    # log(abar) from lambda: abar = sigmoid(2 lambda); `interp` wants rising abscissae.
    wanted_logs = -np.logaddexp(0.0, -2.0 * wanted)
    times = np.interp(-wanted_logs, -logs, np.arange(TRAINING_STEPS, dtype=np.float64))
    times[0], times[-1] = last, 0.0
    return times


def _count(part: str, text: str) -> int:
    """A count of times out of a respacing text."""
    digits = part.strip()
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(
            f"`respacing` must look like '250', '10,20,30' or 'ddim50', got {text!r}."
        )
    return int(digits)


def _strided(count: int, steps: int) -> np.ndarray:
    """`count` times at an integer stride from zero."""
    for stride in range(1, steps + 1):
        times = np.arange(0, steps, stride, dtype=np.int64)
        if len(times) == count:
            return times
    raise ValueError(
        f"`respacing` 'ddim{count}' needs an integer stride that gives {count} of "
        f"{steps} times, and there is none; '{count}' without 'ddim' spaces any number."
    )


def half_log_snr(log_bars: np.ndarray) -> np.ndarray:
    r"""Half the log signal-to-noise ratio, from the logarithms of signal fractions.

    :math:`\lambda = \log\sqrt{\bar\alpha} - \log\sqrt{1-\bar\alpha}`.

    Args:
        log_bars: :math:`\log\bar\alpha`, negative, of any shape.

    Returns:
        Float64 of the same shape.

    Example:
        >>> half_log_snr(np.log(np.array([0.5]))).round(6)
        array([0.])

    Source:
        Lu et al. 2022, "DPM-Solver", section 2.
    """
    return 0.5 * (log_bars - np.log(-np.expm1(log_bars)))
