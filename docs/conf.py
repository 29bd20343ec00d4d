"""The site of the documentation: ``tox -e docs`` builds it, and warnings are errors."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # for autodoc, since nothing is installed, and for drawings.py

from drawings import put_drawings_into  # noqa: E402
from notebooks import put_notebooks_into  # noqa: E402

from lowmem.version import __version__  # noqa: E402

project = "lowmem"
author = "the developers of lowmem"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
html_theme = "furo"
html_title = f"lowmem {release}"

myst_heading_anchors = 3  # as GitHub's
myst_fence_as_directive = ["mermaid"]
highlight_language = "text"  # of indented blocks: commands and equations

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# `sphinx-build -b linkcheck`: links to other sites are those of `tox -e links` alone, since these may be down.
linkcheck_ignore = [] if os.environ.get("LOWMEM_LINKS") else [r"https?://"]
linkcheck_retries = 3

PICTURE = re.compile(
    r'^<picture>\n.*?srcset="(?P<dark>[^"]+)".*?src="(?P<light>[^"]+)" alt="(?P<alt>[^"]+)".*?^</picture>$',
    re.DOTALL | re.MULTILINE,
)
BOTH = "\n".join(
    f"```{{image}} \\g<{theme}>\n:alt: \\g<alt>\n:class: only-{theme}\n```" for theme in ("light", "dark")
)


def show_both_themes(app, docname, source):
    """Turn a picture with a source for each colour scheme, as GitHub shows it, into images that follow the theme."""
    source[0] = PICTURE.sub(BOTH, source[0])


def lead_to_the_index(app, docname, source):
    """Turn links from guides to the README, which the index includes, into links to the index."""
    source[0] = source[0].replace("](../../README.md", "](../index.md")


def show_drawings(app, docname, source):
    """Put the drawings that a page names into it."""
    source[0] = put_drawings_into(source[0])


def show_notebooks(app, docname, source):
    """Put the notebooks that a page names into it, with their outputs."""
    source[0] = put_notebooks_into(source[0], ROOT / "docs")


def setup(app):
    """Register what the pages need."""
    app.connect("source-read", show_both_themes)
    app.connect("source-read", lead_to_the_index)
    app.connect("source-read", show_drawings)
    app.connect("source-read", show_notebooks)
