"""Resident memory of ``from_pretrained`` of transformers, while it stores a model's weights, or keeps 4-bit ones.

    python -m benchmarks.folders    makes models of 709 MiB in a temporary folder, and loads them in fresh processes

"exact" loads a file or folder of another program, whose 4-bit codes are kept. It fails where the high-water mark
(``VmHWM``) passes the stored model, the largest tensor in float32 (with its copy, where ``dtype=`` casts it), and
``CONSTANT``: no more than one dense tensor is ever there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import lowmem
from benchmarks.resident import _record, environment, map_libraries, printed_json, steady
from lowmem import FourBit, Half, measure
from lowmem.nn.stored_module import StoredModule

CONSTANT = 8  # MiB: names and modules, the scratch of the quantizer, and a tensor that stays dense
TECHNIQUES = {
    "nf4": FourBit("nf4", embeddings="4bit"),
    "bof4s": FourBit("bof4s", embeddings="4bit"),
    "bfloat16": Half(torch.bfloat16),
}
CASES = (("nf4", "float32"), ("nf4", "bfloat16"), ("bof4s", "float32"), ("bfloat16", "float32"))
EXACT_DTYPES = ("float32", "bfloat16")
SIZES = {"n_embd": 1024, "n_layer": 12, "vocab_size": 32768}
SMALL = {"n_embd": 64, "n_layer": 1, "vocab_size": 128}
EXACT = {"gguf": "q4_0", "bitsandbytes": "nf4", "compressed-tensors": "q4_0"}
"""What "exact" loads, and lowmem's format of which it is made."""


def make(folder: Path, sizes: dict[str, int]) -> None:
    """Write a GPT-2 with random float32 weights and tied ends, whose largest tensor is read last."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(**sizes, n_head=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200MB")


def make_exact(folder: Path, sizes: dict[str, int]) -> None:
    """Write a Llama with random weights and tied ends in each of ``EXACT``; GGUF has the embedding in 4 bits, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = sizes["n_embd"]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=sizes["n_layer"],
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    for kind, form in EXACT.items():
        torch.manual_seed(0)
        stored = folder / f"{kind}-stored"
        model = lowmem.convert(LlamaForCausalLM(config), FourBit(form, 32, "float16", embeddings="4bit"))
        model.save_pretrained(stored)
        (folder / kind).mkdir()
        out = folder / kind / "model.gguf" if kind == "gguf" else folder / kind / "folder"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has no tokenizer
            lowmem.export(stored, out, format=kind)
        shutil.rmtree(stored)


def load(folder: Path, technique: str, dtype: str) -> dict[str, float]:
    """Load a folder in this process, which ``load`` of a small one has warmed; return what loading took, in MiB.

    The technique is one of ``TECHNIQUES``, or "exact: " and one of ``EXACT``.
    """
    from transformers import AutoModelForCausalLM

    from lowmem.integrations.transformers import LowmemConfig, from_exact

    figures: dict[str, float] = {}
    kind = technique.partition(": ")[2]
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if kind:
        source = folder / kind / ("model.gguf" if kind == "gguf" else "folder")
        model = _record(figures, "load", lambda: from_exact(source, **options))
    else:
        options |= {"quantization_config": LowmemConfig(TECHNIQUES[technique]), "local_files_only": True}
        model = _record(figures, "load", lambda: AutoModelForCausalLM.from_pretrained(folder, **options))
    modules = [module for module in model.modules() if isinstance(module, StoredModule)]
    stored = [module.stored_numel(name) for module in modules for name in module.forms]
    largest = max(*stored, model.get_input_embeddings().weight.numel())
    size = 4 if dtype == "float32" else 4 + getattr(torch, dtype).itemsize  # the folder's, and that of a cast copy
    kept = measure.actual_bytes(model)
    return {"peak": figures["load_peak"], "stored": kept / 2**20, "largest": largest * size / 2**20}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    if given := parser.parse_args(arguments).measure:
        technique, dtype, folder, small = given
        steady()
        load(Path(small), technique, dtype)
        map_libraries()
        print(json.dumps(load(Path(folder), technique, dtype)))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name) / "model", Path(name) / "small"
        make(folder, SIZES)
        make(small, SMALL)
        make_exact(folder, SIZES)
        make_exact(small, SMALL)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{size / 2**20:.0f} MiB of float32 weights")
        exact = [(f"exact: {kind}", dtype) for kind in EXACT for dtype in EXACT_DTYPES]
        for case in (*CASES, *exact):
            figures = printed_json("folders", "--measure", *case, str(folder), str(small), env=environment())
            beyond = figures["peak"] - figures["stored"] - figures["largest"]
            failed |= beyond > CONSTANT
            shown = ", ".join(f"{name} {size:.1f}" for name, size in figures.items())
            print(f"{case[0]} loaded as {case[1]}, MiB: {shown}, beyond {beyond:.1f} (at most {CONSTANT})")
    return failed


if __name__ == "__main__":
    sys.exit(main())
