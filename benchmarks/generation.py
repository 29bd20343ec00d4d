"""Generating text with transformers, bitsandbytes, lowmem and llama.cpp, each in a fresh process, in turns.

    python -m benchmarks.generation                  the shape of SmolLM2-135M: a quarter of an hour on two cores
    python -m benchmarks.generation --model large    0.8 B parameters
    python -m benchmarks.generation --rows 'lowmem*' llama.cpp --rounds 5

It writes a model with random weights, since speed does not depend on their values, in 4 bits: as a folder, and as a
GGUF file with the same codes and scales. transformers and bitsandbytes read the bfloat16 weights that both were made
from. The exit code is 1 if the logits of llama.cpp and lowmem differ by more than rounding.

Columns: tokens a second of decoding after a prompt of 256 tokens, by calling the model, through ``generate`` with the
row's cache, and through ``generate`` with no cache named; of the prompt itself, and of 16 sequences at once; then
MiB, resident after decoding one sequence and at most until then, beyond a process that has done the same with a tiny
model. Pages of mapped files count, libraries do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import lowmem
from benchmarks.resident import _mib, _status, map_libraries, printed_json, reset_high_water
from lowmem.kernels.threads import usable_cpu_count
from lowmem.tools.arguments import parse_positive_int
from lowmem.tools.compute_argument import set_compute_dtype
from lowmem.tools.info import environment_info

ROWS = (
    *("transformers bfloat16", "transformers float32", "bitsandbytes bfloat16"),
    *("lowmem bfloat16", "lowmem float32"),  # as transformers loads the folder
    *("prepared bfloat16", "prepared float32"),  # for inference
    *("adapter bfloat16", "adapter float32"),  # prepared, with LoRA of rank 16 in all layers, as fit trains it
    *("cache8 bfloat16", "cache8 float32"),  # prepared, with keys and values in 8 bits
    *("int8 bfloat16", "int8 float32"),  # prepared, with products in 8-bit integers
    "llama.cpp",
)
EXACT = "lowmem float32"  # whose logits others are held against
DENSE = ("transformers", "bitsandbytes")  # which read the dense folder
PREPARED = "prepared", "adapter", "cache8", "int8"
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SHAPES = {"smollm2": (576, 30, 9, 3, 1536), "large": (2048, 16, 32, 8, 5632), "tiny": (128, 2, 2, 1, 256)}
PROMPT, TOKENS, SEQUENCES = 256, 64, 16
PACKAGES = {"bitsandbytes": "bitsandbytes", "llama.cpp": "llama_cpp_py_sync"}
ROUNDING = 0.2  # of the logits' norm: llama.cpp rounds the inputs of products to 8 bits, which gives 0.07
FIGURES = ("decode", "generate", "default", "prefill", "sequences", "kept", "peak")


def make(folder: Path, shape: str) -> None:
    """Write the three forms of a model."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        **dict(zip(NAMES, SHAPES[shape], strict=True)),
        vocab_size=512 if shape == "tiny" else 49152,
        tie_word_embeddings=True,
        initializer_range=SHAPES[shape][0] ** -0.5,  # so that attention is uneven, and its errors change the logits
        bos_token_id=None,
        eos_token_id=None,  # no text ends early
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "dense")
    lowmem.convert(model, lowmem.FourBit("q4_0", block_size=32, scales="float16", embeddings="4bit"))
    model.save_pretrained(folder / "stored")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no tokenizer
        lowmem.export(folder / "stored", folder / "model.gguf")


def load(row: str, folder: Path) -> Any:
    import transformers

    import lowmem.integrations.transformers

    kind, dtype = row.split()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True}
    if kind == "bitsandbytes":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    source = folder / ("dense" if row.startswith(DENSE) else "stored")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    if kind == "int8":
        set_compute_dtype(model, kind)
    if kind == "adapter":  # B is zero: the logits stay, and the products are computed
        lowmem.add_adapter(model, "default", lowmem.LoRA(16))
    if kind in PREPARED:
        lowmem.prepare_inference(model)
    return model.eval()


