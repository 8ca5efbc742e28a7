"""One file that holds a whole sampler: program, weights and cache.

The program is compiled code's portable form (StableHLO through `jax.export`), lowered
for several platforms at once. It takes the weights as arguments, so the file holds them
once. With a cache the program reads neither modulators nor embedders, and none are
written.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fusionopt_jax import _checks
from fusionopt_jax._paths import named_leaves
from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.dit import TimeConditioningCache
from fusionopt_jax.dit.config import DiTConfig
from fusionopt_jax.dit.export.archive import read_archive, write_archive
from fusionopt_jax.dit.network.model import as_dict
from fusionopt_jax.dit.network.modulation import replace_modulators
from fusionopt_jax.dit.sampling.denoiser import cached_tables, denoiser
from fusionopt_jax.dit.sampling.guidance import Guidance, GuidedChannels
from fusionopt_jax.dit.sampling.loop import run_sampler
from fusionopt_jax.dit.sampling.sample import check_variance, planned
from fusionopt_jax.dit.sampling.sampler import Sampler
from fusionopt_jax.dit.sampling.step_cache import StepCache


@dataclasses.dataclass(frozen=True)
class ExportedSampler:
    """A sampler read from a file; call it with noise and labels.

    Attributes:
        signature: What the file says of itself: labels, times, sampler, step cache,
            sizes, platforms.
        arrays: Weights and cache, in the order of the program's arguments.
        program: The compiled form, called with the arrays before the inputs.
    """

    signature: dict[str, Any]
    arrays: list[Array]
    program: Callable[..., Array]

    @property
    def step_cache(self) -> StepCache | None:
        """The step cache that the file samples with; None if it skips nothing."""
        # Files of versions that had none do not say so.
        masks = self.signature.get("step_cache")
        return None if masks is None else StepCache(**masks)

    def __call__(
        self,
        noise: Float[Array | np.ndarray, "batch height width channels"],
        labels: Int[Array | np.ndarray, " batch"] | Sequence[int],
        cfg_scale: float | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """Sample images of the given labels.

        Args:
            noise: Standard normal, [batch, height, width, channels].
            labels: [batch], each one of `signature["labels"]`.
            cfg_scale: Guidance scale, 1.5 if None; for a file exported with `guided`.
            key: Randomness, if `signature["needs_key"]`.

        Returns:
            Images, float32, shaped as `noise`.

        Raises:
            ValueError: If a shape does not fit, a label is not in the file, a key is
                missing, or there is a guidance scale for a file that does not guide.
        """
        shape = tuple(self.signature["image_shape"])
        size = self.signature["batch_size"]
        noise = jnp.asarray(noise, jnp.float32)
        labels = jnp.asarray(labels, jnp.int32)
        if noise.shape[1:] != shape or (size is not None and len(noise) != size):
            raise ValueError(
                f"`noise` must have shape {[size or 'batch', *shape]}, got "
                f"{_checks.shape_text(noise)}."
            )
        if labels.shape != noise.shape[:1]:
            raise ValueError(
                f"`labels` must have shape [{len(noise)}], one per image, got "
                f"{_checks.shape_text(labels)}."
            )
        known = self.signature["labels"]
        missing = np.setdiff1d(np.asarray(labels), known)
        if missing.size:
            raise ValueError(
                f"`labels` has {missing[0]}, which this file can't sample; it was "
                f"exported for {known}."
            )
        if cfg_scale is not None and not self.signature["guided"]:
            raise ValueError(
                "`cfg_scale` has no effect on this file, which was exported with "
                "guided=False; leave it out, or export with guidance."
            )
        inputs = [noise, labels, jnp.float32(1.5 if cfg_scale is None else cfg_scale)]
        if self.signature["needs_key"]:
            if key is None:
                raise ValueError(
                    f"`key` is needed: {self.signature['sampler']['method']!r} draws "
                    "noise at every step; pass key=jax.random.key(0)."
                )
            inputs.append(_key_data(key))
        return self.program(self.arrays, *inputs)


def export_sampler(
    path: str | os.PathLike[str],
    params: Params,
    config: DiTConfig,
    cache: TimeConditioningCache,
    sampler: Sampler,
    *,
    guided: bool = True,
    cfg_channels: GuidedChannels = None,
    guidance_interval: tuple[float, float] | None = None,
    step_cache: StepCache | None = None,
    batch_size: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Write a sampler that runs without this library.

    The file holds the program, the weights that it reads and the cache. It samples the
    labels of the cache, no others.

    Args:
        path: File to write, such as "sampler.zip". It appears whole or not at all.
        params: Parameters, with or without the modulators, which are not written.
        config: Sizes of the model.
        cache: What `build_cache` made for these parameters and `sampler.eval_times()`.
        sampler: The walk.
        guided: Whether each step also evaluates the null label. The guidance scale
            stays an input.
        cfg_channels: As for `sample`.
        guidance_interval: As for `sample`.
        step_cache: As for `sample`; it becomes part of the program.
        batch_size: Number of images per call; None leaves it open.
        platforms: Names that `jax.export` knows; no such device needs to be here.
        dtype: Type of the operands of the large products.

    Raises:
        StaleCacheError: If the cache was made for other weights or times, or lacks the
            null label that guidance needs, or the step cache was chosen for others.
        ValueError: If a setting is out of range, the sampler reads a variance that the
            model does not predict, or the step cache is for another number of steps.

    Example:
        >>> import pathlib, tempfile
        >>> from fusionopt_jax import dit
        >>> config = dit.DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
        >>> params, sampler = dit.init_params(config), dit.Sampler.euler(steps=2)
        >>> cache = dit.build_cache(params, config, sampler.eval_times(), [207])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "sampler.zip"
        ...     export_sampler(path, params, config, cache, sampler, platforms=["cpu"])
        ...     images = load_sampler(path)(jnp.ones((1, 4, 4, 4)), [207])
        >>> images.shape
        (1, 4, 4, 4)
    """
    _checks.check_choice("guided", guided, (True, False))
    if batch_size is not None:
        _checks.check_integer("batch_size", batch_size, low=1)
    check_variance(config, sampler)
    guidance = Guidance(cfg_channels, guidance_interval)
    if not guided and guidance != Guidance():
        raise ValueError(
            "`cfg_channels` and `guidance_interval` have no effect with guided=False; "
            "leave them out."
        )
    null = [config.null_label] if guided else None
    cache.check(params, config, times=sampler.host_times(), labels=null)
    plans = planned(step_cache, params, config, sampler, guidance if guided else None)
    named, rebuild = _arrays_of(as_dict(params), cache)

    def program(
        arrays: list[Array],
        noise: Array,
        labels: Array,
        cfg_scale: Array,
        key_data: Array | None = None,
    ) -> Array:
        """All of sampling, as a function of arrays."""
        weights, table = rebuild(arrays)
        key = None if key_data is None else jax.random.wrap_key_data(key_data)
        denoise = denoiser(
            weights,
            config,
            table,
            labels,
            cfg_scale,
            guidance=guidance if guided else None,
            dtype=dtype,
        )
        conditions = cached_tables(table, sampler)
        return run_sampler(
            sampler,
            denoise,
            noise,
            conditions=conditions,
            step_cache=plans,
            key=key,
        ).images

    image_shape = (config.input_size, config.input_size, config.in_channels)
    batch: Any = batch_size
    if batch_size is None:
        (batch,) = export.symbolic_shape("batch")
    inputs = [
        [jax.ShapeDtypeStruct(array.shape, array.dtype) for _, array in named],
        jax.ShapeDtypeStruct((batch, *image_shape), np.float32),
        jax.ShapeDtypeStruct((batch,), np.int32),
        jax.ShapeDtypeStruct((), np.float32),
    ]
    if sampler.is_random:
        inputs.append(_key_data(jax.random.key(0)))
    exported = export.export(jax.jit(program), platforms=list(platforms))(*inputs)
    signature = {
        "jax_version": jax.__version__,
        "platforms": list(exported.platforms),
        "image_shape": list(image_shape),
        "batch_size": batch_size,
        "labels": sorted({int(label) for label in np.asarray(cache.labels)}),
        "null_label": config.num_classes if config.has_null_label else None,
        "guided": guided,
        "needs_key": sampler.is_random,
        "model_times": sampler.host_times().tolist(),
        "sampler": {"method": sampler.method, **dataclasses.asdict(sampler)},
        "step_cache": _masks(step_cache) if step_cache and plans else None,
        "config": dataclasses.asdict(config),
    }
    write_archive(path, signature, exported, named)


