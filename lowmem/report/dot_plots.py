"""Charts of errors, groups of layers and gates: dots on logarithmic axes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from lowmem.report import charts
from lowmem.report.charts import (
    ALONE,
    BESIDE_NAMES,
    INK,
    ROW,
    WIDE,
    altair_data,
    color_encoding,
    log_scale,
    shape_encoding,
)
from lowmem.report.layer_groups import LayerGroup
from lowmem.report.quantization_errors import (
    SERIES,
    BitsAndOutputError,
    FormatGaussianError,
    gaussian_error_lower_bound,
)
from lowmem.report.theme import series_color_css_variables
from lowmem.testing.gate_verdicts import FigureComparison

MOST_GROUPS = 24
"""The number of groups of layers that are drawn, the largest first; the table has all of them."""


def format_error_by_bits_chart(points: Sequence[FormatGaussianError], narrow: bool) -> Any:
    """Draw the error of normal weights against bits per weight, and the lower bound."""
    formats = list(dict.fromkeys(point.format for point in points))
    first, last = 4.0, max(point.bits_per_weight for point in points)
    lowest = gaussian_error_lower_bound(last) * 0.95
    steps = [first + (last - first) * step / 40 for step in range(41)]
    theory_rows = [{"bits": bits, "error": gaussian_error_lower_bound(bits), "lowest": lowest} for bits in steps]
    x = _bits_x_encoding(first, last)
    panels: list[Any] = []
    for scales in dict.fromkeys(point.scales for point in points):
        title = "relative error of the weights" if narrow or not panels else None
        y = _log_error_y_encoding(title, lowest, max(point.error for point in points) * 1.1)
        rows = [
            {"bits": point.bits_per_weight, "error": point.error, "name": point.format, "block": point.block_size}
            for point in points
            if point.scales == scales
        ]
        base = alt.Chart(altair_data(rows)).encode(x=x, y=y)
        theory = alt.Chart(altair_data(theory_rows)).encode(x=x, y=y)
        label = alt.Chart(
            altair_data([{"bits": first, "error": lowest, "text": ["least possible error:", "2 to the power -bits"]}])
        )
        layers = [
            theory.mark_area(color="var(--grey)", opacity=0.16).encode(y2="lowest:Q"),
            theory.mark_line(color=INK, strokeDash=[5, 3], strokeWidth=1.4),
            label.mark_text(align="left", baseline="bottom", dx=7, dy=-22, color=INK, lineHeight=14).encode(
                x="bits:Q", y="error:Q", text="text:N"
            ),
            *charts.line_and_point_layers(base, formats, narrow),
        ]
        panels.append(
            alt.layer(*layers).properties(width=ALONE, height=230 if narrow else 300, title=f"{scales} scales")
        )
    return alt.vconcat(*panels) if narrow else alt.hconcat(*panels)


def output_error_by_bits_chart(qualities: Sequence[BitsAndOutputError], narrow: bool) -> Any:
    """Draw the error of a model's output against bits per weight, for each way to choose them."""
    drawn = [point for point in qualities if 0 < point.error < math.inf]
    names = [name for name in SERIES if any(point.series == name for point in drawn)]
    rows = [{"bits": point.bits, "error": point.error, "name": point.series} for point in drawn]
    errors, bits = [point.error for point in drawn], [point.bits for point in drawn]
    x = _bits_x_encoding(min(4.0, *bits), max(bits))
    y = _log_error_y_encoding("relative error of the output", min(errors) / 1.2, max(errors) * 1.2)
    base = alt.Chart(altair_data(rows)).encode(x=x, y=y)
    chart = alt.layer(*charts.line_and_point_layers(base, names, narrow))
    return chart.properties(width=ALONE if narrow else WIDE, height=230 if narrow else 300)


def _bits_x_encoding(first: float, last: float) -> Any:
    """Return the axis of the bits that a weight takes, with room for the last point."""
    scale = alt.Scale(domain=[first, last + 0.1], nice=False)
    return alt.X("bits:Q", title="bits per weight", scale=scale, axis=alt.Axis(tickMinStep=0.5, format="~g"))


