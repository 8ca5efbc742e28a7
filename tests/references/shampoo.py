"""Plain Shampoo: L <- b L + (1-b) G G^T, R <- b R + (1-b) G^T G, update L^p M R^p."""

import numpy as np


def power(matrix, exponent, ridge=0.0):
    """A power of a positive semi-definite matrix plus ridge times the identity."""
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * (np.maximum(values, 0.0) + ridge) ** exponent) @ vectors.T


class Shampoo:
    """Two uncoupled factors whose powers are renewed every ``period`` steps."""

    def __init__(self, shape, *, decay, exponent=-0.25, ridge=1e-4, period=1):
        self.decay, self.exponent = decay, exponent
        self.ridge, self.period = ridge, period
        self.left = np.zeros((shape[0], shape[0]))
        self.right = np.zeros((shape[1], shape[1]))
        self.count = 0

    def learn(self, gradient):
        """Add one gradient; the first call and every period-th renew the powers."""
        b = self.decay
        self.left = b * self.left + (1 - b) * gradient @ gradient.T
        self.right = b * self.right + (1 - b) * gradient.T @ gradient
        if self.count % self.period == 0:
            self.power_left = power(self.left, self.exponent, self.ridge)
            self.power_right = power(self.right, self.exponent, self.ridge)
        self.count += 1

    def precondition(self, matrix):
        """Apply both powers."""
        return self.power_left @ matrix @ self.power_right
