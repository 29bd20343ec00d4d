"""``python -m benchmarks.pictures``: the pages' pictures, drawn by the code of ``lowmem report``, light and dark.

Each SVG holds its specification and figures as metadata: a test compares them with what the code draws now. How
text is laid out depends on the fonts of the machine that drew it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
import vl_convert

import lowmem
from benchmarks import fits
from lowmem.io.filesystem import write_atomically
from lowmem.report import charts, theme
from lowmem.report.footprint import measure_footprint
from lowmem.report.relative_speeds import read_relative_speeds_and_machine
from lowmem.testing.memory import THREADS

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
STORED_RUN = ROOT / "benchmarks" / "baselines" / "0001_baseline.json"
THEMES = {"light": theme.LIGHT, "dark": theme.DARK}
_UNCOMPARED = ("$schema", "usermeta")  # they are those of Altair's version


def memory() -> charts.ChartSvgsAndSpec:
    """Draw what variants of BigNet store and take, for the input that ``lowmem stats`` takes."""
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
    footprints = [measure_footprint(name, lowmem.build(name), x) for name in FRONT]
    return charts.draw_wide_and_narrow_svg(lambda narrow: charts.front_page_memory_chart(footprints))


def speed() -> charts.ChartSvgsAndSpec:
    """Draw how fast the variants are in the stored run."""
    timings = [timing for timing in read_relative_speeds_and_machine(STORED_RUN)[0] if timing.name != "bignet"]
    return charts.draw_wide_and_narrow_svg(lambda narrow: charts.relative_speed_chart(timings, narrow))


def training() -> charts.ChartSvgsAndSpec:
    """Draw where the memory of a training step goes, of BigNet on 256 inputs."""
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, variant, optimizer, memory in STEPS:
        model = lowmem.build(variant)
        if memory:
            lowmem.prepare_training(model, memory)
        found[name] = lowmem.training_memory(model, x, optimizer=optimizer)
    return charts.draw_wide_and_narrow_svg(lambda narrow: charts.training_step_memory_chart(found, narrow))


FRONT = tuple(lowmem.VARIANTS)[:7]  # those without a format of their own: seven names can be read on a phone
STEPS = (  # the name of a bar, the variant, the optimizer, and what prepare_training is asked for
    ("all weights, AdamW", "bignet", "adamw", ""),
    ("all weights, AdamW8bit", "bignet", "adamw8bit", ""),
    ("LoRA on float16, AdamW", "lora", "adamw", ""),
    ("QLoRA, AdamW", "qlora_4bit", "adamw", ""),
    ("QLoRA, AdamW8bit", "qlora_4bit", "adamw8bit", ""),
    ("QLoRA, AdamW8bit, lean", "qlora_4bit", "adamw8bit", "lean"),
)
PICTURES = {"memory": memory, "speed": speed, "training": training}
PREVIEW = IMAGES / "preview.png"  # of links to the site
PREVIEW_SIZE = (1200, 630)  # pixels, as programs that show previews expect


def data_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a picture shows: its specification without what differs between versions of Altair."""
    return {key: value for key, value in spec.items() if key not in _UNCOMPARED}


def standalone(drawing: charts.ChartSvgsAndSpec, colours: Any) -> str:
    """Return a chart as a file of its own, in the colours of one theme, with its specification as metadata."""
    spec = escape(json.dumps(data_of(drawing.spec), sort_keys=True))
    svg = theme.svg_with_theme_colors(drawing.wide, colours)
    start = svg.index(">") + 1
    return f"{svg[:start]}<metadata>{spec}</metadata>{svg[start:]}\n"


def preview() -> str:
    """Return the picture of previews as SVG: the name, what it is for, and the picture of sizes."""
    width, height = PREVIEW_SIZE
    picture = theme.svg_with_theme_colors(fits.draw(), theme.LIGHT)
    placed = picture.replace("<svg ", f'<svg x="{width - 700}" y="20" ', 1)
    placed = re.sub(r'width="\d+" height="\d+">', f'width="680" height="{height - 40}">', placed, count=1)
    ink, words = theme.LIGHT["ink"], ("Train and run", "language models", "in the memory", "that you have")
    said = "".join(
        f'<text x="50" y="{270 + 56 * number}" style="font: 44px sans-serif; fill: {ink}">{line}</text>'
        for number, line in enumerate(words)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="{theme.LIGHT["page"]}"/>'
        f'<text x="50" y="170" style="font: bold 84px sans-serif; fill: {ink}">lowmem</text>{said}{placed}</svg>'
    )


def main() -> None:
    torch.set_num_threads(THREADS)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        drawing = draw()
        for mode, colours in THEMES.items():
            path = IMAGES / f"{name}-{mode}.svg"
            write_atomically(path, standalone(drawing, colours).encode())
            print(path.relative_to(ROOT))
    for mode, colours in THEMES.items():
        path = IMAGES / f"sizes-{mode}.svg"
        write_atomically(path, theme.svg_with_theme_colors(fits.draw(), colours).encode())
        print(path.relative_to(ROOT))
    write_atomically(PREVIEW, vl_convert.svg_to_png(preview()))
    print(PREVIEW.relative_to(ROOT))


if __name__ == "__main__":
    main()
