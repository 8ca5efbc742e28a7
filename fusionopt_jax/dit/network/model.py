"""The diffusion transformer: an NNX module to hold it, a pure function to run it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusionopt_jax._checks import check_integer, shape_text
from fusionopt_jax._types import Params
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.network.attention import AttentionKernel
from fusionopt_jax.dit.network.blocks import (
    Block,
    FinalLayer,
    block,
    checkpointed,
    final_layer,
)
from fusionopt_jax.dit.network.embeddings import (
    LabelEmbedder,
    PatchEmbedder,
    TimeEmbedder,
    check_labels,
    embed_patches,
    unpatchify,
)
from fusionopt_jax.dit.network.modulation import (
    CachedModulation,
    block_parts,
    check_modulation,
    conditioning,
    final_parts,
    replace_modulators,
    require_modulators,
    split_block,
    split_final,
    take_rows,
)
from fusionopt_jax.dit.network.residuals import EXACT, Plan, per_block


class DiT(nnx.Module):
    """A diffusion transformer whose blocks lie stacked along a leading depth axis.

    The module owns the parameters; :func:`apply` is the network. Calling the module is
    `apply` on its own parameters. The position embedding is a constant, no parameter:
    neither weight decay nor an average can touch it.

    Args:
        config: The sizes.
        rngs: Source of the initial parameters, such as `nnx.Rngs(0)`.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> model = DiT(config, rngs=nnx.Rngs(0))
        >>> images, labels = jnp.ones((1, 8, 8, 4)), jnp.array([3])
        >>> model(images, jnp.array([17.0]), labels).shape
        (1, 8, 8, 8)

    Source: Peebles and Xie (arXiv 2212.09748), adaLN-Zero. The start is the published
    one: Xavier-uniform kernels, N(0, 0.02) for the time MLP and the label table, zeros
    for every modulator and for the last map, so that the output starts at exactly 0.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.x_embedder = PatchEmbedder(config, rngs=rngs)
        self.t_embedder = TimeEmbedder(config, rngs=rngs)
        self.y_embedder = LabelEmbedder(config, rngs=rngs)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.final_layer = FinalLayer(config, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        times: Float[Array, "b"] | None,
        labels: Int[Array, "b"] | None,
        **options: Any,
    ) -> Float[Array, "b h w c_out"]:
        """Run the network on its own parameters; see :func:`apply`."""
        params = nnx.state(self, nnx.Param)
        return apply(params, self.config, images, times, labels, **options)


