"""``python -m benchmarks.quality``: what ways to store two trained models lose, and their speed.

The table is in docs/guides/results-and-quality.md, and three of its rows are in README.md.

Nothing is calibrated. Paragraphs of Python's manual judge.

- MiniLM, a sentence encoder whose linear layers are converted: the mean cosine between its embeddings of 128
  paragraphs, dense and converted.
- SmolLM2-135M, a language model whose weights lie on a grid of 4 bits with offsets (Q4_1), converted by the defaults,
  which store embeddings in 8 bits: its size, the mean Kullback-Leibler divergence of the next token's distribution
  from the dense model's, in nats, and the perplexity divided by the dense model's.
- Six linear layers of 1024 x 1024 with one float32 input: how many times as fast as dense ones they are.

Both trained models come in the packages of ``benchmarks.trained``.

``python -m benchmarks.quality --calibrated FILE...``: the table of docs/guides/calibration.md, of SmolLM2-135M as the
default stores it, calibrated in several ways. Other paragraphs of the manual are the text that calibrates; the
paragraphs that judge above and those of each FILE, texts of other kinds, judge.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import process_time
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lowmem
from benchmarks.trained import minilm, paragraphs, paragraphs_of, smollm2
from lowmem import EightBit, FourBit, measure
from lowmem.quant.tensor import QuantizedTensor
from lowmem.testing.memory import THREADS

Technique = FourBit | EightBit

CHOICES: Mapping[str, tuple[Technique, str]] = MappingProxyType(
    {
        'FourBit("nf4")': (FourBit("nf4"), "you want QLoRA as published, or a model for bitsandbytes"),
        'FourBit("bof4s")': (FourBit("bof4s"), "memory matters most; compare it with nf4 on your model"),
        "FourBit()": (FourBit(), "you have no special need: the default"),
        'FourBit("bof4s", 16)': (FourBit("bof4s", 16), "you want the best 4 bits without calibration data"),
        "EightBit()": (EightBit(), "the model must lose almost nothing"),
    }
)
"""By the code that makes it: the technique, and when to take it."""

JUDGES, TOKENS, ROWS = 128, 256, 8  # paragraphs for the encoder; tokens of a row, and rows, for the language model
LAYERS = 6  # that are timed
LETTERS = 5  # of a token at most, on average
COLUMNS = ["Linear layers", "Bits/ weight", "MiB", "Cosine", "KL", "Perplexity / dense", "Speed", "Use it when"]


class Lost(NamedTuple):
    """The size of a converted language model, and what it loses."""

    size: int  # bytes
    divergence: float  # mean KL(dense || converted) of the next token, in nats
    perplexity: float  # relative to the dense model's


def judging(count: int = JUDGES) -> list[str]:
    """Return so many paragraphs of the manual, evenly spread."""
    found = paragraphs()
    return found[:: len(found) // count][:count]


def is_linear(path: str, module: nn.Module) -> bool:
    return type(module) is nn.Linear


def bits(model: nn.Module) -> float:
    """Return the stored bits for each weight of the converted linear layers, without that of the vocabulary."""
    kinds = (lowmem.Linear4Bit, lowmem.Linear8Bit)
    stored: list[QuantizedTensor] = [
        m.quantized for name, m in model.named_modules() if isinstance(m, kinds) and name != "lm_head"
    ]
    return sum(8 * one.nbytes for one in stored) / sum(one.shape.numel() for one in stored)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], size: int = 32) -> Tensor:
    """Return the mean of each text's tokens, of length 1: (texts, width), the shortest text first."""
    means = []
    texts = sorted(texts, key=len)  # alike in length, so that little of a batch is padding
    for start in range(0, len(texts), size):
        batch = tokenizer(
            texts[start : start + size], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        mask = batch["attention_mask"].unsqueeze(-1)  # (texts, tokens, 1)
        means.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(means), dim=-1)


def cosines(choices: Mapping[str, Technique]) -> dict[str, float]:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(minilm()).eval(), AutoTokenizer.from_pretrained(minilm())
    texts = judging()
    dense, found = embed(model, tokenizer, texts), {}
    for name, technique in choices.items():
        converted = lowmem.convert(copy.deepcopy(model), technique, where=is_linear)
        found[name] = float((embed(converted, tokenizer, texts) * dense).sum(-1).mean())
    return found


