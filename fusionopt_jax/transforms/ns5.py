r"""Newton–Schulz orthogonalisation, the update of Muon.

.. math::
    X_0 = G / (\|G\|_F + \epsilon), \qquad
    X_{k+1} = a_k X_k + (b_k R_k + c_k R_k^2) X_k, \quad R_k = X_k X_k^\top

brings the singular values of :math:`G` near 1 and keeps its singular vectors: `ns5`
returns :math:`X_5`, an approximation of the polar factor :math:`UV^\top`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_choice,
    check_count,
    check_integer,
    check_non_negative,
)
from fusionopt_jax._matrices.buckets import (
    BUCKETINGS,
    Bucketing,
    Stack,
    map_leaves,
    map_stacks,
)
from fusionopt_jax._matrices.gram_polynomial import GramMinimax
from fusionopt_jax._matrices.newton_schulz import (
    COEFFICIENTS,
    METHODS,
    PRECONDITIONERS,
    CoefficientTable,
    Method,
    Preconditioner,
    coefficient_table,
    newton_schulz,
    safety_factor,
)
from fusionopt_jax._matrices.norm import frobenius_norm
from fusionopt_jax._matrices.products import HOT_DTYPES, HotDtype
from fusionopt_jax._optax import OfStacks, transformation
from fusionopt_jax._types import Array, Count, Number, Scalar
from fusionopt_jax.routing import Routing, matrix_views

Scale: TypeAlias = Literal["aspect", "rms", "consistent_rms"] | None

SCALES: tuple[Scale, ...] = (None, "aspect", "rms", "consistent_rms")

# The root mean square of an Adam update, which makes Adam's learning rate and decay
# carry over (Liu et al., arXiv 2502.16982).
_ADAM_RMS = 0.2

# The unit of the norm of what the iteration returns: its entries are at most about 1,
# and far below only where `eps` outweighs the gradient.
_RESULT_UNIT = 2.0**-40


class NS5State(NamedTuple):
    """State of `ns5`.

    Attributes:
        count: Updates so far.
        audit_error: Relative Frobenius error of the last audited update against the
            same iteration in fp32, over all matrices; 0 where nothing is audited.
    """

    count: Count
    audit_error: Scalar


def ns5(
    *,
    routing: Routing | None = None,
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    steps: int | None = None,
    preconditioner: Preconditioner = "frobenius",
    method: Method = "auto",
    hot_dtype: HotDtype = "auto",
    scale: Scale = None,
    eps: Number = 1e-7,
    bucketing: Bucketing = "auto",
    audit_every: int | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces every matrix by one with the same singular vectors and values near 1.

    .. math::
        X \leftarrow G / (\|G\|_F + \epsilon), \qquad
        X \leftarrow aX + (bR + cR^2)X, \quad R = XX^\top \quad (\text{`steps` times})

    A matrix of zeros stays zero. The norm is taken in fp32 whatever `hot_dtype` is, and
    scaled, so that its squares don't overflow: entries of an m × n matrix may be as
    large as 3e38/√(mn). Beside one huge entry the others vanish; one that is not finite
    makes its matrix NaN, and no other.

    Args:
        routing: Where the matrices of a leaf come from (axes, chunks, stacks). Without
            one, every leaf is a stack of `(in, out)` matrices over its last two axes.
        coefficients: `"quintic"` (Muon's; singular values end in about [0.7, 1.2]),
            `"polar_express"` (minimax for each step; nearer to 1), or rows `(a, b, c)`,
            one for each step, the last one repeated. `"gram_minimax"` is no steps but
            one polynomial of the Gram matrix, nearer to 1 in fewer products; in fp16
            two, one after the other. It has no `steps`, no plain form, and no bf16.
        steps: How many polynomial steps, at least 1; `None` takes 5, or as many as a
            table given as `coefficients` has rows.
        preconditioner: `"frobenius"` divides by the norm; `"aol"` scales rows as well,
            by which 4 steps do the work of 5, and 8 products that of 11.
        method: `"plain"` iterates on the matrix, `"gram"` on its smaller Gram matrix
            (cheaper from an aspect ratio of about 1.5 on), `"auto"` takes the one with
            fewer operations. The result is the same up to rounding.
        hot_dtype: Dtype of the iterations. `"fp32"`; `"bf16"` or `"fp16"` for half
            precision with fp32 accumulation; `"fp16_safe"` multiplies in fp16 and
            keeps the iterates in fp32; `"auto"` is fp32 on CPUs, fp16 on GPUs, bf16
            elsewhere, by the platform that the program is compiled for. Where that is
            bf16, `coefficients="gram_minimax"` takes fp32.
        scale: `None` leaves the singular values near 1. `"aspect"` multiplies by
            :math:`\sqrt{\max(1, \text{out}/\text{in})}`. `"rms"` gives every update a
            root mean square of 0.2, as Adam's has:
            :math:`0.2\sqrt{\text{in}\cdot\text{out}}\,/\,\|X\|_F`.
            `"consistent_rms"` is the same of singular values that are exactly 1, from
            the shape alone: :math:`0.2\sqrt{\max(\text{in}, \text{out})}`, as
            `optax.contrib.muon(consistent_rms=0.2)` has it.
        eps: Added to the norm; the published value. With a smaller one the result
            doesn't depend on the gradient's scale, however small it is.
        bucketing: `"batch"` joins matrices of equal shape from all leaves into one
            batched call (a stack of layers is one by itself), `"loop"` goes through
            them in a compiled loop, `"leaf"` calls once for each leaf; `"auto"` loops
            on CPUs and batches elsewhere.
        audit_every: Every this many updates, compute in fp32 as well and keep the
            relative difference in the state; `None` never does.

    Returns:
        A transformation whose updates have the shapes and dtypes of its input. It
        returns a direction: positive sign, no learning rate, no decay.

    Raises:
        ValueError: If a setting is out of range or can't be had with
            `coefficients="gram_minimax"`, or a leaf has no matrices.

    Example:
        >>> import jax.numpy as jnp, fusionopt_jax as fo
        >>> tx = fo.ns5(coefficients="polar_express")
        >>> gradient = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1e-2]])}
        >>> update, _ = tx.update(gradient, tx.init(gradient))
        >>> bool(jnp.allclose(update["kernel"], jnp.eye(2), atol=0.15))
        True

    Source:
        Jordan et al., *Muon*, 2024 (quintic, aspect). Amsel et al., arXiv 2505.16932
        (Polar Express). Boissin et al., arXiv 2512.04632 (AOL). Liu et al., arXiv
        2502.16982 (RMS). The published Muon casts to bf16 before it takes the norm;
        here the norm is always fp32.
    """
    given_steps = steps
    if steps is None:
        steps = 5 if isinstance(coefficients, str) else max(len(coefficients), 1)
    check_integer("steps", steps, low=1)
    if audit_every is not None:
        check_count("audit_every", audit_every, low=1)
    check_choice("preconditioner", preconditioner, PRECONDITIONERS)
    check_choice("method", method, METHODS)
    check_choice("hot_dtype", hot_dtype, HOT_DTYPES)
    check_choice("scale", scale, SCALES)
    check_choice("bucketing", bucketing, BUCKETINGS)
    check_non_negative("eps", eps)
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, COEFFICIENTS)
        if isinstance(COEFFICIENTS[coefficients], GramMinimax):
            _check_gram_polynomial(coefficients, given_steps, method, hot_dtype)
    table = _checked_table(coefficients, steps, preconditioner)

    def orthogonalise(
        stack: Array, dtype: HotDtype = hot_dtype, *, platforms: Any
    ) -> Array:
        result = newton_schulz(
            stack,
            table,
            eps=eps,
            safety=safety_factor(coefficients),
            preconditioner=preconditioner,
            method=method,
            hot_dtype=dtype,
            platforms=platforms,
        )
        if scale == "rms":
            result = _rms_scaled(result)
        return result.astype(stack.dtype)

    def scaled(updates: Any) -> Any:
        """Orthogonalised leaves, scaled by what a stack that is turned doesn't tell."""
        if scale not in ("aspect", "consistent_rms"):
            return updates
        by_shape = functools.partial(_scaled_by_shape, scale=scale)
        views = matrix_views(updates, routing, "ns5")
        (updates,) = map_leaves(by_shape, views, written=[updates])
        return updates

    def direction(updates: Any, dtype: HotDtype) -> Any:
        """The orthogonalised, scaled updates."""
        leaves, treedef = jax.tree.flatten(updates)
        views = matrix_views(updates, routing, "ns5")
        function = functools.partial(orthogonalise, dtype=dtype)
        results = map_stacks(function, leaves, views, bucketing=bucketing)
        return scaled(jax.tree.unflatten(treedef, results))

    def init_fn(params: Any) -> NS5State:
        matrix_views(params, routing, "ns5")
        return NS5State(
            count=jnp.zeros([], jnp.int32), audit_error=jnp.zeros([], jnp.float32)
        )

    def update_fn(
        updates: Any, state: NS5State, params: Any = None, **extra_args: Any
    ) -> tuple[Any, NS5State]:
        del params, extra_args
        result = direction(updates, hot_dtype)
        audit_error = state.audit_error
        if audit_every is not None:
            audit_error = jax.lax.cond(
                state.count % audit_every == 0,
                lambda: _relative_error(result, direction(updates, "fp32")),
                lambda: audit_error,
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        return result, NS5State(count=count, audit_error=audit_error)

    def finish(updates: Any, state: NS5State) -> tuple[Any, NS5State]:
        count = jnp.asarray(optax.safe_increment(state.count))
        return scaled(updates), state._replace(count=count)

    tx = transformation(init_fn, update_fn)
    # An audit compares with what the matrices were before.
    if audit_every is not None:
        return tx
    return OfStacks(tx, orthogonalise, finish, bucketing)


def _scaled_by_shape(X: Stack, scale: Scale) -> tuple[Stack]:
    """√max(1, out/in) X, or 0.2 √max(in, out) X."""
    _, inputs, outputs = X.shape
    if scale == "aspect":
        factor = max(1.0, outputs / inputs) ** 0.5
    else:
        factor = _ADAM_RMS * max(inputs, outputs) ** 0.5
    return (X * jnp.asarray(factor, X.dtype),)


def _rms_scaled(X: Array) -> Array:
    """Each matrix with a root mean square of 0.2; zero stays zero."""
    norm = frobenius_norm(X, _RESULT_UNIT)
    target = _ADAM_RMS * (X.shape[-2] * X.shape[-1]) ** 0.5
    return X * jnp.where(norm > 0, target / jnp.where(norm > 0, norm, 1), 0)


def _relative_error(result: Any, exact: Any) -> Array:
    """‖result − exact‖ / ‖exact‖ over all leaves, in fp32."""
    as_fp32 = lambda tree: optax.tree.cast(tree, jnp.float32)  # noqa: E731
    exact = as_fp32(exact)
    difference = optax.tree.norm(optax.tree.sub(as_fp32(result), exact))
    return difference / jnp.maximum(optax.tree.norm(exact), jnp.finfo(jnp.float32).tiny)


def _check_gram_polynomial(
    coefficients: str, steps: int | None, method: Method, hot_dtype: HotDtype
) -> None:
    """Raises where a setting asks for what polynomials of the Gram matrix haven't."""
    if steps is not None:
        raise ValueError(
            f"`coefficients={coefficients!r}` has polynomials and no steps; "
            f"leave `steps` out. Got steps={steps!r}."
        )
    if method == "plain":
        raise ValueError(
            f"`coefficients={coefficients!r}` has polynomials of the Gram matrix and "
            'no plain form; use method="auto" or other coefficients.'
        )
    if hot_dtype == "bf16":
        raise ValueError(
            f"`coefficients={coefficients!r}` needs more bits than bf16 has: rounding "
            "puts singular values where the polynomials have no bound. Use "
            'hot_dtype="fp16" or "fp32", or coefficients="polar_express".'
        )


def _checked_table(
    coefficients: str | Sequence[Sequence[float]],
    steps: int,
    preconditioner: Preconditioner,
) -> CoefficientTable | GramMinimax:
    """The coefficients of each step, or an error that shows the form."""
    try:
        table = coefficient_table(coefficients, steps, preconditioner=preconditioner)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`coefficients` must be a name or rows of three numbers, such as "
            f"[(3.4445, -4.775, 2.0315)]; got {coefficients!r}."
        ) from error
    if not table:
        raise ValueError("`coefficients` must hold at least one row (a, b, c).")
    return table
