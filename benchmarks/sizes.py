"""Llama models of 0.6 to 8 billion weights: memory and time to store, train and run them, each in a fresh process.

    python -m benchmarks.sizes 1b 3b 8b               makes stored models with random codes, and measures them
    python -m benchmarks.sizes 1b 3b 8b --save        and adds the figures to benchmarks/sizes.json, from which
                                                      benchmarks/fits.py makes the README's table and picture
    python -m benchmarks.sizes 1b 3b 8b --jobs plan   predicts, and measures nothing
    python -m benchmarks.sizes 8b --jobs quantize     writes 16 GB of dense weights first, which it stores
    python -m benchmarks.sizes 1b --jobs peft llama.cpp    the peers, where they fit

No dense model is ever in memory, or, but for ``quantize`` and ``peft``, on the disk: a layer is stored, and copied
for all others, since neither memory nor speed depends on the values. Training is ``lowmem fit`` as a user types it,
one row a step, and the prediction what its ``--dry-run`` prints. Each peak is the process's high-water mark
(``VmHWM``), libraries and touched pages of mapped files included; that of PEFT begins when its model is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lowmem
from benchmarks.resident import _status, printed_json, reset_high_water
from lowmem.__main__ import main as run_lowmem
from lowmem.tools.info import environment_info

NAMES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("head_dim", "vocab_size"),
)
SHAPES = {
    "0.6b": (1024, 28, 16, 8, 3072, 128, 151936),
    "1b": (2048, 16, 32, 8, 8192, 64, 128256),
    "3b": (3072, 28, 24, 8, 8192, 128, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128, 128256),
    "tiny": (128, 2, 2, 1, 256, 64, 512),
}
"""Those of Qwen 3 (0.6), and of Llama 3.2 and 3.1, whose ends share a weight up to 3 billion."""
STORED = Path(__file__).with_suffix(".json")  # what --save wrote
LENGTHS, MODES, STEPS = (256, 1024), ("fast", "lean"), 3
PROMPT, TOKENS = 256, 32
JOBS = ("plan", "train", "run", "quantize", "peft", "llama.cpp")
TECHNIQUES = {"stored": lowmem.FourBit(), "gguf": lowmem.FourBit("iq4_nl", embeddings="q8_0")}
SMALL_RANK = 16
DENSE: dict[str, tuple[Any, ...]] = {
    "all weights": (),
    "LoRA on bfloat16": (lowmem.Half(torch.bfloat16), lowmem.LoRA(SMALL_RANK)),
}
"""What is planned beside lowmem's 4 bits: AdamW of all weights in float32, and LoRA."""


def config_of(shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **dict(zip(NAMES, SHAPES[shape], strict=True)),
        tie_word_embeddings=shape != "8b",
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,  # no text ends early
        dtype="bfloat16",
    )


def one_layer_model(shape: str) -> Any:
    """Return a dense model with the ends of a shape, and one of its layers."""
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write_stored_model(folder: Path, shape: str, technique: lowmem.FourBit) -> None:
    """Write a model whose layers all have the codes of the first one."""
    from tests.integrations.transformers.tokens import write_tokenizer

    model = lowmem.convert(one_layer_model(shape), technique)
    (first,) = model.model.layers
    model.config = config_of(shape)
    model.model.layers.extend(copy.deepcopy(first) for _ in range(1, model.config.num_hidden_layers))
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config.vocab_size)


