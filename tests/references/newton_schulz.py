"""Newton-Schulz orthogonalisation: X <- a X + (b A + c A A) X with A = X X^T."""

import numpy as np

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices, steps=5, coefficients=QUINTIC, eps=1e-7):
    """Iterate on every matrix of a stack, from X / (||X||_F + eps)."""
    matrices = np.asarray(matrices, np.float64)
    if matrices.ndim > 2:
        return np.stack([orthogonalize(m, steps, coefficients, eps) for m in matrices])
    if matrices.shape[0] > matrices.shape[1]:
        return orthogonalize(matrices.T, steps, coefficients, eps).T
    a, b, c = coefficients
    x = matrices / (np.linalg.norm(matrices) + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def on_singular_values(matrix, steps=5, coefficients=QUINTIC, eps=1e-7):
    """The same map as a polynomial of each singular value."""
    a, b, c = coefficients
    left, values, right = np.linalg.svd(
        np.asarray(matrix, np.float64), full_matrices=False
    )
    values = values / (np.linalg.norm(values) + eps)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


def polar_factor(matrix):
    """The exactly orthogonal factor that the iteration approximates."""
    left, _, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return left @ right
