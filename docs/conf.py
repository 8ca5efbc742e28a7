"""Sphinx configuration."""

import collections
import importlib
import pkgutil

import fusionopt_jax

project = "fusionopt_jax"
author = "the fusionopt_jax authors"
copyright = "CC0 1.0"
release = fusionopt_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

# NamedTuple fields are listed once, from the Attributes section.
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
# Docstrings are run by the test suite; only the pages' own examples are run here.
doctest_test_doctest_blocks = ""

html_theme = "furo"
html_title = "fusionopt_jax"

_FIELD = type(collections.namedtuple("_Example", "field").field)


def _skip_field(_app, _what, _name, obj, skip, _options):
    """Leave out the fields of named tuples, which the Attributes section lists."""
    return True if isinstance(obj, _FIELD) else skip


def _append_states(_app, docname, source):
    """States live in the modules of their transformations: list those of all."""
    if docname != "api/optimisers":
        return
    names = []
    for package in (fusionopt_jax.transforms, fusionopt_jax.recipes):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            names += [
                f"{found.name}.{name}"
                for name, value in vars(module).items()
                if name.endswith("State")
                and getattr(value, "__module__", None) == found.name
            ]
    names.append("fusionopt_jax.iterates.ScheduleFreeState")
    blocks = "\n\n".join(f".. autoclass:: {name}" for name in sorted(names))
    source[0] += f"\n## States\n\n```{{eval-rst}}\n{blocks}\n```\n"


def setup(app):
    app.connect("autodoc-skip-member", _skip_field)
    app.connect("source-read", _append_states)
