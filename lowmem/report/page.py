"""A report's data, its page as one self-contained HTML file, and the picture of a step. Jinja escapes all text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lowmem.report import charts, dot_plots
from lowmem.report.charts import ChartSvgsAndSpec, draw_wide_and_narrow_svg, readable_bytes
from lowmem.report.footprint import KINDS, MemoryFootprint
from lowmem.report.layer_groups import LayerGroup
from lowmem.report.quantization_errors import BitsAndOutputError, FormatGaussianError, gaussian_error_lower_bound
from lowmem.report.relative_speeds import RelativeSpeed, is_other_library_panel
from lowmem.report.theme import DARK, LIGHT, css_variable_declarations, svg_with_theme_colors
from lowmem.testing.gate_verdicts import OUTCOMES, FigureComparison, GateVerdict
from lowmem.testing.latency import CONFIDENCE
from lowmem.training.step_memory import TrainingMemory
from lowmem.version import __version__


@dataclass(frozen=True)
class ReportPageData:
    """The data of a page: what was measured of a model, and then what is said of it.

    Attributes:
        footprints: of the dense model first, then of every variant.
        meanings: what each of them is: the code that makes it, and words.
        losses: by variant, the error of its output relative to the dense model's.
        timings: of variants and other libraries; empty where nothing was timed.
        distortions: errors of the formats for normal weights.
        machine: properties of the machine of the measurements.
        groups: the layers of a user's model; empty for BigNet, whose layers are all alike.
        qualities: of the output with each choice of bits; empty where they were not measured.
        left_out: why some variants could not be made of the model, a sentence for each reason.
        title: the name of the model.
        lead: a sentence below it.
        timed: a sentence on the source of the timings, or why there are none.
        timing_machine: properties of the machine of the timings, if they are from another run.
        verdicts: of the gates.
    """

    footprints: Sequence[MemoryFootprint]
    meanings: Mapping[str, tuple[str, str]]
    losses: Mapping[str, float]
    timings: Sequence[RelativeSpeed]
    distortions: Sequence[FormatGaussianError]
    machine: Mapping[str, str]
    groups: Sequence[LayerGroup] = ()
    qualities: Sequence[BitsAndOutputError] = ()
    left_out: Sequence[str] = ()
    title: str = ""
    lead: str = ""
    timed: str = ""
    timing_machine: Mapping[str, str] = field(default_factory=dict)
    verdicts: Sequence[GateVerdict] = ()


@dataclass(frozen=True)
class CaptionedTable:
    """A table; the columns in ``text`` hold text, the others numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class FigureWithTable:
    """A chart with a caption and the table of its numbers. A gate's also has a verdict, and may have no chart."""

    drawing: ChartSvgsAndSpec | None
    caption: str
    table: CaptionedTable
    title: str = ""
    outcome: str = ""
    texts: Sequence[str] = ()
    shown: CaptionedTable | None = None

    def svg(self, layout: str) -> Markup:
        """Return the "wide" or "narrow" chart as an image with the caption as its accessible name."""
        text: str = getattr(self.drawing, layout)
        label = escape(self.caption)
        # Vega escapes names
        return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


@dataclass(frozen=True)
class PageSection:
    """A heading with texts, figures and tables."""

    id: str
    title: str
    texts: Sequence[str] = ()
    figures: Sequence[FigureWithTable] = ()
    tables: Sequence[CaptionedTable] = ()


@dataclass(frozen=True)
class HeadlineTile:
    """A headline number at the top of the page."""

    term: str
    value: str
    says: str


def render_report_html(report: ReportPageData) -> str:
    """Return the page as HTML; the same report gives the same bytes."""
    sections = [
        _memory_section(report),
        *([_layers_section(report)] if report.groups else []),
        _latency_section(report),
        _error_section(report),
        _gates_section(report),
        _machine_section(report),
    ]
    return _render_page_html(report.title, report.lead, sections, _headline_tiles(report))


