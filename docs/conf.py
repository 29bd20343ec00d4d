"""The site of the documentation: ``tox -e docs`` builds it, and warnings are errors."""

import html
import os
import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # for autodoc, since nothing is installed, and for drawings.py

from drawings import put_drawings_into  # noqa: E402
from graphs import put_graphs_into  # noqa: E402
from notebooks import put_notebooks_into  # noqa: E402

from lowmem.version import __version__  # noqa: E402

project = "lowmem"
author = "the developers of lowmem"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "lowmem"
html_baseurl = os.environ.get("LOWMEM_SITE", "")  # where the site will lie, for links that have to be absolute
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = html_show_sourcelink = html_copy_source = False
templates_path = ["templates"]
PREVIEW = "preview.png"  # benchmarks/pictures.py draws it
html_extra_path = [f"images/{PREVIEW}"]

myst_heading_anchors = 3  # as GitHub's
smartquotes = False  # which make a dash of --option
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


def show_readme(app, docname, source):
    """Put the README up to its links, which the navigation has, into the page that names it."""
    readme = (ROOT / "README.md").read_text(encoding="utf8").partition("\n## Where to read on")[0]
    for path, shown in (("docs/", ""), ("examples/", "../examples/"), ("CONTRIBUTING.md", "contributing.md")):
        readme = re.sub(rf'(\]\(|(?:src|srcset)="){re.escape(path)}', rf"\g<1>{shown}", readme)
    source[0] = source[0].replace("```{readme}\n```", readme)


def lead_to_the_index(app, docname, source):
    """Turn links from guides to the README, which the index includes, into links to the index."""
    source[0] = source[0].replace("](../../README.md", "](../index.md")


def show_drawings(app, docname, source):
    """Put the drawings that a page names, and its graphs, into it."""
    source[0] = put_graphs_into(put_drawings_into(source[0]))


def show_notebooks(app, docname, source):
    """Put the notebooks that a page names into it, with their outputs."""
    source[0] = put_notebooks_into(source[0], ROOT / "docs")


def description_of(doctree):
    """Return a page's first sentences without what is in brackets: 200 characters, or the first sentence."""
    paragraph = next(doctree.findall(lambda node: node.tagname == "paragraph"), None)
    text = re.sub(r" \([^()]*\)", "", " ".join(paragraph.astext().split())) if paragraph else project
    sentences = re.split(r"(?<=[.!?:]) ", text)
    while len(sentences) > 1 and len(" ".join(sentences)) > 200:
        sentences.pop()
    return " ".join(sentences)


def describe(app, pagename, templatename, context, doctree):
    """Describe a page to search engines, and to programs that show a preview of a link."""
    if doctree is None:
        return
    title = re.sub("<.*?>", "", context["title"])
    picture = html_baseurl.rstrip("/") + f"/{PREVIEW}" if html_baseurl else context["pathto"](PREVIEW, resource=True)
    described = {"name": {"description": description_of(doctree), "twitter:card": "summary_large_image"}}
    described["property"] = {"og:title": title, "og:description": description_of(doctree), "og:type": "website"}
    described["property"] |= {"og:site_name": project, "og:image": picture}
    context["metatags"] = context.get("metatags", "") + "".join(
        f'<meta {kind}="{name}" content="{escape(html.unescape(content))}">\n'
        for kind, contents in described.items()
        for name, content in contents.items()
    )


def setup(app):
    """Register what the pages need."""
    app.connect("html-page-context", describe)
    app.connect("source-read", show_readme)
    app.connect("source-read", show_both_themes)
    app.connect("source-read", lead_to_the_index)
    app.connect("source-read", show_drawings)
    app.connect("source-read", show_notebooks)
