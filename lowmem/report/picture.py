"""The picture of a training step's memory as a file of its own."""

from __future__ import annotations

from collections.abc import Mapping

import vl_convert

from lowmem.report.charts import draw
from lowmem.report.content import Section
from lowmem.report.page import page
from lowmem.report.step import chart, figure
from lowmem.report.theme import DARK, LIGHT, coloured, css
from lowmem.training.memory import TrainingMemory

__all__ = ["picture"]


def picture(title: str, found: Mapping[str, TrainingMemory], ending: str) -> bytes:
    """Return the chart as a file.

    Args:
        title: of a page.
        found: what was measured, by the names of the models.
        ending: ".svg", in the colours of the viewer's theme; ".png", light; or ".html", a page with exact figures.
    """
    if ending in (".html", ".htm"):
        section = Section("step", "Memory of a step", figures=[figure(found)])
        return page(title, "Where its memory goes.", [section]).encode()
    svg = draw(lambda narrow: chart(found, narrow)).wide
    if ending == ".png":
        background = f'<rect width="100%" height="100%" fill="{LIGHT["page"]}"/>'
        return bytes(vl_convert.svg_to_png(_inside(coloured(svg, LIGHT), background), scale=2))
    themes = f":root{{{css(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{css(DARK)}}}}}"
    return _inside(svg, f'<style>{themes}</style><rect width="100%" height="100%" fill="var(--page)"/>').encode()


def _inside(svg: str, first: str) -> str:
    start = svg.index(">") + 1
    return svg[:start] + first + svg[start:]