def write_dense_model(folder: Path, shape: str) -> None:
    """Write a model in bfloat16, a file for each layer, all with the values of the first one."""
    from safetensors.torch import save_file

    from tests.integrations.transformers.tokens import write_tokenizer

    config, tensors = config_of(shape), one_layer_model(shape).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    first = "model.layers.0."
    ends = {name: tensor for name, tensor in tensors.items() if not name.startswith(first)}
    layer = {name.removeprefix(first): tensor for name, tensor in tensors.items() if name not in ends}
    files = {"ends": ends} | {
        f"layer-{number}": {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
        for number in range(config.num_hidden_layers)
    }
    for name, content in files.items():
        save_file(content, folder / f"{name}.safetensors", {"format": "pt"})
    weight_map = {tensor: f"{name}.safetensors" for name, content in files.items() for tensor in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_tokenizer(folder, config.vocab_size)


def measured(job: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the figures of a job, with its seconds and this process's peak in bytes."""
    start = time.perf_counter()
    found = job()
    return {"seconds": time.perf_counter() - start, **found, "peak": _status("VmHWM")}


def run_command(*arguments: str) -> dict[str, Any]:
    """Run ``lowmem`` in this process, and return the JSON that it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run_lowmem([*arguments])
    if code:
        raise SystemExit(code)
    text = printed.getvalue()
    return json.loads(text) if text.startswith("{") else {}


def quantize(folder: Path) -> dict[str, float]:
    out = folder / "quantized"
    run_command("quantize", str(folder / "dense"), str(out))
    shutil.rmtree(out)
    return {}


def run_fit(folder: Path, length: str, memory: str, *more: str) -> dict[str, Any]:
    return run_command(
        *("fit", str(folder / "stored"), "--data", str(folder / "text.txt"), "--length", length, "--memory", memory),
        *("--batch-size", "1", "--accumulate", "1", "--steps", str(STEPS), "--json", *more),
    )


def dry_run(folder: Path, length: str, memory: str) -> dict[str, float]:
    return {"planned": run_fit(folder, length, memory, "--dry-run")["process_bytes"]}


def fit(folder: Path, length: str, memory: str) -> dict[str, float]:
    metrics = folder / f"{length}-{memory}.jsonl"
    metrics.unlink(missing_ok=True)
    run_fit(folder, length, memory, "--metrics", str(metrics))
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {"step": statistics.median(step["seconds"] for step in steps[1:])}


def generate(folder: Path) -> dict[str, float]:
    """Generate as the first command of the guide does, with no cache named."""
    from transformers import AutoModelForCausalLM

    import lowmem.integrations.transformers

    start = time.perf_counter()
    model = lowmem.prepare_inference(AutoModelForCausalLM.from_pretrained(folder / "stored")).eval()
    opened = time.perf_counter()
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    times = []
    for count in (1, 1, TOKENS + 1):
        begun = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
        times.append(time.perf_counter() - begun)
    return {
        "open": opened - start,
        "first": times[0],
        "prefill": PROMPT / times[1],
        "decode": TOKENS / (times[2] - times[1]),
    }


def peft_step(folder: Path, length: str) -> dict[str, float]:
    """Train bitsandbytes' nf4 with PEFT, as the QLoRA paper does, with checkpoints of activations."""
    import peft
    import transformers

    quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=quantization_config, dtype=torch.bfloat16
    )
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = peft.LoraConfig(r=SMALL_RANK, lora_alpha=SMALL_RANK, target_modules="all-linear")
    model = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-4)
    ids = torch.randint(model.config.vocab_size, (1, int(length)))
    gc.collect()
    reset_high_water()  # while it loads, pages of the dense files count, which the system takes back
    for _ in range(2):
        begun = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"step": time.perf_counter() - begun}


def llama_cpp(folder: Path) -> dict[str, float]:
    """Generate with llama.cpp, from layers of the same bits and Q8_0 ends."""
    from tests.formats import llama_cpp

    threads = torch.get_num_threads()
    settings = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": PROMPT + TOKENS + 1}
    loaded = llama_cpp.LlamaCpp(folder / "model.gguf", settings)
    vocabulary = loaded.lib.llama_vocab_n_tokens(loaded.vocab)
    prompt = torch.randint(vocabulary, (PROMPT,)).tolist()
    for _ in range(2):
        loaded.clear()
        begun = time.perf_counter()
        loaded.decode(prompt)
        computed = time.perf_counter()
    for _ in range(TOKENS):
        loaded.decode([int(loaded.last_logits(-1).argmax())])
    return {"prefill": PROMPT / (computed - begun), "decode": TOKENS / (time.perf_counter() - computed)}


RUNS = {
    "quantize": quantize,
    "dry run": dry_run,
    "fit": fit,
    "generate": generate,
    "peft": peft_step,
    "llama.cpp": llama_cpp,
}


