"""Which leaf is a matrix, why, and what a person is told when nothing explains it."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import fusionopt_jax as fo
from fusionopt_jax.routing import embeddings
from tests import _cases


def shapes(tree):
    """A tree of shapes as a tree of arrays without data."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


TRANSFORMER = shapes(
    {
        "blocks": {
            "qkv": {"kernel": (4, 128, 384), "bias": (4, 384)},
            "norm": {"scale": (4, 128)},
        },
        "embedding": (1000, 128),
        "patch": {"kernel": (8, 8, 3, 128)},
        "head": {"kernel": (128, 256), "bias": (256,)},
        "small": {"kernel": (128, 10)},
    }
)


def label_of(routing, params=TRANSFORMER):
    return {route.path: route.label for route in routing.routes(params)}


def reason_of(routing, params=TRANSFORMER):
    return {route.path: route.reason for route in routing.routes(params)}


def matrices_of(routing, params=TRANSFORMER):
    return {
        route.path: route.view.stacks[0]
        for route in routing.routes(params)
        if route.view is not None
    }


def test_stacked_layers_count_matrices():
    routing = fo.Routing(stacked=["blocks"])
    labels = label_of(routing)
    spectral = {path for path, label in labels.items() if label == "spectral"}
    assert spectral == {"blocks/qkv/kernel", "head/kernel"}
    assert matrices_of(routing)["blocks/qkv/kernel"] == (4, 128, 384)
    # A stacked bias is still a bias, though it has two axes of more than 128.
    wide = shapes({"blocks": {"bias": (256, 256)}, "bias": (256, 256)})
    assert label_of(fo.Routing(stacked=["blocks"]), wide) == {
        "blocks/bias": "scalar",
        "bias": "spectral",
    }


def test_without_the_prefix_a_stack_is_scalar_and_the_table_says_why():
    routing = fo.Routing()
    assert label_of(routing)["blocks/qkv/kernel"] == "scalar"
    assert reason_of(routing)["blocks/qkv/kernel"] == "rank 3, no rule"
    assert reason_of(routing)["patch/kernel"] == "rank 4, no rule"
    assert "rank 4, no rule" in routing.table(TRANSFORMER)


def test_reasons_are_those_of_the_decision():
    reasons = reason_of(
        fo.Routing(
            [fo.Rule("head/kernel", "mine")],
            stacked=["blocks"],
            force_scalar=["qkv/kernel"],
        )
    )
    assert reasons == {
        "blocks/qkv/kernel": "force_scalar 'qkv/kernel'",
        "blocks/qkv/bias": "1-D",
        "blocks/norm/scale": "1-D",
        "embedding": "embedding-like name",
        "patch/kernel": "rank 4, no rule",
        "head/kernel": "rule 'head/kernel'",
        "head/bias": "1-D",
        "small/kernel": "a side is below 128",
    }


def test_chunks_are_matrices_of_their_own():
    for rule in (
        fo.Rule("qkv/kernel", chunks=3),
        fo.Rule("qkv/kernel", axes=fo.MatrixAxes(chunks=3)),
    ):
        routing = fo.Routing([rule], stacked=["blocks"])
        assert matrices_of(routing)["blocks/qkv/kernel"] == (12, 128, 128)
        assert label_of(routing)["blocks/qkv/kernel"] == "spectral"
    by_input = fo.Rule("head/kernel", axes=fo.MatrixAxes(chunks=2, chunk_axis="input"))
    routing = fo.Routing([by_input], min_dim=64, stacked=["blocks"])
    assert matrices_of(routing)["head/kernel"] == (2, 64, 256)


def test_the_size_of_a_chunk_decides():
    # 128 x 384 is large enough; its six chunks of 128 x 64 are not.
    routing = fo.Routing([fo.Rule("qkv/kernel", chunks=6)], stacked=["blocks"])
    assert label_of(routing)["blocks/qkv/kernel"] == "scalar"
    routing = fo.Routing([fo.Rule("qkv", "spectral", chunks=6)], stacked=["blocks/qkv"])
    with pytest.raises(ValueError, match=r"'blocks/qkv/bias'.*no.*matrix|MatrixAxes"):
        routing.labels(TRANSFORMER)