def _render_page_html(
    title: str, lead: str, sections: Sequence[PageSection], tiles: Sequence[HeadlineTile] = ()
) -> str:
    """Return a page of sections as HTML, with headline numbers at its top."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title=title,
        lead=lead,
        sections=sections,
        tiles=tiles,
        version=__version__,
        light=Markup(css_variable_declarations(LIGHT)),
        dark=Markup(css_variable_declarations(DARK)),
    )


def step_memory_chart_file_bytes(title: str, memory_by_model: Mapping[str, TrainingMemory], suffix: str) -> bytes:
    """Return the chart of where the memory of training steps goes, by the names of the models, as a file.

    Its ending is ".svg", in the colours of the viewer's theme; ".png", light; or ".html", a page with exact figures.
    """
    if suffix in (".html", ".htm"):
        section = PageSection("step", "Memory of a step", figures=[_training_step_memory_figure(memory_by_model)])
        return _render_page_html(title, "Where its memory goes.", [section]).encode()
    opening, end, rest = draw_wide_and_narrow_svg(
        partial(charts.training_step_memory_chart, memory_by_model)
    ).wide.partition(">")
    if suffix == ".png":
        svg = f'{opening}{end}<rect width="100%" height="100%" fill="var(--page)"/>{rest}'
        return bytes(vl_convert.svg_to_png(svg_with_theme_colors(svg, LIGHT), scale=2))
    light, dark = css_variable_declarations(LIGHT), css_variable_declarations(DARK)
    themes = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    background = '<rect width="100%" height="100%" fill="var(--page)"/>'
    return f"{opening}{end}<style>{themes}</style>{background}{rest}".encode()


def _headline_tiles(report: ReportPageData) -> list[HeadlineTile]:
    dense, *others = report.footprints
    smallest = min(others, key=lambda f: f.stored_bytes)
    times = f"{dense.stored_bytes / smallest.stored_bytes:.1f} times" if smallest.stored_bytes else "infinitely"
    size = readable_bytes(smallest.stored_bytes)
    tiles = [HeadlineTile("Smallest", size, f"{smallest.name}: {times} smaller than {dense.name}")]
    timed = [t for t in report.timings if not is_other_library_panel(t.panel) and t.name != dense.name]
    if timed:
        batch = min(t.batch for t in timed)
        fastest = max((t for t in timed if t.batch == batch), key=lambda t: t.speed)
        dtype = "" if len({t.panel for t in timed}) == 1 else f", {fastest.panel}"
        tiles.append(
            HeadlineTile("Fastest", f"{fastest.speed:.1f}x dense", f"{fastest.name} at batch {batch}{dtype}")
        )
    lossy = {name: error for name, error in report.losses.items() if 0 < error < math.inf}
    if lossy:
        closest, farthest = min(lossy, key=lossy.__getitem__), max(lossy, key=lossy.__getitem__)
        errors = f"{charts.percent_text(lossy[closest])} to {charts.percent_text(lossy[farthest])}"
        tiles.append(HeadlineTile("Error of the output", errors, f"{closest} loses least, {farthest} most"))
    if not report.verdicts:
        tiles.append(HeadlineTile("Gates", "no verdict", "none was given to this report"))
    else:
        gates = {word: [v.gate for v in report.verdicts if v.outcome == word] for word in OUTCOMES}
        worst = next(word for word in OUTCOMES if gates[word])
        says = ", ".join(gates[worst])
        tiles.append(HeadlineTile("Gates", worst, says if worst == "passed" else f"{worst}: {says}"))
    return tiles


def _memory_section(report: ReportPageData) -> PageSection:
    kinds = [kind for kind in KINDS if any(f.kinds[kind] for f in report.footprints)]
    rows = []
    for f in report.footprints:
        sizes = [*(f.kinds[kind] for kind in kinds), f.stored_bytes, f.forward_bytes]
        rows.append([f.name, *(f"{size:,}" for size in sizes), f"{f.step.step_bytes:,}" if f.step else ""])
    names = [[name, *said] for name, said in report.meanings.items()]
    figure = FigureWithTable(
        draw_wide_and_narrow_svg(partial(charts.stored_and_peak_bytes_chart, report.footprints)),
        "What each variant stores, by kind. The hollow bars are peaks: what a forward, and a training step with "
        "AdamW, take beyond model and input. Each panel has a scale of its own.",
        CaptionedTable("Memory in bytes", ["Variant", *kinds, "stored", "forward peak", "step peak"], rows),
        shown=CaptionedTable(
            "The variants", ["Variant", "lowmem.convert(model, ...)", "What it is"], names, text=(0, 1, 2)
        ),
    )
    steps = {f.name: f.step for f in report.footprints if f.step}
    figures = [
        figure,
        *([replace(_training_step_memory_figure(steps), title="Of a training step with AdamW")] if steps else []),
    ]
    return PageSection("memory", "Memory", texts=report.left_out, figures=figures)


def _training_step_memory_figure(memory_by_model: Mapping[str, TrainingMemory]) -> FigureWithTable:
    parts = list(dict.fromkeys(part for memory in memory_by_model.values() for part in memory.parts))
    parts.sort(key=lambda part: (part == "scratch", part.startswith("activations")))
    rows = [
        [name, *(f"{memory.parts.get(part, 0):,}" for part in parts), f"{memory.total_bytes:,}", memory.moment]
        for name, memory in memory_by_model.items()
    ]
    return FigureWithTable(
        draw_wide_and_narrow_svg(partial(charts.training_step_memory_chart, memory_by_model)),
        "What lives at the peak of a training step, by what it is for. Activations are named after the layer whose "
        "forward made them; scratch are temporaries, and gradients of activations.",
        CaptionedTable("Memory of a step in bytes", ["Model", *parts, "peak", "in"], rows, text=(0, len(parts) + 2)),
    )


def _layers_section(report: ReportPageData) -> PageSection:
    names = [f.name for f in report.footprints[1:]]
    storing = [
        name for name in names if not any(f.name == name and f.kinds["LoRA adapters"] for f in report.footprints)
    ]
    rows = []
    for group in report.groups:
        counts = [group.layers, group.weights, group.dense_bytes, *(group.bytes[name] for name in names)]
        errors = ["" if (error := group.errors[name]) is None else charts.percent_text(error) for name in storing]
        shape = "\u00a0x\u00a0".join(map(str, group.shape))
        rows.append([group.name, group.type, shape, *(f"{count:,}" for count in counts), *errors])
    sizes = [f"{name} bytes" for name in ("dense", *names)]
    columns = ["Layers", "Type", "Shape", "Count", "Weights", *sizes, *(f"{name} error" for name in storing)]
    left_out = len(report.groups) - dot_plots.MOST_GROUPS
    figure = FigureWithTable(
        draw_wide_and_narrow_svg(partial(dot_plots.layer_group_bytes_and_error_chart, report.groups, storing)),
        "Layers whose paths differ by an index alone are one row. First the bytes of all of them, then the root mean "
        "square of what storing their weights loses, relative to the weights. LoRA adds its adapters to the same "
        "base; the table has them."
        + f" The {dot_plots.MOST_GROUPS} largest groups are drawn, {left_out} more are in the table."
        * (left_out > 0),
        CaptionedTable("What each group of layers costs and loses", columns, rows, text=(0, 1, 2)),
    )
    return PageSection("layers", "Layers", figures=[figure])


def _latency_section(report: ReportPageData) -> PageSection:
    dense = report.footprints[0].name
    figures = []
    for peers in (False, True):
        timings = [t for t in report.timings if is_other_library_panel(t.panel) == peers]
        drawn = [t for t in timings if t.name != dense]
        if not drawn:
            continue
        caption = (
            "Other libraries' layers, as many times as fast as lowmem's nf4 with products in bfloat16, of the same "
            "input: below the dashed line lowmem is faster. Both axes are logarithmic."
            if peers
            else "How many times as fast as the dense model of the same dtype, against the inputs at once. Above the "
            "dashed line a variant is faster. Both axes are logarithmic."
        )
        if any(t.low is not None for t in drawn):
            caption += f" Bars are {CONFIDENCE:.0%} intervals."
        figures.append(
            FigureWithTable(
                draw_wide_and_narrow_svg(partial(charts.relative_speed_chart, drawn)),
                caption,
                _speed_table("Times as fast" + (", other libraries" if peers else ""), timings),
                title="Other libraries" if peers else "",
            )
        )
    return PageSection("latency", "Latency", texts=[report.timed], figures=figures)


def _speed_table(caption: str, timings: Sequence[RelativeSpeed]) -> CaptionedTable:
    batches = sorted({timing.batch for timing in timings})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for t in timings:
        interval = "" if t.low is None or t.high is None else f" ({t.low:.2f} to {t.high:.2f})"
        cells.setdefault((t.name, t.panel), {})[t.batch] = f"{t.speed:.2f}{interval}"
    rows = [
        [name, panel, *(cells_by_batch.get(batch, "") for batch in batches)]
        for (name, panel), cells_by_batch in cells.items()
    ]
    return CaptionedTable(
        caption, ["Model", "Products in", *(f"batch {batch}" for batch in batches)], rows, text=(0, 1)
    )


def _error_section(report: ReportPageData) -> PageSection:
    figures = []
    if report.losses:
        drawable = any(0 < error < math.inf for error in report.losses.values())
        figures.append(
            FigureWithTable(
                draw_wide_and_narrow_svg(partial(dot_plots.variant_output_error_chart, report.losses))
                if drawable
                else None,
                "The norm of the difference between a variant's output and the dense model's, relative to the "
                "latter's norm, for one random input. A fresh adapter changes nothing, so that LoRA loses what its "
                "base does.",
                CaptionedTable(
                    "Error of the output",
                    ["Variant", "relative error"],
                    [[name, f"{error:.4g}"] for name, error in report.losses.items()],
                ),
                title="Of the output",
            )
        )
    if report.qualities:
        drawable = any(0 < quality.error < math.inf for quality in report.qualities)
        figures.append(
            FigureWithTable(
                draw_wide_and_narrow_svg(partial(dot_plots.output_error_by_bits_chart, report.qualities))
                if drawable
                else None,
                "The error of the output, as above, against the bits that a weight takes: nf4 and bof4s in blocks of "
                "128 weights (left) to 16 (right), 8 bits for all layers, and budgets, which choose for each layer "
                "among bof4s in blocks of 64, 32 and 16 and 8 bits by the relative errors of the weights.",
                CaptionedTable(
                    "Quality against bits",
                    ["Choice", "bits per weight", "relative error", "cosine"],
                    [
                        [quality.name, f"{quality.bits:.3f}", f"{quality.error:.4g}", f"{quality.cosine:.6f}"]
                        for quality in report.qualities
                    ],
                ),
                title="Against bits",
            )
        )
    rows = [
        [
            f"{p.format}, {p.scales}",
            str(p.block_size),
            f"{p.bits_per_weight:.3f}",
            f"{p.error:.2%}",
            f"{gaussian_error_lower_bound(p.bits_per_weight):.2%}",
            f"{p.error / gaussian_error_lower_bound(p.bits_per_weight):.2f}",
        ]
        for p in report.distortions
    ]
    figures.append(
        FigureWithTable(
            draw_wide_and_narrow_svg(partial(dot_plots.format_error_by_bits_chart, report.distortions)),
            "What each format loses of normally distributed weights, by the way its scales are stored. Along a line "
            "blocks shrink from 128 weights (left) to 16 (right), and scales take more bits. The dashed line is the "
            "rate-distortion limit of a normal source, D(R) = 2^(-2R): nothing that stores R bits a weight has a "
            "relative error below 2^-R.",
            CaptionedTable(
                "Error of normal weights",
                ["Format, scales", "block", "bits per weight", "error", "least possible", "times the least"],
                rows,
            ),
            title="Of normal weights",
        )
    )
    return PageSection("error", "Error", figures=figures)


def _gates_section(report: ReportPageData) -> PageSection:
    if not report.verdicts:
        return PageSection("gates", "Gates", texts=["No gate's verdict was given to this report (--verdict FILE)."])
    return PageSection("gates", "Gates", figures=[_gate_figure(verdict) for verdict in report.verdicts])


def _gate_figure(verdict: GateVerdict) -> FigureWithTable:
    columns = ["Workload", "figure", "verdict", "base", "head", "change", "ratio", "interval", "says"]
    text = (0, 1, 2, 8)
    moved = verdict.changed_rows
    count = "1 figure" if len(verdict.rows) == 1 else f"{len(verdict.rows)} figures"
    summary = f"{verdict.head} against {verdict.base}: {count} compared, {len(moved) or 'none'} moved."
    with_ratio = [row for row in verdict.rows if row.ratio is not None]
    machine = "; ".join(f"{key} {value}" for key, value in verdict.machine.items())
    return FigureWithTable(
        draw_wide_and_narrow_svg(partial(dot_plots.gate_ratio_chart, with_ratio)) if with_ratio else None,
        ("Head over base, with its interval: right of the dashed line the head takes more. " if with_ratio else "")
        + (f"Measured on {machine}." if machine else ""),
        CaptionedTable(
            f"All figures of the {verdict.gate} gate",
            columns,
            [_gate_row_cells(row) for row in verdict.rows],
            text=text,
        ),
        title=f"{verdict.gate.capitalize()} gate",
        outcome=verdict.outcome,
        texts=[summary],
        shown=CaptionedTable("What moved", columns, [_gate_row_cells(row) for row in moved], text=text)
        if moved
        else None,
    )


def _gate_row_cells(row: FigureComparison) -> list[str]:
    digits = 0 if row.figure.endswith("bytes") else 4
    change = "" if row.base is None or row.head is None else f"{row.head - row.base:+,.{digits}f}"
    figures = [_gate_number_text(row.base), _gate_number_text(row.head), change, *row.ratio_and_interval_texts]
    return [row.name, row.figure, row.verdict, *figures, row.says]


def _gate_number_text(value: float | None) -> str:
    """Format a figure of a gate: integers in full, others with four digits, None as ""."""
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def _machine_section(report: ReportPageData) -> PageSection:
    tables = [_facts_table("What memory and errors were measured on", report.machine)]
    if report.timing_machine:
        tables.append(_facts_table("What latency was measured on", report.timing_machine))
    return PageSection("machine", "Machine", tables=tables)


def _facts_table(caption: str, facts: Mapping[str, str]) -> CaptionedTable:
    return CaptionedTable(
        caption, ["", ""], [[name.replace("_", " "), value] for name, value in facts.items()], text=(0, 1)
    )
