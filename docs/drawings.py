"""The drawings of ``four-bits.md``: SVG of what the page's code computes, drawn when the site is built.

A block ``{drawing} NAME`` of the page is replaced by one; its content says in words what is shown. Colours follow the
theme, light or dark, and texts can be read at a width of 360 pixels.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from lowmem.report import theme

PAGE = Path(__file__).with_name("four-bits.md")
MEASURED = PAGE.with_suffix(".json")  # by benchmarks/trained_layer.py
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
DRAWING = re.compile(r"^```\{drawing\} (\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WIDTH = 340  # units of a drawing: pixels on a phone; texts have at least 10
STYLE = f"""
.drawing {{ {theme.css_variable_declarations(theme.LIGHT)} max-width: 32rem; margin: 1.5rem auto; }}
body[data-theme="dark"] .drawing {{ {theme.css_variable_declarations(theme.DARK)} }}
@media (prefers-color-scheme: dark) {{
body:not([data-theme="light"]) .drawing {{ {theme.css_variable_declarations(theme.DARK)} }} }}
.drawing svg {{ display: block; width: 100%; height: auto; }}
.drawing text {{ fill: var(--ink); font: 11px system-ui, sans-serif; }}
.drawing figcaption {{ font-size: 0.85em; }}
"""
END_OF_PAGE = f"\n```{{raw}} html\n<style>{STYLE}</style>\n```\n"
MIDDLE, END = 'text-anchor="middle"', 'text-anchor="end"'


@cache
def run_page() -> tuple[dict[str, Any], list[tuple[str, str | None]]]:
    """Run the page's code; return its names, and of each block what it printed and what the page says."""
    text, space, printed = PAGE.read_text(encoding="utf8"), {"__name__": "page"}, []
    for block in BLOCK.finditer(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * text.count("\n", 0, block.start(1)) + block[1], str(PAGE), "exec"), space)
        printed.append((out.getvalue(), block[2]))
    return space, printed


def text(x: float, y: float, content: object, more: str = "") -> str:
    """Return a text; ``more`` are further attributes."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(str(content))}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, more: str = "") -> str:
    """Return a filled rectangle in a colour of the theme."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="var(--{colour})" {more}/>'


def line(points: Iterable[tuple[float, float]], colour: str, more: str = "") -> str:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="var(--{colour})" stroke-width="1.5" {more}/>'


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    """Return a horizontal or vertical line with a head at its end."""
    size = 5
    right, down = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    back_x, back_y = to_x - size * right, to_y - size * down
    corners = [
        (back_x + size * down, back_y + size * right),
        (to_x, to_y),
        (back_x - size * down, back_y - size * right),
    ]
    return line([(x, y), (to_x, to_y)], colour) + line(corners, colour)


def draw_memory(page: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, str]:
    """Bars of the memory for training, and a line at 16 GiB."""
    left, scale, parts = 2, 320 / 128, ("weights", "adapter", "gradients", "moments")
    colours, drawn = ("grey", "blue", "green", "olive"), []
    for row, (name, sizes) in enumerate(page["memory"].items()):
        y, x = 34 + 40 * row, left
        drawn.append(text(left, y, f"{name}: {sum(sizes):.1f} GiB"))
        for size, colour in zip(sizes, colours, strict=True):
            drawn.append(box(x, y + 5, size * scale, 16, colour))
            x += size * scale
    at = left + 16 * scale
    drawn += [line([(at, 36), (at, 142)], "bad", 'stroke-dasharray="4 3"'), text(at, 155, "16 GiB", MIDDLE)]
    for number, (part, colour) in enumerate(zip(parts, colours, strict=True)):
        drawn += [box(2 + 84 * number, 4, 10, 10, colour), text(16 + 84 * number, 13, part)]
    return 160, "".join(drawn)


def draw_histogram(page: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, str]:
    """A trained layer's weights in shares of their blocks' scales, and the levels."""
    shares, bottom, middle, half = measured["layer"]["histogram"], 120, WIDTH / 2, WIDTH / 2 - 12
    step = 2 * half / len(shares)
    drawn = [
        box(middle - half + number * step, bottom - 3400 * share, step - 0.6, 3400 * share, "sky")
        for number, share in enumerate(shares)
    ]
    for level in page["LEVELS"].tolist():
        x = middle + half * level
        drawn.append(line([(x, 12), (x, bottom + 6)], "orange", 'opacity="0.9"'))
    for value in (-1, -0.5, 0, 0.5, 1):
        drawn.append(text(middle + half * value, bottom + 20, f"{value:g}", MIDDLE))
    drawn.append(text(middle, bottom + 36, "weight / scale of its block; lines: levels", MIDDLE))
    return bottom + 42, "".join(drawn)


