r"""The three sequences of Schedule-Free training, read out of any optimiser state.

Training holds :math:`y_t`, the point where gradients are taken, as its parameters; the
state holds the fast iterate :math:`z_t`; the average :math:`x_t`, which is deployed, is
kept or recovered from :math:`y_t = (1-\beta)\,z_t + \beta\,x_t`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from fusionopt_jax._leaves import is_abstract
from fusionopt_jax._matrices.placement import automatic
from fusionopt_jax._paths import path_keys
from fusionopt_jax._types import Array, Count, Float, Params, Scalar

Tree = TypeVar("Tree")


class ScheduleFreeState(NamedTuple):
    r"""State of `schedule_free`.

    Attributes:
        count: Steps taken.
        b1: The interpolation that made the current parameters, :math:`\beta`.
        weight_sum: Sum of the averaging weights so far.
        max_learning_rate: The largest rate that a step has used.
        z: The fast iterate, shaped like the parameters.
        x: The average, shaped like the parameters, or `None` where it is recovered.
        y_sample: For each leaf that is looked at one entry of the parameters that the
            last step leads to, the size that its rounding refers to, and that entry
            of z: by it `eval_params` knows parameters that are not those. Looked at
            are all leaves of a small tree; of a large one the smallest, 64 at most,
            which together are a 32nd of it.
        inner_state: State of the wrapped transformation.
    """

    count: Count
    b1: Scalar
    weight_sum: Scalar
    max_learning_rate: Scalar
    z: Params
    x: Params | None
    y_sample: Float[Array, "3 leaves"]
    inner_state: Any


def average_of(state: ScheduleFreeState, params: Params) -> Params:
    """The average x of one Schedule-Free state, in the dtype that the state keeps."""
    if state.x is not None:
        return state.x
    b1 = state.b1
    # By their difference, so that of a leaf that never moves all three are equal.
    return jax.tree.map(
        lambda y, z: z + (y.astype(z.dtype) - z) / b1.astype(z.dtype), params, state.z
    )


# Each look at a leaf that is divided among devices is an exchange between them, and XLA
# keeps a leaf that a step looks at beside the one that replaces it.
_MOST_SAMPLES = 64
_SAMPLED_SHARE = 1 / 32
_SMALL_TREE = 2**20


def sample_of(
    y: Float[Array, " leaves"],
    z: Float[Array, " leaves"],
    steps: Float[Array, " leaves"] | None = None,
) -> Float[Array, "3 leaves"]:
    """Entries of y after an update, their sizes, and those of z, in fp32.

    The sum is taken in the dtype of the parameters, as `optax.apply_updates` takes it.
    """
    sums, sizes = y, jnp.abs(y)
    if steps is not None:
        sums = (y + steps).astype(y.dtype)
        sizes = sizes + jnp.abs(steps)
    return jnp.stack([row.astype(jnp.float32) for row in (sums, sizes, z)])


def of_entries(
    function: Callable[..., Float[Array, "3 leaves"]], *entries: list[Array]
) -> Float[Array, "3 leaves"]:
    """`function` of lists of entries, those of the same dtypes at once as vectors."""
    kinds = [tuple(one.dtype for one in leaf) for leaf in zip(*entries, strict=True)]
    results, places = [jnp.zeros((3, 0), jnp.float32)], []
    for kind in dict.fromkeys(kinds):
        at = [place for place, other in enumerate(kinds) if other == kind]
        vectors = [jnp.stack([column[place] for place in at]) for column in entries]
        results.append(function(*vectors))
        places += at
    if len(results) <= 2:
        return results[-1]
    return jnp.concatenate(results, axis=1)[:, np.argsort(places)]


def middles(tree: Params) -> list[Array]:
    """The real part of an entry in the middle of each leaf that is looked at."""
    leaves = jax.tree.leaves(tree)
    leaves = [leaves[number] for number in _sampled(leaves)]
    if any(map(is_abstract, leaves)):
        return [jnp.real(jnp.zeros([], leaf.dtype)) for leaf in leaves]

    def middle(leaf: Array) -> Array:
        if not leaf.size:
            return jnp.real(jnp.zeros([], leaf.dtype))
        start = [size // 2 for size in leaf.shape]
        entry = jax.lax.slice(leaf, start, [at + 1 for at in start])
        return jnp.real(entry.reshape(()))

    slices = lambda leaves: [middle(jnp.asarray(leaf)) for leaf in leaves]  # noqa: E731
    return automatic(slices, leaves, like=[PartitionSpec()] * len(leaves))


def _sampled(leaves: list[Any]) -> list[int]:
    """Which leaves an entry is kept of: the smallest, as far as a share of all goes."""
    sizes = [math.prod(jnp.shape(leaf)) for leaf in leaves]
    left = max(_SMALL_TREE, _SAMPLED_SHARE * sum(sizes))
    found = []
    for number in sorted(range(len(leaves)), key=sizes.__getitem__):
        left -= sizes[number]
        if found and left < 0:
            break
        found.append(number)
    count = min(len(found), _MOST_SAMPLES)
    found.sort()
    return [found[(number * len(found)) // count] for number in range(count)]


def check_current(state: ScheduleFreeState, params: Params, name: str) -> None:
    """Require parameters that are the y of a state, where there are numbers to see."""
    (sample,) = jax.tree.leaves(state.y_sample)
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, Tracer) for leaf in (sample, *leaves)):
        return
    entries = middles(params)
    y, size, _ = np.asarray(of_entries(sample_of, entries, entries))
    expected, expected_size, _ = np.asarray(sample)
    # A few roundings: a compiled step may leave out one, or add a product in one go.
    looked_at = _sampled(leaves)
    eps = [max(float(jnp.finfo(leaves[at].dtype).eps), 2.0**-23) for at in looked_at]
    close = np.abs(y - expected) <= 4 * np.asarray(eps) * (size + expected_size)
    same = close | (y == expected) | (np.isnan(y) & np.isnan(expected))
    if np.all(same):
        return
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state.z)[0]]
    where = "/".join(path_keys(paths[looked_at[int(np.argmin(same))]]))
    raise ValueError(
        f"`{name}`: these parameters are not those that the state belongs to (leaf "
        f"{where!r} has an entry {y[np.argmin(same)]:g} where the state led to "
        f"{expected[np.argmin(same)]:g}). Pass the training parameters of the same "
        "step, with all its updates added. What scales, freezes or replaces updates "
        "(`optax.scale`, `reduce_on_plateau`, `optax.masked`) belongs inside "
        "`schedule_free`, in its inner transformation or its `learning_rate`: around "
        "it, the parameters leave the sequences that the state keeps."
    )


def eval_params(state: Any, params: Tree) -> Tree:
    r"""The Schedule-Free average :math:`x_t`: the parameters to evaluate and deploy.

    .. math:: x_t = \bigl(y_t - (1-\beta)\,z_t\bigr) / \beta

    or the average itself where the state keeps it. Cheap enough to call at any step,
    also under `jax.jit`.

    Args:
        state: An optimiser state with a Schedule-Free state anywhere in it: inside
            chains, `multi_transform`, `MultiSteps`, `inject_hyperparams`, `polyak`; of
            an `nnx.Optimizer`, its `opt_state`.
        params: The training parameters :math:`y_t` that belong to it, or a whole NNX
            or Equinox model that holds them.

    Returns:
        A tree like `params`, of its type and in its dtypes. Leaves that no
        Schedule-Free state covers (another group of a `multi_transform`, functions and
        counters of a model) are returned as they are. Of an NNX module it is another
        module; a state made by `nnx.state(module, nnx.Param)` is for `nnx.update`.

    Raises:
        ValueError: If there is no Schedule-Free state, or two cover the same leaf, or
            `params` are not what the state's last update led to. That is seen by an
            entry of each leaf (of a large tree, of each small leaf), and where the
            numbers are known: not under `jax.jit`.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = optax.chain(
        ...     optax.clip_by_global_norm(1.0), fo.schedule_free(optax.identity(), 0.1)
        ... )
        >>> params = {"w": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> fo.eval_params(state, params)["w"]
        Array([1., 1., 1.], dtype=float32)

    Source:
        Defazio et al., *The Road Less Scheduled*, arXiv 2405.15682, eq. 1 to 3.
    """

    def read(found: ScheduleFreeState, params: Params) -> Params:
        check_current(found, params, "eval_params")
        return _like(average_of(found, params), params)

    return _read(state, params, read, "eval_params")


def fast_params(state: Any, params: Tree) -> Tree:
    r"""The Schedule-Free fast iterate :math:`z_t`.

    Args:
        state: An optimiser state with a Schedule-Free state anywhere in it.
        params: The training parameters that belong to it, or a whole model, as for
            `eval_params`.

    Returns:
        A tree like `params`, of its type and in its dtypes.

    Raises:
        ValueError: If there is no Schedule-Free state, or two cover the same leaf.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> tx = fo.schedule_free(optax.identity(), learning_rate=0.5)
        >>> params = {"w": jnp.ones(3)}
        >>> _, state = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
        >>> fo.fast_params(state, params)["w"]
        Array([0.5, 0.5, 0.5], dtype=float32)
    """

    def read(found: ScheduleFreeState, params: Params) -> Params:
        return _like(found.z, params)

    return _read(state, params, read, "fast_params")


def _like(iterate: Params, params: Params) -> Params:
    """An iterate in the dtypes of the parameters."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), iterate, params)


def fast_iterate(state: Any, params: Params) -> Params:
    """The fast iterate z in the dtype that the state keeps."""
    return _read(state, params, lambda found, _: found.z, "fast_params")


def update_scaled(
    inner: optax.GradientTransformationExtraArgs,
    step_size: Scalar,
    updates: Any,
    state: Any,
    params: Params | None,
    extra_args: Mapping[str, Any],
) -> tuple[Any, Any]:
    """An update of `inner` on a learning rate that is multiplied by `step_size`.

    A `schedule_free` inside multiplies it into its own; otherwise the updates are
    multiplied, which is the same for what is linear in its learning rate.
    """
    results, state = inner.update(
        updates, state, params, step_size=step_size, **extra_args
    )
    if not schedule_free_states(state):
        # Selected, since zero times NaN is NaN.
        results = jax.tree.map(
            lambda u: jnp.where(step_size == 0, 0, step_size * u).astype(u.dtype),
            results,
        )
    return results, state


def schedule_free_states(state: Any) -> list[ScheduleFreeState]:
    """Every Schedule-Free state in an optimiser state."""
    leaves = jax.tree.leaves(state, is_leaf=_is_schedule_free)
    return [leaf for leaf in leaves if _is_schedule_free(leaf)]


def _read(state: Any, params: Any, read: Any, name: str) -> Any:
    """`params` with what `read` finds for the leaves that a state covers."""
    found = schedule_free_states(state)
    if not found:
        raise ValueError(
            f"`{name}` found no Schedule-Free state in a state of type "
            f"{type(state).__name__}. Pass the state that belongs to these parameters, "
            "of an optimiser built with `schedule_free` (in `fusion_opt`: with 'sf' "
            "among the components); without it the parameters themselves are deployed."
        )
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    # By name: the state of an `nnx.Optimizer` holds variables, a pure dict has none.
    names = [path_keys(path) for path, _ in paths]
    leaves = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True)}
    covered: set[Any] = set()
    for one in found:
        z_names = [
            path_keys(path)
            for path, _ in jax.tree_util.tree_flatten_with_path(one.z)[0]
        ]
        unknown = [path for path in z_names if path not in leaves]
        twice = [path for path in z_names if path in covered]
        if unknown or twice:
            path = "/".join((unknown or twice)[0])
            problem = (
                "which the given parameters lack: pass the parameters that the state "
                "was initialised with"
                if unknown
                else "which another Schedule-Free state covers too: use one "
                "`schedule_free` around the groups, or one in each group"
            )
            raise ValueError(f"`{name}`: the state has a leaf {path!r}, {problem}.")
        covered.update(z_names)
        own = [leaves[name] for name in z_names]
        own_tree = jax.tree.unflatten(jax.tree.structure(one.z), own)
        values = jax.tree.leaves(read(one, own_tree))
        leaves.update(zip(z_names, values, strict=True))
    return jax.tree.unflatten(treedef, [leaves[name] for name in names])


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, ScheduleFreeState)
