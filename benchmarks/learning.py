"""What training loses by each way to make its steps small: held-out data after 200 steps, beside plain steps.

    python -m benchmarks.learning                            digits, text, sentences: an hour on two cores
    python -m benchmarks.learning --only digits --steps 225  one

All are in nf4 with LoRA of rank 16. Ways begin with the same model and see the same batches in the same order;
"another seed" is the plain way with other adapters and another order: what differs by it is chance. They need
the packages of ``benchmarks.trained``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowmem
from benchmarks.trained import minilm, paragraphs
from benchmarks.training_steps import BLOCK_LAYERS, is_adapted, prepare, print_rows, rows_of_text

RANK, HELD = 16, 12  # of adapters; batches that judge
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Way:
    """How a model is trained."""

    memory: str | None = None  # of prepare_training
    optimizer: Any = torch.optim.AdamW
    dtype: torch.dtype | None = None  # of the adapters; those of 16 bits have float32 master weights
    seed: int = 0  # of adapters and of the order of batches


WAYS = {
    "plain": Way(),
    "another seed": Way(seed=1),
    "fast": Way("fast"),
    "lean": Way("lean"),
    "AdamW8bit": Way(optimizer=lowmem.AdamW8bit),
    "bfloat16 adapters": Way(dtype=torch.bfloat16),
    "lean, AdamW8bit, bfloat16 adapters": Way("lean", lowmem.AdamW8bit, torch.bfloat16),
}


@dataclass(frozen=True)
class Task:
    """What is learned."""

    model: Callable[[], nn.Module]  # makes the dense model
    adapted: str  # the last names of the layers in 4 bits with adapters
    batches: list[Batch]  # the first ones judge, the others train
    judge: Callable[[Any, Batch], tuple[Tensor, float | None]]  # the loss of a batch, and the share that is right
    lr: float


@dataclass(frozen=True)
class Outcome:
    """What a way has learned: the mean loss of the last 20 training steps, and of held-out batches; share right."""

    training: float
    loss: float
    right: float | None


def digits(_: Path | None) -> Task:
    """Return the task of BigNet under a classifier, as ``lowmem fit --data digits``."""
    from lowmem.tools.fit_classifier import Classifier
    from lowmem.tools.fit_classifier_data import load_train_test_split

    data = load_train_test_split("digits", 0)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Classifier(lowmem.BigNet(), 1024, data.classes)

    def judge(model: Any, batch: Batch) -> tuple[Tensor, float]:
        logits = model(batch[0])
        right = (logits.argmax(1) == batch[1]).float().mean()
        return nn.functional.cross_entropy(logits, batch[1]), float(right)

    held = list(zip(data.test_x.flatten(1).split(32), data.test_y.split(32), strict=True))
    train = list(zip(data.train_x.flatten(1).split(32), data.train_y.split(32), strict=True))
    return Task(make, "layers.0 layers.2 layers.4", held[:HELD] + train, judge, 1e-3)


def text(folder: Path | None) -> Task:
    """Return the task of SmolLM2-135M on Python's manual, in texts of 97 tokens, one in a batch."""
    import transformers

    folder = folder or Path(tempfile.mkdtemp())
    if not (folder / "smollm2").exists():
        prepare(folder)
    rows = rows_of_text(folder, 97, torch.Generator().manual_seed(0))

    def judge(model: Any, batch: Batch) -> tuple[Tensor, None]:
        return model(input_ids=batch[0], labels=batch[0]).loss, None

    def make() -> Any:
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(folder / "smollm2", dtype=torch.float32, local_files_only=True)

    return Task(make, BLOCK_LAYERS, [(one,) for one in rows.split(1)], judge, 2e-4)


def sentences(_: Path | None) -> Task:
    """Return the task of all-MiniLM-L6-v2 to find the second halves of 16 paragraphs by their first."""
    import transformers

    folder, texts = minilm(), paragraphs()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()

    def half(numbers: list[int], second: bool) -> list[Tensor]:
        middle = [len(texts[n]) // 2 for n in numbers]
        parts = [texts[n][at:] if second else texts[n][:at] for n, at in zip(numbers, middle, strict=True)]
        got = tokens(parts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return [got["input_ids"], got["attention_mask"]]

    groups = [order[start : start + 16] for start in range(0, len(order) // 16 * 16, 16)]
    batches = [(*half(group, False), *half(group, True)) for group in groups]

    def embed(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)  # (16, tokens, 384)
        return nn.functional.normalize(out.sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def judge(model: Any, batch: Batch) -> tuple[Tensor, float]:
        scores = embed(model, *batch[:2]) @ embed(model, *batch[2:]).T * 20  # (16, 16)
        own = torch.arange(len(scores))
        return nn.functional.cross_entropy(scores, own), float((scores.argmax(1) == own).float().mean())

    def make() -> Any:
        return transformers.AutoModel.from_pretrained(folder, local_files_only=True)

    return Task(make, "query key value dense", batches, judge, 2e-4)


TASKS = {"digits": digits, "text": text, "sentences": sentences}


def learn(task: Task, way: Way, steps: int) -> Outcome:
    model = task.model()
    torch.manual_seed(way.seed)
    lowmem.convert(
        model,
        lowmem.FourBit("nf4", compute_dtype=torch.bfloat16, embeddings="4bit"),
        lowmem.LoRA(RANK, dtype=way.dtype),
        where=lambda path, module: is_adapted(task.adapted, path),
    )
    if way.memory is not None:
        lowmem.prepare_training(model, way.memory)
    optimizer = way.optimizer([one for one in model.parameters() if one.requires_grad], lr=task.lr)
    if way.dtype is not None:
        lowmem.master_weights(optimizer)
    held, train = task.batches[:HELD], task.batches[HELD:]
    generator, losses, order = torch.Generator().manual_seed(way.seed), [], []
    for _ in range(steps):
        order = order or torch.randperm(len(train), generator=generator).tolist()
        loss, _ = task.judge(model.train(), train[order.pop()])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        found = [task.judge(model.eval(), batch) for batch in held]
    right = [one for _, one in found if one is not None]
    mean = statistics.mean(float(loss) for loss, _ in found)
    return Outcome(statistics.mean(losses[-20:]), mean, statistics.mean(right) if right else None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS), help="default: all")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="default: all")
    parser.add_argument("--steps", type=int, default=200, help="steps of each way (default: 200)")
    parser.add_argument("--folder", type=Path, help="where SmolLM2 lies, or is written; default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    given = parser.parse_args(arguments)
    rows = []
    for name in given.only:
        task = TASKS[name](given.folder)
        for way in given.ways:
            got = learn(task, WAYS[way], given.steps)
            print(f"{name}, {way}: {got}", file=sys.stderr)
            rows.append({"task": name, "way": way, **asdict(got)})
    print_rows(rows, f"After {given.steps} steps")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