def draw_errors(page: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, str]:
    """The error against the block size."""
    normal = {
        size: float((page["normal"] - q.dequantize()).norm() / page["normal"].norm())
        for size, q in page["stored"].items()
    }
    trained = {int(size): error for size, error in measured["layer"]["errors"].items()}
    xs, drawn = dict(zip(normal, (60, 140, 220, 300), strict=True)), []

    def height(error: float) -> float:
        return 130 - (error - 0.075) * 4500

    for percent in (8, 9, 10):
        y = height(percent / 100)
        drawn += [line([(36, y), (330, y)], "line"), text(30, y + 4, f"{percent}%", END)]
    for name, errors, colour, y in (("trained layer", trained, "blue", 14), ("normal numbers", normal, "orange", 14)):
        drawn.append(line([(xs[size], height(error)) for size, error in errors.items()], colour))
        drawn += [
            f'<circle cx="{xs[size]}" cy="{height(error):.1f}" r="3.5" fill="var(--{colour})"/>'
            for size, error in errors.items()
        ]
        left = 40 if name == "trained layer" else 150
        drawn += [box(left, y - 9, 10, 10, colour), text(left + 14, y, name)]
    for size, x in xs.items():
        drawn += [
            text(x, 150, size, MIDDLE),
            text(x, 165, f"{page['stored'][size].bits_per_weight:.2f} bits", MIDDLE),
        ]
    return 186, "".join(drawn) + text(180, 181, "weights in a block, and bits per weight", MIDDLE)


def draw_block(page: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, str]:
    """Eight weights, their codes, and the bytes."""
    cell, colours = 41, ("blue", "green", "orange", "purple")
    rows = [f"{weight:g}" for weight in page["weights_by_hand"][0].tolist()], page["codes"]
    drawn = [text(4, 12, "weights: the scale is the largest magnitude"), text(4, 62, "codes")]
    for number in range(8):
        x, colour = 6 + cell * number, colours[number % 4]
        drawn += [box(x, 18, cell - 4, 22, "panel"), text(x + 18, 33, rows[0][number], MIDDLE)]
        drawn += [box(x, 68, cell - 4, 22, colour, 'opacity="0.35"'), text(x + 18, 83, rows[1][number], MIDDLE)]
    drawn.append(text(4, 112, "bytes, with the two codes of each"))
    for number, byte in enumerate(page["by_hand"].packed[0].tolist()):
        x = 6 + 2 * cell * number
        drawn += [box(x, 118, 2 * cell - 4, 22, colours[number], 'opacity="0.35"')]
        drawn.append(text(x + cell - 2, 133, f"0x{byte:02x} = {byte >> 4}, {byte & 15}", MIDDLE))
    return 146, "".join(drawn)


def draw_gradients(page: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, str]:
    """The product forward and backward."""
    drawn = [
        box(92, 30, 130, 40, "grey", 'opacity="0.35" rx="5"'),
        box(92, 104, 58, 40, "blue", 'opacity="0.35" rx="5"'),
        box(164, 104, 58, 40, "blue", 'opacity="0.35" rx="5"'),
    ]
    labels = {"W: 4-bit codes": (157, 48), "frozen": (157, 62), "A": (121, 128), "B": (193, 128), "x": (20, 90)}
    labels |= {"y": (322, 90), "+": (280, 90), "no gradient of W": (157, 86), "dA": (121, 175), "dB": (193, 175)}
    drawn += [text(*place, label, MIDDLE) for label, place in labels.items()]
    forward = [(44, 44, 92, 44), (222, 44, 262, 44), (44, 118, 92, 118), (150, 118, 164, 118), (222, 118, 262, 118)]
    back = [(248, 56, 222, 56), (92, 56, 56, 56), (248, 132, 222, 132), (164, 132, 150, 132), (92, 132, 56, 132)]
    drawn += [arrow(*place, "ink") for place in forward] + [arrow(*place, "bad") for place in back]
    drawn += [line([(44, 44), (44, 118)], "ink"), line([(56, 56), (56, 132)], "bad")]
    drawn += [line([(28, 84), (44, 84)], "ink"), arrow(56, 94, 28, 94, "bad")]
    drawn += [
        line([(262, 44), (262, 118)], "ink"),
        line([(262, 84), (272, 84)], "ink"),
        arrow(288, 84, 314, 84, "ink"),
    ]
    drawn += [
        line([(248, 56), (248, 132)], "bad"),
        line([(272, 94), (248, 94)], "bad"),
        arrow(314, 94, 288, 94, "bad"),
    ]
    drawn += [arrow(121, 144, 121, 162, "bad"), arrow(193, 144, 193, 162, "bad")]
    drawn += [line([(4, 10), (24, 10)], "ink"), text(30, 14, "forward")]
    drawn += [line([(104, 10), (124, 10)], "bad"), text(130, 14, "gradients")]
    return 182, "".join(drawn)