def test_chunks_that_do_not_divide_are_named():
    routing = fo.Routing([fo.Rule("head/kernel", chunks=3)])
    with pytest.raises(ValueError, match=r"'head/kernel'.*`chunks`=3.*256"):
        routing.labels(TRANSFORMER)


GROUPED = {"qkv": {"kernel": jax.ShapeDtypeStruct((4, 128, 512), jnp.float32)}}


@pytest.mark.parametrize("chunks", [(256, 128, 128), [256, 128, 128]])
def test_chunks_may_be_unequal(chunks):
    routing = fo.Routing([fo.Rule("qkv/kernel", chunks=chunks)], stacked=["qkv"])
    (route,) = routing.routes(GROUPED)
    assert route.label == "spectral"
    assert route.view.stacks == ((4, 128, 256), (4, 128, 128), (4, 128, 128))
    assert "4 x (128, 256) + 8 x (128, 128)" in routing.table(GROUPED)
    equal = fo.Routing([fo.Rule("qkv/kernel", chunks=4)], stacked=["qkv"])
    with pytest.raises(
        ValueError, match=r"spectral 16x\(128, 128\), now .* 4x\(128, 256\) \+ 8x"
    ):
        routing.check(GROUPED, equal.fingerprint(GROUPED))
    # The same sizes in another order.
    moved = fo.Routing([fo.Rule("qkv/kernel", chunks=(128, 256, 128))], stacked=["qkv"])
    with pytest.raises(ValueError, match="moved"):
        routing.check(GROUPED, moved.fingerprint(GROUPED))
    assert hash(routing) == hash(
        fo.Routing([fo.Rule("qkv/kernel", chunks=tuple(chunks))], stacked=["qkv"])
    )


def test_the_smallest_chunk_decides():
    routing = fo.Routing([fo.Rule("qkv", chunks=(384, 64, 64))], stacked=["qkv"])
    assert label_of(routing, GROUPED) == {"qkv/kernel": "scalar"}


def test_equal_sizes_blocks_and_a_number_are_one_split():
    axes = [
        fo.MatrixAxes(chunks=4),
        fo.MatrixAxes(chunks=(128,) * 4),
        fo.MatrixAxes(block=128),
    ]
    prints = {
        fo.Routing([fo.Rule("qkv", axes=each)], stacked=["qkv"]).fingerprint(GROUPED)
        for each in axes
    }
    assert len(prints) == 1
    by_input = fo.MatrixAxes(block=32, chunk_axis="input")
    routing = fo.Routing([fo.Rule("qkv", "spectral", by_input)], stacked=["qkv"])
    assert matrices_of(routing, GROUPED) == {"qkv/kernel": (16, 32, 512)}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"chunks": (256, 128)},
            r"'qkv/kernel'.*\(256, 128\).*384.*output side is 512",
        ),
        ({"block": 100}, r"'qkv/kernel'.*`block`=100.*side is 512"),
    ],
)
def test_sizes_that_do_not_fit_are_named(axes, message):
    rule = fo.Rule("qkv", axes=fo.MatrixAxes(**axes))
    routing = fo.Routing([rule], stacked=["qkv"])
    with pytest.raises(ValueError, match=message):
        routing.table(GROUPED)


@pytest.mark.parametrize(
    "wrong",
    [{"chunks": ()}, {"chunks": (3, 0)}, {"chunks": 0}, {"block": 0}],
)
def test_chunks_are_positive_numbers(wrong):
    with pytest.raises(ValueError, match=r"`(chunks|block)`"):
        fo.MatrixAxes(**wrong)


def test_chunks_and_blocks_exclude_each_other():
    with pytest.raises(ValueError, match="`chunks`=3 and `block`=64"):
        fo.MatrixAxes(chunks=3, block=64)


