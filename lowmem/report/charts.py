"""The charts: what Altair draws of the figures, for a desk and for a phone, in the names of the theme's colours.

They are SVG without a script: the page is the same wherever HTML is shown or printed, and nothing in it runs. What a
tooltip would say is in the table below each chart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from io import StringIO
from typing import Any, NamedTuple

import altair as alt

from lowmem.report.distortion import Distortion, least_error
from lowmem.report.footprint import KINDS, Footprint
from lowmem.report.groups import Group
from lowmem.report.theme import series
from lowmem.report.timings import Timing, is_peers
from lowmem.testing.verdicts import Row

__all__ = [
    "FONT",
    "MOST_GROUPS",
    "Drawing",
    "distortion_chart",
    "draw",
    "group_chart",
    "loss_chart",
    "memory_chart",
    "percent",
    "ratio_chart",
    "readable_bytes",
    "speed_chart",
]

FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
MOST_GROUPS = 24
"""Groups of layers that are drawn, the largest ones; the table has all of them."""

INK, QUIET, LINE, PAGE = "var(--ink)", "var(--quiet)", "var(--line)", "var(--page)"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")

_KIND_COLOURS = dict(zip(KINDS, ("grey", "blue", "green", "olive", "purple", "orange", "brown"), strict=True))
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
_ROW = 26  # pixels of a row of bars
_CHARACTER = 6.8  # pixels of a character of 11 pixels in a wide font


class Drawing(NamedTuple):
    """A chart as SVG, for a desk and for a phone, and the specification of the former."""

    wide: str
    narrow: str
    spec: dict[str, Any]


def draw(chart: Callable[[bool], Any]) -> Drawing:
    """Draw a chart for a desk and for a phone.

    Args:
        chart: returns it, given whether it is narrow.
    """
    wide, narrow = (_configured(chart(is_narrow)) for is_narrow in (False, True))
    return Drawing(_svg(wide), _svg(narrow), wide.to_dict())


def _svg(chart: Any) -> str:
    text = StringIO()
    chart.save(text, format="svg")
    return text.getvalue()


def _configured(chart: Any) -> Any:
    return (
        chart.configure(font=FONT, background="transparent", padding={"left": 4, "right": 14, "top": 4, "bottom": 4})
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
    """Return bytes in the largest unit of which there is one: ``9.43 MiB``."""
    size, unit = _unit(count)
    return f"{count:,.0f} bytes" if size == 1 else f"{count / size:.2f} {unit}"


def percent(value: float) -> str:
    """Return a share with two digits: ``3.7%``."""
    digits = max(0, 1 - math.floor(math.log10(value * 100))) if value > 0 else 1
    return f"{value:.{min(digits, 6)}%}"


def _unit(count: float) -> tuple[int, str]:
    return next(((size, unit) for size, unit in _UNITS if abs(count) >= size), _UNITS[-1])


def _data(rows: Iterable[dict[str, Any]]) -> Any:
    return alt.Data(values=list(rows))  # type: ignore[no-untyped-call]


def _names(names: Sequence[str], *, shown: bool = True) -> Any:
    """Return the axis of rows that have names, in their order."""
    axis = _name_axis(names) if shown else _unlabelled(grid=False)
    return alt.Y("name:N", sort=list(names), axis=axis, scale=alt.Scale(paddingInner=0.3, paddingOuter=0.15))


def _name_axis(names: Iterable[str], *, grid: bool = False, labels: str | None = None) -> Any:
    """Return an axis with room for names in any font: Vega measures them in one that is narrower than some are."""
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


def _unlabelled(*, grid: bool) -> Any:
    return alt.Axis(title=None, labels=False, ticks=False, domain=False, grid=grid)


def memory_chart(footprints: Sequence[Footprint], narrow: bool) -> Any:
    """Draw what each variant stores, by kind, and the peaks of its forward and its training step, as bars."""
    names = [footprint.name for footprint in footprints]
    kinds = [kind for kind in KINDS if any(footprint.kinds[kind] for footprint in footprints)]
    size, unit = _unit(max(footprint.stored_bytes for footprint in footprints))
    stored = [
        {"name": f.name, "kind": kind, "order": KINDS.index(kind), "size": f.kinds[kind] / size}
        for f in footprints
        for kind in kinds
        if f.kinds[kind]
    ]
    totals = [
        {"name": f.name, "size": f.stored_bytes / size, "text": readable_bytes(f.stored_bytes)} for f in footprints
    ]
    width = 190 if narrow else 400
    x = alt.X("size:Q", title=unit, scale=_room_for_text(totals, width), axis=_few_ticks(narrow))
    bars = (
        alt.Chart(_data(stored))
        .mark_bar(stroke=PAGE, strokeWidth=0.5)
        .encode(
            y=_names(names),
            x=x,
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=[f"var(--{_KIND_COLOURS[kind]})" for kind in kinds]),
                legend=alt.Legend(columns=2 if narrow else len(kinds), title=None),
            ),
            order="order:Q",
        )
    )
    panels = [alt.layer(bars, _texts(totals, names)).properties(width=width, height=alt.Step(_ROW), title="Stored")]
    for title, colour, peaks in (
        ("Forward peak", "sky", [f.forward_bytes for f in footprints]),
        ("Training step peak", "purple", [f.step_bytes for f in footprints]),
    ):
        panels.append(_peak_panel(title, f"var(--{colour})", names, peaks, narrow))
    return alt.vconcat(*panels) if narrow else alt.hconcat(*panels)


def _peak_panel(title: str, colour: str, names: Sequence[str], peaks: Sequence[int], narrow: bool) -> Any:
    size, unit = _unit(max(peaks))
    rows = [
        {"name": name, "size": peak / size, "text": readable_bytes(peak)}
        for name, peak in zip(names, peaks, strict=True)
    ]
    width = 190 if narrow else 165
    x = alt.X("size:Q", title=unit, scale=_room_for_text(rows, width), axis=_few_ticks(True))
    bars = alt.Chart(_data(rows)).mark_bar(color=colour).encode(y=_names(names, shown=narrow), x=x)
    return alt.layer(bars, _texts(rows, names, shown=narrow)).properties(
        width=width, height=alt.Step(_ROW), title=title
    )


def _room_for_text(rows: Sequence[dict[str, Any]], width: int) -> Any:
    """Return a scale that leaves 62 pixels right of the longest bar, for its figure."""
    largest = max(row["size"] for row in rows) or 1.0
    return alt.Scale(domain=[0, largest * width / (width - 62)], nice=False)


def _few_ticks(few: bool) -> Any:
    return alt.Axis(tickCount=3 if few else 6, format=",~r")


def _texts(rows: Sequence[dict[str, Any]], names: Sequence[str], *, shown: bool = True) -> Any:
    return (
        alt.Chart(_data(rows))
        .mark_text(align="left", dx=5, color=INK, fontSize=11)
        .encode(y=_names(names, shown=shown), x="size:Q", text="text:N")
    )


def speed_chart(timings: Sequence[Timing], narrow: bool) -> Any:
    """Draw how many times as fast as the dense model, against the batch: a panel for each dtype, logarithmic axes."""
    names = list(dict.fromkeys(timing.name for timing in timings))
    batches = sorted({timing.batch for timing in timings})
    ends = [end for t in timings for end in (t.speed, t.low or t.speed, t.high or t.speed)]
    lowest, highest = min(*ends, 0.9) / 1.08, max(*ends, 1.1) * 1.08
    panels = list(dict.fromkeys(timing.panel for timing in timings))
    width = 250 if narrow else min(420, 800 // len(panels) - 18)
    charts: list[Any] = []
    for panel in panels:
        rows = [asdict(timing) for timing in timings if timing.panel == panel]
        base = alt.Chart(_data(rows)).encode(
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
                axis=alt.Axis(values=_powers_of_two(lowest, highest), format="~g"),
            ),
            color=_by_name(names, narrow),
        )
        reference = "lowmem's nf4" if is_peers(panel) else "dense"
        dense = alt.Chart(_data([{"batch": batches[0], "speed": 1.0, "text": reference}]))
        layers = [
            dense.mark_rule(color=INK, strokeDash=[5, 3], strokeWidth=1.2).encode(y="speed:Q"),
            dense.mark_text(align="left", baseline="top", dy=4, color=INK, fontSize=11).encode(
                x=alt.value(4), y="speed:Q", text="text:N"
            ),
            base.mark_line(strokeWidth=1.8),
            base.mark_point(filled=True, size=55, opacity=1).encode(shape=_shapes(names, narrow)),
        ]
        if any(t.low is not None for t in timings if t.panel == panel):
            layers.insert(2, base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y="low:Q", y2="high:Q"))
        charts.append(alt.layer(*layers).properties(width=width, height=230, title=panel))
    return alt.vconcat(*charts) if narrow else alt.hconcat(*charts)


def _around(batches: Sequence[int]) -> list[float]:
    return [batches[0] / 1.15, batches[-1] * 1.15]


def _powers_of_two(low: float, high: float) -> list[float]:
    return [value for power in range(-10, 11) if low <= (value := 2.0**power) <= high]


def _by_name(names: Sequence[str], narrow: bool) -> Any:
    return alt.Color("name:N", scale=alt.Scale(domain=list(names), range=series(len(names))), legend=_legend(narrow))


def _shapes(names: Sequence[str], narrow: bool) -> Any:
    shapes = [SHAPES[number % len(SHAPES)] for number in range(len(names))]
    return alt.Shape("name:N", scale=alt.Scale(domain=list(names), range=shapes), legend=_legend(narrow))


def _legend(narrow: bool) -> Any:
    return alt.Legend(columns=2 if narrow else 6, title=None)


def distortion_chart(points: Sequence[Distortion], narrow: bool) -> Any:
    """Draw the error of normal weights against bits a weight, and the least possible."""
    formats = list(dict.fromkeys(point.format for point in points))
    first, last = 4.0, max(point.bits_per_weight for point in points)
    lowest = least_error(last) * 0.95
    steps = [first + (last - first) * step / 40 for step in range(41)]
    theory_rows = [{"bits": bits, "error": least_error(bits), "lowest": lowest} for bits in steps]
    x = alt.X(
        "bits:Q",
        title="bits per weight",
        scale=alt.Scale(domain=[first, last + 0.06], nice=False),
        axis=alt.Axis(values=[4, 4.5, 5, 5.5, 6], format="~g"),
    )
    panels: list[Any] = []
    for scales in dict.fromkeys(point.scales for point in points):
        y = alt.Y(
            "error:Q",
            title="relative error of the weights" if narrow or not panels else None,
            scale=alt.Scale(type="log", domain=[lowest, max(point.error for point in points) * 1.1], nice=False),
            axis=alt.Axis(values=[0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15], format="~%"),
        )
        rows = [
            {"bits": point.bits_per_weight, "error": point.error, "name": point.format, "block": point.block_size}
            for point in points
            if point.scales == scales
        ]
        base = alt.Chart(_data(rows)).encode(x=x, y=y, color=_by_name(formats, narrow))
        theory = alt.Chart(_data(theory_rows)).encode(x=x, y=y)
        label = alt.Chart(
            _data([{"bits": first, "error": lowest, "text": ["least possible error:", "2 to the power -bits"]}])
        )
        layers = [
            theory.mark_area(color="var(--grey)", opacity=0.16).encode(y2="lowest:Q"),
            theory.mark_line(color=INK, strokeDash=[5, 3], strokeWidth=1.4),
            label.mark_text(
                align="left", baseline="bottom", dx=7, dy=-22, color=INK, fontSize=11, lineHeight=14
            ).encode(x="bits:Q", y="error:Q", text="text:N"),
            base.mark_line(strokeWidth=1.6),
            base.mark_point(filled=True, size=50, opacity=1).encode(shape=_shapes(formats, narrow)),
        ]
        panels.append(
            alt.layer(*layers).properties(width=240, height=230 if narrow else 300, title=f"{scales} scales")
        )
    return alt.vconcat(*panels) if narrow else alt.hconcat(*panels)


def loss_chart(errors: Mapping[str, float], narrow: bool) -> Any:
    """Draw the error of each variant's output, relative to the dense model's, as dots on a logarithmic axis."""
    drawn = {name: error for name, error in errors.items() if 0 < error < math.inf}
    rows = [{"name": name, "error": error, "text": percent(error)} for name, error in drawn.items()]
    names = list(errors)
    x = alt.X(
        "error:Q",
        title="relative error of the output",
        scale=alt.Scale(type="log", domain=[min(drawn.values()) / 1.5, max(drawn.values()) * 6]),
        axis=alt.Axis(values=[10.0**power for power in range(-9, 2)], format="~%"),
    )
    base = alt.Chart(_data(rows)).encode(y=_names(names), x=x)
    return alt.layer(
        base.mark_point(filled=True, size=80, opacity=1, color="var(--blue)"),
        base.mark_text(align="left", dx=9, color=INK, fontSize=11).encode(text="text:N"),
    ).properties(width=190 if narrow else 680, height=alt.Step(_ROW))


def group_chart(groups: Sequence[Group], variants: Sequence[str], narrow: bool) -> Any:
    """Draw what each group of layers costs, dense and in each variant, and what its weights lose."""
    drawn = sorted(groups, key=lambda group: -group.dense_bytes)[:MOST_GROUPS]
    labels = {group.name: _short(group.name, 20 if narrow else 44) for group in drawn}
    names = [group.name for group in drawn]
    largest = max(max(group.dense_bytes, *group.bytes.values()) for group in drawn)
    size, unit = _unit(largest)
    cost = [
        {"name": group.name, "variant": variant, "value": count / size}
        for group in drawn
        for variant, count in {"dense": group.dense_bytes, **group.bytes}.items()
        if count and variant in ("dense", *variants)
    ]
    loss = [
        {"name": group.name, "variant": variant, "value": error}
        for group in drawn
        for variant, error in group.errors.items()
        if error and variant in variants
    ]
    expression = _looked_up(labels)
    axis = _name_axis(labels.values(), grid=True, labels=expression)
    domain = ["dense", *variants]
    colours = ["var(--grey)", *series(len(variants))]
    width = 160 if narrow else 330

    def panel(rows: list[dict[str, Any]], title: str, x: Any, shown: bool) -> Any:
        y = alt.Y("name:N", sort=names, scale=alt.Scale(domain=names), axis=axis if shown else _unlabelled(grid=True))
        return (
            alt.Chart(_data(rows))
            .mark_point(filled=True, size=70, opacity=1)
            .encode(
                x=x,
                y=y,
                color=alt.Color("variant:N", scale=alt.Scale(domain=domain, range=colours), legend=_legend(narrow)),
                shape=alt.Shape(
                    "variant:N",
                    scale=alt.Scale(domain=domain, range=[SHAPES[n % len(SHAPES)] for n in range(len(domain))]),
                    legend=_legend(narrow),
                ),
            )
            .properties(width=width, height=alt.Step(22), title=title)
        )

    panels = [panel(cost, "Costs", _decades(cost, f"{unit}, logarithmic", "~g"), True)]
    if loss:
        x = _decades(loss, "relative error of the weights, logarithmic", "~%")
        panels.append(panel(loss, "Loses", x, narrow))
    return alt.vconcat(*panels) if narrow else alt.hconcat(*panels)


def _decades(rows: Sequence[dict[str, Any]], title: str, format: str) -> Any:
    """Return a logarithmic axis from one power of ten to another, with one tick for each."""
    values = [row["value"] for row in rows]
    first, last = math.floor(math.log10(min(values) / 1.2)), math.ceil(math.log10(max(values) * 1.2))
    ticks = [float(f"1e{power}") for power in range(first, last + 1)]
    scale = alt.Scale(type="log", domain=[ticks[0], ticks[-1]], nice=False)
    return alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(values=ticks, format=format))


def _looked_up(labels: Mapping[str, str]) -> str:
    """Return an expression of Vega that looks labels up; with a mark before each, none is a property of objects."""
    marked = {f"~{name}": label for name, label in labels.items()}
    return f"{json.dumps(marked)}['~' + datum.label]"


def _short(name: str, limit: int) -> str:
    """Return the end of a name that is too long: it says more than the beginning."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def ratio_chart(rows: Sequence[Row], narrow: bool) -> Any:
    """Draw the ratios of a gate, head over base, with their intervals; what moved stands out."""
    drawn = [row for row in rows if row.ratio is not None]
    names = list(dict.fromkeys(row.name for row in drawn))
    labels = {name: _short(name, 24 if narrow else 60) for name in names}
    data: list[dict[str, Any]] = [
        {
            "name": row.name,
            "ratio": row.ratio,
            "low": row.low or row.ratio,
            "high": row.high or row.ratio,
            "verdict": row.verdict,
        }
        for row in drawn
    ]
    ends = [end for row in data for end in (row["ratio"], row["low"], row["high"])]
    colours = {"slower": "bad", "grew": "bad", "missing": "bad", "faster": "good", "shrank": "good"}
    verdicts = list(dict.fromkeys(row.verdict for row in drawn))
    axis = _name_axis(labels.values(), labels=_looked_up(labels))
    x = alt.X(
        "ratio:Q",
        title="head / base, logarithmic",
        scale=alt.Scale(type="log", domain=[min(*ends, 0.95) / 1.01, max(*ends, 1.05) * 1.01], nice=False),
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    base = alt.Chart(_data(data)).encode(
        y=alt.Y("name:N", sort=names, axis=axis),
        color=alt.Color(
            "verdict:N",
            scale=alt.Scale(domain=verdicts, range=[f"var(--{colours.get(v, 'grey')})" for v in verdicts]),
            legend=alt.Legend(columns=3, title=None),
        ),
    )
    one = alt.Chart(_data([{"ratio": 1.0}])).mark_rule(color=INK, strokeDash=[5, 3])
    return alt.layer(
        one.encode(x=x),
        base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x,
            shape=alt.Shape(
                "verdict:N",
                scale=alt.Scale(domain=verdicts, range=list(SHAPES[: len(verdicts)])),
                legend=alt.Legend(columns=3, title=None),
            ),
        ),
    ).properties(width=180 if narrow else 560, height=alt.Step(20))
