"""Sizes: what is refused, and that the published ones have the published weights."""

import dataclasses
import importlib.util
import sys

import jax
import numpy as np
import pytest

from fusionopt_jax import dit

# Instantiated in PyTorch with 1000 classes; the count includes the position embedding.
PUBLISHED_PARAMETERS = {
    "DiT-S/2": 32_963_360,
    "DiT-S/4": 32_945_024,
    "DiT-S/8": 33_148_160,
    "DiT-B/2": 130_512_416,
    "DiT-B/4": 130_475_648,
    "DiT-B/8": 130_881_536,
    "DiT-L/2": 458_102_816,
    "DiT-L/4": 458_053_760,
    "DiT-L/8": 458_594_816,
    "DiT-XL/2": 675_129_632,
    "DiT-XL/4": 675_074_432,
    "DiT-XL/8": 675_683_072,
}


def test_presets_are_the_published_ones():
    assert set(dit.CONFIGS) == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    config = dit.CONFIGS[name]
    shapes = jax.eval_shape(lambda: dit.init_params(config))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    positions = config.num_tokens * config.hidden_size
    assert count + positions == PUBLISHED_PARAMETERS[name]


def test_config_is_hashable_and_frozen():
    assert hash(dit.DiTConfig()) == hash(dit.DiTConfig())
    config = dit.DiTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_size": 31}, "`patch_size` must divide `input_size`"),
        ({"num_heads": 7}, "`num_heads` must divide `hidden_size`"),
        ({"hidden_size": 6, "num_heads": 3}, "divisible by 4"),
        ({"depth": 0}, "`depth` must be at least 1"),
        ({"num_classes": -1}, "`num_classes` must be at least 1"),
        ({"mlp_ratio": 0.0}, "`mlp_ratio` must lie in"),
        ({"class_dropout_prob": 1.5}, "`class_dropout_prob` must lie in"),
        ({"time_scale": -1.0}, "`time_scale` must lie in"),
        ({"frequency_shift": -1}, "`frequency_shift` must be at least 0"),
        ({"frequency_shift": 2}, "`frequency_shift` must be one of 0, 1"),
        ({"norm_eps": 0.0}, "`norm_eps` must lie in"),
    ],
)
def test_wrong_size_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        dit.DiTConfig(**settings)


@pytest.mark.parametrize("settings", [{"learn_sigma": 1}, {"depth": True}])
def test_wrong_kind_is_refused(settings):
    # Checked by beartype in tests, and by the config itself where beartype is absent.
    with pytest.raises(Exception, match=r"learn_sigma|depth"):
        dit.DiTConfig(**settings)


def test_missing_flax_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    spec = importlib.util.spec_from_file_location("dit_without_flax", dit.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=r"fusionopt-jax\[dit\]"):
        spec.loader.exec_module(module)


def test_no_null_label_without_label_dropout():
    config = dit.DiTConfig(class_dropout_prob=0.0, num_classes=10)
    assert config.num_labels == 10
    with pytest.raises(ValueError, match="no null label"):
        _ = config.null_label
