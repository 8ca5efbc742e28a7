"""The first release of the PyTorch FusionOpt, written from its description.

Spectral leaves: m <- mu m + g + a A with A <- bn A + (g - g_prev); Shampoo with powers
-1/4; NS5; sqrt(max(1, out/in)); rows divided by the root of an average of their sum of
squares. All other leaves: Adam. One step size lr min(1, t/warmup) clamp(f / mean|g|).
"""

import numpy as np

from tests.references.newton_schulz import orthogonalize
from tests.references.schedule_free import Adam
from tests.references.shampoo import Shampoo


class SharedRatio:
    """clamp(EMA(loss) / EMA(mean |g|)), and exactly 1 where no loss was given."""

    def __init__(self, decay, lowest, highest):
        self.decay, self.lowest, self.highest = decay, lowest, highest
        self.loss = self.norm = None

    def _average(self, old, new):
        return new if old is None else self.decay * old + (1 - self.decay) * new

    def next(self, grads, loss):
        total = sum(np.abs(g).sum() for g in grads.values())
        count = sum(g.size for g in grads.values())
        self.norm = self._average(self.norm, total / count)
        if loss is None:
            return 1.0
        self.loss = self._average(self.loss, loss)
        return float(np.clip(self.loss / self.norm, self.lowest, self.highest))


class _Spectral:
    def __init__(self, shape, components, hyper):
        self.components, self.hyper = components, hyper
        self.momentum, self.acceleration, self.previous = (
            np.zeros(shape) for _ in range(3)
        )
        self.rows = np.zeros((shape[0], 1))
        self.shampoo = Shampoo(
            shape,
            decay=hyper["beta_k"],
            ridge=hyper["shampoo_delta"],
            period=hyper["eigen_period"],
        )

    def direction(self, gradient):
        h, on = self.hyper, self.components
        accelerated = gradient
        if "mona" in on:
            self.acceleration = h["beta_n"] * self.acceleration + (
                gradient - self.previous
            )
            self.previous = gradient
            accelerated = gradient + h["mona_alpha"] * self.acceleration
        self.momentum = h["mu"] * self.momentum + accelerated
        update = self.momentum
        if "shampoo" in on:
            self.shampoo.learn(gradient)
            update = self.shampoo.precondition(update)
        if "ns5" in on:
            update = orthogonalize(update, eps=1e-12)
            update = update * np.sqrt(max(1.0, update.shape[0] / update.shape[1]))
        if "normuon" in on:
            squares = np.sum(update**2, axis=1, keepdims=True)
            self.rows = h["beta_r"] * self.rows + (1 - h["beta_r"]) * squares
            update = update / (np.sqrt(self.rows) + h["eps"])
        return update


def trajectory(
    params0,
    grads,
    losses,
    *,
    components,
    lr,
    scalar_wd,
    spectral_wd,
    min_spectral_dim=4,
    warmup_steps=0,
    **hyper,
):
    """What the parameters hold after each step, the ratios, and z where there is one.

    ``losses`` holds None where no loss was given.
    """
    params = {n: np.asarray(p, np.float64) for n, p in params0.items()}
    spectral = {
        n for n, p in params.items() if p.ndim == 2 and min(p.shape) >= min_spectral_dim
    }
    workers = {
        n: _Spectral(p.shape, components, hyper)
        if n in spectral
        else Adam(p.shape, beta1=hyper["beta1"], beta2=hyper["beta2"], eps=hyper["eps"])
        for n, p in params.items()
    }
    ratio = SharedRatio(hyper["beta_p"], hyper["gamma_min"], hyper["gamma_max"])
    fast, average = dict(params), dict(params)
    history, ratios = [], []
    for t, loss in enumerate(losses):
        g = {n: np.asarray(stack[t], np.float64) for n, stack in grads.items()}
        ratios.append(ratio.next(g, loss))
        warm = min(1.0, (t + 1) / warmup_steps) if warmup_steps else 1.0
        step = lr * warm * ratios[-1]
        for n, gradient in g.items():
            decay = spectral_wd if n in spectral else scalar_wd
            update = workers[n].direction(gradient)
            fast[n] = (1 - step * decay) * fast[n] - step * update
            if "sf" in components:
                average[n] = average[n] + (fast[n] - average[n]) / (t + 1)
                params[n] = (1 - hyper["beta"]) * fast[n] + hyper["beta"] * average[n]
            else:
                params[n] = fast[n]
        history.append(dict(params))
    return history, np.array(ratios), fast
