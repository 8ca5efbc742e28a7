"""What speed depends on and no clock is needed for.

Programs whose size doesn't depend on depth, temporary memory of one matrix, no
eigendecomposition, no second compilation, and the number of operations that the choice
between the two Newton-Schulz forms counts with.
"""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import fusionopt_jax as fo
from fusionopt_jax import _trees
from fusionopt_jax._matrices import newton_schulz

ROUTING = fo.Routing(min_dim=16, stacked=("blocks",))
# What the calls into LAPACK and cuSOLVER of eigendecompositions and SVDs are named.
EIGENDECOMPOSITION = re.compile("eigh|syev|heev|geev|jacobi|gesdd|gesvd", re.IGNORECASE)
WIDTH = 32


def parameters(depth):
    """Shapes of a small transformer with stacked blocks; tall, wide and square."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    return {
        "blocks": {
            "qkv": shape(depth, WIDTH, 3 * WIDTH),
            "proj": shape(depth, WIDTH, WIDTH),
            "down": shape(depth, 4 * WIDTH, WIDTH),
            "bias": shape(depth, WIDTH),
        },
        "head": shape(WIDTH, 10),
    }


def lowered(optimizer, params, donate=(0, 1)):
    """A whole step of an optimizer, lowered for donated parameters and state."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    optimizer = optax.with_extra_args_support(optimizer)
    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=donate).lower(params, state, params)


def compiled(optimizer, params):
    return lowered(optimizer, params).compile()


def on_cpu():
    """Compiles for a CPU, which every machine has."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def steps():
    """The default composition for two depths."""
    optimizer = fo.fusion_opt(1e-3, routing=ROUTING)
    # XLA sums axes shorter than 6 by another, shorter program.
    return {depth: compiled(optimizer, parameters(depth)) for depth in (6, 24)}


def test_program_size_is_independent_of_depth(steps):
    lines = {len(program.as_text().splitlines()) for program in steps.values()}
    assert len(lines) == 1


@pytest.mark.parametrize(
    "dtype", ["int8", pytest.param("bf16", marks=pytest.mark.exhaustive)]
)
def test_few_bits_need_a_place_for_the_sum(dtype, steps):
    """Of momentum and gradient, which fp32 writes over the old momentum."""
    optimizer = fo.fusion_opt(1e-3, routing=ROUTING, state_dtype=dtype)
    params = parameters(6)
    memory = compiled(optimizer, params).memory_analysis()
    exact = steps[6].memory_analysis()
    blocks = {name: params["blocks"][name] for name in ("qkv", "proj", "down")}
    # Besides, a few numbers for each row.
    allowed = exact.temp_size_in_bytes + 4 * size(blocks) * 1.1
    assert memory.temp_size_in_bytes <= allowed
    saved = exact.argument_size_in_bytes - memory.argument_size_in_bytes
    # A row of 96 or 32 has one scale.
    rows = sum(leaf.size // leaf.shape[-1] for leaf in blocks.values())
    rest = size(params) - size(blocks)
    moved = {"bf16": 2 * size(blocks), "int8": 3 * size(blocks) - 4 * rows}[dtype]
    # Adam's two moments of the rest; two counts of steps are new.
    assert saved == moved + 4 * rest - 2 * 4


def test_separate_layers_grow_no_loop_bodies():
    """Layers with leaves of their own share one Newton-Schulz loop for each shape."""

    def loops(depth):
        params = {
            f"block_{i}": jax.ShapeDtypeStruct((WIDTH, 3 * WIDTH), jnp.float32)
            for i in range(depth)
        }
        text = lowered(fo.ns5(routing=fo.Routing(min_dim=16)), params).as_text()
        return text.count("stablehlo.dot_general")

    assert loops(2) == loops(6) > 0


def test_newton_schulz_works_in_the_memory_of_one_matrix():
    """Temporary bytes don't grow with the number of matrices."""
    # A CPU's choice; elsewhere it has to be asked for.
    bucketing = "auto" if jax.default_backend() == "cpu" else "loop"

    def temporary(depth):
        gradients = parameters(depth)["blocks"]["down"]
        tx = optax.chain(fo.ns5(bucketing=bucketing), fo.normuon())
        state = jax.eval_shape(tx.init, gradients)
        program = jax.jit(tx.update).lower(gradients, state).compile()
        return program.memory_analysis().temp_size_in_bytes

    matrix = 4 * (4 * WIDTH * WIDTH)
    # ns5's result, on its way to normuon, grows with the depth; nothing else does.
    growth = temporary(20) - temporary(4)
    assert growth <= 16 * matrix * 1.05


