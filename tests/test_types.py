"""What a type checker knows of results: pyright reads this file as a user's."""

from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo
from fusionopt_jax import dit


class Weights(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def test_iterates_have_the_type_of_the_parameters():
    tx = fo.schedule_free(optax.identity(), 0.1)
    weights = Weights(jnp.ones((2, 3)), jnp.ones(3))
    tree = {"kernel": jnp.ones((2, 3))}
    for read in (fo.eval_params, fo.fast_params):
        assert isinstance(read(tx.init(weights), weights), Weights)
    average = assert_type(fo.eval_params(tx.init(weights), weights), Weights)
    assert average.kernel.shape == (2, 3)
    assert_type(fo.fast_params(tx.init(weights), weights).bias, jax.Array)
    assert_type(fo.eval_params(tx.init(tree), tree), dict[str, jax.Array])


def test_transformations_are_those_of_optax():
    assert_type(fo.fusion_opt(0.1), optax.GradientTransformationExtraArgs)
    assert_type(fo.ns5(), optax.GradientTransformationExtraArgs)
    numbers = fo.diagnostics(fo.polyak(optax.sgd(0.1)).init({}))
    assert_type(numbers, dict[str, jax.Array])


def test_a_model_and_its_cache_have_types():
    config = dit.DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2)
    params = assert_type(dit.init_params(config), dict[str, Any])
    cache = dit.build_cache(params, config, [999.0], [207])
    assert_type(cache, dit.TimeConditioningCache)
    assert_type(cache.checked(params, config), dit.TimeConditioningCache)
    assert_type(cache.rows([207]), jax.Array)
    assert_type(dit.strip_modulators(params), dict[str, Any])
    weights = dit.to_pytorch(params, config)
    again, found = dit.from_pytorch(weights, num_heads=2)
    assert_type(again, dict[str, Any])
    assert assert_type(found, dit.DiTConfig) == config
