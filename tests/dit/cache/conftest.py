"""One model and one cache of it for all tests of the cache."""

import pytest

from fusionopt_jax import dit
from tests.dit._models import CONFIG, LABELS, TIMES, random_params


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def cache(params):
    return dit.build_cache(params, CONFIG, TIMES, LABELS)


@pytest.fixture(autouse=True)
def empty_registry():
    dit.clear_cache_registry()
