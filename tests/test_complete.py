"""What a new component has to be entered in: a forgotten list fails here.

`docs/contributing.md` walks through the same lists.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import fusionopt_jax as fo
from fusionopt_jax import transforms
from fusionopt_jax.dit import sampling
from fusionopt_jax.dit.weights import files
from fusionopt_jax.recipes.components import COMPONENTS
from tests import _cases, test_optax_common

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def makes_a_transformation(function):
    returned = inspect.signature(function).return_annotation
    return "GradientTransformation" in getattr(returned, "__name__", str(returned))


def factories(module):
    """The public functions that a module defines and that make transformations."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and inspect.isfunction(value)
        and value.__module__ == module.__name__
        and makes_a_transformation(value)
    ]


MODULES = {
    found.name: importlib.import_module(f"{transforms.__name__}.{found.name}")
    for found in pkgutil.iter_modules(transforms.__path__)
}
METHODS = [name for module in MODULES.values() for name in factories(module)]
# Everything that is held to the contract, the recipes too.
PUBLIC = [
    name
    for name in fo.__all__
    if inspect.isfunction(getattr(fo, name))
    and makes_a_transformation(getattr(fo, name))
]


def test_methods_are_found():
    assert {"ns5", "kl_shampoo", "schedule_free"} <= set(METHODS)
    assert {"accumulate", "fusion_opt"} <= set(PUBLIC)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_method_that_people_can_type(module):
    found = factories(MODULES[module])
    assert found
    assert set(found) <= set(fo.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_is_held_to_the_contract(name):
    cases = [
        case
        for case in _cases.ALL
        if case.name == name or case.name.startswith(f"{name}_")
    ]
    assert any(name in case.build.__code__.co_names for case in cases), (
        f"no case of tests/_cases.ALL is named {name!r} and builds it"
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_is_asked_to_converge(name):
    assert any(
        given == name or given.startswith(f"{name}_")
        for given in test_optax_common.OPTIMIZERS
    )


# Its numbers are norms, which its own tests have in closed form.
MEASURES = {"gain"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - MEASURES))
def test_is_compared_with_something_independent(module):
    tests = [
        path.read_text()
        for path in (ROOT / "tests" / "transforms").glob(f"test_{module}*.py")
    ]
    assert any(
        re.search(r"tests\.references|_golden|_replay", text) for text in tests
    ), f"tests/transforms/test_{module}*.py uses no reference and no recording"


@pytest.mark.parametrize("name", METHODS)
def test_has_a_page_or_a_section(name):
    heading = re.compile(rf"^#+ .*\b{name}\b", re.MULTILINE)
    pages = (DOCS / "methods").glob("*.md")
    assert any(heading.search(page.read_text()) for page in pages), (
        f"no heading of docs/methods/*.md names {name!r}"
    )
    assert f"`{name}`" in (DOCS / "choosing.md").read_text()


# What `fusion_opt` reaches by an argument instead of a component's name.
BY_ARGUMENT = {
    "polyak": "polyak_rule",
    "measure_gain": "gains",
    "quantize_state": "state_dtype",
}


@pytest.mark.parametrize("name", METHODS)
def test_can_be_reached_from_the_recipe(name):
    if name in BY_ARGUMENT:
        assert BY_ARGUMENT[name] in inspect.signature(fo.fusion_opt).parameters
        return
    made = {component.make for component in COMPONENTS.values()}
    assert getattr(fo, name) in made, f"COMPONENTS has no entry for {name!r}"


def test_components_are_explained():
    text = inspect.getdoc(fo.fusion_opt)
    page = (DOCS / "choosing.md").read_text()
    for name in COMPONENTS:
        assert f'"{name}"' in text, name
        assert f'"{name}"' in page, name


@pytest.mark.parametrize("method", sampling.METHODS, ids=lambda each: each.method)
def test_a_sampler_is_explained(method):
    assert f"Sampler.{method.method}" in (DOCS / "sampling.md").read_text()


@pytest.mark.parametrize("suffix", files.FORMATS)
def test_a_weight_format_is_explained(suffix):
    assert f"`{suffix}`" in (DOCS / "dit.md").read_text()
    assert f"`{suffix}`" in inspect.getdoc(files.read_weights)


def test_every_cited_paper_is_in_the_references():
    references = (DOCS / "references.md").read_text()
    listed = set(re.findall(r"eprint = \{([0-9.]+)\}", references))
    sources = [*(ROOT / "fusionopt_jax").rglob("*.py"), *DOCS.rglob("*.md")]
    cited = {
        number
        for path in sources
        for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text())
    }
    assert cited <= listed, f"without an entry: {sorted(cited - listed)}"
