"""Sphinx configuration."""

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
]
myst_enable_extensions = ["amsmath", "dollarmath"]
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
