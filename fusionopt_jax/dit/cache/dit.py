"""The table of this library's DiT: what `sample` reads in place of the modulators."""

import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from fusionopt_jax._types import Params
from fusionopt_jax.dit.cache.file import read_arrays, write_arrays
from fusionopt_jax.dit.cache.fingerprint import PARTS, fingerprint
from fusionopt_jax.dit.cache.table import StaleCacheError, Table
from fusionopt_jax.dit.config import DiTConfig, differences
from fusionopt_jax.dit.network.model import as_dict
from fusionopt_jax.dit.network.modulation import (
    CachedModulation,
)

_FORMAT = "fusionopt_jax modulator cache 2"
_ARRAYS = ("block", "final", "times", "labels", "fingerprint")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TimeConditioningCache(Table):
    """All modulators that a sampling run needs, as a pytree.

    It is immutable and goes through `jax.jit`, `jax.device_put` and `lax.scan` like any
    other tree. Scan it, do not close over it: a closure bakes the table into
    the program.

    Attributes:
        block: `[steps, depth, labels, 6, hidden]`.
        final: `[steps, labels, 2, hidden]`.
        times: `[steps]` float32, in the order of the sampler.
        labels: `[labels]` int32: distinct labels, then null labels up to a power of 2.
        fingerprint: `[weights, 2]` uint32, digests of the weights it was made from.
        config: The sizes of the model; static.
    """

    block: Float[Array, "s depth u 6 d"]
    final: Float[Array, "s u 2 d"]
    times: Float[Array, "s"]
    labels: Int[Array, "u"]
    fingerprint: UInt32[Array, "parts 2"]
    config: DiTConfig = dataclasses.field(metadata={"static": True})

    @property
    def entries(self) -> tuple[Array, Array]:
        """The arrays that hold the modulators."""
        return self.block, self.final

    def digests(self, weights: Params) -> UInt32[Array | np.ndarray, "parts 2"]:
        """Digests of what feeds the table: both embedders and every modulator."""
        return fingerprint(as_dict(weights))

    def weight_names(self, weights: Params) -> list[str]:
        """Names of what feeds the table; the same for all parameters."""
        del weights
        return ["/".join(path) for path in PARTS]

    def blanked_unless(self, fits: Bool[Array, ""]) -> "TimeConditioningCache":
        """The cache where `fits` holds, and one whose images are NaN elsewhere."""
        # Every image goes through the final layer, whose table is the smaller one.
        final = jnp.where(fits, self.final, jnp.nan).astype(self.final.dtype)
        return dataclasses.replace(self, final=final)

    def at(self, step: int, labels: Any) -> CachedModulation:
        """What `apply` takes as `modulation` at one step, for sampling by hand.

        Args:
            step: Index into `times`; negative ones count from the end.
            labels: `[batch]` integers.

        Returns:
            The tables of that step with the row of each label.

        Raises:
            IndexError: If there is no such step.
            StaleCacheError: If the cache lacks a label.

        Example:
            >>> from fusionopt_jax.dit import apply, build_cache, init_params
            >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
            >>> params, labels = init_params(config), jnp.array([360])
            >>> cache = build_cache(params, config, [999.0], labels)
            >>> modulation, images = cache.at(0, labels), jnp.ones((1, 8, 8, 4))
            >>> apply(params, config, images, None, None, modulation=modulation).shape
            (1, 8, 8, 8)
        """
        self.check_step(step)
        return CachedModulation(self.block[step], self.final[step], self.rows(labels))

    def check(
        self,
        params: Params,
        config: DiTConfig,
        *,
        times: Any = None,
        labels: Any = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        """Refuse to go on if the cache was made from something else than is in use.

        The weights are compared by digests of their bits: the time and label embedders
        and all modulators. After `strip_modulators` the digests that it left are
        compared. Digests of device arrays are remembered, so checking again costs
        nothing.

        Args:
            params: The parameters in use, full or stripped.
            config: The config in use.
            times: The times that will be asked for; None does not compare them. A
                trailing entry for time 0 in the cache (`include_zero_time`) is allowed.
            labels: The labels that will be asked for; None does not compare them.
            dtype: The type that the table should have; None accepts any.

        Raises:
            StaleCacheError: If anything differs. The message names what, and the
                remedy.
            TypeError: If anything is traced by `jax.jit`; there, use :meth:`checked`.
            ValueError: If modulators are missing and no digest of them was left.

        Example:
            >>> from fusionopt_jax.dit import build_cache, init_params, strip_modulators
            >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
            >>> params = init_params(config, seed=0)
            >>> cache = build_cache(params, config, [999.0], [207])
            >>> cache.check(strip_modulators(params), config, times=[999.0])
            >>> try:
            ...     cache.check(init_params(config, seed=1), config)
            ... except StaleCacheError as error:
            ...     print(error)
            the cache was built from other weights: t_embedder/fc1/kernel, ...
        """
        self._compare_config(config)
        if dtype is not None and self.block.dtype != jnp.dtype(dtype):
            raise StaleCacheError(
                f"the cache holds {self.block.dtype}, but {jnp.dtype(dtype)} was asked "
                f"for; build it again with dtype={jnp.dtype(dtype).name!r}."
            )
        super().check(params, times=times, labels=labels)

    def checked(
        self,
        params: Params,
        config: DiTConfig,
        *,
        times: Any = None,
        labels: Any = None,
    ) -> "TimeConditioningCache":
        """A cache that gives no image unless it fits, also inside your own `jax.jit`.

        Whatever is known is compared at once, as :meth:`check` does. Where the weights
        or the cache are arguments of a function that is being traced, the comparison
        becomes part of the program: the digests are computed on the device, and a cache
        that does not fit gives NaN, as it does for a label that it lacks. That reads
        the embedders, and the modulators if there are any, once per call of the
        program, not per step. `sample` does this.

        Args:
            params: As for :meth:`check`.
            config: As for :meth:`check`.
            times: As for :meth:`check`.
            labels: As for :meth:`check`; traced ones are not compared.

        Returns:
            The cache itself, or one that is NaN where it does not fit.

        Raises:
            StaleCacheError: If anything that is known differs.
            ValueError: If modulators are missing and no digest of them was left.

        Example:
            >>> from fusionopt_jax.dit import build_cache, init_params
            >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
            >>> params = init_params(config, seed=0)
            >>> cache = build_cache(params, config, [999.0], [207])
            >>> read = jax.jit(lambda params: cache.checked(params, config).final)
            >>> bool(jnp.isfinite(read(params)).all())
            True
            >>> bool(jnp.isnan(read(init_params(config, seed=1))).all())
            True
        """
        self._compare_config(config)
        return super().checked(params, times=times, labels=labels)

    def _compare_config(self, config: DiTConfig) -> None:
        """Require the same config."""
        if self.config == config:
            return
        raise StaleCacheError(
            "the cache was built for another config: "
            f"{differences(self.config, config, 'in the cache')}; build it again with "
            "`build_cache`."
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, whole or not at all.

        Args:
            path: The file (`.npz`); one that exists is replaced.

        Raises:
            OSError: If the file can't be written.

        Example:
            >>> import pathlib, tempfile
            >>> from fusionopt_jax.dit import build_cache, init_params
            >>> config = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4)
            >>> cache = build_cache(init_params(config), config, [999.0], [207])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache.save(pathlib.Path(folder) / "cache.npz")
            ...     loaded = cache.load(pathlib.Path(folder) / "cache.npz")
            >>> bool((loaded.block == cache.block).all())
            True
        """
        arrays = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        about = json.dumps(dataclasses.asdict(self.config))
        write_arrays(path, _FORMAT, about, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TimeConditioningCache":
        """Read a cache from a file, without checking what it fits.

        Args:
            path: A file that :meth:`save` wrote.

        Returns:
            The cache; :meth:`check` says whether it fits.

        Raises:
            OSError: If the file is not there, is a folder, or can't be read.
            StaleCacheError: If it is damaged, or no cache. The file holds a SHA-256 of
                all that is in it, so that a table with other numbers is never returned.

        Example:
            >>> TimeConditioningCache.load("nowhere.npz")
            Traceback (most recent call last):
            ...
            FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.npz'
        """
        about, arrays = read_arrays(path, _FORMAT)
        try:
            config = DiTConfig(**json.loads(about))
        except TypeError as error:
            raise StaleCacheError(
                f"{os.fspath(path)} was written by a version with another config "
                f"({error}); delete it to have a new one written."
            ) from error
        return cls(
            **{name: jnp.asarray(arrays[name]) for name in _ARRAYS}, config=config
        )
