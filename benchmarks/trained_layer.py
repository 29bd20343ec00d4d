"""What the page ``docs/four-bits.md`` shows of trained models: a layer's weights, and a conversation's tokens.

    python -m benchmarks.trained_layer     writes docs/four-bits.json

The layer is of all-MiniLM-L6-v2, the tokenizer and the chat template are those of SmolLM2: ``benchmarks.trained``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import lowmem
from benchmarks.trained import minilm, smollm2
from lowmem.finetuning.text_examples import IGNORED

FILE = Path(__file__).parents[1] / "docs" / "four-bits.json"
LAYER = "encoder.layer.2.intermediate.dense.weight"
BINS = 80  # of the histogram, from -1 to 1
BLOCK_SIZES = (16, 32, 64, 128)  # of which each divides the layer's rows of 384
CONVERSATION = [
    {"role": "user", "content": "Is 7 prime?"},
    {"role": "assistant", "content": "Yes. Only 1 and 7 divide it."},
]


def layer() -> dict[str, Any]:
    """Return the histogram of a layer's weights, divided by their blocks' scales, and its error for block sizes."""
    with safe_open(minilm() / "model.safetensors", "pt") as file:
        weight = file.get_tensor(LAYER).float()
    blocks = weight.view(-1, 64)
    shares = torch.histc(blocks / blocks.abs().amax(-1, keepdim=True), BINS, -1, 1) / weight.numel()
    stored = {size: lowmem.quantize(weight, "nf4", block_size=size) for size in BLOCK_SIZES}
    return {
        "name": LAYER,
        "shape": list(weight.shape),
        "histogram": [round(share, 5) for share in shares.tolist()],
        "bits": {str(size): round(q.bits_per_weight, 3) for size, q in stored.items()},
        "errors": {str(size): q.squares.relative_error for size, q in stored.items()},
    }


def conversation(folder: Path) -> list[list[Any]]:
    """Return the text of each token, and whether it counts in the loss."""
    import transformers

    from lowmem.integrations.transformers import TextTokenizer

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2().parent, gguf_file=smollm2().name)
    (folder / "chat.jsonl").write_text(json.dumps({"messages": CONVERSATION}), encoding="utf8")
    (example,) = lowmem.read_examples(folder / "chat.jsonl", TextTokenizer(tokenizer), 128).examples
    counts = [False, *(example.targets[:-1] != IGNORED).tolist()]
    return [[tokenizer.decode([one]), mark] for one, mark in zip(example.ids.tolist(), counts, strict=True)]


def main(folder: Path) -> None:
    FILE.write_text(json.dumps({"layer": layer(), "conversation": conversation(folder)}, indent=1) + "\n")


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        main(Path(folder))
