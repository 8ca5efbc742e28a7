r"""Newton–Schulz orthogonalisation of a stack of matrices, plain and in Gram form.

One stack of matrices in, one out: no trees, no state, no Optax. Capital letters are the
papers' symbols. The formulas are those of `(..., m, n)` stacks with :math:`m \le n`,
where the Gram matrix :math:`XX^\top` is the small one; where m > n, :math:`X^\top`
takes the place of :math:`X` without being written down.

The quintic step (Jordan et al., *Muon*, 2024) maps each singular value :math:`\sigma`
of :math:`X` to :math:`a\sigma + b\sigma^3 + c\sigma^5`:

.. math::
    R = XX^\top, \qquad X \leftarrow (aI + bR + cR^2)\,X .

Since every such step multiplies :math:`X` from the left by a polynomial in the first
:math:`R`, the steps can be taken on the :math:`m \times m` matrices alone (Gram form):

.. math::
    Z = bR + cR^2, \qquad Q \leftarrow (aI + Z)\,Q, \qquad
    R \leftarrow (aI + Z)\,R\,(aI + Z), \qquad X_k = Q X_0 .

Nor do there have to be steps: `gram_polynomial` has one polynomial :math:`Q = q(R)`
that takes fewer products, and for fp16 two with a restart from :math:`X` between them.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusionopt_jax._matrices.gram_polynomial import (
    GRAM_MINIMAX,
    GRAM_MINIMAX_AOL,
    LARGEST_FACTOR,
    GramMinimax,
    evaluate,
    evaluate_apart,
)
from fusionopt_jax._matrices.norm import frobenius_norm
from fusionopt_jax._matrices.platform import PLATFORMS, Platform, by_platform
from fusionopt_jax._matrices.products import HotDtype, Products, tall
from fusionopt_jax._types import Number

Method: TypeAlias = Literal["auto", "plain", "gram"]
Preconditioner: TypeAlias = Literal["frobenius", "aol"]
CoefficientTable: TypeAlias = tuple[tuple[float, float, float], ...]

METHODS: tuple[Method, ...] = ("auto", "plain", "gram")
PRECONDITIONERS: tuple[Preconditioner, ...] = ("frobenius", "aol")

COEFFICIENTS: dict[str, CoefficientTable | GramMinimax] = {
    # Jordan et al., Muon, 2024: steepest slope at zero for a band of about [0.7, 1.2].
    "quintic": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al., arXiv 2505.16932: minimax per step, with a 2 % safety factor.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "gram_minimax": GRAM_MINIMAX,
}

# Polar Express wants singular values at most 1 after rounding, so its input is
# divided by 1.02 of the norm (arXiv 2505.16932, its reference code).
_SAFETY = {"quintic": 1.0, "polar_express": 1.02, "gram_minimax": 1.0}

# The Gram form restarts from X after at most this many steps, for the rounding error of
# R grows with each step taken on R alone. In half precision 3 and 2 are ten times as
# near to an SVD as 2 and 3.
_GRAM_STEPS = {"fp32": 5, "bf16": 3, "fp16": 3, "fp16_safe": 3}


def newton_schulz(
    G: Float[Array, "*batch m n"],
    table: CoefficientTable | GramMinimax,
    *,
    eps: Number = 1e-7,
    safety: float = 1.0,
    preconditioner: Preconditioner = "frobenius",
    method: Method = "auto",
    hot_dtype: HotDtype = "fp32",
    platforms: tuple[Platform, ...] = PLATFORMS,
) -> Float[Array, "*batch m n"]:
    """Each matrix of an `(..., m, n)` stack with its singular values near 1.

    The norm is taken in fp32 before anything is cast: in fp16 the sum of squares would
    leave the range. Zero matrices give zero.

    Args:
        G: A stack of matrices, of any floating dtype.
        table: `(a, b, c)` of each step; or polynomials of the Gram matrix, for which
            `method` isn't `"plain"`, and which in bf16 have no bound.
        eps: Added to the norm.
        safety: Factor on the norm; what Polar Express needs beyond 1.
        preconditioner: `"frobenius"`, or `"aol"` to scale rows by almost-orthogonal
            Lipschitz bounds first (arXiv 2512.04632), which saves a step.
        method: `"plain"`, `"gram"`, or `"auto"` for the one with fewer operations.
        hot_dtype: The dtype of the iterations.
        platforms: Those that the program may be compiled for, see `by_platform`.

    Returns:
        A stack shaped like `G`, in fp32.
    """

    def setting(platform: Platform) -> tuple[HotDtype, bool]:
        dtype = resolve_hot_dtype(hot_dtype, platform)
        if hot_dtype == "auto" and dtype == "bf16" and isinstance(table, GramMinimax):
            dtype = "fp32"
        return dtype, platform == "cpu" and dtype != "fp32"

    def iterated(alike: tuple[Platform, ...], G: Array) -> Array:
        dtype, simulated = setting(alike[0])
        return _iterated(
            G,
            eps,
            table=table,
            safety=safety,
            preconditioner=preconditioner,
            method=method,
            hot_dtype=dtype,
            simulated=simulated,
        )

    return by_platform(iterated, setting, G, platforms=platforms)


# Of the versions for several platforms one is used: traced once for each shape.
@functools.partial(
    jax.jit,
    static_argnames=(
        *("table", "safety", "preconditioner", "method", "hot_dtype", "simulated"),
    ),
    inline=True,
)
def _iterated(
    G: Float[Array, "*batch m n"],
    eps: Number,
    *,
    table: CoefficientTable | GramMinimax,
    safety: float,
    preconditioner: Preconditioner,
    method: Method,
    hot_dtype: HotDtype,
    simulated: bool,
) -> Float[Array, "*batch m n"]:
    """`newton_schulz` in a definite dtype, or in fp32 that simulates it."""
    if method == "auto":
        m, n = sorted(G.shape[-2:])
        method = cheaper_method(m, n, table, hot_dtype)
    largest = _largest_operand(table, hot_dtype)
    dot = Products.fitting(hot_dtype, largest, simulated=simulated)

    X = G.astype(jnp.float32)
    norm = frobenius_norm(X) * safety + eps
    X = X / jnp.where(norm > 0, norm, 1)
    R = None
    if preconditioner == "aol":
        # The bounds need the Gram matrix; scaled, it serves the first step as well.
        R = dot.gram(X * dot.unit)
        scale = _aol_scale(R) / safety
        X = X * scale.mT if tall(X) else scale * X
        R = scale * R * scale.mT
    X = (X * dot.unit).astype(dot.storage)
    if isinstance(table, GramMinimax):
        X = _polynomials(X, R, table, dot, whole=hot_dtype == "fp32")
    elif method == "plain":
        X = _plain_steps(X, R, table, dot)
    else:
        for segment in gram_segments(table, hot_dtype):
            X, R = _gram_steps(X, R, segment, dot), None
    return X.astype(jnp.float32) / dot.unit


def _polynomials(
    X: Array, R: Array | None, table: GramMinimax, dot: Products, *, whole: bool
) -> Array:
    """X ← q(R) X, whole or for each of the halves; the first R given or computed."""
    if whole:
        R = dot.gram(X) if R is None else R
        return dot.onto(evaluate(table.whole, R, dot), X)
    for polynomial in table.halves:
        mean, Q = evaluate_apart(polynomial, dot.gram(X) if R is None else R, dot)
        X, R = (mean * X + dot.onto(Q, X)).astype(X.dtype), None
    return X


def _plain_steps(
    X: Array, R: Array | None, table: CoefficientTable, dot: Products
) -> Array:
    """X ← (aI + bR + cR²) X for each row of the table; R = XXᵀ, given or computed."""

    def step(X: Array, row: Array, R: Array | None = None) -> tuple[Array, None]:
        a, b, c = row
        R = dot.gram(X) if R is None else R
        Z = b * R + c * dot(R, R)
        return (a * X + dot.onto(Z, X)).astype(X.dtype), None

    rows = jnp.asarray(table, jnp.float32)
    if R is not None:
        (X, _), rows = step(X, rows[0], R), rows[1:]
    return jax.lax.scan(step, X, rows)[0]


def _gram_steps(
    X: Array, R: Array | None, table: CoefficientTable, dot: Products
) -> Array:
    """The same on R and Q alone, and QX at the end."""
    R = dot.gram(X) if R is None else R
    a, b, c = first = jnp.asarray(table[0], jnp.float32)
    Z = b * R + c * dot(R, R)
    identity = jnp.eye(Z.shape[-1], dtype=Z.dtype)
    Q = Z + a * jnp.broadcast_to(identity, Z.shape)

    def step(carry: tuple[Array, ...], row: Array) -> tuple[tuple[Array, ...], None]:
        R, Z, Q, (a, _, _) = carry
        # (aI + Z) R (aI + Z), the identities apart: in half precision aI would round Z.
        W = a * R + dot(Z, R)
        R = a * W + dot(W, Z)
        a, b, c = row
        Z = b * R + c * dot(R, R)
        return (R, Z, a * Q + dot(Z, Q), row), None

    rows = jnp.asarray(table[1:], jnp.float32).reshape(-1, 3)
    (_, _, Q, _), _ = jax.lax.scan(step, (R, Z, Q, first), rows)
    return dot.onto(Q, X).astype(X.dtype)


def _largest_operand(
    table: CoefficientTable | GramMinimax, hot_dtype: HotDtype
) -> float:
    """A bound on the entries of what is multiplied, for an X of norm 1."""
    if isinstance(table, GramMinimax):
        return LARGEST_FACTOR
    # Between steps X has singular values up to 2 (the first step of Polar Express makes
    # such), so R has entries up to 4, bR + cR² up to 4|b| + 16|c|, and Q up to the
    # product of the a.
    bounds = [4 * abs(b) + 16 * abs(c) for _, b, c in table]
    for segment in gram_segments(table, hot_dtype):
        bounds.append(math.prod(max(abs(a), 1.0) for a, _, _ in segment))
    return max(bounds)


def _aol_scale(R: Float[Array, "*batch m m"]) -> Float[Array, "*batch m 1"]:
    """s_i = (Σ_j |R_ij|)^(-1/2), R = XXᵀ: diag(s) X has no singular value above 1."""
    row_sums = jnp.sum(jnp.abs(R), axis=-1, keepdims=True)
    positive = row_sums > 0
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, row_sums, 1)), 0)


def coefficient_table(
    coefficients: str | Sequence[Sequence[float]],
    steps: int,
    *,
    preconditioner: Preconditioner = "frobenius",
) -> CoefficientTable | GramMinimax:
    """The `(a, b, c)` of each of `steps` steps; a short table repeats its last row.

    A named table that is too long loses its first rows: those only stretch what is
    small, while the last ones bring every singular value near 1. Polynomials of the
    Gram matrix have no steps; those for AOL's start have fewer products.
    """
    named = isinstance(coefficients, str)
    rows = COEFFICIENTS[coefficients] if named else coefficients
    if isinstance(rows, GramMinimax):
        return GRAM_MINIMAX_AOL if preconditioner == "aol" else rows
    table = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    if named:
        table = table[-steps:]
    return (table + table[-1:] * steps)[:steps]


def safety_factor(coefficients: str | Sequence[Sequence[float]]) -> float:
    """By how much more than its norm the input of these coefficients is divided."""
    return _SAFETY[coefficients] if isinstance(coefficients, str) else 1.0


def resolve_hot_dtype(hot_dtype: HotDtype, platform: Platform) -> HotDtype:
    """`"auto"` made definite: fp32 on CPUs, fp16 on GPUs, bf16 elsewhere.

    CPUs multiply half precision no faster than fp32; TPUs have no fp16 matrix unit;
    on GPUs fp16 costs what bf16 costs and is about ten times closer to fp32.
    """
    if hot_dtype != "auto":
        return hot_dtype
    if platform == "cpu":
        return "fp32"
    return "fp16" if platform == "gpu" else "bf16"


def newton_schulz_flops(
    m: int,
    n: int,
    table: CoefficientTable | GramMinimax,
    method: Literal["plain", "gram"],
    hot_dtype: HotDtype = "fp32",
) -> int:
    """Floating-point operations of all matrix products for one m × n matrix, m ≤ n."""
    if isinstance(table, GramMinimax):
        polynomials = (table.whole,) if hot_dtype == "fp32" else table.halves
        return sum(4 * m * m * n + 2 * m**3 * part.products for part in polynomials)
    if method == "plain":
        return len(table) * (4 * m * m * n + 2 * m**3)
    total = 0
    for segment in gram_segments(table, hot_dtype):
        # XXᵀ and QX once; R² each step; Q and the two products of R from the second.
        total += 4 * m * m * n + 2 * m**3 * (4 * len(segment) - 3)
    return total


def gram_segments(
    table: CoefficientTable, hot_dtype: HotDtype = "fp32"
) -> tuple[CoefficientTable, ...]:
    """The steps that the Gram form takes between one restart and the next."""
    longest = _GRAM_STEPS[hot_dtype]
    count = -(-len(table) // longest)
    sizes = [len(table) // count + (i < len(table) % count) for i in range(count)]
    starts = [sum(sizes[:i]) for i in range(count)]
    return tuple(
        table[start : start + size] for start, size in zip(starts, sizes, strict=True)
    )


def cheaper_method(
    m: int,
    n: int,
    table: CoefficientTable | GramMinimax,
    hot_dtype: HotDtype = "fp32",
) -> Literal["plain", "gram"]:
    """The form that needs fewer operations: Gram above n/m of about 1.5."""
    if isinstance(table, GramMinimax):
        return "gram"
    gram = newton_schulz_flops(m, n, table, "gram", hot_dtype)
    plain = newton_schulz_flops(m, n, table, "plain")
    return "gram" if gram < plain else "plain"
