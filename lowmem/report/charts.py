"""Charts of memory and speed, drawn by Altair wide and narrow as static SVG, in the theme's CSS variables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from io import StringIO
from typing import Any, NamedTuple

import altair as alt

from lowmem.report.footprint import KINDS, MemoryFootprint
from lowmem.report.relative_speeds import RelativeSpeed, is_other_library_panel
from lowmem.report.theme import series_color_css_variables
from lowmem.training.step_memory import TrainingMemory

FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"

INK, QUIET, LINE, PAGE = "var(--ink)", "var(--quiet)", "var(--line)", "var(--page)"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")

_KIND_COLOURS = dict(zip(KINDS, ("grey", "blue", "sky", "green", "olive", "purple", "orange", "brown"), strict=True))
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
# Height of a row, in pixels
ROW = 26
# Width of a chart's only panel on a desk, in pixels
WIDE = 560
FRONT = 330  # of the front page's panels, in pixels
ALONE, BESIDE_NAMES = 250, 190  # of a panel on a phone, without and with names beside it
_LAYERS = ("orange", "purple", "sky")
_OTHERS = "activations: other layers"
PARTS = {"weights": "grey", "adapters": "blue", "inputs": "navy", "gradients": "green", "optimizer": "olive"}
"""The colours of the parts that every training step has, in the order of the bars; activations and scratch follow."""

# Width of a character at font size 11 in a wide font, in pixels
_CHARACTER = 6.8


class ChartSvgsAndSpec(NamedTuple):
    """A chart as SVG, wide and narrow, and the Vega-Lite specification of the wide one."""

    wide: str
    narrow: str
    spec: dict[str, Any]


def draw_wide_and_narrow_svg(make_chart: Callable[[bool], Any]) -> ChartSvgsAndSpec:
    """Draw the wide and the narrow layout of a chart, which ``make_chart`` returns for each."""
    wide, narrow = (_chart_with_style(make_chart(is_narrow)) for is_narrow in (False, True))
    return ChartSvgsAndSpec(_chart_svg(wide), _chart_svg(narrow), wide.to_dict())


def _chart_svg(chart: Any) -> str:
    text = StringIO()
    chart.save(text, format="svg")
    return text.getvalue()


def _chart_with_style(chart: Any) -> Any:
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


def readable_bytes(byte_count: float) -> str:
    """Format bytes in the largest unit that is not above them: ``9.43 MiB``."""
    size, unit = byte_unit_size_and_name(byte_count)
    return f"{byte_count:,.0f} bytes" if size == 1 else f"{byte_count / size:.2f} {unit}"


def percent_text(fraction: float) -> str:
    """Format a fraction as a percentage with two significant digits: ``3.7%``."""
    digits = max(0, 1 - math.floor(math.log10(fraction * 100))) if fraction > 0 else 1
    return f"{fraction:.{min(digits, 6)}%}"


def log_scale(low: float, high: float, base: Any = alt.Undefined) -> Any:
    """Return a logarithmic scale from ``low`` to ``high``; Vega would widen it to round numbers."""
    return alt.Scale(type="log", base=base, domain=[low, high], nice=False)


def byte_unit_size_and_name(byte_count: float) -> tuple[int, str]:
    """Return the size in bytes and the name of the largest unit that is not above ``byte_count``."""
    return next(((size, unit) for size, unit in _UNITS if abs(byte_count) >= size), _UNITS[-1])


def altair_data(rows: Iterable[dict[str, Any]]) -> Any:
    """Return rows as the data of an Altair chart."""
    return alt.Data(values=list(rows))  # type: ignore[no-untyped-call]


def row_names_y_encoding(names: Sequence[str], *, show_names: bool = True) -> Any:
    """Return the y axis of named rows, in the order of ``names``."""
    axis = row_names_axis(names) if show_names else unlabeled_axis(grid=False)
    return alt.Y("name:N", sort=list(names), axis=axis, scale=alt.Scale(paddingInner=0.3, paddingOuter=0.15))


def row_names_axis(names: Iterable[str], *, grid: bool = False, label_expression: str | None = None) -> Any:
    """Return an axis with room for names in any font; Vega measures text in a font narrower than some."""
    expression: Any = {} if label_expression is None else {"labelExpr": label_expression}
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


def unlabeled_axis(*, grid: bool) -> Any:
    """Return the axis of rows whose names another panel shows."""
    return alt.Axis(title=None, labels=False, ticks=False, domain=False, grid=grid)


def stored_and_peak_bytes_chart(footprints: Sequence[MemoryFootprint], narrow: bool) -> Any:
    """Draw bars of each variant's stored bytes by kind, and of the peaks of its forward and training step."""
    panels = [
        _stored_bytes_panel(footprints, BESIDE_NAMES if narrow else 400, narrow, 2 if narrow else len(KINDS)),
        _peak_bytes_panel("Forward peak", {f.name: f.forward_bytes for f in footprints}, narrow),
        _peak_bytes_panel("Training step peak", _step_peak_bytes_by_name(footprints), narrow),
    ]
    return alt.vconcat(*panels) if narrow else alt.hconcat(*panels)


