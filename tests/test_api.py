"""What the package promises by name: complete, documented, light to import."""

import doctest
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys

import optax
import pytest

import fusionopt_jax as fo

# The names that others build on; removing one of them breaks their code.
PROMISED = {
    "Routing",
    "MatrixAxes",
    "Rule",
    "accumulate",
    "diagnostics",
    "eval_params",
    "fast_params",
    "fusion_opt",
    "fusion_opt_torch",
    "kl_shampoo",
    "mona",
    "normuon",
    "ns5",
    "polyak",
    "schedule_free",
    "warm_start",
}

# Keyword names that callers spell out.
KEYWORDS = {
    "ns5": "routing coefficients steps preconditioner method hot_dtype scale",
    "normuon": "beta2 eps restore_norm routing",
    "mona": "alpha beta weighted",
    "kl_shampoo": "inner statistics exponent update_every sides",
    "schedule_free": "inner learning_rate b1 b1_max b1_anneal_steps weight_lr_power r "
    "averaging_warmup inner_params state_dtype keep_average",
    "polyak": "inner rule norm",
    "Routing": "rules min_dim force_scalar layout stacked",
    "MatrixAxes": "reduction_axis output_axis chunks",
    "eval_params": "state params",
    "fast_params": "state params",
    "warm_start": "tx params old_state",
    "accumulate": "tx every",
    "fusion_opt": "learning_rate routing components",
    "fusion_opt_torch": "lr beta beta_p gamma_min gamma_max mu mona_alpha beta_n "
    "beta_k eigen_period shampoo_delta beta_r beta1 beta2 eps hot_dtype warmup_steps "
    "components spectral_lr scalar_lr spectral_wd scalar_wd min_spectral_dim "
    "force_scalar",
}


def public():
    """Every public name that is a function or a class, with its object."""
    return {name: getattr(fo, name) for name in fo.__all__}


def test_all_is_sorted_complete_and_exists():
    assert fo.__all__ == sorted(fo.__all__)
    assert len(set(fo.__all__)) == len(fo.__all__)
    assert set(fo.__all__) >= PROMISED
    defined = {
        name
        for name, value in vars(fo).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert defined == {
        name for name in fo.__all__ if not inspect.ismodule(public()[name])
    }


@pytest.mark.parametrize("name", sorted(KEYWORDS))
def test_keyword_names_are_kept(name):
    assert set(KEYWORDS[name].split()) <= set(
        inspect.signature(getattr(fo, name)).parameters
    )


@pytest.mark.parametrize("name", fo.__all__)
def test_everything_public_is_documented(name):
    value = public()[name]
    text = inspect.getdoc(value)
    assert text
    assert text.splitlines()[0].endswith(".")
    if inspect.isclass(value):
        # The fields of a state; other classes show their use.
        assert "Attributes:" in text or "Example:" in text
    else:
        assert doctest.DocTestParser().get_examples(text), "no example"
        assert "Args:" in text
        for argument in inspect.signature(value).parameters:
            assert f"{argument}:" in text, f"`{argument}` is not explained"


def states():
    """Every state class that a module of the optimisers defines, by its name."""
    packages = (fo.transforms, fo.recipes)
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for package in packages
        for found in pkgutil.iter_modules(package.__path__)
    ]
    return {
        name: value
        for module in (fo.iterates, *modules)
        for name, value in vars(module).items()
        if name.endswith("State") and value.__module__ == module.__name__
    }


def test_states_are_named_tuples_with_explained_fields():
    found = states()
    assert len(found) >= 10
    # They are imported from their modules; `fo` has what people type.
    assert not found.keys() & set(fo.__all__)
    for name, state in found.items():
        assert issubclass(state, tuple), name
        assert not hasattr(optax, name), name
        explained = inspect.getdoc(state).split("Attributes:")[1]
        for field in state._fields:
            assert re.search(rf"^ +{field}: ", explained, re.MULTILINE), (name, field)


def test_the_version_is_that_of_the_distribution():
    try:
        installed = importlib.metadata.version("fusionopt-jax")
    except importlib.metadata.PackageNotFoundError:
        installed = fo.__version__
    assert installed == fo.__version__


def test_importing_is_silent_and_brings_no_model_library():
    program = (
        "import sys, fusionopt_jax as fo; "
        "heavy = [m for m in ('flax', 'orbax', 'equinox', 'torch', 'beartype') "
        "if m in sys.modules]; "
        "assert not heavy, heavy; "
        "assert 'fusionopt_jax.dit' not in sys.modules; "
        "import jax; assert not jax._src.xla_bridge._backends, 'a backend started'"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
