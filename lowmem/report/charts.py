"""Charts of memory and speed, drawn by Altair in a wide and a narrow layout, in the theme's CSS variables.

They are static SVG, so that the page runs no script and prints as it is shown. A table below each chart holds its
numbers in place of tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from io import StringIO
from typing import Any, NamedTuple

import altair as alt

from lowmem.report.footprint import KINDS, Footprint
from lowmem.report.theme import series
from lowmem.report.timings import Timing, is_peers

__all__ = [
    "ALONE",
    "BESIDE_NAMES",
    "FONT",
    "INK",
    "PAGE",
    "ROW",
    "SHAPES",
    "WIDE",
    "Drawing",
    "by_name",
    "data",
    "draw",
    "few_ticks",
    "legend",
    "memory_chart",
    "name_axis",
    "names_axis",
    "percent",
    "powers",
    "readable_bytes",
    "room_for_text",
    "shapes",
    "speed_chart",
    "texts",
    "unit_of",
    "unlabelled",
]

FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"

INK, QUIET, LINE, PAGE = "var(--ink)", "var(--quiet)", "var(--line)", "var(--page)"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")

_KIND_COLOURS = dict(zip(KINDS, ("grey", "blue", "green", "olive", "purple", "orange", "sky", "brown"), strict=True))
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
ROW = 26  # height of a row, in pixels
WIDE = 560  # width of a chart's only panel on a desk, in pixels
ALONE, BESIDE_NAMES = 250, 190  # of a panel on a phone, without and with names beside it
_CHARACTER = 6.8  # width of a character at font size 11 in a wide font, in pixels


class Drawing(NamedTuple):
    """A chart as SVG, wide and narrow, and the Vega-Lite specification of the wide one."""

    wide: str
    narrow: str
    spec: dict[str, Any]


def draw(chart: Callable[[bool], Any]) -> Drawing:
    """Draw the wide and the narrow layout of a chart.

    Args:
        chart: returns the Altair chart; its argument says whether it is narrow.
    """
    wide, narrow = (_configured(chart(is_narrow)) for is_narrow in (False, True))
    return Drawing(_svg(wide), _svg(narrow), wide.to_dict())


def _svg(chart: Any) -> str:
    text = StringIO()
    chart.save(text, format="svg")
    return text.getvalue()


def _configured(chart: Any) -> Any:
    return (
        chart.configure(
            font=FONT, aria=False, background="transparent", padding={"left": 4, "right": 14, "top": 4, "bottom": 4}
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=QUIET,
            titleColor=QUIET,
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            gridColor=LINE,
            domainColor=LINE,
            tickColor=LINE,
            labelLimit=320,
            titlePadding=8,
        )
        .configure_legend(
            labelColor=INK,
            labelFontSize=11,
            labelLimit=200,
            title=None,
            orient="top",
            symbolSize=90,
            symbolOpacity=1,
            columnPadding=22,
            rowPadding=4,
            offset=12,
        )
        .configure_title(color=INK, fontSize=12, fontWeight=600, anchor="start", offset=8, frame="bounds")
        .configure_concat(spacing=18)
    )


def readable_bytes(count: float) -> str:
    """Format bytes in the largest unit that is not above them: ``9.43 MiB``."""
    size, unit = unit_of(count)
    return f"{count:,.0f} bytes" if size == 1 else f"{count / size:.2f} {unit}"


def percent(value: float) -> str:
    """Format a fraction as a percentage with two significant digits: ``3.7%``."""
    digits = max(0, 1 - math.floor(math.log10(value * 100))) if value > 0 else 1
    return f"{value:.{min(digits, 6)}%}"


def unit_of(count: float) -> tuple[int, str]:
    """Return the size in bytes and the name of the largest unit that is not above ``count``."""
    return next(((size, unit) for size, unit in _UNITS if abs(count) >= size), _UNITS[-1])


def data(rows: Iterable[dict[str, Any]]) -> Any:
    """Return rows as the data of an Altair chart."""
    return alt.Data(values=list(rows))  # type: ignore[no-untyped-call]


def names_axis(names: Sequence[str], *, shown: bool = True) -> Any:
    """Return the y axis of named rows, in the order of ``names``."""
    axis = name_axis(names) if shown else unlabelled(grid=False)
    return alt.Y("name:N", sort=list(names), axis=axis, scale=alt.Scale(paddingInner=0.3, paddingOuter=0.15))


def name_axis(names: Iterable[str], *, grid: bool = False, labels: str | None = None) -> Any:
    """Return an axis with room for names in any font; Vega measures text in a font narrower than some."""
    expression: Any = {} if labels is None else {"labelExpr": labels}
    return alt.Axis(
        title=None,
        labelColor=INK,
        ticks=False,
        domain=False,
        labelPadding=8,
        grid=grid,
        labelLimit=0,
        minExtent=_CHARACTER * max(map(len, names)),
        **expression,
    )


def unlabelled(*, grid: bool) -> Any:
    """Return the axis of rows whose names another panel shows."""
    return alt.Axis(title=None, labels=False, ticks=False, domain=False, grid=grid)


def memory_chart(footprints: Sequence[Footprint], narrow: bool) -> Any:
    """Draw bars of each variant's stored bytes by kind, and of the peaks of its forward and training step."""
    names = [footprint.name for footprint in footprints]
    kinds = [kind for kind in KINDS if any(footprint.kinds[kind] for footprint in footprints)]
    size, unit = unit_of(max(footprint.stored_bytes for footprint in footprints))
    stored = [
        {"name": f.name, "kind": kind, "order": KINDS.index(kind), "size": f.kinds[kind] / size}
        for f in footprints
        for kind in kinds
        if f.kinds[kind]
    ]
    totals = [
        {"name": f.name, "size": f.stored_bytes / size, "text": readable_bytes(f.stored_bytes)} for f in footprints
    ]
    width = BESIDE_NAMES if narrow else 400
    x = alt.X("size:Q", title=unit, scale=room_for_text(totals, width), axis=few_ticks(narrow))
    bars = (
        alt.Chart(data(stored))
        .mark_bar(stroke=PAGE, strokeWidth=0.5)
        .encode(
            y=names_axis(names),
            x=x,
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=[f"var(--{_KIND_COLOURS[kind]})" for kind in kinds]),
                legend=alt.Legend(columns=2 if narrow else len(kinds), title=None),
            ),
            order="order:Q",
        )
    )
    panels = [alt.layer(bars, texts(totals, names)).properties(width=width, height=alt.Step(ROW), title="Stored")]
    for title, colour, peaks in (
        ("Forward peak", "sky", [f.forward_bytes for f in footprints]),
        ("Training step peak", "purple", [f.step_bytes for f in footprints]),
    ):
        panels.append(_peak_panel(title, f"var(--{colour})", names, peaks, narrow))
    return alt.vconcat(*panels) if narrow else alt.hconcat(*panels)


