"""MONA: acceleration from an average of gradient differences, in its two-buffer form.

A_t = beta A_{t-1} + w (g_t - g_{t-1}),  g_0 = 0,  w = (1 - beta) if weighted else 1;
the gradient handed on is g_t + alpha A_t.
"""

import numpy as np


def trajectory(grads, *, alpha, beta, weighted):
    """Accelerated gradients after each step, and the accelerations."""
    grads = np.asarray(grads, np.float64)
    acceleration = np.zeros_like(grads[0])
    previous = np.zeros_like(grads[0])
    weight = 1 - beta if weighted else 1.0
    out, accelerations = [], []
    for gradient in grads:
        acceleration = beta * acceleration + weight * (gradient - previous)
        previous = gradient
        out.append(gradient + alpha * acceleration)
        accelerations.append(acceleration)
    return np.stack(out), np.stack(accelerations)
