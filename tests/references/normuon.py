"""NorMuon: neuron-wise normalisation of the orthogonalised momentum.

v <- b2 v + (1-b2) mean_in(O^2);  N = O / (sqrt(v) + eps);
N <- N ||O||_F / (||N||_F + eps).
"""

import numpy as np

from tests.references.muon import nesterov
from tests.references.newton_schulz import orthogonalize


def normalize(update, second_moment, *, beta2=0.95, eps=1e-10, restore_norm=True):
    """One normalisation of (out, in) matrices: the new update and the new moment."""
    update = np.asarray(update, np.float64)
    mean_square = np.mean(update**2, axis=-1, keepdims=True)
    second_moment = beta2 * second_moment + (1 - beta2) * mean_square
    normalized = update / (np.sqrt(second_moment) + eps)
    if restore_norm:
        before = np.sqrt(np.sum(update**2, axis=(-2, -1), keepdims=True))
        after = np.sqrt(np.sum(normalized**2, axis=(-2, -1), keepdims=True))
        normalized = normalized * before / (after + eps)
    return normalized, second_moment


def trajectory(param0, grads, *, lr, momentum, weight_decay, beta2, present=None):
    """Weights after each step, last momentum, last second moment.

    Where ``present`` is 0 the gradient was missing: the published code steps with a
    zero gradient and leaves the decay out.
    """
    param = np.asarray(param0, np.float64)
    average = np.zeros_like(param)
    second_moment = np.zeros((*param.shape[:-1], 1))
    present = np.ones(len(grads)) if present is None else present
    scale = np.sqrt(max(1.0, param.shape[-2] / param.shape[-1]))
    params = []
    for gradient, here in zip(np.asarray(grads, np.float64), present, strict=True):
        average, mixed = nesterov(average, gradient, momentum)
        update, second_moment = normalize(
            orthogonalize(mixed), second_moment, beta2=beta2
        )
        param = (1 - lr * weight_decay * here) * param - lr * scale * update
        params.append(param)
    return np.stack(params), average, second_moment