def load_sampler(path: str | os.PathLike[str]) -> ExportedSampler:
    """Read what `export_sampler` wrote.

    Args:
        path: The file.

    Returns:
        A function of noise and labels; see `ExportedSampler`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no exported sampler, or is damaged, or was exported
            for other platforms than this one.

    Example:
        See `export_sampler`.
    """
    signature, exported, arrays = read_archive(path)
    # JAX names its backend "gpu" where exports say "cuda".
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in exported.platforms:
        raise ValueError(
            f"{path} was exported for {list(exported.platforms)}, not for "
            f"{platform!r}; export it again with platforms=[{platform!r}]."
        )
    return ExportedSampler(signature, arrays, jax.jit(exported.call))


def _arrays_of(
    params: Params, cache: TimeConditioningCache
) -> tuple[list[tuple[str, Array]], Callable[[list[Array]], Any]]:
    """The arrays that a program with a cache reads, named, and how to put them back."""
    params = replace_modulators(params, None)
    weights = {name: params[name] for name in ("x_embedder", "blocks", "final_layer")}
    tree = (weights, (cache.block, cache.final, cache.labels))
    leaves, structure = jax.tree.flatten(tree)
    names = [name for name, _ in named_leaves(weights)]
    names += ["cache/block", "cache/final", "cache/labels"]

    def rebuild(arrays: list[Array]) -> Any:
        """Weights and cache again, out of a flat list."""
        weights, (block, final, labels) = jax.tree.unflatten(structure, arrays)
        return weights, dataclasses.replace(
            cache, block=block, final=final, labels=labels
        )

    return list(zip(names, leaves, strict=True)), rebuild


def _masks(step_cache: StepCache) -> dict[str, Any]:
    """What a step cache does, without what it was chosen for."""
    names = ("mask", "attention", "mlp", "order")
    return {name: getattr(step_cache, name) for name in names}


def _key_data(key: PRNGKeyArray) -> Array:
    """The two words of a key, typed or raw, of JAX's default generator."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return key
