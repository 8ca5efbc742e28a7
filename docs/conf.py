"""Sphinx configuration."""

import collections
import importlib
import pkgutil
import re

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx import addnodes
from sphinx.util import logging

import fusionopt_jax

project = "fusionopt_jax"
author = "the fusionopt_jax authors"
copyright = "CC0 1.0"
release = fusionopt_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

# What stands in single backticks is code, and a link where it is a public name.
default_role = "py:obj"

# NamedTuple fields are listed once, from the Attributes section.
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autosummary_generate = False
autodoc_member_order = "bysource"
# Docstrings are run by the test suite; only the pages' own examples are run here.
doctest_test_doctest_blocks = ""

html_theme = "furo"
html_title = "fusionopt_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Formulas are part of the page, and need neither a network nor a script.
html_math_renderer = "mathml"

_MODULE = re.compile(r"~?\b(jaxtyping|(jax\.)?jaxlib\._jax|collections\.abc)\.")
_LOGGER = logging.getLogger(__name__)
_FIELD = type(collections.namedtuple("_Example", "field").field)


def _skip_field(_app, _what, _name, obj, skip, _options):
    """Leave out the fields of named tuples, which the Attributes section lists."""
    return True if isinstance(obj, _FIELD) else skip


_OVERVIEW = {
    "Complete optimisers, and around them": "recipes",
    "Transformations": "transforms",
    "Which leaves are matrices": "routing",
    "Reading a state": "iterates diagnostics",
}


def _list_names(_app, docname, source):
    """What there is by subject, with a line each, before all of it by name."""
    if docname != "api/optimisers":
        return
    blocks = []
    for title, modules in _OVERVIEW.items():
        names = [
            name
            for name in fusionopt_jax.__all__
            if fusionopt_jax.__dict__[name].__module__.split(".")[1] in modules.split()
        ]
        lines = "\n".join(f"   ~fusionopt_jax.{name}" for name in names)
        blocks.append(
            f".. rubric:: {title}\n\n.. autosummary::\n   :nosignatures:\n\n{lines}"
        )
    overview = "\n\n".join(blocks)
    head, rest = source[0].split("\n", 1)
    source[0] = f"{head}\n\n```{{eval-rst}}\n{overview}\n```\n\n## By name\n{rest}"


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


def _shorten_types(_app, doctree):
    """Types as the source spells them, without the modules they come from."""
    for description in doctree.findall(addnodes.desc):
        for text in list(description.findall(nodes.Text)):
            short = _MODULE.sub("", text)
            # What napoleon calls the attributes of a named tuple.
            short = "Fields" if short == "Variables" else short
            if short != text:
                text.parent.replace(text, nodes.Text(short))


def _mathml(node, as_block):
    """A formula as MathML; what docutils can't read is a warning with its place."""
    # Of the two names of one sign docutils knows the longer.
    formula = node.astext().replace(r"\dots", r"\ldots")
    try:
        return latex2mathml.tex2mathml(formula, as_block=as_block)
    except MathError as error:
        _LOGGER.warning("%s in %s", error, formula, location=node)
        return ""


def _visit_math(translator, node):
    translator.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _visit_math_block(translator, node):
    translator.body.append(translator.starttag(node, "div", CLASS="formula"))
    translator.body.append(_mathml(node, as_block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    app.connect("autodoc-skip-member", _skip_field)
    app.connect("source-read", _append_states)
    app.connect("source-read", _list_names)
    app.connect("doctree-read", _shorten_types)