def measured_apart(folder: Path, name: str, *arguments: str) -> dict[str, float]:
    """Measure one of ``RUNS`` in a fresh process."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    given = ("--measure", name, str(folder), *arguments)
    found: dict[str, float] = printed_json("sizes", *given, env={**os.environ, **quiet})
    print(f"{folder.name} {name} {' '.join(arguments)}: {found}", file=sys.stderr)
    return found


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def figures_of(shape: str, jobs: list[str], folder: Path, lengths: list[int]) -> dict[str, dict[str, float]]:
    """Measure a size; return its figures by what was done, in bytes, seconds and tokens a second."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("some words " * 4 * max(LENGTHS))
    figures: dict[str, dict[str, float]] = {}
    needed = {"stored": {"plan", "train", "run"}, "gguf": {"llama.cpp"}}
    for name, technique in TECHNIQUES.items():
        if needed[name] & {*jobs} and not (folder / name).exists():
            write_stored_model(folder / name, shape, technique)
    if {"quantize", "peft"} & {*jobs} and not (folder / "dense").exists():
        write_dense_model(folder / "dense", shape)
    if "quantize" in jobs:
        figures["quantize"] = measured_apart(folder, "quantize")
    if "plan" in jobs:
        for name, techniques in DENSE.items():
            for length in lengths:
                planned = planned_training_bytes(shape, techniques, length)
                figures[f"train {length} tokens, {name}"] = {"planned": planned}
    for length in lengths if {"plan", "train"} & {*jobs} else ():
        for memory in MODES:
            found = measured_apart(folder, "dry run", str(length), memory)
            found = {"planned": found["planned"]}
            if "train" in jobs:
                found |= measured_apart(folder, "fit", str(length), memory)
            figures[f"train {length} tokens, {memory}"] = found
    for length in lengths if "peft" in jobs else ():
        figures[f"train {length} tokens, PEFT with bitsandbytes"] = measured_apart(folder, "peft", str(length))
    if {"plan", "run"} & {*jobs}:
        figures["run"] = {"planned": planned_inference_bytes(shape)}
        if "run" in jobs:
            figures["run"] |= measured_apart(folder, "generate")
    if "llama.cpp" in jobs:
        if not (folder / "model.gguf").exists():
            lowmem.export(folder / "gguf", folder / "model.gguf")
        figures["run, llama.cpp"] = measured_apart(folder, "llama.cpp")
    return figures


def row_of(shape: str, what: str, found: dict[str, float]) -> str:
    """Return a line of the table."""
    times = [
        f"{found[name]:{form}} {unit}"
        for name, form, unit in (
            ("step", ".1f", "s a step"),
            ("prefill", ".0f", "tokens/s read"),
            ("decode", ".1f", "tokens/s written"),
            ("open", ".0f", "s to open"),
        )
        if name in found
    ]
    if what == "quantize":
        times = [f"{found['seconds']:.0f} s"]
    sizes = [gib(found[name]) if name in found else "" for name in ("planned", "peak")]
    return f"| {' | '.join((shape, what, *sizes, ', '.join(times)))} |"


def save(machine: str, shape: str, figures: dict[str, dict[str, float]]) -> None:
    """Add figures to the stored ones: predictions, and what was measured on a machine."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {"planned": {}, "measured": {}}
    for what, found in figures.items():
        measured = {name: round(figure, 2) for name, figure in found.items() if name != "planned"}
        if "planned" in found:
            stored["planned"].setdefault(shape, {})[what] = int(found["planned"])
        if measured:
            stored["measured"].setdefault(machine, {}).setdefault(shape, {})[what] = measured
    STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def planned_training_bytes(shape: str, techniques: tuple[Any, ...], length: int) -> int:
    """Return what ``plan`` says of a step of AdamW on one row of ``length`` tokens."""
    from transformers import AutoModelForCausalLM

    make = lambda: AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32)  # noqa: E731
    with torch.device("meta"):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        batch = {"input_ids": tokens, "labels": tokens}
        return lowmem.plan(make, *techniques, batch=batch, loss=lambda output: output.loss).training_bytes


def planned_inference_bytes(shape: str) -> int:
    """Return what ``plan`` says of a prompt and its answer."""
    from transformers import AutoModelForCausalLM

    make = lambda: AutoModelForCausalLM.from_config(config_of(shape))  # noqa: E731
    with torch.device("meta"):
        batch = torch.zeros(1, PROMPT, dtype=torch.int64)
        planned = lowmem.plan(make, lowmem.FourBit(), batch=batch, training=None, tokens=PROMPT + TOKENS)
    return planned.inference_bytes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SIZE", help=f"some of {', '.join(SHAPES)}")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["train", "run"], help="default: train run")
    parser.add_argument("--folder", type=Path, help="where models lie, or are written; default: a temporary one")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a row; default: 256 1024")
    parser.add_argument("--save", action="store_true", help=f"add the figures to {STORED.name}")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        name, folder, *more = given.measure
        print(json.dumps(measured(lambda: RUNS[name](Path(folder), *more))))
        return 0
    if not given.shapes or not {*given.shapes} <= {*SHAPES}:
        parser.error(f"{' '.join(given.shapes) or 'nothing'} is not of {', '.join(SHAPES)}: name sizes of them")
    machine = f"{environment_info()['cpu']}, {torch.get_num_threads()} threads, {lowmem.backend().partition(':')[0]}"
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in given.shapes:
            figures = figures_of(shape, given.jobs, (given.folder or Path(temporary)) / shape, given.lengths)
            rows += [row_of(shape, what, found) for what, found in figures.items()]
            if given.save:
                save(machine, shape, figures)
    print(f"{machine}\n\n| Weights | What | Predicted GiB | Peak GiB | Time |\n| :-- | :-- | --: | --: | :-- |")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
