"""Which leaves of a parameter tree are matrices, along which axes, and who gets them.

A `Routing` is data about leaves: it depends on their paths and shapes alone, knows
nothing of Optax, and is frozen, hashable and not callable, so that it can be closed
over, compared, and passed through `optax.inject_hyperparams` (which would take a
callable for a schedule). Every transformation that works on matrices reads its axes
from one, so all of them see the same matrices.

A leaf's label is decided in this order: `force_scalar`; the first rule that matches its
path; the usual names of embeddings, which are `"scalar"`; the default, by which a leaf
of exactly one input and one output axis, both of at least `min_dim`, is `"spectral"`
and everything else `"scalar"`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax

from fusionopt_jax._checks import (
    check_choice,
    check_integer,
    shape_text,
)
from fusionopt_jax._leaves import check_arrays, check_leaves
from fusionopt_jax._matrices.view import MatrixView
from fusionopt_jax._paths import path_name
from fusionopt_jax._types import KeyPath, Leaf, Params
from fusionopt_jax.routing import routes
from fusionopt_jax.routing.embeddings import is_embedding_like
from fusionopt_jax.routing.routes import Route
from fusionopt_jax.routing.rules import (
    SCALAR,
    SPECTRAL,
    Axes,
    MatrixAxes,
    Rule,
    check_pattern,
)

Layout: TypeAlias = Literal["in_out", "out_in"]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Labels every leaf of a parameter tree, and says which axes make its matrices.

    Args:
        rules: Tried in order on each leaf's path; the first match decides.
        min_dim: Matrices with both sides at least this long are spectral by default.
            Below about 128 an orthogonalised update gains nothing over Adam's.
        force_scalar: Regular expressions of paths that are scalar whatever the rules
            say.
        layout: `"in_out"` for Flax kernels (output neurons last), `"out_in"` for
            Equinox and PyTorch weights.
        stacked: Path prefixes, such as `"blocks"`, under which the leading axis of
            every leaf counts layers (scan over layers); a stacked bias is still a bias.

    Raises:
        ValueError: If a setting is malformed. `labels`, `table` and `fingerprint` raise
            it if a rule, a `force_scalar` entry or a `stacked` prefix matches no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {
        ...     "blocks": {"qkv": jnp.ones((4, 128, 384)), "bias": jnp.ones((4, 384))},
        ...     "head": jnp.ones((128, 10)),
        ... }
        >>> routing = Routing([Rule("qkv", chunks=3)], stacked=["blocks"])
        >>> routing.labels(params)
        {'blocks': {'bias': 'scalar', 'qkv': 'spectral'}, 'head': 'scalar'}
        >>> print(routing.table(params))
        path         shape          label     matrices         why
        blocks/bias  (4, 384)       scalar                     1-D
        blocks/qkv   (4, 128, 384)  spectral  12 x (128, 128)  rule 'qkv'
        head         (128, 10)      scalar    1 x (128, 10)    a side is below 128
        scalar: 2 leaves, 2,816 parameters; spectral: 1 leaf, 196,608 parameters
    """

    rules: Sequence[Rule] = ()
    _: dataclasses.KW_ONLY
    min_dim: int = 128
    force_scalar: Sequence[str] = ()
    layout: Layout = "in_out"
    stacked: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_integer("min_dim", self.min_dim, low=1)
        check_choice("layout", self.layout, ("in_out", "out_in"))
        for name in ("rules", "force_scalar", "stacked"):
            value = getattr(self, name)
            if isinstance(value, str | Rule):
                raise TypeError(f"`{name}` must be a sequence, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"`rules` must hold Rule objects, got {rule!r}.")
        for pattern in self.force_scalar:
            check_pattern("force_scalar", pattern)
        object.__setattr__(
            self, "stacked", tuple(prefix.strip("/") for prefix in self.stacked)
        )

    def labels(self, params: Params) -> Any:
        """A tree like `params` with each leaf's label; for `optax.multi_transform`.

        Args:
            params: Arrays, or anything with a shape.

        Returns:
            The same tree with a string in place of each leaf.
        """
        labels = [route.label for route in self.routes(params)]
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    def scales(self, params: Params) -> Any:
        """A tree like `params` with the factor on each leaf's learning rate.

        It is the `scale` of the first rule that finds the leaf, whatever decides its
        label, and 1 where there is none.

        Args:
            params: Arrays, or anything with a shape.

        Returns:
            The same tree with a float in place of each leaf.

        Example:
            >>> import jax.numpy as jnp
            >>> params = {"body": jnp.ones((4, 4)), "head": jnp.ones((4, 4))}
            >>> Routing([Rule("^head", scale=0.1)]).scales(params)
            {'body': 1.0, 'head': 0.1}
        """
        scales = [route.scale for route in self.routes(params)]
        return jax.tree.unflatten(jax.tree.structure(params), scales)

    def routes(self, params: Params) -> list[Route]:
        """What the routing says of each leaf, in the order of the tree's leaves."""
        check_arrays("Routing", params)
        leaves = jax.tree_util.tree_flatten_with_path(params)[0]
        routes = [self.route(path, leaf) for path, leaf in leaves]
        self._check_all_used([route.path for route in routes])
        return routes

    def table(self, params: Params) -> str:
        """The split as text, for a person to read before training.

        Factors on the learning rate have a column where there are any.
        """
        return routes.table(self.routes(params))

    def fingerprint(self, params: Params) -> str:
        """The split as one string, to keep in a checkpoint and `check` on restoring.

        It holds the group of every leaf, its matrices, and the axes and chunks that
        make them; factors on the learning rate are no part of the split.
        """
        return routes.fingerprint(self.routes(params))

    def check(self, params: Params, fingerprint: str) -> None:
        """Require that a saved fingerprint describes this routing of these parameters.

        Args:
            params: The parameters to be restored into.
            fingerprint: What `fingerprint` returned when the checkpoint was written.

        Raises:
            ValueError: If any leaf moved to another group, has other matrices or other
                axes, came or went (it lists them), or if it is no fingerprint of this
                version.
        """
        routes.check(self.routes(params), fingerprint)

    def route(self, path: KeyPath, leaf: Leaf) -> Route:
        """What the routing says of one leaf."""
        name = path_name(path)
        shape = tuple(leaf.shape)
        rule = next((rule for rule in self.rules if _finds(rule.pattern, name)), None)
        view = self._view(name, leaf, rule)
        label, reason = self._decide(name, shape, rule, view)
        if label == SPECTRAL and view is None:
            raise ValueError(
                f"Leaf {name!r} of shape {shape_text(leaf)} is routed to "
                f"{SPECTRAL!r}, but nothing says which of its axes make a matrix. "
                f"{_AXES_REMEDY}"
            )
        scale = 1.0 if rule is None else float(rule.scale)
        return Route(name, shape, label, view, reason, scale)

    def _decide(
        self,
        name: str,
        shape: tuple[int, ...],
        rule: Rule | None,
        view: MatrixView | None,
    ) -> tuple[str, str]:
        """The label of a leaf, and the reason for it."""
        for pattern in self.force_scalar:
            if _finds(pattern, name):
                return SCALAR, f"force_scalar {pattern!r}"
        if rule is not None and rule.label is not None:
            return rule.label, f"rule {rule.pattern!r}"
        rank = len(shape) - self._layer_axes(name)
        if view is None:
            unexplained = rank > 2
            return SCALAR, f"rank {rank}, no rule" if unexplained else f"{rank}-D"
        # A rule that only scales the rate says nothing of what the leaf is.
        if rule is not None and rule.axes is None and rule.scale != 1:
            rule = None
        if rule is None and is_embedding_like(name):
            return SCALAR, "embedding-like name"
        if view.smallest_side < self.min_dim:
            return SCALAR, f"a side is below {self.min_dim}"
        by = f"rule {rule.pattern!r}" if rule else f"both sides >= {self.min_dim}"
        return SPECTRAL, by

    def _view(self, name: str, leaf: Leaf, rule: Rule | None) -> MatrixView | None:
        """The matrices of a leaf, or `None` if nothing explains its axes."""
        shape = tuple(leaf.shape)
        offset = self._layer_axes(name)
        rank = len(shape) - offset
        axes = rule.axes if rule is not None else None
        if not isinstance(axes, MatrixAxes):
            axes = MatrixAxes()
        if axes.reduction_axis is None or axes.output_axis is None:
            if rank != 2:
                return None
            inputs, outputs = (0, 1) if self.layout == "in_out" else (1, 0)
        else:
            inputs, outputs = axes.reduction_axis, axes.output_axis
        chunks = axes.chunks if isinstance(axes.chunks, int) else tuple(axes.chunks)
        view = MatrixView(
            shape=shape,
            in_axes=_absolute("reduction_axis", inputs, rank, offset, name, leaf),
            out_axes=_absolute("output_axis", outputs, rank, offset, name, leaf),
            chunks=chunks,
            chunk_axis=axes.chunk_axis,
        ).checked(name)
        return view if axes.block is None else view.in_blocks(axes.block, name)

    def _layer_axes(self, name: str) -> int:
        """How many leading axes of a leaf count layers: one under a stacked prefix."""
        return int(any(_below(prefix, name) for prefix in self.stacked))

    def _check_all_used(self, names: list[str]) -> None:
        """Require that every rule, force_scalar entry and prefix finds a leaf."""
        if not names:
            return
        finders = [
            *((f"Rule {rule.pattern!r}", rule.pattern, _finds) for rule in self.rules),
            *((f"`force_scalar` entry {p!r}", p, _finds) for p in self.force_scalar),
            *((f"`stacked` prefix {p!r}", p, _below) for p in self.stacked),
        ]
        for what, pattern, finds in finders:
            if not any(finds(pattern, name) for name in names):
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ValueError(
                    f"{what} matches no leaf. Correct or remove it; the paths are: "
                    f"{shown}."
                )


_AXES_REMEDY = (
    "Add Rule(pattern, label, MatrixAxes(reduction_axis=..., output_axis=...)) for it, "
    "name its prefix in `stacked` if its leading axis counts layers, or route it to "
    "the scalar group."
)


def matrix_views(
    tree: Params, routing: Routing | None, component: str
) -> list[MatrixView]:
    """The matrices of every leaf of a tree, for a component that needs them.

    Args:
        tree: Arrays; the holes of a masked tree are passed over.
        routing: Where the axes come from. Without one, every leaf is a stack of
            `(in, out)` matrices over its last two axes.
        component: Who asks, for the errors.

    Raises:
        ValueError: If a leaf has no matrices or its entries are no real floating-point
            numbers, with its path, its shape and the remedy.
    """
    check_leaves(component, tree)
    views = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if routing is None:
            view = _trailing_view(tuple(leaf.shape))
        else:
            view = routing.route(path, leaf).view
        if view is None:
            remedy = (
                _AXES_REMEDY
                if len(leaf.shape) > 2
                else "Send it to another group with optax.multi_transform(..., "
                "routing.labels)."
            )
            raise ValueError(
                f"`{component}` works on matrices and can't handle leaf "
                f"{path_name(path)!r} of shape {shape_text(leaf)}. {remedy}"
            )
        views.append(view)
    return views


def _trailing_view(shape: tuple[int, ...]) -> MatrixView | None:
    """A stack of `(in, out)` matrices over the last two axes."""
    rank = len(shape)
    return MatrixView(shape, (rank - 2,), (rank - 1,)) if rank >= 2 else None


def _absolute(
    argument: str,
    axes: Axes,
    rank: int,
    offset: int,
    name: str,
    leaf: Leaf,
) -> tuple[int, ...]:
    """Axes of a leaf counted from 0, past the axis that counts its layers."""
    listed = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in listed:
        if not -rank <= axis < rank:
            raise ValueError(
                f"`{argument}`={axes} does not fit leaf {name!r} of shape "
                f"{shape_text(leaf)}"
                + (", whose leading axis counts layers." if offset else ".")
            )
    return tuple(axis % rank + offset for axis in listed)


def _finds(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None


def _below(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + "/")