def test_layouts_swap_inputs_and_outputs():
    params = shapes({"w": (200, 300)})
    assert matrices_of(fo.Routing(), params)["w"] == (1, 200, 300)
    assert matrices_of(fo.Routing(layout="out_in"), params)["w"] == (1, 300, 200)


def test_a_convolution_is_explained_by_its_axes():
    for axes in (
        fo.MatrixAxes(reduction_axis=(0, 1, 2), output_axis=3),
        fo.MatrixAxes(reduction_axis=[0, 1, 2], output_axis=-1),
        optax.contrib.MuonDimensionNumbers((0, 1, 2), 3),
    ):
        routing = fo.Routing([fo.Rule("patch/kernel", axes=axes)])
        assert matrices_of(routing)["patch/kernel"] == (1, 192, 128)
        assert label_of(routing)["patch/kernel"] == "spectral"


def test_dimension_numbers_of_optax_skip_the_layer_axis():
    rule = fo.Rule("qkv/kernel", axes=optax.contrib.MuonDimensionNumbers(0, 1))
    routing = fo.Routing([rule], stacked=["blocks"])
    assert matrices_of(routing)["blocks/qkv/kernel"] == (4, 128, 384)
    rule = fo.Rule("qkv/kernel", axes=optax.contrib.MuonDimensionNumbers(1, 2))
    assert matrices_of(fo.Routing([rule]))["blocks/qkv/kernel"] == (4, 128, 384)


def test_axes_that_a_leaf_lacks_are_named():
    rule = fo.Rule("head/kernel", axes=fo.MatrixAxes(2, 1))
    with pytest.raises(
        ValueError, match=r"`reduction_axis`=2.*'head/kernel'.*128, 256"
    ):
        fo.Routing([rule]).labels(TRANSFORMER)
    rule = fo.Rule("qkv/kernel", axes=fo.MatrixAxes(2, 1))
    with pytest.raises(ValueError, match="leading axis counts layers"):
        fo.Routing([rule], stacked=["blocks"]).labels(TRANSFORMER)
    rule = fo.Rule("head/kernel", axes=fo.MatrixAxes(0, -2))
    with pytest.raises(ValueError, match="use an axis twice"):
        fo.Routing([rule]).labels(TRANSFORMER)


@pytest.mark.parametrize("component", [fo.ns5, fo.normuon, fo.kl_shampoo])
def test_leaves_without_matrices_are_an_error_of_the_component(component):
    name = component.__name__
    with pytest.raises(ValueError, match=rf"`{name}`.*'b'.*float32\[3\].*multi_trans"):
        component().init({"b": jnp.ones(3)})
    kernel = {"conv": {"kernel": jnp.ones((3, 3, 4, 8))}}
    with pytest.raises(ValueError, match=r"'conv/kernel'.*MatrixAxes\(reduction_axis"):
        component(routing=fo.Routing(min_dim=1)).init(kernel)
    # Without a routing it is a stack of its last two axes.
    component().init(kernel)


def test_a_rule_that_sends_an_unexplained_kernel_to_the_matrices_is_an_error():
    routing = fo.Routing([fo.Rule("patch/kernel", "spectral")])
    with pytest.raises(ValueError, match=r"'patch/kernel'.*float32\[8, 8, 3, 128\]"):
        routing.labels(TRANSFORMER)
    with pytest.raises(ValueError, match="'bias'"):
        fo.Routing([fo.Rule("bias", "spectral")]).labels({"bias": jnp.ones(3)})