def _peak_panel(title: str, colour: str, names: Sequence[str], peaks: Sequence[int], narrow: bool) -> Any:
    size, unit = unit_of(max(peaks))
    rows = [
        {"name": name, "size": peak / size, "text": readable_bytes(peak)}
        for name, peak in zip(names, peaks, strict=True)
    ]
    width = BESIDE_NAMES if narrow else 165
    x = alt.X("size:Q", title=unit, scale=room_for_text(rows, width), axis=few_ticks(True))
    bars = alt.Chart(data(rows)).mark_bar(color=colour).encode(y=names_axis(names, shown=narrow), x=x)
    return alt.layer(bars, texts(rows, names, shown=narrow)).properties(
        width=width, height=alt.Step(ROW), title=title
    )


def room_for_text(rows: Sequence[dict[str, Any]], width: int) -> Any:
    """Return a scale that leaves 62 pixels right of the longest bar, for its label."""
    largest = max(row["size"] for row in rows) or 1.0
    return alt.Scale(domain=[0, largest * width / (width - 62)], nice=False)


def few_ticks(few: bool) -> Any:
    """Return the axis of a panel of bars."""
    return alt.Axis(tickCount=3 if few else 6, format=",~r")


def texts(rows: Sequence[dict[str, Any]], names: Sequence[str], *, shown: bool = True) -> Any:
    """Return the labels ``text`` of rows, right of their bars."""
    return (
        alt.Chart(data(rows))
        .mark_text(align="left", dx=5, color=INK, fontSize=11)
        .encode(y=names_axis(names, shown=shown), x="size:Q", text="text:N")
    )