def front_page_memory_chart(footprints: Sequence[MemoryFootprint]) -> Any:
    """Draw what variants store, and the peaks of their training steps, to be read at a width of 400 pixels."""
    return alt.vconcat(
        _stored_bytes_panel(footprints, FRONT, True, 3),
        _peak_bytes_panel(
            "Peak of a training step, beyond the model", _step_peak_bytes_by_name(footprints), True, FRONT
        ),
    )


def _step_peak_bytes_by_name(footprints: Iterable[MemoryFootprint]) -> dict[str, int | None]:
    return {f.name: f.step.step_bytes if f.step else None for f in footprints}


def _stored_bytes_panel(
    footprints: Sequence[MemoryFootprint], width: int, few_ticks: bool, legend_columns: int
) -> Any:
    """Draw bars of stored bytes by kind, with a legend in some columns."""
    kinds = [kind for kind in KINDS if any(footprint.kinds[kind] for footprint in footprints)]
    colours = {kind: _KIND_COLOURS[kind] for kind in kinds}
    orders = {kind: KINDS.index(kind) for kind in kinds}
    legend = alt.Legend(columns=legend_columns, title=None)
    bars = {footprint.name: footprint.kinds for footprint in footprints}
    drawn = _stacked_bars_with_sums("kind", bars, colours, orders, width, few_ticks, legend)
    return drawn.properties(title="Stored")


def training_step_memory_chart(memory_by_model: Mapping[str, TrainingMemory], narrow: bool) -> Any:
    """Draw a stacked bar for each model: of activations the three kinds of layers that have most, and the others."""
    colours = _step_colors_by_part(memory_by_model.values())
    bars = {name: dict.fromkeys(colours, 0) for name in memory_by_model}
    for name, memory in memory_by_model.items():
        for part, size in memory.parts.items():
            if size:
                bars[name][part if part in colours else _OTHERS] += size
    orders = {part: order for order, part in enumerate(colours)}
    legend = alt.Legend(columns=1 if narrow else 4, title=None, labelLimit=0)
    return _stacked_bars_with_sums("part", bars, colours, orders, BESIDE_NAMES if narrow else WIDE, narrow, legend)


def _step_colors_by_part(memories: Iterable[TrainingMemory]) -> dict[str, str]:
    """Return the colours of the parts that a chart of steps has."""
    memories, sizes = list(memories), Counter[str]()
    for memory in memories:
        sizes.update(memory.activations)
    largest = sorted(sizes, key=lambda kind: (-sizes[kind], kind))[: len(_LAYERS)]
    colours = {part: colour for part, colour in PARTS.items() if any(memory.parts[part] for memory in memories)}
    colours |= {f"activations: {kind}": colour for kind, colour in zip(largest, _LAYERS, strict=False)}
    if len(sizes) > len(largest):
        colours[_OTHERS] = "brown"
    return colours | {"scratch": "rose"}


def _stacked_bars_with_sums(
    field: str,
    bars: Mapping[str, Mapping[str, int]],
    colors: Mapping[str, str],
    orders: Mapping[str, int],
    width: int,
    narrow: bool,
    legend: Any,
) -> Any:
    """Draw a bar for each name, of its parts (``field`` of the data, stacked by ``orders``), with their sum."""
    names = list(bars)
    sums = {name: sum(parts.values()) for name, parts in bars.items()}
    size, unit = byte_unit_size_and_name(max(sums.values()))
    rows = [
        {"name": name, field: part, "order": orders[part], "size": parts[part] / size}
        for name, parts in bars.items()
        for part in colors
        if parts[part]
    ]
    totals = [{"name": name, "size": sums[name] / size, "text": readable_bytes(sums[name])} for name in names]
    drawn = (
        alt.Chart(altair_data(rows))
        .mark_bar(stroke=PAGE, strokeWidth=0.5)
        .encode(
            y=row_names_y_encoding(names),
            x=alt.X(
                "size:Q", title=unit, scale=_x_scale_with_label_margin(totals, width), axis=_bar_value_axis(narrow)
            ),
            color=alt.Color(
                f"{field}:N",
                scale=alt.Scale(domain=list(colors), range=[f"var(--{colour})" for colour in colors.values()]),
                legend=legend,
            ),
            order="order:Q",
        )
    )
    return alt.layer(drawn, _bar_label_layer(totals, names)).properties(width=width, height=alt.Step(ROW))