@pytest.mark.parametrize(
    "path",
    [
        "embedding",
        "embed",
        "wte",
        "token_embedding",
        "y_embedder/embedding_table",
        "wte/weight",
        "wpe/embedding",
        "Embed_0/embedding",
        "emb/weight",
        "token_emb/weight",
        "pos_emb",
        "pos_embed",
        "encoder/posembed_input/pos_embedding",
        "positional_encoding",
        "cls_token",
        "register_tokens",
        "rel_bias_table",
        "relative_position_bias_table",
        "relative_attention_bias/embedding",
        "relpos_bias/rel_bias",
        "codebook",
        "lm_head/kernel",
        "lm_head/weight",
        "LM_Head",
        "unembed",
        "unembed/kernel",
        "embed_out/kernel",
        "output_embedding/kernel",
        "decoder/logits_dense/kernel",
    ],
)
def test_embeddings_are_scalar(path):
    params = shapes({path: (1000, 256)})
    assert label_of(fo.Routing(), params) == {path: "scalar"}
    assert reason_of(fo.Routing(), params) == {path: "embedding-like name"}
    assert "embedding-like name" in fo.Routing().table(params)
    # Another rate says nothing of what it is.
    scaled = fo.Routing([fo.Rule(".", scale=0.1)])
    assert label_of(scaled, params) == {path: "scalar"}
    # Unless a rule says otherwise.
    routing = fo.Routing([fo.Rule(".", "spectral")])
    assert label_of(routing, params) == {path: "spectral"}


def test_every_name_of_an_embedding_is_tested_as_one():
    for name in (*embeddings.TABLES, *embeddings.HEADS):
        for path in (name, f"layer/{name}/weight", f"layer/my_{name}"):
            assert label_of(fo.Routing(), shapes({path: (256, 256)})) == {
                path: "scalar"
            }


@pytest.mark.parametrize(
    "path",
    [
        "x_embedder/proj/kernel",
        "embedding/kernel",
        "head",
        "head/kernel",
        "token_mixing/kernel",
        "member/weight",
        "tokenizer/kernel",
    ],
)
def test_projections_beside_embeddings_are_matrices(path):
    assert label_of(fo.Routing(), shapes({path: (256, 256)})) == {path: "spectral"}


def linen_attention():
    """The parameters of Linen's attention: four kernels and four biases."""
    layer = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=128)
    x = jnp.ones((1, 2, 96))
    return jax.eval_shape(layer.init, jax.random.key(0), x, x)["params"]


def nnx_attention():
    """The same of NNX's."""
    layer = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(
            4, 96, qkv_features=128, decode=False, rngs=nnx.Rngs(0)
        )
    )
    return nnx.state(layer, nnx.Param)


@pytest.mark.parametrize("library", [linen_attention, nnx_attention])
@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stacked"])
def test_the_attention_kernels_of_flax_have_a_ready_rule(library, stacked):
    params = {"body": {"attn": library(), "out": jnp.ones((128, 128))}}
    if stacked:
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), params
        )
    settings = {"min_dim": 96, "stacked": ["body"] if stacked else []}
    layers = 3 if stacked else 1
    kernels = {f"body/attn/{name}/kernel" for name in ("query", "key", "value", "out")}
    labels = label_of(fo.Routing(**settings), params)
    assert {labels[path] for path in kernels} == {"scalar"}

    whole = fo.Routing(fo.attention_rules(), **settings)
    labels = label_of(whole, params)
    spectral = {path for path, label in labels.items() if label == "spectral"}
    assert spectral == kernels | {"body/out"}
    matrices = matrices_of(whole, params)
    assert matrices["body/attn/query/kernel"] == (layers, 96, 128)
    assert matrices["body/attn/out/kernel"] == (layers, 128, 96)

    heads = fo.Routing(fo.attention_rules("attn", per_head=True), **settings)
    matrices = matrices_of(heads, params)
    assert label_of(heads, params) == labels
    assert matrices["body/attn/query/kernel"] == (layers * 4, 96, 32)
    assert matrices["body/attn/out/kernel"] == (layers * 4, 32, 96)


