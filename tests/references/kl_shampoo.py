"""KL-Shampoo: Kronecker factors estimated through each other's inverse.

For a matrix G (m, n) with S_a = Q_a diag(lam_a) Q_a^T, and S_b likewise:
S_a <- b S_a + (1-b) G S_b^-1 G^T / n;
lam_a <- b lam_a + (1-b) mean_cols((Q_a^T G Q_b)^2 / lam_b);
step: Q_a [(Q_a^T M Q_b) / sqrt(lam_a lam_b^T)] Q_b^T;
Q_a <- qr(S_a Q_a) every few steps. Tensors with more axes have one factor per axis.
"""

import numpy as np


def along(tensor, matrix, axis):
    """Multiply every fibre along one axis by a matrix."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)


def scaled(tensor, vector, axis):
    """Multiply every slice along one axis by a number of its own."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return tensor * vector.reshape(shape)


def gram(tensor, axis):
    """Sum of outer products of the fibres along one axis."""
    rows = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    return rows @ rows.T


def orthonormal(Y, Q):
    """Gram-Schmidt on the columns of Y; where one adds nothing, on that of Q, last."""
    largest = np.max(np.linalg.norm(Y, axis=0))
    basis = np.zeros_like(Q)

    def added(j, vector):
        for _ in range(2):
            vector = vector - basis @ (basis.T @ vector)
        length = np.linalg.norm(vector)
        # Far above the rounding of float64, far below what float32 can tell from zero.
        if length > 1e-10 * largest:
            basis[:, j] = vector / length
            return True
        return False

    spent = [j for j in range(len(Q)) if not added(j, Y[:, j])]
    largest = 1.0
    for j in spent:
        assert added(j, Q[:, j])
    return basis


class Factors:
    """The Kronecker factors of one parameter."""

    def __init__(self, gradient, *, decay, init_factor, bases=None):
        self.decay = decay
        self.axes = range(gradient.ndim)
        self.others = [gradient.size / d for d in gradient.shape]
        self.factors = [
            (1 - decay) * gram(gradient, i) / self.others[i] for i in self.axes
        ]
        if bases is None:
            # Largest eigenvalue first: the order that the power steps lead to.
            bases = [np.linalg.eigh(s)[1][:, ::-1] for s in self.factors]
        self.bases = [np.asarray(q, np.float64) for q in bases]
        self.values = [np.full(d, float(init_factor)) for d in gradient.shape]
        self.limits = [np.inf for _ in gradient.shape]

    def clamp(self, largest):
        """Bound 1/sqrt(lam) by max(10, min(dimension, largest)) from now on."""
        self.limits = [max(10.0, min(len(v), largest)) for v in self.values]

    def precondition(self, tensor, eps):
        """Divide by sqrt(lam_a lam_b) in the eigenbases; eps damps the quotient."""
        for i in self.axes:
            tensor = along(tensor, self.bases[i].T, i)
        scale = np.ones_like(tensor)
        for i in self.axes:
            scale = scaled(scale, self.values[i] ** -0.5, i)
        tensor = tensor * scale / (1 + scale * eps)
        for i in self.axes:
            tensor = along(tensor, self.bases[i], i)
        return tensor

    def _whitened(self, gradient, keep, values):
        """Project every axis but one on its eigenbasis and divide by sqrt(lam)."""
        for i in self.axes:
            if i != keep:
                gradient = along(gradient, self.bases[i].T, i)
                gradient = scaled(gradient, values[i] ** -0.5, i)
        return gradient

    def learn(self, gradient, damping=0.0):
        """One update of factors and eigenvalues from a raw gradient.

        The published code treats the axes of a matrix simultaneously, and those of a
        tensor of three axes last first, with the eigenvalues renewed so far; where the
        last axis meets the first, it still uses those of the beginning.
        """
        b = self.decay
        old = list(self.values)
        means = [np.mean(1 / v) for v in old]
        total = damping * np.prod(means)
        tensor = len(old) == 3
        for i in reversed(self.axes):
            for_factor, for_values = list(old), list(old)
            if tensor and i == 1:
                for_values[2] = self.values[2]
            if tensor and i == 0:
                for_factor[1] = for_values[1] = self.values[1]
            white = self._whitened(gradient, i, for_factor)
            self.factors[i] = (
                b * self.factors[i] + (1 - b) * gram(white, i) / self.others[i]
            )
            white = self._whitened(gradient, i, for_values)
            white = along(white, self.bases[i].T, i)
            squares = np.moveaxis(white, i, 0).reshape(len(old[i]), -1) ** 2
            fresh = b * old[i] + (1 - b) * (squares.mean(axis=1) + total / means[i])
            # 1/sqrt(lam) at most the limit is lam at least 1/limit^2.
            self.values[i] = np.maximum(fresh, self.limits[i] ** -2.0)

    def refresh(self):
        """One power step and one orthonormalisation of every basis."""
        self.bases = [
            orthonormal(s @ q, q) for s, q in zip(self.factors, self.bases, strict=True)
        ]


def trajectory(
    param0,
    grads,
    *,
    lr,
    betas,
    shampoo_beta,
    eps,
    weight_decay,
    precondition_frequency,
    init_factor,
    normalize_grads=False,
    using_damping=False,
    using_clamping=True,
    bases=None,
    largest=4000.0,
):
    """Weights after each step, and the factors at the end.

    The first gradient only starts the statistics. Decay follows the update.
    """
    grads = np.asarray(grads, np.float64)
    param = np.asarray(param0, np.float64)
    decay = betas[1] if shampoo_beta < 0 else shampoo_beta
    factors = Factors(grads[0], decay=decay, init_factor=init_factor, bases=bases)
    if using_clamping:
        factors.clamp(largest)
    average = np.zeros_like(param)
    params = [param]
    for count, gradient in enumerate(grads[1:], start=1):
        average = betas[0] * average + (1 - betas[0]) * gradient
        update = factors.precondition(average, eps)
        factors.learn(gradient, damping=eps if using_damping else 0.0)
        if count % precondition_frequency == 0:
            factors.refresh()
        if normalize_grads:
            update = update / (1e-30 + np.sqrt(np.mean(update**2)))
        param = (param - lr * update) * (1 - lr * weight_decay)
        params.append(param)
    return np.stack(params), factors
