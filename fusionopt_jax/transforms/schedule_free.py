r"""Schedule-Free averaging around any direction.

.. math::
    z_{t+1} &= z_t - \gamma_t u_t \\
    x_{t+1} &= (1 - c_t)\,x_t + c_t\,z_{t+1}, \qquad
    c_t = w_t / {\textstyle\sum_{i \le t} w_i}, \quad
    w_t = (t+1)^r \, (\max_{i \le t} \gamma_i)^p \\
    y_{t+1} &= (1 - \beta_t)\,z_{t+1} + \beta_t\,x_{t+1}
"""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from fusionopt_jax._checks import (
    check_choice,
    check_count,
    check_non_negative,
    check_number,
    check_rate_or_schedule,
)
from fusionopt_jax._direction import check_direction, check_direction_on
from fusionopt_jax._leaves import check_leaves, copied, wide_dtype, widened
from fusionopt_jax._matrices.placement import device_count
from fusionopt_jax._optax import TransformLike, accepting_extra_args, transformation
from fusionopt_jax._rematerialised import Origin, afterwards, with_origins
from fusionopt_jax._types import Array, Count, Number, Params, Scalar, ScalarOrSchedule
from fusionopt_jax.iterates import (
    ScheduleFreeState,
    average_of,
    middles,
    of_entries,
    sample_of,
)

InnerParams: TypeAlias = Literal["fast", "gradient", "average"]

# Not `jnp.float32` itself: it can be called, and `optax.inject_hyperparams` takes every
# callable for a schedule.
_FLOAT32 = jnp.dtype(jnp.float32)

_INNER_PARAMS: tuple[InnerParams, ...] = ("fast", "gradient", "average")


