"""What a type checker knows of results: pyright reads this file as a user's."""

from typing import NamedTuple, assert_type

import jax
import jax.numpy as jnp
import optax

import fusionopt_jax as fo


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