def _peak_bytes_panel(title: str, peaks: Mapping[str, int | None], narrow: bool, width: int = BESIDE_NAMES) -> Any:
    """Draw a hollow bar for each peak, whose colour is none of a kind of stored bytes."""
    names = list(peaks)
    size, unit = byte_unit_size_and_name(max(peak or 0 for peak in peaks.values()))
    rows = [
        {"name": name, "size": (peak or 0) / size, "text": "no step" if peak is None else readable_bytes(peak)}
        for name, peak in peaks.items()
    ]
    width = width if narrow else 165
    x = alt.X("size:Q", title=unit, scale=_x_scale_with_label_margin(rows, width), axis=_bar_value_axis(True))
    bars = alt.Chart(altair_data(rows)).mark_bar(color="var(--panel)", stroke=INK, strokeWidth=1)
    bars = bars.encode(y=row_names_y_encoding(names, show_names=narrow), x=x)
    return alt.layer(bars, _bar_label_layer(rows, names, show_names=narrow)).properties(
        width=width, height=alt.Step(ROW), title=title
    )


def _x_scale_with_label_margin(rows: Sequence[dict[str, Any]], width: int) -> Any:
    """Return a scale that leaves 62 pixels right of the longest bar, for its label."""
    largest = max(row["size"] for row in rows) or 1.0
    return alt.Scale(domain=[0, largest * width / (width - 62)], nice=False)


def _bar_value_axis(few_ticks: bool) -> Any:
    """Return the axis of a panel of bars."""
    return alt.Axis(tickCount=3 if few_ticks else 6, format=",~r")


def _bar_label_layer(rows: Sequence[dict[str, Any]], names: Sequence[str], *, show_names: bool = True) -> Any:
    """Return the labels ``text`` of rows, right of their bars."""
    return (
        alt.Chart(altair_data(rows))
        .mark_text(align="left", dx=5, color=INK, fontSize=11)
        .encode(y=row_names_y_encoding(names, show_names=show_names), x="size:Q", text="text:N")
    )


def relative_speed_chart(timings: Sequence[RelativeSpeed], narrow: bool) -> Any:
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
        base = alt.Chart(altair_data(rows)).encode(
            x=alt.X(
                "batch:Q",
                title="batch",
                scale=log_scale(batches[0] / 1.15, batches[-1] * 1.15, base=2),
                axis=alt.Axis(values=batches, grid=False, format="d"),
            ),
            y=alt.Y(
                "speed:Q",
                title=None if charts and not narrow else "times as fast",
                scale=log_scale(lowest, highest, base=2),
                axis=alt.Axis(values=powers_between(2, lowest, highest), format="~g"),
            ),
            color=color_encoding(names, narrow),
        )
        reference = "lowmem's nf4" if is_other_library_panel(panel) else "dense"
        dense = alt.Chart(altair_data([{"batch": batches[0], "speed": 1.0, "text": reference}]))
        layers = [
            dense.mark_rule(color=INK, strokeDash=[5, 3], strokeWidth=1.2).encode(y="speed:Q"),
            dense.mark_text(align="left", baseline="top", dy=4, color=INK, fontSize=11).encode(
                x=alt.value(4), y="speed:Q", text="text:N"
            ),
            *line_and_point_layers(base, names, narrow),
        ]
        if any(t.low is not None for t in timings if t.panel == panel):
            layers.insert(2, base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y="low:Q", y2="high:Q"))
        charts.append(alt.layer(*layers).properties(width=width, height=230, title=panel))
    return alt.vconcat(*charts) if narrow else alt.hconcat(*charts)


def line_and_point_layers(base_chart: Any, names: Sequence[str], narrow: bool) -> list[Any]:
    """Return the layers of lines with a point at each value, one for each of ``names``, of a chart with axes."""
    base_chart = base_chart.encode(color=color_encoding(names, narrow))
    points = base_chart.mark_point(filled=True, size=55, opacity=1).encode(shape=shape_encoding(names, narrow))
    return [base_chart.mark_line(strokeWidth=1.8), points]


def powers_between(base: int, low: float, high: float) -> list[float]:
    """Return the powers of 2 or 10 from ``low`` to ``high``."""
    log = {2: math.log2, 10: math.log10}[base]
    return [float(base) ** power for power in range(math.ceil(log(low)), math.floor(log(high)) + 1)]


def color_encoding(names: Sequence[str], narrow: bool, field: str = "name", colors: Sequence[str] = ()) -> Any:
    """Return the colour encoding of series, by their names in ``field``; by default in the theme's colours."""
    scale = alt.Scale(domain=list(names), range=list(colors) or series_color_css_variables(len(names)))
    return alt.Color(f"{field}:N", scale=scale, legend=_series_legend(narrow))


def shape_encoding(names: Sequence[str], narrow: bool, field: str = "name") -> Any:
    """Return the shape encoding of series."""
    shapes = [SHAPES[number % len(SHAPES)] for number in range(len(names))]
    return alt.Shape(f"{field}:N", scale=alt.Scale(domain=list(names), range=shapes), legend=_series_legend(narrow))


def _series_legend(narrow: bool) -> Any:
    return alt.Legend(columns=2 if narrow else 6, title=None)