def schedule_free(
    inner: TransformLike,
    learning_rate: ScalarOrSchedule,
    *,
    b1: Number = 0.9,
    b1_max: Number | None = None,
    b1_anneal_steps: int | jax.Array = 0,
    weight_lr_power: Number = 2.0,
    r: Number = 0.0,
    averaging_warmup: int | jax.Array = 0,
    inner_params: InnerParams = "fast",
    state_dtype: Any = _FLOAT32,
    keep_average: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a learning-rate schedule by averaging the iterates.

    Gradients are taken at :math:`y`, which training holds as its parameters; `inner`
    turns them into a direction :math:`u`; the fast iterate :math:`z` takes the step and
    :math:`x`, its weighted average, is what `eval_params` deploys:

    .. math::
        z &\leftarrow z - \gamma_t u, \qquad
        x \leftarrow (1 - c_t)\,x + c_t z, \qquad
        y \leftarrow (1 - \beta_t)\,z + \beta_t x \\
        c_t &= w_t / {\textstyle\sum_{i \le t} w_i}, \qquad
        w_t = (t+1)^r \, (\max_{i \le t} \gamma_i)^p

    where :math:`\gamma_t` is `learning_rate` times the extra argument `step_size`, if
    one is handed down (see `polyak`). `inner` sees :math:`z` as its parameters, so
    `optax.add_decayed_weights` inside it decays the fast iterate.

    Args:
        inner: Returns a direction: positive sign, no learning rate. A complete
            optimiser, which `optax.contrib.schedule_free` takes, is refused.
        learning_rate: Non-negative number, or a schedule of the step count from 0.
        b1: Interpolation :math:`\beta` between the fast iterate (0) and the average
            (1), in [0, 1]. With a momentum inside, 0.6 serves better than 0.9.
        b1_max: Where :math:`\beta` ends if it is annealed; `None` leaves it at `b1`.
        b1_anneal_steps: Over how many steps :math:`\log(1-\beta)` goes from `b1` to
            `b1_max`; 0 leaves it at `b1`.
        weight_lr_power: The power :math:`p` of the largest rate so far.
        r: The power of the step number; larger ones forget early iterates sooner.
        averaging_warmup: Steps during which the average follows the fast iterate
            (:math:`c = 1`) and no weight accumulates.
        inner_params: What `inner` gets as its parameters: `"fast"` (:math:`z`),
            `"gradient"` (:math:`y`) or `"average"` (:math:`x`).
        state_dtype: Dtype of :math:`z` and :math:`x`.
        keep_average: Store :math:`x` instead of recovering it from :math:`y` and
            :math:`z`, at the price of one more copy of the parameters. `None` stores it
            where recovering would lose it: for parameters of a narrower dtype than
            `state_dtype`, and for `b1` = 0.

    Returns:
        A transformation that needs `params` and whose updates, of the parameters'
        dtypes, lead from the current :math:`y` to the next.

    Raises:
        ValueError: If `inner` goes against the gradient, as a complete optimiser does,
            a setting is out of range, `params` is missing from an update, or
            `b1` is 0 with `keep_average=False`.

    Example:
        >>> import jax.numpy as jnp, optax, fusionopt_jax as fo
        >>> direction = optax.chain(
        ...     optax.scale_by_adam(b1=0.0, b2=0.99), optax.add_decayed_weights(0.01)
        ... )
        >>> tx = fo.schedule_free(direction, learning_rate=0.1)
        >>> params = {"w": jnp.array([1.0, -2.0])}
        >>> state = tx.init(params)
        >>> for _ in range(60):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.max(jnp.abs(fo.eval_params(state, params)["w"])) < 0.6)
        True

    Source:
        Defazio et al., *The Road Less Scheduled*, arXiv 2405.15682, eq. 1 to 3, and its
        published code (weights, warm-up); *ScheduleFree+*, arXiv 2605.19095 (annealed
        :math:`\beta`, averaging warm-up); *SF-NorMuon*, arXiv 2605.23061 (decay on the
        fast iterate). `optax.contrib.schedule_free` skips the first value of a schedule
        and takes the dtype of its scalars from the parameters; here they are fp32.
    """
    check_rate_or_schedule("learning_rate", learning_rate)
    check_number("b1", b1, low=0.0, high=1.0)
    if b1_max is not None:
        check_number("b1_max", b1_max, low=0.0, high=1.0, high_open=True)
    check_count("b1_anneal_steps", b1_anneal_steps)
    check_non_negative("weight_lr_power", weight_lr_power)
    check_number("r", r)
    check_count("averaging_warmup", averaging_warmup)
    check_choice("inner_params", inner_params, _INNER_PARAMS)
    if keep_average is False and isinstance(b1, int | float) and b1 == 0:
        raise ValueError(
            "`keep_average` can't be False with `b1`=0: the parameters are then the "
            "fast iterate and the average can't be recovered from them."
        )
    if isinstance(state_dtype, jax.Array):
        raise TypeError(
            "`state_dtype` must be a dtype, got an array. Under "
            "`optax.inject_hyperparams`, name it in `static_args`."
        )
    inner_tx = accepting_extra_args(inner)
    is_direction = check_direction("schedule_free", inner)
    state_dtype = jnp.dtype(state_dtype)

    def stores_average(params: Params) -> bool:
        if keep_average is not None:
            return keep_average
        b1_is_zero = isinstance(b1, int | float) and b1 == 0
        width = jnp.finfo(state_dtype).bits
        leaves = jax.tree.leaves(params)
        # `optax.tree.map_params` calls `init` on a stand-in without leaves to find the
        # state that is shaped like the parameters; an average has to be found too.
        return (
            b1_is_zero
            or not leaves
            or any(jnp.finfo(leaf.dtype).bits < width for leaf in leaves)
        )

    def interpolation(count: Count) -> Scalar:
        r"""β of this step."""
        start = jnp.asarray(b1, jnp.float32)
        if b1_max is None:
            return start
        steps = jnp.asarray(b1_anneal_steps, jnp.float32)
        elapsed = jnp.minimum(count / jnp.maximum(steps, 1.0), 1.0)
        progress = jnp.where(steps > 0, elapsed, 0.0)
        return 1 - (1 - start) * ((1 - b1_max) / (1 - start)) ** progress

    def init_fn(params: Params) -> ScheduleFreeState:
        check_leaves("schedule_free", params, complex_too=True)
        if not is_direction:
            check_direction_on("schedule_free", inner_tx, params)

        def iterate() -> Params:
            """A copy of the parameters as the state keeps them."""
            return jax.tree.map(lambda p: copied(p, wide_dtype(p, state_dtype)), params)

        z = iterate()
        x = iterate() if stores_average(params) else None
        return ScheduleFreeState(
            count=jnp.zeros([], jnp.int32),
            b1=interpolation(jnp.zeros([], jnp.int32)),
            weight_sum=jnp.zeros([], jnp.float32),
            max_learning_rate=jnp.zeros([], jnp.float32),
            y_sample=of_entries(sample_of, middles(params), middles(z)),
            z=z,
            x=x,
            inner_state=inner_tx.init(params),
        )

    def update_fn(
        updates: Any,
        state: ScheduleFreeState,
        params: Params | None = None,
        *,
        step_size: Array | float = 1.0,
        **extra_args: Any,
    ) -> tuple[Any, ScheduleFreeState]:
        if params is None:
            raise ValueError(
                "`schedule_free` needs the current parameters: call "
                "`update(grads, state, params)`."
            )
        check_leaves("schedule_free", updates, complex_too=True)
        x = average_of(state, params)
        seen = {"fast": state.z, "gradient": params, "average": x}[inner_params]

        def directed(updates: Any, inner_state: Any, seen: Params) -> tuple[Any, Any]:
            return inner_tx.update(updates, inner_state, seen, **extra_args)

        handed = (updates, state.inner_state, seen)
        # An entry of an array on several devices is an exchange between them.
        leaves = jax.tree.leaves(handed)
        again = (
            inner_params == "fast"
            and any(isinstance(leaf, Tracer) for leaf in leaves)
            and device_count(*jax.tree.leaves(params)) == 1
        )
        if again:
            (direction, inner_state), origins = with_origins(directed, *handed)
        else:
            (direction, inner_state), origins = directed(*handed), None

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        gamma = jnp.asarray(rate, jnp.float32) * jnp.asarray(step_size, jnp.float32)
        largest = jnp.maximum(state.max_learning_rate, gamma)
        weight_sum, c = _averaging(state, largest)
        beta = interpolation(state.count)

        def fast(z: Array, u: Array, gamma: Scalar = gamma) -> Array:
            # Selected, since zero times NaN is NaN, and a step size of zero no step.
            return jnp.where(gamma == 0, z, z - gamma * widened(u)).astype(z.dtype)

        def average(x: Array, z_next: Array) -> Array:
            return (x + c * (z_next - x)).astype(x.dtype)

        def step(y: Array, z_next: Array, x_next: Array) -> Array:
            y_next = z_next + beta * (x_next - z_next)
            return (y_next - y.astype(z_next.dtype)).astype(y.dtype)

        def replacing(
            y: Array, z: Array, x: Array, update: Array, origin: Origin
        ) -> tuple[Array, Array]:
            """The next z and x, each computed when what it replaces was last read."""
            # The parameters, as `optax.apply_updates` makes them.
            written = (y + update).astype(y.dtype)
            if state.x is not None:
                rate, (last_z, last_x, *made_of) = afterwards(
                    written, gamma, z, x, *origin.arrays
                )
                x = average(last_x, fast(last_z, origin.again(*made_of), rate))
                written = x
            rate, (last_z, *made_of) = afterwards(written, gamma, z, *origin.arrays)
            return fast(last_z, origin.again(*made_of), rate), x

        def next_sample(
            state: ScheduleFreeState, params: Params, z_next: Params, x_next: Params
        ) -> Array:
            """An entry of each leaf of the parameters that this step leads to."""
            # Cut out of what is stored anyway: the updates, the average that is
            # recovered and the last z would have to be stored for it, which are else
            # used up as they are made.
            last = list(state.y_sample[2]) if state.x is None else middles(x_next)

            def sample(y: Array, z: Array, last: Array) -> Array:
                if state.x is None:
                    known = state._replace(z=last.astype(z.dtype))
                    last = average(average_of(known, y), z)
                return sample_of(y, z, step(y, z, last))

            return of_entries(sample, middles(params), middles(z_next), last)

        z_next = jax.tree.map(fast, state.z, direction)
        x_next = jax.tree.map(average, x, z_next)
        steps = jax.tree.map(step, params, z_next, x_next)
        if origins is not None:
            tree = jax.tree.structure(params)
            columns = map(jax.tree.leaves, (params, state.z, x, steps))
            pairs = list(map(replacing, *columns, origins))
            z_next = tree.unflatten([z for z, _ in pairs])
            x_next = tree.unflatten([x for _, x in pairs])
        return steps, ScheduleFreeState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            b1=beta,
            weight_sum=weight_sum,
            max_learning_rate=largest,
            y_sample=next_sample(state, params, z_next, x_next),
            z=z_next,
            x=None if state.x is None else x_next,
            inner_state=inner_state,
        )

    def _averaging(state: ScheduleFreeState, largest: Scalar) -> tuple[Scalar, Scalar]:
        """The sum of weights after this step, and this step's share c of it."""
        number = state.count.astype(jnp.float32) + 1
        weight = number**r * largest**weight_lr_power
        warming = state.count < averaging_warmup
        weight_sum = state.weight_sum + jnp.where(warming, 0.0, weight)
        share = jnp.where(
            weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1), 0
        )
        return weight_sum, jnp.where(warming, 1.0, share)

    return transformation(init_fn, update_fn)