def test_the_matrices_of_a_head_are_those_that_flax_multiplies_by(rng):
    # A head's part of a projection is x @ kernel[:, head]; of the output,
    # values[head] @ kernel[head].
    params = {
        "query": {"kernel": jnp.asarray(rng.normal(size=(6, 2, 4)), jnp.float32)},
        "out": {"kernel": jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)},
    }
    routes = fo.Routing(fo.attention_rules(per_head=True)).routes(params)
    stacks = {
        route.path: route.view.to_stacks(leaf)[0]
        for route, leaf in zip(routes, jax.tree.leaves(params), strict=True)
    }
    for head in range(2):
        query = params["query"]["kernel"][:, head]
        assert jnp.array_equal(stacks["query/kernel"][head], query)
        out = params["out"]["kernel"][head]
        assert jnp.array_equal(stacks["out/kernel"][head], out)


def test_attention_rules_can_be_kept_to_some_layers():
    kernel = {"kernel": (128, 2, 64)}
    out = {"kernel": (2, 64, 128)}
    layer = {"query": kernel, "key": kernel, "value": kernel, "out": out}
    params = shapes({"encoder": layer, "decoder": layer})
    labels = label_of(fo.Routing(fo.attention_rules("^decoder")), params)
    spectral = {path for path, label in labels.items() if label == "spectral"}
    assert spectral == {f"decoder/{name}/kernel" for name in layer}
    with pytest.raises(ValueError, match="`within`"):
        fo.attention_rules("(")
    # Another layer of that name is told, and the argument is the remedy.
    params = shapes({"attn": layer, "out": {"kernel": (128, 128)}})
    with pytest.raises(ValueError, match=r"'out/kernel'"):
        fo.Routing(fo.attention_rules()).labels(params)
    fo.Routing(fo.attention_rules("^attn")).labels(params)


def test_the_first_rule_that_matches_decides():
    rules = [fo.Rule("head/kernel", "first"), fo.Rule("kernel", "second")]
    labels = label_of(fo.Routing(rules))
    assert labels["head/kernel"] == "first"
    assert labels["small/kernel"] == "second"
    # A pattern is found anywhere in the path, so anchors matter.
    assert label_of(fo.Routing([fo.Rule("^head", "mine")]))["head/bias"] == "mine"


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        (fo.Routing([fo.Rule("heads", "scalar")]), r"Rule 'heads' matches no leaf"),
        (fo.Routing(force_scalar=["heads"]), "`force_scalar` entry 'heads'"),
        (fo.Routing(stacked=["block"]), "`stacked` prefix 'block' matches no leaf"),
    ],
)
def test_what_matches_nothing_is_an_error_that_lists_the_paths(routing, words):
    for use in (routing.labels, routing.table, routing.fingerprint):
        with pytest.raises(ValueError, match=rf"{words}.*blocks/norm/scale"):
            use(TRANSFORMER)


def test_force_scalar_beats_the_rules():
    routing = fo.Routing([fo.Rule("head/kernel", "spectral")], force_scalar=["^head/"])
    assert label_of(routing)["head/kernel"] == "scalar"


def test_a_label_depends_on_path_and_shape_alone():
    routing = fo.Routing(min_dim=8)
    arrays = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    for tree in (
        arrays,
        optax.tree.cast(arrays, jnp.bfloat16),
        shapes({"w": (8, 8), "b": (8,)}),
    ):
        assert routing.labels(tree) == {"w": "spectral", "b": "scalar"}
    inside = []
    jax.jit(lambda tree: inside.append(routing.labels(tree)))(arrays)
    assert inside == [{"w": "spectral", "b": "scalar"}]


def test_masked_leaves_are_passed_over():
    params = {"w": jnp.ones((8, 8)), "b": optax.MaskedNode()}
    labels = fo.Routing(min_dim=8).labels(params)
    assert labels == {"w": "spectral", "b": optax.MaskedNode()}
    assert fo.Routing([fo.Rule("nothing", "scalar")]).labels({}) == {}