def draw_conversation(page: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, str]:
    """The tokens of a conversation, of which those that count are marked."""
    x, y, drawn = 4.0, 26.0, []
    for token, counts in measured["conversation"]:
        shown = token.replace("\n", "\u21b5").strip() or "\u2423"
        width = 6.6 * len(shown) + 6
        if x + width > WIDTH - 4:
            x, y = 4.0, y + 22
        drawn.append(box(x, y, width, 18, "green" if counts else "panel", 'opacity="0.45"' if counts else ""))
        drawn.append(text(x + width / 2, y + 13, shown, MIDDLE))
        x += width + 3
        if token == "\n":
            x, y = 4.0, y + 22
    drawn += [box(4, 4, 12, 12, "green", 'opacity="0.45"'), text(20, 14, "counts"), box(84, 4, 12, 12, "panel")]
    return y + 4, "".join(drawn) + text(100, 14, "is read, and does not count")


def draw_merge(page: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[float, str]:
    """A weight between its neighbouring levels, its update, and the borders beyond which its code would change."""
    frozen, update, typical = page["frozen"], page["update"], float(page["update"].square().mean().sqrt())
    scale = frozen.view(64, -1, 64).abs().amax(-1)  # (out, blocks)
    # The first weight on a small level whose update is of the usual size
    codes = (frozen.view(64, -1, 64) / scale.unsqueeze(-1) - page["LEVELS"][9]).abs() < 1e-4
    usual = (update.view(64, -1, 64) - typical).abs() < 0.1 * typical
    row, block, column = (codes & usual).nonzero()[0].tolist()
    levels = [float(level * scale[row, block]) for level in page["LEVELS"][8:11]]
    borders = [(levels[0] + levels[1]) / 2, (levels[1] + levels[2]) / 2]
    change = float(update.view(64, -1, 64)[row, block, column])

    def at(value: float) -> float:
        return 30 + 280 * (value - levels[0]) / (levels[2] - levels[0])

    drawn = [line([(10, 70), (330, 70)], "quiet")]
    for level in levels:
        drawn += [
            line([(at(level), 58), (at(level), 82)], "orange"),
            text(at(level), 97, f"{level:.4f}", MIDDLE),
        ]
    for border in borders:
        drawn += [
            line([(at(border), 34), (at(border), 88)], "quiet", 'stroke-dasharray="3 3"'),
            text(at(border), 28, "border", MIDDLE),
        ]
    drawn += [
        arrow(at(levels[1]), 50, at(levels[1] + change), 50, "blue"),
        text(at(levels[1]), 44, f"+{change:.4f}", MIDDLE),
    ]
    return 134, "".join(drawn) + text(170, 118, "levels of the block; the weight is on the middle one", MIDDLE)


DRAWINGS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float, str]]] = {
    "memory": draw_memory,
    "histogram": draw_histogram,
    "errors": draw_errors,
    "block": draw_block,
    "gradients": draw_gradients,
    "conversation": draw_conversation,
    "merge": draw_merge,
}


def draw(name: str, description: str) -> str:
    """Return a drawing as HTML, with a description for those who do not see it."""
    height, content = DRAWINGS[name](run_page()[0], json.loads(MEASURED.read_text(encoding="utf8")))
    label = " ".join(description.split())
    return figure(height, content, label, f"<figcaption>{escape(label, quote=True)}</figcaption>")


def figure(height: float, content: str, label: str, caption: str = "") -> str:
    """Return the content of an SVG as a figure of HTML; ``label`` is for those who do not see it."""
    return (
        f'<figure class="drawing"><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{content}</svg>{caption}</figure>'
    )


def put_drawings_into(page: str) -> str:
    """Return the text of a page in which drawings, with their style, stand in place of their names."""
    return put_figures_into(page, DRAWING, lambda found: draw(found[1], found[2]))


def put_figures_into(page: str, block: re.Pattern[str], draw_block: Callable[[re.Match[str]], str]) -> str:
    """Return the text of a page in which figures, with their style, stand in place of what ``block`` matches."""
    drawn = block.sub(lambda found: f"```{{raw}} html\n{draw_block(found)}\n```", page)
    return drawn if drawn == page else f"{drawn}{END_OF_PAGE}"
