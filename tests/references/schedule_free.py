"""Schedule-Free: y = (1-b) z + b x;  z <- z - lr u(g(y));  x <- (1-c) x + c z.

c_t = w_t / sum w with w_t = (max lr so far)^power t^r.
"""

import numpy as np


class Averaging:
    """The weight c_t of each new point, and the scalars behind it."""

    def __init__(self, *, power=2.0, r=0.0, averaging_warmup=0):
        self.power, self.r, self.averaging_warmup = power, r, averaging_warmup
        self.count, self.lr_max, self.weight_sum = 0, 0.0, 0.0

    def next(self, lr):
        self.lr_max = max(self.lr_max, lr)
        self.count += 1
        if self.count <= self.averaging_warmup:
            return 1.0
        weight = self.count**self.r * self.lr_max**self.power
        self.weight_sum += weight
        return weight / self.weight_sum if self.weight_sum else 1.0


class Adam:
    """Adam's direction, each average with or without its bias correction."""

    def __init__(self, shape, *, beta1, beta2, eps, correct_first=True):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.correct_first = correct_first
        self.first, self.second = np.zeros(shape), np.zeros(shape)
        self.count = 0

    def direction(self, gradient):
        self.count += 1
        self.first = self.beta1 * self.first + (1 - self.beta1) * gradient
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient**2
        first = self.first
        if self.correct_first:
            first = first / (1 - self.beta1**self.count)
        second = self.second / (1 - self.beta2**self.count)
        return first / (np.sqrt(second) + self.eps)


def warmed_up(lr, warmup_steps):
    """The published learning rate: linear over the first steps, then constant."""
    return lambda t: lr * min(1.0, (t + 1) / warmup_steps)


def trajectory(
    param0,
    grads,
    direction,
    *,
    lr,
    beta,
    weight_decay=0.0,
    decay_at="y",
    power=2.0,
    r=0.0,
):
    """y, z and x after each step for ``direction(gradient)`` and a rate ``lr(t)``."""
    y = z = x = np.asarray(param0, np.float64)
    averaging = Averaging(power=power, r=r)
    ys, zs, xs = [], [], []
    for t, gradient in enumerate(np.asarray(grads, np.float64)):
        decayed = y if decay_at == "y" else z
        z = z - lr(t) * (direction(gradient) + weight_decay * decayed)
        c = averaging.next(lr(t))
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
        ys.append(y), zs.append(z), xs.append(x)
    return np.stack(ys), np.stack(zs), np.stack(xs), averaging