@pytest.mark.parametrize("name", ["qkv", "proj", "down"])
def test_matrices_are_replaced_where_they_lie(name):
    """A loop that may overwrite gradients and state needs no second stack."""

    def growth(tx):
        def temporary(depth):
            gradients = parameters(depth)["blocks"][name]
            state = jax.eval_shape(tx.init, gradients)
            step = jax.jit(tx.update, donate_argnums=(0, 1))
            program = step.lower(gradients, state).compile()
            return program.memory_analysis().temp_size_in_bytes

        return (temporary(20) - temporary(4)) / 16

    numbers = 4 * 8 * WIDTH  # A few for each row and column.
    assert growth(fo.ns5(bucketing="loop")) <= numbers
    # It reads the gradients in two places. Bases are renewed where they lie.
    matrix = 4 * size(parameters(1)["blocks"][name])
    for every in (1, 10):
        tx = fo.kl_shampoo(bucketing="loop", update_every=every)
        assert growth(tx) <= matrix + numbers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_schedule_free_writes_each_iterate_where_it_was_read(dtype):
    """No copy of a leaf, no temporary array, the fewest passes without one."""
    shape = (1024, 1040)  # Too large for an entry of it to be looked at.
    params = {
        "kernel": jax.ShapeDtypeStruct(shape, dtype),
        "bias": jax.ShapeDtypeStruct((8,), dtype),
    }
    direction = optax.scale_by_rms(0.99, bias_correction=True)
    inner = optax.chain(direction, optax.add_decayed_weights(0.01))
    # Elsewhere one kernel writes both iterates.
    with on_cpu():
        program = compiled(fo.schedule_free(inner, 1e-3), params)
    text = program.as_text()
    entry = text[text.index("\nENTRY") :]
    assert re.findall(rf"\[{shape[0]},{shape[1]}\]\S* copy\(", entry) == []
    # Entries of the bias, and scalars.
    assert program.memory_analysis().temp_size_in_bytes <= 4096
    if dtype == jnp.float32:
        # Of nu: 2 reads, 1 write; of y: y, z, g and nu, 1 write; of z: z, g, nu, 1.
        passes = program.cost_analysis()["bytes accessed"] / (4 * size(params))
        assert passes <= 12.01


