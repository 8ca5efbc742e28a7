r"""The diffusion of training: its noise levels, and the times that sampling keeps.

.. math::
    x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon

with the linear :math:`\beta` of the published DiT, over `TRAINING_STEPS` integer times.

Everything but `clean_prediction` is host arithmetic in float64 on a handful of numbers
per step. The loop casts the result once, to the type of its images, so no schedule is
recomputed, in lower precision, inside the compiled program.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fusionopt_jax import _checks

TRAINING_STEPS = 1000
"""Number of noise levels that the published DiT was trained on."""


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

    Four forms. `250` or `"250"` spreads that many times evenly from the first to the
    last. `"10,20,30"` cuts the times into equal sections and spreads a count over each.
    `"ddim50"` strides by an integer from time 0, so it never reaches the last time. The
    first and the third are different grids: 10 steps are 0, 111, ..., 999 in the first
    form and 0, 100, ..., 900 in the third. `"leading30"` is the default grid of
    diffusers: 30 multiples of 1000 // 30, from time 0. It is the third form where the
    count divides `steps`; where not, it stops early (at 957, not 986) and serves every
    count.

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
        >>> respace("leading3").tolist()
        [0, 333, 666]

    Source:
        Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models",
        section 4; the DDIM form after Song et al. 2021, appendix D.2; "leading" after
        Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed",
        table 2.
    """
    if isinstance(respacing, bool) or not isinstance(respacing, str | int):
        raise TypeError(
            "`respacing` must be a number of steps or a string such as '250' or "
            f"'ddim50', got {respacing!r}."
        )
    text = str(respacing).strip()
    if text.startswith("ddim"):
        return _strided(_count(text[len("ddim") :], text), steps)
    if text.startswith("leading"):
        count = _count(text[len("leading") :], text)
        _check_fits(count, steps, text)
        return np.arange(count, dtype=np.int64) * (steps // count)
    counts = [_count(part, text) for part in text.split(",")]
    size, extra = divmod(steps, len(counts))
    pieces = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (1 if section < extra else 0)
        _check_fits(count, length, text)
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Published code adds the stride up; the sum, not a product, decides how an
        # exact half rounds, and with it which weights a time sees.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        pieces.append(start + np.rint(offsets).astype(np.int64))
        start += length
    return np.concatenate(pieces)


def alpha_bars_at(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Signal fractions at the kept times, and at the kept time before each.

    Args:
        times: Rising integer times as `respace` gives them.

    Returns:
        :math:`\bar\alpha_k` and :math:`\bar\alpha_{k-1}`, float64 shaped as `times`;
        before the first time, 1: the clean image.

    Example:
        >>> bar, bar_before = alpha_bars_at(respace(3))
        >>> bool(bar_before[0] == 1.0), bool(bar_before[2] == bar[1])
        (True, True)
    """
    bar = linear_alpha_bars()[times]
    return bar, np.concatenate([[1.0], bar[:-1]])


def clean_prediction(x: Array, noise: Array, at: Any, clip: bool) -> Array:
    r"""The clean image that a noise prediction implies.

    :math:`\hat x_0 = (x - \sigma\,\epsilon_\theta)/\alpha`.

    Args:
        x: The noisy image.
        noise: The network's :math:`\epsilon_\theta`, shaped as `x`.
        at: Coefficients of the step, with :math:`\alpha=\sqrt{\bar\alpha}` and
            :math:`\sigma=\sqrt{1-\bar\alpha}` as `alpha` and `sigma`.
        clip: Whether to cut it to [-1, 1].

    Returns:
        An image shaped as `x`.

    Example:
        >>> from types import SimpleNamespace
        >>> at = SimpleNamespace(alpha=0.5, sigma=1.0)
        >>> clean_prediction(jnp.ones(2), jnp.array([0.25, 0.75]), at, clip=True)
        Array([1. , 0.5], dtype=float32)
    """
    clean = (x - at.sigma * noise) / at.alpha
    return jnp.clip(clean, -1.0, 1.0) if clip else clean


def _count(part: str, text: str) -> int:
    """A count of times out of a respacing text."""
    digits = part.strip()
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(
            "`respacing` must look like '250', '10,20,30', 'ddim50' or 'leading50', "
            f"got {text!r}."
        )
    return int(digits)


def _check_fits(count: int, length: int, text: str) -> None:
    """Require that there are as many times as are asked for."""
    if count > length:
        raise ValueError(
            f"`respacing` {text!r} asks for {count} of {length} times; ask for at "
            f"most {length}."
        )


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
