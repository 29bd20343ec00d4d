"""Answers of ``lowmem fit`` to held-out prompts, before, during and after training: ``--samples``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowmem.finetuning.calling_convention import eval_mode_without_grad
from lowmem.finetuning.text_examples import IGNORED, Example
from lowmem.tools.arguments import parse_nonempty_path, parse_positive_int

MAX_ANSWER_TOKENS = 128


def parse_samples(text: str) -> int | Path:
    """Parse a number of held-out examples, or a file of examples."""
    return parse_positive_int(text) if text.isdigit() else parse_nonempty_path(text)


def examples_with_prompts(examples: Sequence[Example], samples: int | Path) -> tuple[Example, ...]:
    """Return the examples of which a part counts that a prompt precedes, at most ``samples`` if that is a number.

    Raises:
        ValueError: there are none.
    """
    prompted = [example for example in examples if example.targets[0] == IGNORED]
    if not prompted:
        raise ValueError(
            f"--samples={samples} needs examples with prompts: hold some out with --eval-share or --eval-data, or "
            "name a file of them"
        )
    return tuple(prompted[:samples] if isinstance(samples, int) else prompted)


def prompts_digest(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of the tokens of prompts, which tells whether answers are to the same ones."""
    tokens = [example.ids[: _prompt_length(example)].tolist() for example in examples]
    return hashlib.sha256(repr(tokens).encode()).hexdigest()


def evenly_spaced_steps(step_count: int, count: int) -> set[int]:
    """Return ``count`` steps that divide all steps into equal parts; fewer, if there are fewer steps."""
    return {round(step_count * part / (count + 1)) for part in range(1, count + 1)} - {0, step_count}


def generate_answers(
    model: Any, tokenizer: Any, ends: Sequence[int], examples: Sequence[Example], length: int
) -> list[str]:
    """Return the likeliest answers to the prompts of examples.

    Args:
        model: of transformers, maybe while it trains.
        tokenizer: its own.
        ends: tokens that end an answer.
        examples: as ``examples_with_prompts``.
        length: the most tokens of a prompt with its answer.
    """
    from lowmem.integrations.transformers.model_facts import delayed_transformers_log

    answers = []
    # What it says of options for random answers does not apply
    with delayed_transformers_log(replay=False), eval_mode_without_grad(model):
        for example in examples:
            prompt = example.ids[: _prompt_length(example)].long()[None].to(model.device)  # (1, tokens)
            tokens = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=min(MAX_ANSWER_TOKENS, length - prompt.shape[1]),
                eos_token_id=list(ends) or None,
                pad_token_id=ends[0] if ends else 0,
            )
            answers.append(_decode(tokenizer, tokens[0, prompt.shape[1] :]))
    return answers


def samples_record(
    examples: Sequence[Example], tokenizer: Any, answers: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Return the samples as JSON: of each the prompt, the answer of the data, and those of the model by steps."""
    record = []
    for number, example in enumerate(examples):
        start = _prompt_length(example)
        learned = example.targets[start - 1 :] != IGNORED
        # Of the first answer of a conversation
        count = len(learned) if bool(learned.all()) else int(learned.int().argmin())
        record.append(
            {
                "prompt": _decode(tokenizer, example.ids[:start]),
                "expected": _decode(tokenizer, example.ids[start : start + count]),
                "answers": {step: texts[number] for step, texts in answers.items()},
            }
        )
    return record


def samples_markdown(record: Sequence[Mapping[str, Any]]) -> str:
    """Return the samples for a model card; texts are indented, so that none is markup."""
    parts = ["## Samples\n\nThe likeliest answers to prompts that were not trained."] if record else []
    for sample in record:
        texts = {"Prompt": sample["prompt"], "Answer of the data": sample["expected"]}
        texts |= {f"Answer after {step} steps": text for step, text in sample["answers"].items()}
        for title, text in texts.items():
            lines = [f"    {line}" for line in text.splitlines()] or ["    "]
            parts.append("\n".join([f"**{title}**\n", *lines]))
    return "\n\n".join(parts)


def _prompt_length(example: Example) -> int:
    return int((example.targets != IGNORED).int().argmax()) + 1


def _decode(tokenizer: Any, tokens: torch.Tensor) -> str:
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()
