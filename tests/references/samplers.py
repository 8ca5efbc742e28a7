"""Diffusion and flow samplers in float64, step by step from their papers.

Nothing is precomputed: each step forms its conditional Gaussian by Bayes' rule or its
exponential integral from the formula, so that a wrong coefficient table can't hide.
"""

import itertools
import math

import numpy as np


def alpha_bars(steps=1000, first=1e-4, last=2e-2):
    """Running product of 1 - beta, by a plain loop."""
    product, out = 1.0, []
    for index in range(steps):
        product *= 1.0 - (first + (last - first) * index / (steps - 1))
        out.append(product)
    return np.array(out)


def toy_network(image, time, label):
    """The closed-form model of the recordings: noise, and variance logits."""
    level = np.interp(time, np.arange(1000), np.sqrt(1.0 - alpha_bars()))
    noise = level * image + 0.1 * np.sin(3.0 * image + label)
    return noise, np.cos(2.0 * image)


def guided(network, label, null, scale, channels):
    """Guidance of the first channels of a network; the rest as given the label."""

    def predict(image, time):
        noise, logits = network(image, time, label)
        free, _ = network(image, time, null)
        out = noise.copy()
        out[..., :channels] = (free + scale * (noise - free))[..., :channels]
        return out, logits

    return predict


def posterior(bar, previous_bar):
    """Weights of (clean, noisy) in the mean of q(x_{t-1} | x_t, x_0), and its variance.

    Two Gaussians in x_{t-1} are multiplied: the prior given x_0, of mean
    sqrt(previous_bar) x_0 and variance 1 - previous_bar, and the likelihood of x_t.
    """
    alpha = bar / previous_bar
    prior_precision = 1.0 / (1.0 - previous_bar)
    step_precision = alpha / (1.0 - alpha)
    variance = 1.0 / (prior_precision + step_precision)
    clean = variance * prior_precision * math.sqrt(previous_bar)
    noisy = variance * math.sqrt(alpha) / (1.0 - alpha)
    return clean, noisy, variance


def ancestral(predict, image, noises, times, variance, clip):
    """DDPM over `times` (rising); returns the last image and every clean prediction."""
    bars = alpha_bars()[times]
    cleans = []
    for step, k in enumerate(reversed(range(len(times)))):
        noise, logits = predict(image, float(times[k]))
        clean = (image - math.sqrt(1.0 - bars[k]) * noise) / math.sqrt(bars[k])
        if clip:
            clean = np.clip(clean, -1.0, 1.0)
        cleans.append(clean)
        if k == 0:
            # The posterior has collapsed onto the clean image.
            image = clean
            continue
        weight_clean, weight_noisy, small = posterior(bars[k], bars[k - 1])
        large = 1.0 - bars[k] / bars[k - 1]
        if variance == "learned_range":
            share = (logits + 1.0) / 2.0
            value = np.exp(share * np.log(large) + (1.0 - share) * np.log(small))
        else:
            value = small if variance == "fixed_small" else large
        mean = weight_clean * clean + weight_noisy * image
        image = mean + np.sqrt(value) * noises[step]
    return image, np.stack(cleans)


def implicit(predict, image, noises, times, eta, clip):
    """DDIM over `times` (rising); returns the last image and every clean prediction."""
    bars = alpha_bars()[times]
    cleans = []
    for step, k in enumerate(reversed(range(len(times)))):
        bar, previous = bars[k], bars[k - 1] if k else 1.0
        noise, _ = predict(image, float(times[k]))
        clean = (image - math.sqrt(1.0 - bar) * noise) / math.sqrt(bar)
        if clip:
            clean = np.clip(clean, -1.0, 1.0)
            noise = (image - math.sqrt(bar) * clean) / math.sqrt(1.0 - bar)
        cleans.append(clean)
        variance = eta**2 * (1.0 - previous) / (1.0 - bar) * (1.0 - bar / previous)
        image = math.sqrt(previous) * clean
        image = image + math.sqrt(max(1.0 - previous - variance, 0.0)) * noise
        image = image + math.sqrt(variance) * noises[step]
    return image, np.stack(cleans)