class Transformers:
    """A model of transformers that continues random tokens."""

    def __init__(self, row: str, folder: Path) -> None:
        self.model, self.kind = load(row, folder), row.split()[0]
        self.prompt = prompt(self.model.config.vocab_size)

    def start(self, sequences: int = 1) -> None:
        """Compute the prompt, once for all sequences."""
        self.cache = self._new_cache()
        self._compute(self.prompt)
        if sequences > 1:
            self.cache.batch_repeat_interleave(sequences)
            self.likeliest *= sequences

    def step(self) -> None:
        """Compute the next token of each sequence."""
        self._compute(torch.tensor(self.likeliest)[:, None])

    def generate(self, count: int, names_cache: bool = True) -> Any:
        given = {"attention_mask": torch.ones_like(self.prompt)}
        given |= {"cache": self._new_cache()} if names_cache else {}
        return self.model.generate(self.prompt, **given, max_new_tokens=count, do_sample=False)

    def _compute(self, tokens: torch.Tensor) -> None:
        with torch.no_grad():
            found = self.model(tokens, cache=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = found.logits[:, -1]  # (sequences, vocabulary)
        self.likeliest = self.logits.argmax(-1).tolist()

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        if self.kind in PREPARED:
            return lowmem.KeyValueCache(self.model, bits=8 if self.kind == "cache8" else None)
        return DynamicCache(config=self.model.config)


class LlamaCpp:
    """The same in llama.cpp, with its own settings."""

    def __init__(self, row: str, folder: Path) -> None:
        from tests.formats import llama_cpp

        threads = torch.get_num_threads()
        self.settings = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": PROMPT + TOKENS + 1}
        self.loaded = llama_cpp.LlamaCpp(folder / "model.gguf", self.settings)
        self.batch = self.loaded.lib.llama_batch_init(SEQUENCES, 0, 1)
        self.batch.n_tokens = 1
        self.prompt = prompt(self.loaded.lib.llama_vocab_n_tokens(self.loaded.vocab))[0].tolist()

    def start(self, sequences: int = 1) -> None:
        if sequences != self.batch.n_tokens:
            self.batch.n_tokens, room = sequences, sequences * self.settings["n_ctx"]
            self.loaded.set_up({**self.settings, "n_ctx": room, "n_seq_max": sequences})
        self.loaded.clear()
        self.loaded.decode(self.prompt)
        self.position, lib = PROMPT, self.loaded.lib
        for sequence in range(1, sequences):
            lib.llama_memory_seq_cp(lib.llama_get_memory(self.loaded.context), 0, sequence, -1, -1)
        self._take([-1] * sequences)

    def step(self) -> None:
        batch = self.batch
        for row, token in enumerate(self.likeliest):
            batch.token[row], batch.pos[row], batch.logits[row] = token, self.position, 1
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, row
        assert self.loaded.lib.llama_decode(self.loaded.context, batch) == 0
        self.position += 1
        self._take(range(batch.n_tokens))

    def _take(self, rows: Iterable[int]) -> None:
        self.logits = torch.stack([self.loaded.last_logits(row) for row in rows])
        self.likeliest = self.logits.argmax(-1).tolist()


def prompt(vocabulary: int) -> torch.Tensor:
    """Return int64 (1, ``PROMPT``)."""
    return torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def model_of(row: str, folder: Path) -> Any:
    return (LlamaCpp if row == "llama.cpp" else Transformers)(row, folder)


def seconds(call: Callable[..., None], *given: int, count: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call(*given)
    return time.perf_counter() - start


def measure(row: str, folder: Path) -> dict[str, float | None]:
    """Measure a row in this process, and write the logits behind the prompt beside the model."""
    work(model_of(row, folder / "tiny"), 2, folder / "tiny.pt")
    map_libraries()
    gc.collect()
    reset_high_water()
    before = _status("VmRSS")
    return work(model_of(row, folder), TOKENS, folder / f"{row}.pt", before)


def work(model: Any, tokens: int, logits: Path, before: int = 0) -> dict[str, float | None]:
    """Let a model compute what is measured, each after a first call that is not."""
    found: dict[str, float | None] = dict.fromkeys(FIGURES)
    model.start()
    found["prefill"] = PROMPT / seconds(model.start)
    torch.save(model.logits[0].float(), logits)
    model.step()
    found["decode"] = tokens / seconds(model.step, count=tokens)
    found["kept"], found["peak"] = (_mib(_status(name) - before) for name in ("VmRSS", "VmHWM"))
    if hasattr(model, "generate"):
        for figure, names_cache in (("generate", True), ("default", False)):
            once = seconds(model.generate, 1, names_cache)
            found[figure] = (tokens - 1) / (seconds(model.generate, tokens, names_cache) - once)
    model.start(SEQUENCES)
    model.step()
    found["sequences"] = SEQUENCES * (tokens // 2) / seconds(model.step, count=tokens // 2)
    return found


def measure_apart(row: str, folder: Path, threads: int) -> dict[str, float | None]:
    """Measure a row in a fresh process."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    env = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
    return printed_json("generation", "--measure", row, str(folder), env=env)


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a table of medians."""
    names = ("decode", "`generate`", "no cache named", "prefill", f"{SEQUENCES} sequences", "MiB", "peak MiB")
    lines = [f"| | {' | '.join(names)} |", f"| :-- {'| --: ' * len(names)}|"]
    for row, runs in found.items():
        medians = (statistics.median(run[name] for run in runs) if runs[0][name] else None for name in FIGURES)
        cells = ("" if one is None else f"{float(f'{one:.3g}'):g}" for one in medians)  # three digits, no exponent
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def differing(folder: Path, rows: list[str]) -> list[str]:
    """Return the 4-bit rows whose logits are further from lowmem's in float32 than rounding; print the distances."""
    logits = {row: torch.load(folder / f"{row}.pt") for row in rows if not row.startswith(DENSE)}
    exact = logits.get(EXACT)
    distances = {row: float((own - exact).norm() / exact.norm()) for row, own in logits.items() if exact is not None}
    for row, distance in distances.items():
        print(f"{row}: logits differ by {distance:.2g} of their norm (at most {ROUNDING})", file=sys.stderr)
    return [row for row, distance in distances.items() if not distance <= ROUNDING]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="smollm2", help="the shape (default: smollm2)")
    parser.add_argument("--rows", nargs="*", default=["*"], metavar="PATTERN", help=f"some of {', '.join(ROWS)}")
    parser.add_argument(
        "--rounds", type=parse_positive_int, default=3, help="fresh processes of each row (default: 3)"
    )
    parser.add_argument(
        "--threads", type=parse_positive_int, default=usable_cpu_count(), help="of each process (default: all)"
    )
    parser.add_argument("--folder", type=Path, help="where the model lies, or is written; default: a temporary one")
    parser.add_argument("--measure", nargs=2, metavar=("ROW", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json.dumps(measure(given.measure[0], Path(given.measure[1]))))
        return 0
    rows = [row for row in ROWS if any(fnmatch(row, pattern) for pattern in given.rows)]
    if not rows:
        parser.error(f"--rows {' '.join(given.rows)} matches none of {', '.join(ROWS)}")
    for kind, package in PACKAGES.items():
        if find_spec(package) is None and any(row.startswith(kind) for row in rows):
            print(f"{kind} is left out, since {package} is not installed", file=sys.stderr)
            rows = [row for row in rows if not row.startswith(kind)]
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "tiny").exists():
            make(folder, given.model)
            make(folder / "tiny", "tiny")
        for row in rows * given.rounds:
            found[row].append(measure_apart(row, folder, given.threads))
        far = differing(folder, rows)
    machine, packages = environment_info(), ["torch", "transformers", *filter(find_spec, PACKAGES.values())]
    print(f"{machine['cpu']}, {given.threads} threads, {lowmem.backend().partition(':')[0]}", end="")
    print("".join(f"; {name} {version(name)}" for name in packages), end="\n\n")
    print("\n".join(table(found)))
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
