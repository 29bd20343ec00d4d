"""The content of a page: the report's data, and the sections, figures and tables that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from lowmem.report.charts import Drawing
from lowmem.report.footprint import Footprint
from lowmem.report.groups import Group
from lowmem.report.quality import Distortion, Quality
from lowmem.report.timings import Timing
from lowmem.testing.verdicts import Verdict
from lowmem.training.memory import TrainingMemory


@dataclass(frozen=True)
class Report:
    """The data of a page.

    Attributes:
        title: the name of the model.
        lead: a sentence below it.
        footprints: of the dense model first, then of every variant.
        steps: of those that train, by name, where the memory of a step goes.
        losses: by variant, the error of its output relative to the dense model's.
        timings: of variants and other libraries; empty where nothing was timed.
        timed: a sentence on the source of the timings, or why there are none.
        groups: the layers of a user's model; empty for BigNet, whose layers are all alike.
        distortions: errors of the formats for normal weights.
        verdicts: of the gates.
        machine: properties of the machine of the measurements.
        timing_machine: the same of the timings, if they are from another run.
        qualities: of the output with each choice of bits; empty where they were not measured.
        left_out: why some variants could not be made of the model, a sentence for each reason.
    """

    title: str
    lead: str
    footprints: Sequence[Footprint]
    steps: Mapping[str, TrainingMemory]
    losses: Mapping[str, float]
    timings: Sequence[Timing]
    timed: str
    groups: Sequence[Group]
    distortions: Sequence[Distortion]
    verdicts: Sequence[Verdict]
    machine: Mapping[str, str]
    timing_machine: Mapping[str, str]
    qualities: Sequence[Quality] = ()
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """A table; the columns in ``text`` hold text, the others numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Figure:
    """A chart with a caption and the table of its numbers. A gate's also has a verdict, and may have no chart."""

    drawing: Drawing | None
    caption: str
    table: Table
    title: str = ""
    outcome: str = ""
    texts: Sequence[str] = ()
    shown: Table | None = None

    def svg(self, width: str) -> Markup:
        """Return the "wide" or "narrow" chart as an image with the caption as its accessible name."""
        text: str = getattr(self.drawing, width)
        label = escape(self.caption)
        return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # Vega escapes names


@dataclass(frozen=True)
class Section:
    """A heading with texts, figures and tables."""

    id: str
    title: str
    texts: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Tile:
    """A headline number at the top of the page."""

    term: str
    value: str
    says: str
