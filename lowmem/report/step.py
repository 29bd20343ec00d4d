"""Where the memory of a training step goes: stacked bars, one for each model, and the table of their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt

from lowmem.report.charts import (
    BESIDE_NAMES,
    PAGE,
    ROW,
    WIDE,
    data,
    draw,
    few_ticks,
    names_axis,
    readable_bytes,
    room_for_text,
    texts,
    unit_of,
)
from lowmem.report.content import Figure, Table
from lowmem.training.memory import TrainingMemory

__all__ = ["PARTS", "chart", "figure"]

_LAYERS = ("orange", "purple", "sky")
_OTHERS = "activations: other layers"
PARTS = {"weights": "grey", "adapters": "blue", "inputs": "navy", "gradients": "green", "optimizer": "olive"}
"""The parts that every step has, with their colours, in the order of the bars; then activations, and scratch."""


def chart(found: Mapping[str, TrainingMemory], narrow: bool) -> Any:
    """Draw a stacked bar for each model: of activations the three kinds of layers that have most, and the others."""
    names, colours = list(found), _colours(found.values())
    size, unit = unit_of(max(one.total_bytes for one in found.values()))
    rows, totals = [], []
    for name, one in found.items():
        parts = _parts(one, colours)
        rows += [
            {"name": name, "part": part, "order": order, "size": parts[part] / size}
            for order, part in enumerate(colours)
            if parts[part]
        ]
        text = readable_bytes(one.total_bytes)
        totals.append({"name": name, "size": one.total_bytes / size, "text": text})
    width = BESIDE_NAMES if narrow else WIDE
    bars = (
        alt.Chart(data(rows))
        .mark_bar(stroke=PAGE, strokeWidth=0.5)
        .encode(
            y=names_axis(names),
            x=alt.X("size:Q", title=unit, scale=room_for_text(totals, width), axis=few_ticks(narrow)),
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=list(colours), range=[f"var(--{colour})" for colour in colours.values()]),
                legend=alt.Legend(columns=1 if narrow else 4, title=None, labelLimit=0),
            ),
            order="order:Q",
        )
    )
    return alt.layer(bars, texts(totals, names)).properties(width=width, height=alt.Step(ROW))


def _colours(steps: Iterable[TrainingMemory]) -> dict[str, str]:
    """Return the colours of the parts that a picture has."""
    steps = list(steps)
    sizes: dict[str, int] = {}
    for one in steps:
        for kind, size in one.activations.items():
            sizes[kind] = sizes.get(kind, 0) + size
    largest = sorted(sizes, key=lambda kind: (-sizes[kind], kind))[: len(_LAYERS)]
    colours = {part: colour for part, colour in PARTS.items() if any(one.parts[part] for one in steps)}
    colours |= {f"activations: {kind}": colour for kind, colour in zip(largest, _LAYERS, strict=False)}
    if len(sizes) > len(largest):
        colours[_OTHERS] = "brown"
    return colours | {"scratch": "rose"}


def _parts(one: TrainingMemory, colours: Mapping[str, str]) -> dict[str, int]:
    """Return the bytes of the parts of a picture; kinds of layers that have no colour are one."""
    parts = dict.fromkeys(colours, 0)
    for part, size in one.parts.items():
        if size:
            parts[part if part in colours else _OTHERS] += size
    return parts


def figure(found: Mapping[str, TrainingMemory]) -> Figure:
    """Return the chart with the table of its exact figures, for a page."""
    parts = list(dict.fromkeys(part for one in found.values() for part in one.parts))
    parts.sort(key=lambda part: (part == "scratch", part.startswith("activations")))
    rows = [
        [name, *(f"{one.parts.get(part, 0):,}" for part in parts), f"{one.total_bytes:,}", one.moment]
        for name, one in found.items()
    ]
    return Figure(
        draw(lambda narrow: chart(found, narrow)),
        "What lives at the peak of a training step, by what it is for. Activations are named after the layer whose "
        "forward made them; scratch are temporaries, and gradients of activations.",
        Table("Memory of a step in bytes", ["Model", *parts, "peak", "in"], rows, text=(0, len(parts) + 2)),
    )
