"""What a cache costs: the estimate, the rule, and the memory that it saves."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax import dit
from fusionopt_jax.dit.cache import size
from tests.dit._models import CONFIG, LABELS, golden


class TestSize:
    def test_xl_arithmetic(self):
        config = dit.CONFIGS["DiT-XL/2"]
        shapes = jax.eval_shape(lambda: dit.init_params(config))
        modulators = [
            shapes["blocks"]["adaLN_modulation"],
            shapes["final_layer"]["adaLN_modulation"],
        ]
        values = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(modulators))
        total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        assert dit.modulator_bytes(config) == 4 * values
        # Fifty steps, one label and the null label: 75 MiB in place of 861 MiB.
        held = 4 * (total - values) + dit.cache_bytes(config, steps=50, labels=2)
        assert held <= 0.7 * 4 * total

    def test_estimate_is_what_is_built(self, cache):
        assert dit.cache_bytes(CONFIG, steps=3, labels=4) == cache.nbytes

    def test_break_even(self):
        rows = CONFIG.hidden_size + 1
        weights = dit.modulator_bytes(CONFIG)
        assert dit.cache_bytes(CONFIG, steps=rows - 1, labels=1) < weights
        assert dit.cache_bytes(CONFIG, steps=rows, labels=1) == weights
        assert dit.cache_bytes(CONFIG, 1, rows, jnp.bfloat16) == weights // 2

    @pytest.mark.parametrize(
        ("table", "weights", "steps"),
        [
            (jnp.float32, jnp.float32, 17),
            (jnp.bfloat16, jnp.float32, 34),
            (jnp.float32, jnp.bfloat16, 8),
        ],
    )
    def test_warns_from_the_break_even_on(self, params, table, weights, steps):
        params = jax.tree.map(lambda leaf: leaf.astype(weights), params)

        def build(steps, **options):
            # The null label alone: one row for each time.
            times = np.arange(float(steps))
            return dit.build_cache(params, CONFIG, times, [10], dtype=table, **options)

        # Warnings are errors here, so this says that there is none.
        assert build(steps).times.shape == (steps,)
        with pytest.warns(UserWarning, match="than the .* of modulators") as caught:
            build(steps + 1)
        assert len(caught) == 1
        assert build(steps + 1, force=True).times.shape == (steps + 1,)

    def test_warning_says_sizes_and_what_to_do(self):
        params, config, arrays = golden()
        with pytest.warns(UserWarning, match="a cache of") as caught:
            dit.build_cache(params, config, arrays["cache/t"], np.arange(10))
        assert str(caught[0].message) == (
            "a cache of 10 steps x 16 labels takes 1.2 MiB, more than the 0.71 MiB of "
            "modulators that it replaces (they break even at steps x labels = 97): it "
            "can save time, but no memory. Pass force=True to build it without this "
            "warning, or sample without a cache (cache=None)."
        )

    @pytest.mark.exhaustive
    def test_warning_names_the_line_of_the_caller(self):
        # Type checks at run time would stand between the caller and the library: hence
        # a process without them.
        program = """
import numpy as np
from fusionopt_jax import dit
config = dit.DiTConfig(input_size=4, hidden_size=16, num_heads=2, depth=1)
params, times = dit.init_params(config), np.arange(9.0)
dit.build_cache(params, config, times, [1])
dit.get_or_build_cache(params, config, times, [1])
"""
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", program],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        for line in (6, 7):
            assert f"<string>:{line}: UserWarning: a cache of 9" in done.stderr

    def test_larger_than_the_limit_is_refused(self, params, monkeypatch):
        monkeypatch.setattr(size, "SIZE_LIMIT", 0)
        times = np.arange(5.0)
        for build in (dit.build_cache, dit.get_or_build_cache):
            with pytest.raises(ValueError, match=r"steps x labels = 17.*force=True"):
                build(params, CONFIG, times, LABELS)
            assert build(params, CONFIG, times, LABELS, force=True).times.shape == (5,)

    def test_limit_applies_to_published_sizes(self):
        config = dit.CONFIGS["DiT-XL/2"]
        params = jax.eval_shape(lambda: dit.init_params(config))
        with pytest.raises(ValueError, match="Sample without a cache"):
            dit.build_cache(params, config, np.arange(250.0), np.arange(1000))


@pytest.mark.slow
def test_xl_needs_less_memory_with_its_cache():
    """Live bytes of DiT-XL/2 with a cache of fifty steps and a label: at most 70 %."""
    config = dit.CONFIGS["DiT-XL/2"]
    params = dit.init_params(config)
    full = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    before = {id(array) for array in jax.live_arrays()}
    before -= {id(leaf) for leaf in jax.tree.leaves(params)}
    cache = dit.build_cache(params, config, np.linspace(999, 1, 50), [207])
    params = dit.strip_modulators(params)
    held = {*map(id, jax.tree.leaves((params, cache)))}
    live = [array for array in jax.live_arrays() if id(array) not in before]
    assert held <= {id(array) for array in live}
    assert sum(array.nbytes for array in live) <= 0.7 * full
