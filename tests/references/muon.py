"""Muon: orthogonalised Nesterov momentum with decoupled weight decay.

m <- b m + (1-b) g;  u = (1-b) g + b m;
W <- (1 - lr wd) W - lr sqrt(max(1, out/in)) NS(u).
"""

import numpy as np

from tests.references.newton_schulz import orthogonalize


def nesterov(average, gradient, momentum):
    """One momentum update and the look-ahead mix that is orthogonalised."""
    average = momentum * average + (1 - momentum) * gradient
    return average, (1 - momentum) * gradient + momentum * average


def trajectory(param0, grads, *, lr, momentum, weight_decay, aspect=None):
    """Weights after each step, and the last momentum.

    A kernel of rank four is one (out, rest) matrix. ``aspect`` replaces out/in in the
    scale: the published code reads it off the last two axes of whatever it was given.
    """
    param = np.asarray(param0, np.float64)
    average = np.zeros_like(param)
    if aspect is None:
        aspect = param.shape[-2] / param.shape[-1]
    shape = (len(param), -1) if param.ndim == 4 else param.shape
    params = []
    for gradient in np.asarray(grads, np.float64):
        average, mixed = nesterov(average, gradient, momentum)
        update = orthogonalize(mixed.reshape(shape)).reshape(param.shape)
        update = update * np.sqrt(max(1.0, aspect))
        param = (1 - lr * weight_decay) * param - lr * update
        params.append(param)
    return np.stack(params), average
