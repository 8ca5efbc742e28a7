"""Prodigy's estimate of a step size, written from the paper (arXiv 2306.06101).

r <- b r + (1-b) d^p <g, x0 - x>      s <- b s + (1-b) d^p g      d <- max(d, r / |s|_1)

with p = 2, and p = 1 for the weight of D-Adaptation (arXiv 2301.07733).
"""

import numpy as np


def trajectory(gradient, start, direction, *, first, decay, power, steps):
    """Estimates and parameters of every step along `-d direction(g)`."""
    x0 = x = np.asarray(start, np.float64)
    r, s, d = 0.0, np.zeros_like(x0), first
    estimates, path = [], []
    for _ in range(steps):
        g = gradient(x)
        r = decay * r + (1 - decay) * d**power * np.sum(g * (x0 - x))
        s = decay * s + (1 - decay) * d**power * g
        x = x - d * direction(g)
        d = max(d, r / np.abs(s).sum())
        estimates.append(d)
        path.append(x)
    return np.array(estimates), np.array(path)