def speed_chart(timings: Sequence[Timing], narrow: bool) -> Any:
    """Draw the speed relative to the dense model against the batch size: a panel per dtype, logarithmic axes."""
    names = list(dict.fromkeys(timing.name for timing in timings))
    batches = sorted({timing.batch for timing in timings})
    ends = [end for t in timings for end in (t.speed, t.low or t.speed, t.high or t.speed)]
    lowest, highest = min(*ends, 0.9) / 1.08, max(*ends, 1.1) * 1.08
    panels = list(dict.fromkeys(timing.panel for timing in timings))
    width = ALONE if narrow else min(420, 800 // len(panels) - 18)
    charts: list[Any] = []
    for panel in panels:
        rows = [asdict(timing) for timing in timings if timing.panel == panel]
        base = alt.Chart(data(rows)).encode(
            x=alt.X(
                "batch:Q",
                title="batch",
                scale=alt.Scale(type="log", base=2, domain=_around(batches), nice=False),
                axis=alt.Axis(values=batches, grid=False, format="d"),
            ),
            y=alt.Y(
                "speed:Q",
                title=None if charts and not narrow else "times as fast",
                scale=alt.Scale(type="log", base=2, domain=[lowest, highest], nice=False),
                axis=alt.Axis(values=powers(2, lowest, highest), format="~g"),
            ),
            color=by_name(names, narrow),
        )
        reference = "lowmem's nf4" if is_peers(panel) else "dense"
        dense = alt.Chart(data([{"batch": batches[0], "speed": 1.0, "text": reference}]))
        layers = [
            dense.mark_rule(color=INK, strokeDash=[5, 3], strokeWidth=1.2).encode(y="speed:Q"),
            dense.mark_text(align="left", baseline="top", dy=4, color=INK, fontSize=11).encode(
                x=alt.value(4), y="speed:Q", text="text:N"
            ),
            base.mark_line(strokeWidth=1.8),
            base.mark_point(filled=True, size=55, opacity=1).encode(shape=shapes(names, narrow)),
        ]
        if any(t.low is not None for t in timings if t.panel == panel):
            layers.insert(2, base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y="low:Q", y2="high:Q"))
        charts.append(alt.layer(*layers).properties(width=width, height=230, title=panel))
    return alt.vconcat(*charts) if narrow else alt.hconcat(*charts)


def _around(batches: Sequence[int]) -> list[float]:
    return [batches[0] / 1.15, batches[-1] * 1.15]


def powers(base: int, low: float, high: float) -> list[float]:
    """Return the powers of 2 or 10 from ``low`` to ``high``."""
    log = {2: math.log2, 10: math.log10}[base]
    return [float(base) ** power for power in range(math.ceil(log(low)), math.floor(log(high)) + 1)]


def by_name(names: Sequence[str], narrow: bool) -> Any:
    """Return the colour encoding of the series ``names``."""
    return alt.Color("name:N", scale=alt.Scale(domain=list(names), range=series(len(names))), legend=legend(narrow))


def shapes(names: Sequence[str], narrow: bool) -> Any:
    """Return the shape encoding of the series ``names``."""
    given = [SHAPES[number % len(SHAPES)] for number in range(len(names))]
    return alt.Shape("name:N", scale=alt.Scale(domain=list(names), range=given), legend=legend(narrow))


def legend(narrow: bool) -> Any:
    """Return the legend of the series."""
    return alt.Legend(columns=2 if narrow else 6, title=None)
