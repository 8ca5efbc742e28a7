"""Caches that a process keeps: found again, and never a stale one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.cache import registry
from tests.dit._models import CONFIG, LABELS, TIMES


class TestRegistry:
    def test_hit_and_build_counts(self, params):
        first = dit.get_or_build_cache(params, CONFIG, TIMES, LABELS)
        assert dit.get_or_build_cache(params, CONFIG, TIMES, [3, 7]) is first
        assert registry.cache_counts() == (1, 0, 1)
        for other in (
            {"labels": [3]},
            {"times": TIMES[:2]},
            {"dtype": jnp.bfloat16},
            {"params": jax.tree.map(lambda leaf: 0.9999 * leaf, params)},
            {"include_zero_time": True},
        ):
            request = {"params": params, "times": TIMES, "labels": LABELS, **other}
            cache = dit.get_or_build_cache(config=CONFIG, **request)
            assert cache is not first
        assert registry.cache_counts() == (1, 0, 6)
        dit.clear_cache_registry()
        assert registry.cache_counts() == (0, 0, 0)

    def test_warns_of_the_size_only_where_it_builds(self, params, tmp_path):
        path, times = tmp_path / "cache.npz", np.arange(5.0)

        def get(**options):
            return dit.get_or_build_cache(
                params, CONFIG, times, LABELS, path=path, **options
            )

        with pytest.warns(UserWarning, match="5 steps x 4 labels"):
            get()
        get()
        dit.clear_cache_registry()
        get()
        assert registry.cache_counts() == (0, 1, 0)
        dit.clear_cache_registry()
        path.unlink()
        get(force=True)
        assert registry.cache_counts() == (0, 0, 1)

    def test_stripped_parameters_find_what_full_ones_built(self, params):
        first = dit.get_or_build_cache(params, CONFIG, TIMES, LABELS)
        stripped = dit.strip_modulators(params)
        assert dit.get_or_build_cache(stripped, CONFIG, TIMES, LABELS) is first

    def test_oldest_leaves_first(self, params, monkeypatch):
        monkeypatch.setattr(registry, "REGISTRY_SIZE", 2)
        first = dit.get_or_build_cache(params, CONFIG, TIMES, [1])
        dit.get_or_build_cache(params, CONFIG, TIMES, [2])
        assert dit.get_or_build_cache(params, CONFIG, TIMES, [1]) is first
        dit.get_or_build_cache(params, CONFIG, TIMES, [3])
        dit.get_or_build_cache(params, CONFIG, TIMES, [2])
        assert registry.cache_counts() == (1, 0, 4)
