"""What the package promises by name: complete, documented, light to import."""

import dataclasses
import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys

import optax
import pytest

import fusionopt_jax as fo
from fusionopt_jax import dit

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
    "kl_shampoo_torch",
    "mona",
    "normuon",
    "ns5",
    "polyak",
    "schedule_free",
    "shampoo",
    "warm_start",
}

# Keyword names that callers spell out.
KEYWORDS = {
    "ns5": "routing coefficients steps preconditioner method hot_dtype scale",
    "normuon": "b2 eps restore_norm routing beta2",
    "mona": "alpha b1 weighted beta",
    "kl_shampoo": "inner exponent update_every sides",
    "shampoo": "inner exponent update_every sides damping",
    "kl_shampoo_torch": "lr betas shampoo_beta eps weight_decay precondition_frequency "
    "init_factor normalize_grads using_damping using_clamping",
    "schedule_free": "inner learning_rate b1 b1_max b1_anneal_steps weight_lr_power r "
    "averaging_warmup inner_params state_dtype keep_average",
    "polyak": "inner rule norm b1",
    "Routing": "rules min_dim force_scalar layout stacked",
    "MatrixAxes": "reduction_axis output_axis chunks",
    "eval_params": "state params",
    "fast_params": "state params",
    "warm_start": "tx params old_state",
    "accumulate": "tx every",
    "fusion_opt": "learning_rate routing components settings groups",
    "fusion_opt_torch": "lr beta beta_p gamma_min gamma_max mu mona_alpha beta_n "
    "beta_k eigen_period shampoo_delta beta_r beta1 beta2 eps hot_dtype warmup_steps "
    "components spectral_lr scalar_lr spectral_wd scalar_wd min_spectral_dim "
    "force_scalar",
}


def public():
    """Every public name of the optimisers, with its object."""
    return {name: getattr(fo, name) for name in fo.__all__}


EVERYTHING = {
    f"{module.__name__}.{name}": value
    for module in (fo, dit)
    for name in module.__all__
    # A table of configurations has no docstring of its own.
    if callable(value := getattr(module, name))
}


def sections(text):
    """The entries of each section of a docstring: `{"Args": {"steps": "How many"}}`."""
    found, entries = {}, None
    for line in inspect.cleandoc(text).splitlines():
        if title := re.fullmatch(r"([A-Z]\w*):", line):
            entries = found[title[1]] = {}
        elif line and not line.startswith(" "):
            entries = None
        elif entries is not None and (
            entry := re.fullmatch(r" {4}\*{0,2}(\w+): (.+)", line)
        ):
            entries[entry[1]] = entry[2]
    return found


def arguments(function):
    if inspect.isclass(function):
        function = function.__init__
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("self", "cls")]


def states():
    """Every state of the optimisers, wherever it is defined."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(fo.__path__, "fusionopt_jax.")
        if not found.name.startswith("fusionopt_jax.dit")
    ]
    return {
        value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("State")
        and inspect.isclass(value)
        and value.__module__ == module.__name__
    }


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


def test_sections_are_told_apart_from_text():
    found = sections(
        """Speaks of steps: and of r: in its text.

        Args:
            steps: How many,
                beta: is no entry of its own.
            *others: The rest.

        Returns:
            A number.

        Not part of: it.
        """
    )
    assert found == {"Args": {"steps": "How many,", "others": "The rest."}} | {
        "Returns": {}
    }


@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_public_is_documented(name):
    value = EVERYTHING[name]
    text = inspect.getdoc(value)
    assert text
    assert text.splitlines()[0].endswith(".")
    found = sections(text)
    if not inspect.isclass(value):
        elsewhere = re.search(r"^Example:\n +See `\w+`\.$", text, re.MULTILINE)
        assert elsewhere or doctest.DocTestParser().get_examples(text), "no example"
        assert list(found.get("Args", {})) == arguments(value)
    elif hasattr(value, "_fields"):
        assert tuple(found["Attributes"]) == value._fields
    elif "Attributes" in found:
        assert list(found["Attributes"]) == [
            field.name for field in dataclasses.fields(value)
        ]
    elif not issubclass(value, Exception):
        assert list(found["Args"]) == arguments(value)


@pytest.mark.parametrize("name", EVERYTHING)
def test_public_methods_are_documented(name):
    value = EVERYTHING[name]
    methods = vars(value) if inspect.isclass(value) else {}
    for method, member in methods.items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if method.startswith(("_", "tree_")) or not inspect.isfunction(function):
            continue
        text = inspect.getdoc(function) or ""
        assert text.splitlines()[:1], f"{name}.{method}"
        if (explained := sections(text).get("Args")) is not None:
            assert list(explained) == arguments(function), f"{name}.{method}"


def test_states_are_named_tuples_with_explained_fields():
    assert len(states()) >= 10
    for state in states():
        # Imported from its module; `fo` has what people type.
        assert state.__name__ not in fo.__all__
        assert issubclass(state, tuple), state
        assert not hasattr(optax, state.__name__)
        assert tuple(sections(state.__doc__)["Attributes"]) == state._fields, state


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
