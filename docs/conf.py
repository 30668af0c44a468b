# SPDX-License-Identifier: Apache-2.0
"""The site: these pages as they are on GitHub, and the API from its docstrings.

`sphinx-build -W docs build/site` builds it, with the extra `docs`.
"""

import os
import pathlib
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax_ep

project = "jax_ep"
author = copyright = "the jax_ep authors"
version = release = jax_ep.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["README.md"]  # the list of pages for GitHub; here index.md
myst_heading_anchors = 3
default_role = "py:obj"  # `dispatch` in a docstring is a link where there is such a thing

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the arguments' descriptions say shapes and types
napoleon_google_docstring = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"jax_ep {release}"
html_show_sphinx = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"code-font-size": "75%"},  # 100 columns
}

_ROOT = pathlib.Path(__file__).parent.parent
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)\)")


def _link(match: re.Match) -> str:
    """A link out of docs/: the changelog is a page, a file a download, a folder just its name."""
    text, target = match.groups()
    if target == "../CHANGELOG.md":
        return f"[{text}](changelog.md)"
    return f"`{text}`" if (_ROOT / "docs" / target).is_dir() else match[0]


def _adapt(app, name: str, source: list[str]) -> None:
    source[0] = _OUTSIDE.sub(_link, source[0])


def setup(app) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _adapt)