def test_accelerators_get_the_program_as_it_is_written():
    """What keeps CPUs from a copy would keep a GPU from writing both at once."""
    params = parameters(2)
    optimizer = fo.fusion_opt(1e-3, routing=ROUTING, components={"sf"})
    state = jax.eval_shape(optimizer.init, params)
    step = jax.jit(lambda *args: optimizer.update(*args, value=jnp.float32(1)))
    traced = step.trace(params, state, params)
    for platform, barriers in (("cpu", 5), ("cuda", 0), ("tpu", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.optimization_barrier") == barriers


def test_small_leaves_of_one_shape_need_one_program():
    """Neither the norm nor `normuon` has more reductions for more such leaves."""

    def reductions(count):
        norms = jax.jit(_trees.l2_norm).lower([jnp.ones(384)] * count).as_text()
        matrices = {f"{i}": jnp.ones((32, 48)) for i in range(count)}
        tx = fo.normuon()
        step = jax.jit(tx.update).lower(matrices, tx.init(matrices)).as_text()
        # One for each matrix: the mean squares of its neurons.
        return norms.count("stablehlo.reduce("), step.count("stablehlo.reduce(") - count

    assert reductions(3) == reductions(6)


def test_schedule_free_needs_no_more_than_one_copy_of_the_parameters():
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    tx = fo.schedule_free(optax.scale_by_rms(0.99), 1e-3)
    temporary = compiled(tx, params).memory_analysis().temp_size_in_bytes
    # 4 bytes a parameter, and a few scalars.
    assert temporary <= 4 * size(params) + 1024


def test_schedule_free_can_go_through_the_leaves_one_by_one():
    """What it knows foreign parameters by keeps few leaves alive."""
    leaf = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    params = {f"kernel_{i}": leaf for i in range(8)} | {"bias": jnp.zeros(8)}
    tx = fo.schedule_free(optax.scale_by_rms(0.99), 1e-3)
    # A schedule of XLA's for CPUs.
    schedule = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    with on_cpu():
        program = lowered(tx, params).compile(schedule)
    # The old iterate of the kernel that is looked at, that of another while its new
    # parameters are made, and a few scalars.
    assert program.memory_analysis().temp_size_in_bytes <= 2 * 4 * leaf.size + 4096


@pytest.mark.parametrize("norm", [_trees.l2_norm, _trees.l1_norm])
def test_norms_are_taken_in_no_memory(norm):
    # Of one shape, since XLA stores what two leaves would share.
    leaf = jax.ShapeDtypeStruct((64, 64, 64), jnp.float32)
    program = jax.jit(norm).lower([leaf, leaf]).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 4096


@pytest.mark.parametrize(
    "components",
    [("ns5", "normuon", "sf"), ("shampoo", "ns5", "normuon", "sf")],
    ids=["sf-normuon", "with-shampoo"],
)
def test_no_eigendecomposition(components):
    optimizer = fo.fusion_opt(1e-3, components=components, routing=ROUTING)
    program = lowered(optimizer, parameters(2)).as_text()
    calls = re.findall(r"custom_call @([\w$]+)", program)
    assert [name for name in calls if EIGENDECOMPOSITION.search(name)] == []


def test_an_eigendecomposition_would_be_found():
    program = jax.jit(jnp.linalg.eigh).lower(jnp.eye(4)).as_text()
    calls = re.findall(r"custom_call @([\w$]+)", program)
    assert [name for name in calls if EIGENDECOMPOSITION.search(name)]


def test_compiles_once():
    """Neither other values nor the state of a later step compiles anything again."""
    optimizer = fo.fusion_opt(1e-3, routing=ROUTING)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), parameters(2))
    step = jax.jit(
        lambda grads, state, params, loss: optimizer.update(
            grads, state, params, value=loss
        )
    )
    state = optimizer.init(params)
    for scale in (1.0, 2.0, 3.0):
        grads = jax.tree.map(lambda leaf, scale=scale: scale * leaf, params)
        _, state = step(grads, state, params, jnp.float32(scale))
    assert step._cache_size() == 1


def counted_operations(function, *args):
    """Operations of all matrix products of a program, loops counted as often as run."""

    def walk(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                contracted = equation.params["dimension_numbers"][0][0]
                left = equation.invars[0].aval.shape
                inner = 1
                for axis in contracted:
                    inner *= left[axis]
                total += 2 * inner * equation.outvars[0].aval.size
            times = equation.params.get("length", 1)
            for inner_jaxpr in jaxprs_in_params(equation.params):
                total += times * walk(inner_jaxpr)
        return total

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("steps_taken", [1, 4, 5, 8])
@pytest.mark.parametrize("method", ["plain", "gram"])
@pytest.mark.parametrize("hot_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("preconditioner", ["frobenius", "aol"])
def test_operations_are_counted_exactly(
    coefficients, steps_taken, method, hot_dtype, preconditioner
):
    table = newton_schulz.coefficient_table(coefficients, steps_taken)
    stack = jax.ShapeDtypeStruct((1, 8, 24), jnp.float32)
    counted = counted_operations(
        lambda stack: newton_schulz.newton_schulz(
            stack,
            table,
            method=method,
            hot_dtype=hot_dtype,
            preconditioner=preconditioner,
            platforms=("other",),
        ),
        stack,
    )
    expected = newton_schulz.newton_schulz_flops(8, 24, table, method, hot_dtype)
    assert counted == expected


def test_the_cheaper_form_is_taken():
    """Gram from n/m of 1.5 on: 4a + 34 against 20a + 10 units of m³ for five steps."""
    table = newton_schulz.coefficient_table("quintic", 5)
    chosen = {n: newton_schulz.cheaper_method(64, n, table) for n in (64, 95, 97, 256)}
    assert chosen == {64: "plain", 95: "plain", 97: "gram", 256: "gram"}
