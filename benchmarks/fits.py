"""``python -m benchmarks.fits``: the README's table of what fits, and its picture, from benchmarks/sizes.json.

``python -m benchmarks.sizes 0.6b 1b 3b 8b --save`` writes that file: what ``plan`` and ``--dry-run`` predict, and
what was measured, by processor. A cell without a figure is empty.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.sizes import LENGTHS, SMALL_RANK, STORED, config_of

ROWS = {"0.6b": "0.6 B", "1b": "1 B", "3b": "3 B", "8b": "8 B"}
LENGTH, EXAMPLES = LENGTHS[0], 1000
DRAWN = ("1b", "3b", "8b")
WAYS = {  # of training: the name in the picture, and its colour
    "all weights": ("all weights, float32", "grey"),
    "LoRA on bfloat16": ("LoRA on bfloat16", "orange"),
    "PEFT with bitsandbytes": ("PEFT + bitsandbytes", "purple"),
    "fast": ("lowmem, fast", "blue"),
    "lean": ("lowmem, lean", "green"),
}
LIMITS, MOST = (8, 16, 24), 26  # GiB: of the lines, and of the picture's width
LEFT, WIDTH, BAR = 148, 480, 16  # pixels
ARROW = " \u2192"
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""bitsandbytes' double quantization: a code, a byte for each 64 weights, a float32 for 256 of these bytes."""


def figures() -> dict[str, Any]:
    """Return the stored figures."""
    stored: dict[str, Any] = json.loads(STORED.read_text(encoding="utf8"))
    return stored


def weights_of(shape: str) -> tuple[int, int, int]:
    """Return the weights of a shape's linear layers, its other weights, and those of an adapter."""
    config = config_of(shape)
    width, hidden = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    matrices = [(queries, width), (keys, width), (keys, width), (width, queries)]
    matrices += [(hidden, width), (hidden, width), (width, hidden)]  # (out, in), of a layer
    ends = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    layers = config.num_hidden_layers
    linear = layers * sum(out * inputs for out, inputs in matrices)
    adapter = layers * SMALL_RANK * sum(out + inputs for out, inputs in matrices)
    return linear, ends + (2 * layers + 1) * width, adapter


def peft_bytes(shape: str) -> int:
    """Return what PEFT stores with bitsandbytes' nf4, and an adapter's gradients and moments.

    ``prepare_model_for_kbit_training`` makes other weights float32. Activations and libraries come on top.
    """
    linear, other, adapter = weights_of(shape)
    return int(linear * NF4_BITS / 8 + 4 * other + 16 * adapter)


def known_bytes(shape: str, what: str) -> tuple[int, bool] | None:
    """Return the largest measured peak, or what is predicted, and whether it was measured."""
    stored = figures()
    peaks = [one[shape][what]["peak"] for one in stored["measured"].values() if what in one.get(shape, {})]
    planned = stored["planned"].get(shape, {}).get(what)
    return (int(max(peaks)), True) if peaks else (planned, False) if planned else None


def training_bytes(shape: str) -> dict[str, tuple[int, bool]]:
    """Return the bytes of each way of training, and whether they were measured."""
    found = {way: known_bytes(shape, f"train {LENGTH} tokens, {way}") for way in WAYS}
    found["PEFT with bitsandbytes"] = found["PEFT with bitsandbytes"] or (peft_bytes(shape), False)
    return {way: known for way, known in found.items() if known is not None}


def table() -> list[str]:
    """Return the lines of the table."""
    fast, lean = (f"train {LENGTH} tokens, {mode}" for mode in ("fast", "lean"))
    measured = figures()["measured"]
    machines = sorted(name for name, found in measured.items() if any(fast in shape for shape in found.values()))
    columns = ["Weights", "train, fast", "train, lean", "run"]
    for name in machines:
        columns += [f"hours, fast / lean: {name}", "tokens/s written"]
    lines = [f"| {' | '.join(columns)} |", f"| :-- |{' --: |' * (len(columns) - 1)}"]
    for shape, name in ROWS.items():
        known = [known_bytes(shape, what) for what in (fast, lean, "run")]
        cells = ["" if size is None else f"{size[0] / 2**30:.1f}" for size in known]
        for machine in machines:
            found = measured[machine].get(shape, {})
            steps = [found[what]["step"] for what in (fast, lean) if what in found]
            cells.append(" / ".join(f"{seconds * EXAMPLES / 3600:.1f}" for seconds in steps))
            cells.append(f"{found['run']['decode']:.0f}" if "run" in found else "")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def draw() -> str:
    """Return the picture of training's memory as SVG, in colours of a theme's names."""
    scale = (WIDTH - LEFT - 56) / MOST
    drawn, y = [], 32.0
    for shape in DRAWN:
        drawn.append(f'<text x="4" y="{y + 10:.0f}" font-weight="bold">{ROWS[shape]} weights</text>')
        y += 18
        for way, (size, measured) in training_bytes(shape).items():
            name, colour = WAYS[way]
            gib, length = size / 2**30, min(size / 2**30, MOST) * scale
            label = f"{gib:.1f}{'*' if measured else ''}{ARROW if gib > MOST else ''}"
            drawn += [
                f'<text x="{LEFT - 6}" y="{y + 12:.0f}" text-anchor="end">{name}</text>',
                f'<rect x="{LEFT}" y="{y:.0f}" width="{length:.1f}" height="{BAR}" fill="var(--{colour})"/>',
                f'<text x="{LEFT + length + 4:.1f}" y="{y + 12:.0f}">{label}</text>',
            ]
            y += BAR + 4
        y += 8
    lines = []
    for limit in LIMITS:
        x = LEFT + limit * scale
        lines.append(f'<path d="M{x:.1f},20 V{y:.0f}" stroke="var(--bad)" stroke-dasharray="4 3"/>')
        lines.append(f'<text x="{x:.1f}" y="14" text-anchor="middle">{limit} GiB</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}">'
        "<style>text { fill: var(--ink); font: 12px system-ui, sans-serif; "
        "stroke: var(--page); stroke-width: 3px; paint-order: stroke; }</style>"
        f'<rect width="100%" height="100%" fill="var(--page)"/>{"".join(lines + drawn)}</svg>\n'
    )


if __name__ == "__main__":
    print("\n".join(table()))
