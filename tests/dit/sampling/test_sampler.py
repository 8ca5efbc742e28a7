"""What every sampler is: listed, a value, checked; and that one's own needs no more."""

import dataclasses
import importlib
import inspect
import pkgutil

import jax.numpy as jnp
import numpy as np
import pytest

from fusionopt_jax.dit import Sampler, run_sampler, sampling
from fusionopt_jax.dit.sampling.sampler import Step


def test_every_sampler_of_the_package_is_listed():
    classes = {
        found
        for module in pkgutil.iter_modules(sampling.__path__, sampling.__name__ + ".")
        for found in vars(importlib.import_module(module.name)).values()
        if isinstance(found, type)
        and issubclass(found, Sampler)
        and not inspect.isabstract(found)
    }
    assert classes == set(sampling.METHODS)
    declared = {
        name for name, kind in Sampler.__annotations__.items() if "type[" in str(kind)
    }
    assert declared == {method.method for method in sampling.METHODS}
    for method in sampling.METHODS:
        assert getattr(Sampler, method.method) is method
        assert isinstance(method(), Sampler)


def test_a_sampler_of_ones_own_is_one_class():
    @dataclasses.dataclass(frozen=True)
    class Halving(Sampler):
        """Moves half of the way to zero, with the state that a step may keep."""

        method = "halving"
        steps: int = 3

        def host_times(self):
            return np.arange(self.steps, 0, -1, dtype=np.float32)

        def coefficients(self):
            return {"share": np.full(self.steps, 0.5)}

        def start(self, x):
            return jnp.zeros((), jnp.int32)

        def step(self, predict, x, at):
            clean = predict(x).value
            x = x + at.coefficients["share"] * (clean - x)
            return Step(x, clean + at.memory, at.memory + 1)

    samples = run_sampler(
        Halving(), lambda x, t, c: 0.0 * x, jnp.ones((1, 2, 2, 1)), previews=3
    )
    np.testing.assert_array_equal(samples.images, np.full((1, 2, 2, 1), 0.125))
    assert samples.previews[:, 0, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_samplers_are_values():
    assert Sampler.ddpm(50) == Sampler.ddpm("50")
    assert hash(Sampler.ddim("ddim50")) == hash(Sampler.ddim("ddim50"))
    assert Sampler.ddim("ddim50") != Sampler.ddim("50")


def test_heun_asks_for_one_time_more_than_it_has_steps():
    assert Sampler.heun(3).eval_times().tolist() == pytest.approx(
        [1000.0, 2000 / 3, 1000 / 3, 0.0]
    )
    assert len(Sampler.euler(3).eval_times()) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampler.euler(0), "steps"),
        (lambda: Sampler.heun(5, shift=0.0), "shift"),
        (lambda: Sampler.ddpm("ddim999"), "integer stride"),
        (lambda: Sampler.ddpm("10", variance="learned"), "learned_range"),
        (lambda: Sampler.ddim("10", eta=-0.1), "eta"),
        (lambda: Sampler.dpm_solver_pp_2m(5, spacing="even"), "spacing"),
        (lambda: Sampler.ddim("10", clip=2), "clip"),
    ],
)
def test_settings_that_mean_nothing_are_errors(unchecked_types, make, words):
    with pytest.raises(ValueError, match=words):
        make()