def test_libraries_give_the_same_paths():
    class Model(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    state = nnx.state(Model(), nnx.Param)
    paths = {"first/bias", "first/kernel"}
    routing = fo.Routing(min_dim=8)
    for tree in (state, nnx.to_pure_dict(state), nnx.as_pure(state)):
        assert {route.path for route in routing.routes(tree)} == paths
    model = eqx.nn.MLP(8, 8, 8, 1, key=jax.random.key(0))
    tree = eqx.filter(model, eqx.is_inexact_array)
    assert {route.path for route in routing.routes(tree)} == {
        "layers/0/weight",
        "layers/0/bias",
        "layers/1/weight",
        "layers/1/bias",
    }


def test_leaves_of_one_path_keep_their_own_labels():
    params = shapes({"a/b": (8,), "a": {"b": (8, 8)}})
    labels = fo.Routing(min_dim=8).labels(params)
    assert labels == {"a/b": "scalar", "a": {"b": "spectral"}}


def test_the_table_is_what_a_person_reads():
    table = fo.Routing([fo.Rule("qkv/kernel", chunks=3)], stacked=["blocks"]).table(
        TRANSFORMER
    )
    lines = table.splitlines()
    assert lines[0].split() == ["path", "shape", "label", "matrices", "why"]
    assert len(lines) == 1 + 8 + 1
    [qkv] = [line for line in lines if line.startswith("blocks/qkv/kernel")]
    assert qkv.split("  ")[-1] == "rule 'qkv/kernel'"
    assert "12 x (128, 128)" in qkv
    spectral = 4 * 128 * 384 + 128 * 256
    assert lines[-1].endswith(f"spectral: 2 leaves, {spectral:,} parameters")


def test_a_rule_scales_the_rate_of_the_leaves_it_finds():
    rules = [
        fo.Rule("^head/kernel", scale=0.1),
        # The first rule that finds a leaf decides, and `force_scalar` only the label.
        fo.Rule("^head", "mine", scale=2),
    ]
    routing = fo.Routing(rules, stacked=["blocks"], force_scalar=["head/kernel"])
    scales = routing.scales(TRANSFORMER)
    assert scales["head"] == {"kernel": 0.1, "bias": 2.0}
    assert set(jax.tree.leaves(scales["blocks"])) == {1.0}
    assert label_of(routing)["head/kernel"] == "scalar"
    lines = routing.table(TRANSFORMER).splitlines()
    assert lines[0].split()[-1] == "rate"
    [head] = [line for line in lines if line.startswith("head/kernel")]
    assert head.endswith("x 0.1")
    # A factor moves no leaf to other state.
    plain = fo.Routing([fo.Rule("^head/bias", "mine")], stacked=["blocks"])
    scaled = fo.Routing([fo.Rule("^head/bias", "mine", scale=3)], stacked=["blocks"])
    plain.check(TRANSFORMER, scaled.fingerprint(TRANSFORMER))
    assert "rate" not in plain.table(TRANSFORMER)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), jnp.ones(()), "0.1", True])
def test_a_scale_is_a_positive_number(scale):
    with pytest.raises((TypeError, ValueError), match="`scale`"):
        _cases.unchecked(fo.Rule, "head", scale=scale)


def test_is_frozen_hashable_and_no_function():
    routing = fo.Routing([fo.Rule("head", "scalar")], stacked=["blocks/"])
    again = fo.Routing((fo.Rule("head", "scalar"),), stacked=("blocks",))
    assert routing == again
    assert hash(routing) == hash(again)
    assert not callable(routing)
    assert routing != fo.Routing()
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.min_dim = 1
    # Equal routings are one static argument: the second call reuses the program.
    traces = []
    count = jax.jit(lambda x, r: traces.append(r) or x, static_argnums=1)
    count(1.0, routing)
    count(1.0, again)
    assert len(traces) == 1


def test_strings_in_place_of_sequences_are_an_error():
    for setting in ("rules", "force_scalar", "stacked"):
        with pytest.raises(TypeError, match=f"`{setting}` must be a sequence"):
            _cases.unchecked(fo.Routing, **{setting: "blocks"})
    with pytest.raises(TypeError, match="Rule objects"):
        _cases.unchecked(fo.Routing, [("blocks", "scalar")])
    with pytest.raises(TypeError, match="MatrixAxes"):
        _cases.unchecked(fo.Rule, "blocks", axes=(0, 1))