def multistep(predict, image, times):
    """DPM-Solver++(2M) over `times` (falling, fractional), algorithm 2 of the paper."""
    logs = np.log(alpha_bars())

    def levels(time):
        """Signal, noise level and half log signal-to-noise ratio at a time."""
        bar = math.exp(np.interp(time, np.arange(1000), logs))
        signal, level = math.sqrt(bar), math.sqrt(1.0 - bar)
        return signal, level, math.log(signal / level)

    previous_clean = previous_step = None
    steps = len(times) - 1
    for index in range(steps):
        signal, level, here = levels(times[index])
        next_signal, next_level, there = levels(times[index + 1])
        noise, _ = predict(image, float(times[index]))
        clean = (image - level * noise) / signal
        step = there - here
        target = clean
        lower_order = index == 0 or (index == steps - 1 and steps < 15)
        if not lower_order:
            ratio = previous_step / step
            target = (1 + 1 / (2 * ratio)) * clean - previous_clean / (2 * ratio)
        image = next_level / level * image
        image = image - next_signal * (math.exp(-step) - 1.0) * target
        previous_clean, previous_step = clean, step
    return image


def gaussian_velocity(image, time, deviation):
    """Velocity of the flow from N(0, deviation^2) images to unit noise."""
    variance = (1.0 - time) ** 2 * deviation**2 + time**2
    return image * (time - (1.0 - time) * deviation**2) / variance


def gaussian_noise(image, bar, deviation):
    """The noise that is expected in a noisy image of an N(0, deviation^2) image."""
    return image * (1.0 - bar) ** 0.5 / (bar * deviation**2 + 1.0 - bar)


def linear_velocity(image, time, deviation, mean=0.0):
    """Velocity image - noise of the line from unit noise (0) to N(mean, dev^2) (1).

    The expected image and the expected noise, given their mixture, are those of
    Gaussian regression.
    """
    variance = time**2 * deviation**2 + (1.0 - time) ** 2
    surprise = (image - time * mean) / variance
    expected_image = mean + time * deviation**2 * surprise
    expected_noise = (1.0 - time) * surprise
    return expected_image - expected_noise


def heun_flow(velocity, image, times, correct_last=True):
    """Heun along a velocity over `times`; returns every state."""
    states = []
    for index, (here, there) in enumerate(itertools.pairwise(times)):
        slope = velocity(image, here)
        guess = image + (there - here) * slope
        if correct_last or index < len(times) - 2:
            slope = (slope + velocity(guess, there)) / 2.0
        image = image + (there - here) * slope
        states.append(image)
    return states


def sit_diffusion(form, norm, time):
    """The diffusion w of SiT's stochastic sampler, by SiT's names."""
    return {
        "constant": norm,
        "sigma": norm * (1.0 - time),
        "linear": norm * (1.0 - time),
        "decreasing": 0.25 * (norm * math.cos(math.pi * time) + 1.0) ** 2,
    }[form]


def sit_stochastic(velocity, image, noises, sampler):
    """SiT's stochastic sampler in its own direction of time; returns every state.

    `noises` has one for each noisy step. Velocity and score are asked for apart, as in
    the paper's equations.
    """

    def score(x, t):
        return (t * velocity(x, t) - x) / (1.0 - t)

    def drift(x, t):
        return velocity(x, t) + diffusion(t) * score(x, t)

    def diffusion(t):
        return sit_diffusion(sampler.diffusion, sampler.norm, t)

    size = 0.0 if sampler.last_step is None else sampler.last_step_size
    times = np.linspace(0.0, 1.0 - size, len(noises) + 1)
    states, x = [], image
    for here, there, noise in zip(times[:-1], times[1:], noises, strict=True):
        dt = there - here
        wiener = math.sqrt(dt) * noise
        if sampler.solver == "euler":
            x = x + drift(x, here) * dt + math.sqrt(2.0 * diffusion(here)) * wiener
        else:
            x = x + math.sqrt(2.0 * diffusion(here)) * wiener
            first = drift(x, here)
            second = drift(x + dt * first, there)
            x = x + dt * (first + second) / 2.0
        states.append(x)
    last = times[-1]
    if sampler.last_step == "mean":
        states.append(x + drift(x, last) * size)
    elif sampler.last_step == "euler":
        states.append(x + velocity(x, last) * size)
    elif sampler.last_step == "tweedie":
        states.append(x / last + (1.0 - last) ** 2 / last * score(x, last))
    return states