def init_params(config: DiTConfig, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters as a nested dict of arrays.

    Args:
        config: The sizes.
        seed: Seed of the initial values, a non-negative integer.

    Returns:
        A dict of fp32 arrays; kernels are `(in, out)`, those of the blocks
        `(depth, in, out)`.

    Raises:
        ValueError: If `seed` is negative.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> init_params(config)["blocks"]["attn"]["qkv"]["kernel"].shape
        (2, 32, 96)

    Source: the start of :class:`DiT`.
    """
    check_integer("seed", seed, low=0)
    state = nnx.state(DiT(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return dict(nnx.to_pure_dict(state))


def as_dict(params: Params) -> Mapping[str, Any]:
    """Parameters as a nested dict: an `nnx.State` is converted, a dict passes."""
    if isinstance(params, nnx.State):
        return nnx.to_pure_dict(params)
    if not isinstance(params, Mapping):
        raise TypeError(
            "`params` must be a nested dict or an nnx.State, got "
            f"{type(params).__name__}; from a module, take "
            "nnx.state(model, nnx.Param)."
        )
    return params


def apply(
    params: Params,
    config: DiTConfig,
    images: Any,
    times: Any,
    labels: Any,
    *,
    modulation: CachedModulation | None = None,
    dtype: DTypeLike = jnp.float32,
    unroll: bool = False,
    remat: bool = False,
    attention: AttentionKernel = None,
) -> Float[Array, "b h w c_out"]:
    r"""Run the network: what it predicts for noisy images at given times and labels.

    Each block adds two gated branches,
    :math:`x \leftarrow x + g_i \odot f_i(\mathrm{norm}(x) \odot (1 + s_i) + b_i)`; the
    shift :math:`b_i`, scale :math:`s_i` and gate :math:`g_i` are linear in
    :math:`\mathrm{SiLU}(\mathrm{emb}(t) + \mathrm{emb}(y))` with t in `times` and y in
    `labels`, or are read from `modulation`.

    It is deterministic: dropping labels is a matter of the training objective.

    Args:
        params: Parameters as :func:`init_params` returns them, or an `nnx.State`. With
            `modulation` they may lack the modulators
            (:func:`~fusionopt_jax.dit.strip_modulators`).
        config: The sizes; static under `jax.jit`.
        images: `[batch, input_size, input_size, in_channels]`, floating point.
        times: `[batch]`, floating point: 0 to 999 for diffusion models, 1000 t for flow
            models. Unused, and may be None, if `modulation` is given.
        labels: `[batch]` integers in [0, config.num_labels). While tracing their values
            can't be checked: an unknown label then gives NaN. Unused with `modulation`.
        modulation: One step of a cache. None computes it from `times` and `labels`.
        dtype: Type of the operands of the large products. fp32 by default; bfloat16 for
            speed on accelerators. Sums, normalisation, conditioning and the residual
            stream stay fp32 in either case.
        unroll: Write the blocks out instead of looping over them: a larger program and
            a longer compilation, which can pay for low latency.
        remat: Recompute each block in the backward pass instead of keeping what is in
            it; saves memory for a third more time. Otherwise the loop keeps what linear
            maps and attention return, and recomputes the rest: norms, GELU, softmax.
        attention: "xla" or "cudnn": that implementation of
            `jax.nn.dot_product_attention`. None is "xla" too, unless operands are fp32:
            then the softmax is divided last, which CPUs are faster with.

    Returns:
        `[batch, input_size, input_size, config.out_channels]` in fp32; with
        `learn_sigma` the second half of the channels is the variance logit.

    Raises:
        ValueError: If shapes do not match the config or each other, if a label is out
            of range, or if `params` lack something that is needed.
        TypeError: If `labels` are not integers or `images` are not floating point.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> params = init_params(config)
        >>> images, labels = jnp.ones((2, 8, 8, 4)), jnp.array([3, config.null_label])
        >>> out = apply(params, config, images, jnp.array([999.0, 17.5]), labels)
        >>> out.shape, float(abs(out).max())  # the last map starts at zero
        ((2, 8, 8, 8), 0.0)

    Source: Peebles and Xie (arXiv 2212.09748), figure 3. Tokens, fused weights and
    constants follow the published PyTorch model; its outputs are reproduced to 5e-5.
    """
    output, _ = recalling_apply(
        params,
        config,
        images,
        times,
        labels,
        plan=EXACT,
        kept=None,
        modulation=modulation,
        dtype=dtype,
        unroll=unroll,
        remat=remat,
        attention=attention,
    )
    return output


def recalling_apply(
    params: Params,
    config: DiTConfig,
    images: Any,
    times: Any,
    labels: Any,
    *,
    plan: Plan,
    kept: Any,
    modulation: CachedModulation | None = None,
    dtype: DTypeLike = jnp.float32,
    unroll: bool = False,
    remat: bool = False,
    attention: AttentionKernel = None,
) -> tuple[Float[Array, "b h w c_out"], Any]:
    """:func:`apply` where some residuals are recalled from earlier evaluations.

    With `plan.network` the residual is what all blocks together add to the embedded
    patches; the embedding and the final layer, with the modulation of the present time,
    are computed every time. Otherwise it is that of the attention and MLP branches.

    Args:
        params: As for :func:`apply`, like all that is not listed here.
        config: The sizes.
        images: `[batch, input_size, input_size, in_channels]`.
        times: `[batch]`.
        labels: `[batch]`.
        plan: What is computed and what is recalled.
        kept: What the evaluation before returned as such; None before the first.
        modulation: One step of a cache.
        dtype: Type of the operands of the large products.
        unroll: Write the blocks out.
        remat: Recompute each block in the backward pass.
        attention: Implementation of attention.

    Returns:
        What :func:`apply` returns, and the residuals to hand to the next evaluation:
        `[kept, batch, tokens, hidden]` for the network, or for attention and MLP a pair
        of `[depth, kept, batch, tokens, hidden]`; None in the place of what is always
        computed.

    Example:
        >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
        >>> from fusionopt_jax.dit.network.residuals import Recall
        >>> params, images = init_params(config), jnp.ones((1, 8, 8, 4))
        >>> plan = Plan(network=Recall(jnp.array(True), jnp.array([1.0])))
        >>> inputs = (images, jnp.ones(1), jnp.array([3]))
        >>> out, kept = recalling_apply(params, config, *inputs, plan=plan, kept=None)
        >>> kept.shape
        (1, 1, 16, 32)
    """
    params = as_dict(params)
    images = jnp.asarray(images)
    _check_images(config, images)
    batch = images.shape[0]
    if modulation is None:
        times, labels = _check_conditioning(config, batch, times, labels)
        require_modulators(
            params,
            ", so the modulation can't be computed: pass `modulation` (one step of a "
            "cache), or the full parameters.",
        )
        cond = conditioning(params, config, times, labels)
        cached = None
        final = final_parts(params["final_layer"], cond)

        def fresh_parts(layer: Params, _: None) -> Float[Array, "b 6 d"]:
            """Computed from the block's own weights."""
            return block_parts(layer, cond)

        parts_of = fresh_parts
    else:
        check_modulation(config, batch, modulation)
        cached = modulation.block
        final = take_rows(modulation.final, modulation.rows)

        def cached_parts(
            _: Params, table: Float[Array, "u 6 d"]
        ) -> Float[Array, "b 6 d"]:
            """Read from the block's slice of the cache."""
            # Gathered here and not before the loop: [depth, batch, 6, D] at once would
            # be the largest array of the program.
            return take_rows(table, modulation.rows)

        parts_of = cached_parts

    def run_block(
        tokens: Float[Array, "b tokens d"], layer: tuple[Params, Any, Plan, Any]
    ) -> tuple[Float[Array, "b tokens d"], Any]:
        """One block: its parameters, slice of the cache, plan and residuals."""
        weights, table, block_plan, block_kept = layer
        return block(
            weights,
            tokens,
            *split_block(parts_of(weights, table)),
            num_heads=config.num_heads,
            norm_eps=config.norm_eps,
            dtype=dtype,
            attention=attention,
            plan=block_plan,
            kept=block_kept,
        )

    step = checkpointed(run_block, remat, unroll, attention)
    if modulation is not None:
        params = replace_modulators(params, None)
    block_plan = Plan(
        attention=per_block(plan.attention, config.depth),
        mlp=per_block(plan.mlp, config.depth),
    )

    def run_blocks(
        tokens: Float[Array, "b tokens d"], kept: Any
    ) -> tuple[Float[Array, "b tokens d"], Any]:
        """All blocks, one after the other."""
        layers = (params["blocks"], cached, block_plan, kept)
        if not unroll:
            return jax.lax.scan(step, tokens, layers)
        every = []
        for index in range(config.depth):
            layer = jax.tree.map(lambda leaf, i=index: leaf[i], layers)
            tokens, kept = step(tokens, layer)
            every.append(kept)
        return tokens, jax.tree.map(lambda *leaves: jnp.stack(leaves), *every)

    def added(tokens: Float[Array, "b tokens d"]) -> Float[Array, "b tokens d"]:
        """What the blocks add to the tokens."""
        return run_blocks(tokens, (None, None))[0] - tokens

    tokens = embed_patches(params["x_embedder"], config, images, dtype)
    if plan.network.compute is None:
        tokens, kept = run_blocks(tokens, (None, None) if kept is None else kept)
    else:
        residual, kept = plan.network(added, kept, tokens)
        tokens = tokens + residual
    patches = final_layer(params["final_layer"], tokens, *split_final(final), dtype)
    return unpatchify(patches, config.patch_size), kept


def _check_images(config: DiTConfig, images: Array) -> None:
    """Require floating-point images of the size that the config asks for."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"`images` must be floating point, got {shape_text(images)}; scale them to "
            "about [-1, 1] first."
        )
    expected = (config.input_size, config.input_size, config.in_channels)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(
            f"`images` must have shape [batch, {expected[0]}, {expected[1]}, "
            f"{expected[2]}] (batch, height, width, channels), got "
            f"{shape_text(images)}; channels come last here, unlike in PyTorch."
        )


def _check_conditioning(
    config: DiTConfig, batch: int, times: Any, labels: Any
) -> tuple[Array, Array]:
    """Require one time and one known label per image."""
    if times is None or labels is None:
        raise ValueError(
            "`times` and `labels` are needed unless `modulation` is given."
        )
    times, labels = jnp.asarray(times), jnp.asarray(labels)
    for name, value in (("times", times), ("labels", labels)):
        if value.shape != (batch,):
            raise ValueError(
                f"`{name}` must have shape [{batch}], one per image, got "
                f"{shape_text(value)}."
            )
    check_labels(config, labels)
    return times.astype(jnp.float32), labels
