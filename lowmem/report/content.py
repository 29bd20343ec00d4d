"""What a page is made of: the report's figures, and the sections, figures and tables that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from lowmem.report.charts import Drawing
from lowmem.report.distortion import Distortion
from lowmem.report.footprint import Footprint
from lowmem.report.groups import Group
from lowmem.report.timings import Timing
from lowmem.testing.verdicts import Verdict

__all__ = ["Figure", "Report", "Section", "Table", "Tile", "figure_text"]


@dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
        title: the name of the model.
        lead: a sentence below it.
        footprints: of the dense model first, and of every variant.
        losses: by variant, the error of its output relative to the dense model's.
        timings: how fast variants are, and other libraries; empty where nothing was timed.
        timed: a sentence: where the timings are from, or why there are none.
        groups: the layers of a user's model; empty for BigNet, whose layers are all alike.
        distortions: what formats lose of normal weights.
        verdicts: of the gates.
        machine: what the figures were measured on.
        timing_machine: what the timings were measured on, where that is another run.
    """

    title: str
    lead: str
    footprints: Sequence[Footprint]
    losses: Mapping[str, float]
    timings: Sequence[Timing]
    timed: str
    groups: Sequence[Group]
    distortions: Sequence[Distortion]
    verdicts: Sequence[Verdict]
    machine: Mapping[str, str]
    timing_machine: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table; ``text`` says which columns are no figures."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Figure:
    """A chart, what it shows, and its figures; a gate's has a verdict, and may have no chart."""

    drawing: Drawing | None
    caption: str
    table: Table
    title: str = ""
    passed: bool | None = None
    texts: Sequence[str] = ()
    shown: Table | None = None

    def svg(self, width: str) -> Markup:
        """Return the chart as an image that is called by its caption."""
        text: str = getattr(self.drawing, width)
        label = escape(self.caption)
        return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # Vega escapes names


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    id: str
    title: str
    texts: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Tile:
    """A figure that says most at a glance."""

    term: str
    value: str
    says: str = field(default="")


def figure_text(value: float | None) -> str:
    """Return a figure of a gate as a table shows it: whole numbers whole, others to four digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