def _log_error_y_encoding(title: str | None, lowest: float, highest: float) -> Any:
    """Return the logarithmic axis of relative errors."""
    scale = log_scale(lowest, highest)
    return alt.Y("error:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6, format="~%"))


def variant_output_error_chart(errors: Mapping[str, float], narrow: bool) -> Any:
    """Draw the error of each variant's output, relative to the dense model's, as dots on a logarithmic axis."""
    drawn = {name: error for name, error in errors.items() if 0 < error < math.inf}
    rows = [{"name": name, "error": error, "text": charts.percent_text(error)} for name, error in drawn.items()]
    names = list(errors)
    # A tick at least, and room for the text
    lowest, highest = min(drawn.values()) / 1.5, max(drawn.values()) * 7
    x = alt.X(
        "error:Q",
        title="relative error of the output",
        scale=log_scale(lowest, highest),
        axis=alt.Axis(values=charts.powers_between(10, lowest, highest), format="~%"),
    )
    base = alt.Chart(altair_data(rows)).encode(y=charts.row_names_y_encoding(names), x=x)
    return alt.layer(
        base.mark_point(filled=True, size=80, opacity=1, color="var(--blue)"),
        base.mark_text(align="left", dx=9, color=INK).encode(text="text:N"),
    ).properties(width=BESIDE_NAMES if narrow else WIDE, height=alt.Step(ROW))


def layer_group_bytes_and_error_chart(groups: Sequence[LayerGroup], variants: Sequence[str], narrow: bool) -> Any:
    """Draw the bytes of each group of layers, dense and in each variant, and the errors of its weights."""
    drawn = sorted(groups, key=lambda group: -group.dense_bytes)[:MOST_GROUPS]
    largest = max(max(group.dense_bytes, *group.bytes.values()) for group in drawn)
    size, unit = charts.byte_unit_size_and_name(largest)
    cost = [
        {"name": _vega_safe_name(group.name), "variant": variant, "value": count / size}
        for group in drawn
        for variant, count in {"dense": group.dense_bytes, **group.bytes}.items()
        if count and variant in ("dense", *variants)
    ]
    loss = [
        {"name": _vega_safe_name(group.name), "variant": variant, "value": error}
        for group in drawn
        for variant, error in group.errors.items()
        if error and variant in variants
    ]
    domain = ["dense", *variants]
    colours = ["var(--grey)", *series_color_css_variables(len(variants))]
    width = BESIDE_NAMES if narrow else 290

    def group_panel(rows: list[dict[str, Any]], title: str, x_encoding: Any, show_names: bool) -> Any:
        return (
            alt.Chart(altair_data(rows))
            .mark_point(filled=True, size=70, opacity=1)
            .encode(
                x=x_encoding,
                y=_shortened_names_y_encoding(
                    (group.name for group in drawn), narrow, grid=True, show_names=show_names
                ),
                color=color_encoding(domain, narrow, "variant", colours),
                shape=shape_encoding(domain, narrow, "variant"),
            )
            .properties(width=width, height=alt.Step(ROW), title=title)
        )

    panels = [group_panel(cost, "Costs", _decade_ticks_x_encoding(cost, f"{unit}, logarithmic", "~g"), True)]
    if loss:
        x = _decade_ticks_x_encoding(loss, "relative error of the weights, logarithmic", "~%")
        panels.append(group_panel(loss, "Loses", x, narrow))
    return alt.vconcat(*panels) if narrow else alt.hconcat(*panels)


def _decade_ticks_x_encoding(rows: Sequence[dict[str, Any]], title: str, number_format: str) -> Any:
    """Return a logarithmic axis between powers of ten, with a tick at each."""
    values = [row["value"] for row in rows]
    first, last = math.floor(math.log10(min(values) / 1.2)), math.ceil(math.log10(max(values) * 1.2))
    ticks = [float(f"1e{power}") for power in range(first, last + 1)]
    scale = log_scale(ticks[0], ticks[-1])
    return alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(values=ticks, format=number_format))


def _vega_safe_name(name: str) -> str:
    """Return a name for Vega, which trips over names that each object of JavaScript has, as ``constructor``."""
    return f"~{name}"


def _shortened_names_y_encoding(
    names: Iterable[str], narrow: bool, *, grid: bool = False, show_names: bool = True
) -> Any:
    """Return the y axis of marked names, labelled with as much of each as a column of the page has room for.

    A Vega expression looks up the labels, which are marked in it, too.
    """
    labels = {_vega_safe_name(name): _truncate_name_start(name, 17 if narrow else 44) for name in names}
    marked = json.dumps({name: _vega_safe_name(label) for name, label in labels.items()})
    axis = charts.row_names_axis(labels.values(), grid=grid, label_expression=f"slice({marked}[datum.label], 1)")
    return alt.Y(
        "name:N",
        sort=list(labels),
        scale=alt.Scale(domain=list(labels)),
        axis=axis if show_names else charts.unlabeled_axis(grid=grid),
    )


def _truncate_name_start(name: str, max_length: int) -> str:
    """Return the end of a name that is too long, which identifies a layer better than the beginning."""
    return name if len(name) <= max_length else f"…{name[1 - max_length :]}"


def gate_ratio_chart(rows: Sequence[FigureComparison], narrow: bool) -> Any:
    """Draw the ratios head / base of a gate with their intervals, coloured by verdict."""
    drawn = [row for row in rows if row.ratio is not None]
    drawn_rows: list[dict[str, Any]] = [
        {
            "name": _vega_safe_name(row.name),
            "ratio": row.ratio,
            "low": row.low or row.ratio,
            "high": row.high or row.ratio,
            "verdict": row.verdict,
        }
        for row in drawn
    ]
    ends = [end for row in drawn_rows for end in (row["ratio"], row["low"], row["high"])]
    colours = {"slower": "bad", "grew": "bad", "missing": "bad", "faster": "good", "shrank": "good"}
    verdicts = list(dict.fromkeys(row.verdict for row in drawn))
    x = alt.X(
        "ratio:Q",
        title="head / base, logarithmic",
        scale=log_scale(min(*ends, 0.95) / 1.01, max(*ends, 1.05) * 1.01),
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    base = alt.Chart(altair_data(drawn_rows)).encode(
        y=_shortened_names_y_encoding((row.name for row in drawn), narrow),
        color=color_encoding(verdicts, narrow, "verdict", [f"var(--{colours.get(v, 'grey')})" for v in verdicts]),
    )
    reference_line = alt.Chart(altair_data([{"ratio": 1.0}])).mark_rule(color=INK, strokeDash=[5, 3])
    return alt.layer(
        reference_line.encode(x=x),
        base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, shape=shape_encoding(verdicts, narrow, "verdict")
        ),
    ).properties(width=BESIDE_NAMES if narrow else WIDE, height=alt.Step(ROW))