def language_model() -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M, dense in float32, and its tokenizer."""
    from transformers import AutoTokenizer

    from lowmem.integrations.transformers.pretrained_folder import load_gguf

    file = smollm2()
    model = lowmem.restore(load_gguf(file))
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def rows_of_tokens(tokenizer: Any, texts: Sequence[str] | None = None) -> Tensor:
    """Return int64 (ROWS, TOKENS): texts, by default those that judge, cut into rows."""
    tokens: list[int] = tokenizer("\n\n".join(judging() if texts is None else texts), verbose=False)["input_ids"]
    return torch.tensor(tokens[: ROWS * TOKENS]).view(-1, TOKENS)


def calibrations(model: nn.Module, tokenizer: Any) -> dict[str, list[Tensor] | str | None]:
    """Return the batches for ``calibrate`` by name; with None, the model is converted without calibration."""
    from lowmem.integrations.transformers.folder_calibration import calibration_batches
    from lowmem.transforms.calibration.random_tokens import random_token_batches

    judges = set(judging())
    text: Any = calibration_batches(model, tokenizer, "\n\n".join(p for p in paragraphs() if p not in judges))
    drawn = random_token_batches(model, tokenizer, 0, 4096)
    return {
        "none": None,
        "`random`, 4096 tokens": drawn,
        "`self`, 4096 tokens": "self",
        "Python's manual, 8192 tokens": text,
        "the manual and `random`": [*text, *drawn],
    }


def calibrated_table(files: Sequence[Path]) -> list[str]:
    """Return the lines of the table of calibrations, judged by the manual and by texts of other kinds."""
    dense, tokenizer = language_model()
    kinds = {"manual": rows_of_tokens(tokenizer)}
    for file in files:
        found = paragraphs_of(file.read_text(encoding="utf8"))
        step = max(1, sum(map(len, found)) // (LETTERS * ROWS * TOKENS))  # evenly spread
        kinds[file.stem] = rows_of_tokens(tokenizer, found[::step])
    columns = [f"{kind}: {figure}" for kind in kinds for figure in ("perplexity / dense", "KL")]
    models, figures = {}, {}
    for name, batches in calibrations(dense, tokenizer).items():
        started, model = process_time(), copy.deepcopy(dense)
        if batches is None:
            lowmem.convert(model, FourBit())
        else:
            lowmem.calibrate(model, batches, FourBit(), tokenizer=tokenizer)
        models[name], figures[name] = model, [f"{process_time() - started:.0f}"]
    for rows in kinds.values():
        for name, lost in losses(dense, models, rows).items():
            figures[name] += [f"{lost.perplexity:.3f}", f"{lost.divergence:.3f}"]
    return [
        f"| Calibrated on | CPU seconds | {' | '.join(columns)} |",
        f"| :-- {'| --: ' * (1 + len(columns))}|",
        *(f"| {name} | {' | '.join(row)} |" for name, row in figures.items()),
    ]


@torch.no_grad()
def losses(dense: Any, converted: Mapping[str, Any], rows: Tensor) -> dict[str, Lost]:
    """Return what each converted language model loses on rows of tokens, int64 (rows, tokens)."""
    divergence = dict.fromkeys(converted, 0.0)
    surprise = dict.fromkeys([*converted, ""], 0.0)  # negative log-likelihoods, in nats; "": of the dense model

    def log_probabilities(model: Any, row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logarithms of (some tokens, vocabulary), and the tokens that came."""
        logits = model(input_ids=row[None]).logits[0, :-1]
        for few, targets in zip(logits.split(64), row[1:].split(64), strict=True):
            yield few.double().log_softmax(-1), targets

    for row in rows:
        expected = []
        for logs, targets in log_probabilities(dense, row):
            expected.append(logs)
            surprise[""] -= float(logs.gather(1, targets[:, None]).sum())
        for name, model in converted.items():
            for wanted, (logs, targets) in zip(expected, log_probabilities(model, row), strict=True):
                divergence[name] += float((wanted.exp() * (wanted - logs)).sum())
                surprise[name] -= float(logs.gather(1, targets[:, None]).sum())
    count = rows.shape[0] * (rows.shape[1] - 1)
    return {
        name: Lost(
            measure.theoretical_bytes(model),
            divergence[name] / count,
            math.exp((surprise[name] - surprise[""]) / count),
        )
        for name, model in converted.items()
    }


def speeds(choices: Mapping[str, Technique], rounds: int = 31) -> dict[str, float]:
    """Return how many times as fast as dense layers those of each choice are: medians of CPU time, taken in turns."""
    dense = [nn.Linear(1024, 1024) for _ in range(LAYERS)]
    models = {"": dense}
    for name, technique in choices.items():
        models[name] = [lowmem.convert(copy.deepcopy(one), technique) for one in dense]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(rounds):
            for name, layers in models.items():
                started = process_time()
                for layer in layers:
                    layer(x)
                seconds[name].append(process_time() - started)
    torch.set_num_threads(threads)
    return {name: median(seconds[""]) / median(seconds[name]) for name in choices}


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table under ``COLUMNS``."""
    ends = "| :-- " + "| --: " * (len(COLUMNS) - 2) + "| :-- |"
    return [f"| {' | '.join(COLUMNS)} |", ends, *(f"| {' | '.join(row)} |" for row in rows)]


def dense_row(size: int) -> list[str]:
    """Return the row of the models in float32; ``size`` is the bytes of the language model."""
    figures = ["32.00", f"{size / 2**20:.2f}", "1.000", "0.000", "1.00", "1.0"]
    return ["float32, dense", *figures, "memory is no limit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrated", nargs="+", type=Path, metavar="FILE", help="print the table of calibrations")
    files = parser.parse_args().calibrated
    torch.set_num_threads(THREADS)
    if files is not None:
        print("\n".join(calibrated_table(files)))
        return
    choices = {name: technique for name, (technique, _) in CHOICES.items()}
    found = cosines(choices)
    dense, tokenizer = language_model()
    converted = {name: lowmem.convert(copy.deepcopy(dense), one) for name, one in choices.items()}
    lost = losses(dense, converted, rows_of_tokens(tokenizer))
    fast = speeds(choices)
    rows = [dense_row(measure.theoretical_bytes(dense))]
    for name, (_, when) in CHOICES.items():
        size, divergence, perplexity = lost[name]
        figures = [bits(converted[name]), size / 2**20, found[name], divergence, perplexity, fast[name]]
        shown = [f"{figure:.{digits}f}" for figure, digits in zip(figures, (2, 2, 3, 3, 2, 1), strict=True)]
        rows.append([f"`{name}`", *shown, when])
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