def test_a_saved_split_is_recognised():
    routing = fo.Routing(stacked=["blocks"])
    routing.check(TRANSFORMER, routing.fingerprint(TRANSFORMER))
    # The fingerprint is of the split, not of the way it was written down.
    other = fo.Routing([fo.Rule("norm/", "scalar")], stacked=["blocks"])
    other.check(TRANSFORMER, routing.fingerprint(TRANSFORMER))


def test_another_split_is_an_error_that_lists_the_leaves_that_moved():
    saved = fo.Routing(stacked=["blocks"]).fingerprint(TRANSFORMER)
    now = fo.Routing(
        [fo.Rule("qkv/kernel", chunks=3)],
        stacked=["blocks"],
        force_scalar=["head/kernel"],
    )
    with pytest.raises(ValueError, match="another routing") as error:
        now.check(TRANSFORMER, saved)
    message = str(error.value)
    assert "blocks/qkv/kernel: saved as spectral 4x(128, 384), now spectral 12x" in (
        message
    )
    assert "head/kernel: saved as spectral" in message
    assert "small/kernel" not in message
    fewer = {name: leaf for name, leaf in TRANSFORMER.items() if name != "small"}
    with pytest.raises(ValueError, match=r"small/kernel: saved as scalar.*now absent"):
        fo.Routing(stacked=["blocks"]).check(fewer, saved)
    with pytest.raises(ValueError, match="can't be read"):
        now.check(TRANSFORMER, "not a fingerprint")


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        (
            fo.Routing(),
            fo.Routing(layout="out_in"),
            r"square: saved as .*inputs \(0,\), outputs \(1,\), now .*inputs \(1,\)",
        ),
        (
            fo.Routing([fo.Rule("stack", axes=fo.MatrixAxes(1, 2))]),
            fo.Routing([fo.Rule("stack", axes=fo.MatrixAxes(0, 2))]),
            r"stack: saved as .*inputs \(1,\).*now .*inputs \(0,\)",
        ),
        (
            fo.Routing([fo.Rule("stack", axes=fo.MatrixAxes(1, 2, chunks=1))]),
            fo.Routing([fo.Rule("stack", "spectral", fo.MatrixAxes(1, 2, chunks=2))]),
            r"stack: saved as spectral 128x\(128, 128\), now spectral 256x\(128, 64\)",
        ),
        (
            fo.Routing([fo.Rule("stack", "spectral", fo.MatrixAxes(1, (0, 2), 2))]),
            fo.Routing([fo.Rule("stack", "spectral", fo.MatrixAxes(1, (2, 0), 2))]),
            r"outputs \(0, 2\), chunks 2 of the outputs, now .*outputs \(2, 0\)",
        ),
    ],
    ids=["layout", "axes", "chunks", "order"],
)
def test_the_same_split_along_other_axes_is_another_split(saved, now, words):
    params = shapes({"square": (128, 128), "stack": (128, 128, 128)})
    text = saved.fingerprint(params)
    saved.check(params, text)
    with pytest.raises(ValueError, match=words):
        now.check(params, text)


def test_a_fingerprint_without_axes_is_told_from_a_damaged_one():
    routing = fo.Routing()
    params = shapes({"w": (128, 128)})
    with pytest.raises(ValueError, match=r"axes.*replace it by"):
        routing.check(params, '{"w":"spectral 1x(128, 128)"}')
    with pytest.raises(ValueError, match="another version"):
        routing.check(params, "3")


@pytest.mark.parametrize("leaf", [jax.nn.relu, "gelu", 3, 0.5])
def test_leaves_that_are_no_arrays_are_named(leaf):
    params = {"layer": {"activation": leaf, "w": jnp.ones((8, 8))}}
    routing = fo.Routing()
    for use in (routing.labels, routing.table, routing.fingerprint, routing.scales):
        with pytest.raises(ValueError, match=r"'layer/activation' is no array.*array"):
            use(params)
