r"""Shampoo whose two factors whiten each other, around any momentum.

With :math:`g` the raw gradient, :math:`M` what the inner transformation makes of it,
and :math:`S_a = Q_a \operatorname{diag}(\lambda_a) Q_a^\top` for either side:

.. math::
    U = S_a^{-1/2} M S_c^{-1/2}, \qquad
    S_a \leftarrow b S_a + (1-b)\, g S_c^{-1} g^\top / n, \qquad
    S_c \leftarrow b S_c + (1-b)\, g^\top S_a^{-1} g / m .

Eigenvalues are renewed at every step, bases by a power step every few.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from fusionopt_jax._checks import (
    check_choice,
    check_count,
    check_decay_rate,
    check_non_negative,
    check_number,
    check_positive,
)
from fusionopt_jax._matrices.buckets import (
    BUCKETINGS,
    Bucketing,
    resolve_bucketing,
    turned,
)
from fusionopt_jax._matrices.eigenbasis import (
    ORTHONORMALISATIONS,
    Number,
    Orthonormalisation,
)
from fusionopt_jax._matrices.kronecker import (
    FIRST_BASES,
    SCALINGS,
    SIDES,
    STATISTICS,
    FirstBasis,
    Pair,
    Scaling,
    Settings,
    Sides,
    SideState,
    Statistics,
    first_pair,
    gram_step,
    group_count,
    kl_step,
    renewed_bases,
)
from fusionopt_jax._matrices.newton_schulz import frobenius_norm
from fusionopt_jax._matrices.placement import automatic, device_count, whole
from fusionopt_jax._matrices.view import MatrixView
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._types import Array, Count, Params
from fusionopt_jax.routing import Routing, matrix_views

FirstStep: TypeAlias = Literal["pass", "skip"]

FIRST_STEPS: tuple[FirstStep, ...] = ("pass", "skip")

# What FusionOpt adds to the diagonal of its factors.
_GRAM_DAMPING = 1e-4


class KLShampooState(NamedTuple):
    """State of `kl_shampoo`.

    Every field but the first and the last is a tree like the parameters with one fp32
    array for each leaf; `d` is the length of the matrices' side. A side that has no
    factor holds `optax.MaskedNode()`.

    Attributes:
        count: Updates so far.
        input_factors: Symmetric factors of the input side, each the lower triangle in
            a rectangle `(matrices, d + 1, d / 2)` (d rounded up to even).
        output_factors: The same of the output side.
        input_bases: `(matrices, d, d)`: orthonormal bases, their vectors as columns;
            with `statistics="gram"` the powers of the factors.
        output_bases: The same of the output side.
        input_eigenvalues: `(matrices, d)`; none with `statistics="gram"`.
        output_eigenvalues: The same of the output side.
        inner_state: The state of the inner transformation.
    """

    count: Count
    input_factors: Params
    output_factors: Params
    input_bases: Params
    output_bases: Params
    input_eigenvalues: Params
    output_eigenvalues: Params
    inner_state: Any


def kl_shampoo(
    inner: TransformLike | None = None,
    *,
    routing: Routing | None = None,
    b2: Number = 0.98,
    bias_correction: bool | None = None,
    statistics: Statistics = "kl",
    exponent: Number | None = None,
    sides: Sides = "auto",
    update_every: int | Array = 10,
    stagger: bool = True,
    restore_norm: bool = False,
    first_step: FirstStep = "pass",
    first_basis: FirstBasis = "identity",
    eps: Number = 1e-8,
    damping: Number | None = None,
    scaling: Scaling = "relative",
    init_factor: Number | None = None,
    max_inverse_root: Number | None = 4000.0,
    orthonormalisation: Orthonormalisation = "auto",
    bucketing: Bucketing = "auto",
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens what an inner momentum returns, by factors of the raw gradients.

    .. math::
        U = Q_a\left[\frac{(Q_a^\top M Q_c)\odot s}{1 + \epsilon s}\right]Q_c^\top,
        \qquad s = \lambda_a^{p}\,(\lambda_c^{p})^\top, \quad p = -\tfrac12,

    with the bases and eigenvalues of the step before; then, with the raw gradient
    :math:`g` of :math:`m \times n`,

    .. math::
        S_a \leftarrow b_2 S_a + (1-b_2)\, g S_c^{-1} g^\top / n, \qquad
        \lambda_a \leftarrow b_2 \lambda_a + (1-b_2)\operatorname{mean}_j
            \bigl((Q_a^\top g\, Q_c)_{ij}^2 / \lambda_{c,j}\bigr),

    the same for :math:`c` with rows and columns exchanged, and every `update_every`
    steps :math:`Q_a \leftarrow \operatorname{orth}(S_a Q_a)`, without any
    eigendecomposition. A side that is left out is the identity.

    `statistics="gram"` is plain Shampoo instead:
    :math:`L \leftarrow b_2 L + (1-b_2)\, g g^\top`,
    :math:`R \leftarrow b_2 R + (1-b_2)\, g^\top g`,
    :math:`U = (L + \delta I)^p M (R + \delta I)^p`, with powers taken by an
    eigendecomposition every `update_every` steps, the first one included.

    Args:
        inner: An Optax transformation, such as `optax.trace(0.95)`; it sees the raw
            gradients, and its updates are preconditioned. `None`: the gradients are.
        routing: Where the matrices of a leaf come from; without one, `(in, out)` over
            the last two axes.
        b2: Decay rate of factors and eigenvalues, :math:`b_2`, in [0, 1).
        bias_correction: Average all gradients alike until there are
            :math:`1/(1-b_2)` of them, so that the start delays nothing. `None` does so
            where `scaling` is relative; the published codes don't.
        statistics: `"kl"` (coupled factors) or `"gram"` (plain Shampoo).
        exponent: :math:`p`, of each side. `None` takes -1/2 for `"kl"`; for `"gram"`
            -1/4 with two sides and -1/2 with one, as Shampoo does.
        sides: `"both"`; `"small"` keeps a factor of the shorter side alone (of the
            input side of a square matrix); `"auto"` keeps both where the longer side is
            below 1.5 times the shorter, 12 bytes a parameter if square, 13 at most.
        update_every: Steps between two renewals of a basis (of a power), at least 1.
        stagger: Renew the bases of different matrices at different steps, so that no
            step pays for all of them; `False` renews all at multiples of
            `update_every`, as the published code does.
        restore_norm: Give each matrix back its norm, as SOAP-Muon does before `ns5`.
        first_step: At the very first update there are no statistics yet. `"pass"`
            returns the matrices as `inner` gives them, divided by the gradients' root
            mean square (times `init_factor`). `"skip"` returns zeros and doesn't run
            `inner`, as the published code does. Without effect on `"gram"`.
        first_basis: `"identity"` starts from the axes and needs no eigendecomposition;
            `"eigh"` takes the first factor's eigenvectors, as the published code does.
        eps: :math:`\epsilon`, added to :math:`1/s`. Of no effect on `"gram"`.
        damping: Added to every squared gradient entry in the eigenvalues of `"kl"`;
            :math:`\delta` of `"gram"`. `None` takes 0 and 1e-4.
        scaling: `"relative"` measures `eps`, `damping`, `init_factor` and
            `max_inverse_root` in the gradients' own scale: the direction doesn't change
            when all gradients are multiplied by a constant. `"absolute"` takes them as
            they are, as the published codes do.
        init_factor: First eigenvalue; `None` takes the published 0.1 where `scaling` is
            absolute, and 1, by which the first update has the size of later ones, where
            it is relative (in units of the gradients' root mean square).
        max_inverse_root: :math:`1/\sqrt\lambda` is kept below max(10, min(d, this)) for
            a side of length d, relative to the root of the mean eigenvalue or
            absolutely. `None` sets no bound.
        orthonormalisation: `"qr"`; `"cholesky_qr"`, twice, and Gram–Schmidt where that
            breaks down; `"auto"` takes QR on CPUs and Cholesky-QR elsewhere.
        bucketing: `"batch"` joins leaves of equal matrices and takes all of them at
            once, `"loop"` goes through them one matrix at a time in a compiled loop,
            `"leaf"` takes the matrices of one leaf at once; `"auto"` loops on CPUs and
            batches elsewhere.
        precision: Of the matrix products. Less than the highest lets GPUs shorten
            operands to TF32, which turns the bases by large angles.

    Returns:
        A transformation whose updates have the shapes and dtypes of its input. It
        returns a direction: positive sign, no learning rate, no decay. With `"kl"` its
        root mean square is near that of a whitened gradient, 1.

    Raises:
        ValueError: If a setting is out of range, or a leaf has no matrices.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = optax.chain(fo.kl_shampoo(optax.trace(0.95)), fo.ns5())
        >>> gradient = {"kernel": jnp.ones((4, 6)).at[0, 0].set(3.0)}
        >>> update, state = tx.update(gradient, tx.init(gradient))
        >>> update["kernel"].shape
        (4, 6)

    Source:
        Lin et al., arXiv 2509.03378, Claims 2 and 3, and its code (`kl_opt.py` of
        yorkerlin/KL-Methods), which is reproduced for matrices by `scaling="absolute"`,
        `stagger=False`, `sides="both"`, `first_basis="eigh"`, `first_step="skip"`; its
        `using_damping` is `damping=eps`. A tensor of three axes, there a product of
        three factors, is here a stack of matrices. Gupta et al., *Shampoo*, arXiv
        1802.09568 (`"gram"`). *ASGO*, arXiv 2503.20762 (one side, exponent -1/2).
    """
    check_decay_rate("b2", b2)
    check_choice("statistics", statistics, STATISTICS)
    check_choice("sides", sides, SIDES)
    check_choice("scaling", scaling, SCALINGS)
    check_choice("first_basis", first_basis, FIRST_BASES)
    check_choice("first_step", first_step, FIRST_STEPS)
    check_choice("orthonormalisation", orthonormalisation, ORTHONORMALISATIONS)
    check_choice("bucketing", bucketing, BUCKETINGS)
    check_count("update_every", update_every, low=1)
    check_non_negative("eps", eps)
    if exponent is not None:
        check_number("exponent", exponent)
    if damping is None:
        damping = 0.0 if statistics == "kl" else _GRAM_DAMPING
    check_non_negative("damping", damping)
    if init_factor is None:
        init_factor = 0.1 if scaling == "absolute" else 1.0
    check_positive("init_factor", init_factor)
    if bias_correction is None:
        bias_correction = scaling == "relative"
    if max_inverse_root is not None:
        check_positive("max_inverse_root", max_inverse_root)
    settings = Settings(
        b2=b2,
        bias_correction=bias_correction,
        statistics=statistics,
        exponent=exponent,
        sides=sides,
        update_every=update_every,
        stagger=stagger,
        eps=eps,
        damping=damping,
        scaling=scaling,
        init_factor=init_factor,
        max_inverse_root=max_inverse_root,
        first_basis=first_basis,
        orthonormalisation=orthonormalisation,
        precision=precision,
    )
    momentum = accepting_extra_args(optax.identity() if inner is None else inner)
    skips = first_step == "skip" and statistics == "kl"

    def init_fn(params: Any) -> KLShampooState:
        views = matrix_views(params, routing, "kl_shampoo")
        return _assembled(
            jax.tree.structure(params),
            [first_pair(view.stack_shape, settings) for view in views],
            jnp.zeros([], jnp.int32),
            momentum.init(params),
        )

    def step(
        gradient: Array,
        direction: Array,
        pair: Pair,
        count: Count,
        groups: int,
        settings: Settings,
    ) -> tuple[Array, Pair]:
        """The preconditioned stack of one bucket, and its new statistics."""
        if statistics == "kl":
            result, pair = kl_step(gradient, direction, pair, count, settings)
            pair = renewed_bases(pair, count, groups, settings)
        else:
            result, pair = gram_step(gradient, direction, pair, count, groups, settings)
        if restore_norm:
            norm = frobenius_norm(result)
            target = frobenius_norm(direction)
            result = result * (target / jnp.where(norm > 0, norm, 1))
        return (jnp.where(count == 0, 0, result) if skips else result), pair

    def whitened(
        leaves: list[Array],
        directions: list[Array],
        pairs: list[Pair],
        count: Count,
        views: Sequence[MatrixView],
    ) -> tuple[list[Array], list[Pair]]:
        """Every leaf preconditioned, and its new statistics, bucket by bucket."""
        loop = resolve_bucketing(bucketing, *leaves) == "loop"
        chosen = settings._replace(loop=loop)
        results, pairs = list(leaves), list(pairs)
        groups = 0

        def stack_of(arrays: list[Array], i: int, turn: bool) -> Array:
            return turned(views[i].to_stack(arrays[i]).astype(jnp.float32), turn)

        # On several devices a joined copy would be an exchange between them, and a loop
        # gains nothing from one.
        join = bucketing != "leaf" and device_count(*leaves) == 1
        for members in _buckets(views, pairs, join=join, loop=loop):
            # Only stacks that are joined have to lie the same way.
            turns = {i: len(members) > 1 and pairs[i][0] is None for i in members}
            gradient, direction = (
                _joined([stack_of(x, i, turns[i]) for i in members])
                for x in (leaves, directions)
            )
            pair = _joined([_swapped(pairs[i], turns[i]) for i in members])
            # Renewals take a few matrices at a time, which divided stacks would have
            # to exchange inside their loop.
            gradient, direction, pair = whole((gradient, direction, pair), *leaves)
            done = step(gradient, direction, pair, count, groups, chosen)
            result, pair = whole(done, *leaves)
            groups += group_count(pair, chosen)
            start = 0
            for i, turn in turns.items():
                part = slice(start, start + views[i].count)
                start = part.stop
                done = turned(result[part], turn).astype(leaves[i].dtype)
                results[i] = views[i].from_stack(done)
                mine = jax.tree.map(lambda stack, part=part: stack[part], pair)
                pairs[i] = _swapped(mine, turn)
        return results, pairs

    def update_fn(
        updates: Any, state: KLShampooState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KLShampooState]:
        views = matrix_views(updates, routing, "kl_shampoo")
        directions, inner_state = momentum.update(
            updates, state.inner_state, params, **extra_args
        )
        leaves, treedef = jax.tree.flatten(updates)
        directions = treedef.flatten_up_to(directions)
        pairs = _pairs(treedef, state)
        results, pairs = automatic(
            functools.partial(whitened, views=views),
            leaves,
            directions,
            pairs,
            state.count,
            like=(leaves, pairs),
        )
        if skips:
            inner_state = jax.tree.map(
                lambda new, old: jnp.where(state.count == 0, old, new),
                inner_state,
                state.inner_state,
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        return (
            jax.tree.unflatten(treedef, results),
            _assembled(treedef, pairs, count, inner_state),
        )

    return transformation(init_fn, update_fn)


def _assembled(
    treedef: Any, pairs: list[Pair], count: Count, inner_state: Any
) -> KLShampooState:
    """The state from one pair of sides for each leaf."""

    def tree(side: Literal[0, 1], field: Literal["factor", "basis", "values"]) -> Any:
        arrays = [getattr(pair[side], field, None) for pair in pairs]
        masked = [optax.MaskedNode() if array is None else array for array in arrays]
        return jax.tree.unflatten(treedef, masked)

    return KLShampooState(
        count=count,
        input_factors=tree(0, "factor"),
        output_factors=tree(1, "factor"),
        input_bases=tree(0, "basis"),
        output_bases=tree(1, "basis"),
        input_eigenvalues=tree(0, "values"),
        output_eigenvalues=tree(1, "values"),
        inner_state=inner_state,
    )


def _buckets(
    views: Sequence[MatrixView], pairs: Sequence[Pair], *, join: bool, loop: bool
) -> list[list[int]]:
    """Indices of the leaves that are stacks of the same kind, once turned."""
    buckets: dict[Hashable, list[int]] = {}
    for i, (view, pair) in enumerate(zip(views, pairs, strict=True)):
        both = pair[0] is not None and pair[1] is not None
        shape = view.matrix_shape if both else tuple(sorted(view.matrix_shape))
        alone = not join or (loop and view.count > 1)
        buckets.setdefault(i if alone else (both, *shape), []).append(i)
    return list(buckets.values())


def _swapped(pair: Pair, turn: bool) -> Pair:
    """The pair of the turned stack."""
    return (pair[1], pair[0]) if turn else pair


def _joined(stacks: Sequence[Any]) -> Any:
    """Trees of stacks as one tree of longer stacks."""
    if len(stacks) == 1:
        return stacks[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)


def _pairs(treedef: Any, state: KLShampooState) -> list[Pair]:
    """The pair of sides of each leaf out of the state."""

    def sides(factors: Any, bases: Any, values: Any) -> list[SideState | None]:
        columns = [treedef.flatten_up_to(tree) for tree in (factors, bases, values)]
        return [
            None
            if isinstance(basis, optax.MaskedNode)
            else SideState(
                factor, basis, None if isinstance(value, optax.MaskedNode) else value
            )
            for factor, basis, value in zip(*columns, strict=True)
        ]

    inputs = sides(state.input_factors, state.input_bases, state.input_eigenvalues)
    outputs = sides(state.output_factors, state.output_bases, state.output_eigenvalues)
    return list(zip(inputs, outputs, strict=True))
