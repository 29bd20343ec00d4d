"""``python docs/check_pages.py FOLDER``: what holds of every page of the built site.

Without a browser: a page loads nothing from another host, and has a title of its own and a description. In Chromium,
where it is installed: code is not cut, no page is wider than the screen, pictures follow the colour scheme, and the
search finds words in files that no server serves.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

PHONE, DESKTOP = 360, 1280  # pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOADS = {"src", "srcset", "data", "poster"}
UNTITLED = {"genindex.html", "py-modindex.html", "search.html"}  # pages of Sphinx, which have no text
SEARCHED = "calibration"

# What is wrong with the layout of the page that is shown. Code may scroll on a phone, and has room elsewhere.
LAYOUT = """(wide) => {
  const wrong = [], first = (node) => JSON.stringify(node.textContent.trim().slice(0, 50));
  for (const pre of document.querySelectorAll("pre")) {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(pre).overflowX);
    const outside = Math.round(pre.getBoundingClientRect().right - innerWidth);
    if (outside > 1) wrong.push(`code ends ${outside} pixels outside: ${first(pre)}`);
    if (pre.scrollWidth > pre.clientWidth + 1 && (wide || !scrolls))
      wrong.push(`code is cut by ${pre.scrollWidth - pre.clientWidth} pixels: ${first(pre)}`);
  }
  const wider = document.documentElement.scrollWidth - innerWidth;
  if (wider > 1) wrong.push(`the page is ${wider} pixels wider than the screen`);
  const content = document.querySelector(".content");
  if (content && content.scrollWidth > content.clientWidth + 1)
    wrong.push(`the text is ${content.scrollWidth - content.clientWidth} pixels wider than its column`);
  for (const svg of document.querySelectorAll("figure.drawing svg text"))
    if (svg.getBoundingClientRect().height < 9) wrong.push(`a text of a drawing is too small: ${first(svg)}`);
  return wrong;
}"""
HIDDEN = """(theme) => [...document.querySelectorAll(`img.only-${theme}`)]
  .filter((image) => !image.offsetParent || !image.naturalWidth).map((image) => image.src)"""


class Page(HTMLParser):
    """What a page loads, its title and its description."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.titles: list[str] = []
        self.described: list[str] = []
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag loads or says."""
        values = {name: value or "" for name, value in attrs}
        self._in_title = tag == "title"
        self.loads += [value for name, value in values.items() if name in LOADS]
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev", "index", "search"):
            self.loads.append(values.get("href", ""))
        if tag == "meta" and values.get("name") == "description":
            self.described.append(values.get("content", ""))

    def handle_data(self, data: str) -> None:
        """Note the text of a title."""
        if self._in_title:
            self.titles.append(data)
            self._in_title = False


def files_that_load_from_elsewhere(folder: Path) -> Iterator[str]:
    """Yield what pages and style sheets load from other hosts."""
    for path in sorted(folder.rglob("*.html")):
        for url in Page(path.read_text(encoding="utf8")).loads:
            if re.search(r"(?:^|[\s,])(?:https?:)?//", url):
                yield f"{path.relative_to(folder)} loads {url}"
    for path in sorted(folder.rglob("*.css")):
        for url in re.findall(r"""(?:@import\s+|url\()\s*["']?((?:https?:)?//[^"')]+)""", path.read_text("utf8")):
            yield f"{path.relative_to(folder)} loads {url}"


def pages_without_words(folder: Path) -> Iterator[str]:
    """Yield pages that share a title, or have no description."""
    pages = {path.relative_to(folder).as_posix(): Page(path.read_text("utf8")) for path in folder.rglob("*.html")}
    titles = Counter(page.titles[0] for page in pages.values())
    for name, page in sorted(pages.items()):
        if titles[page.titles[0]] > 1:
            yield f"{name} has the title of another page, {page.titles[0]!r}"
        if name not in UNTITLED and len(page.described) != 1:
            yield f"{name} has {len(page.described)} descriptions"


@contextlib.contextmanager
def chromium_pages(browser: str, loaded: list[str]) -> Iterator[Any]:
    """Give what makes a page of Chromium of a width and a colour scheme; requests to hosts go to ``loaded`` alone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])

        def make(width: int, scheme: str) -> Any:
            page = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
            page.route(re.compile("^https?:"), lambda route: (loaded.append(route.request.url), route.abort()))
            return page

        yield make
        chromium.close()


def faults_in_chromium(folder: Path, browser: str) -> Iterator[str]:
    """Yield what is wrong with a page in Chromium."""
    from playwright.sync_api import TimeoutError

    loaded: list[str] = []
    files = sorted(folder.rglob("*.html"))
    with chromium_pages(browser, loaded) as make:
        for width, scheme in ((PHONE, "light"), (DESKTOP, "dark")):
            page = make(width, scheme)
            for path in files:
                page.goto(path.resolve().as_uri())
                found = page.evaluate(LAYOUT, width >= DESKTOP)
                found += [f"a picture is not shown: {url}" for url in page.evaluate(HIDDEN, scheme)]
                yield from (f"{path.relative_to(folder)} at {width} pixels, {scheme}: {fault}" for fault in found)
        page = make(DESKTOP, "light")
        page.goto(f"{(folder / 'search.html').resolve().as_uri()}?q={SEARCHED}")
        with contextlib.suppress(TimeoutError):
            page.wait_for_selector("#search-results li a", timeout=20_000)
        if not page.query_selector("#search-results li a"):
            yield f"the search finds no page with {SEARCHED!r} where no server serves it"
    yield from (f"a page asks for {url}" for url in dict.fromkeys(loaded))


def main(arguments: list[str] | None = None) -> int:
    """Print what is wrong with the pages of a folder; return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the built site")
    folder: Path = parser.parse_args(arguments).folder
    faults = [*files_that_load_from_elsewhere(folder), *pages_without_words(folder)]
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser:
        faults += faults_in_chromium(folder, browser)
    else:
        print(f"skipped in a browser, since none of {', '.join(BROWSERS)} is installed (Debian: chromium)")
    print("\n".join(faults) or f"{len(list(folder.rglob('*.html')))} pages are as they should be")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
