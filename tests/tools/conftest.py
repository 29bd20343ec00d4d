"""A tiny language model with its tokenizer, and examples to fit it to."""

import json
from pathlib import Path

import pytest
import torch

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LINES = [{"text": f"item {n} costs {n * 7 % 10}"} for n in range(20)]
LINES += [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(20)]
LINES += [
    {"messages": [{"role": "user", "content": f"after {n}?"}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(20)
]


@pytest.fixture
def no_gpu(refused, monkeypatch, tmp_path):
    """Return a function that runs a command with ``--device cuda`` without a GPU: one line, nothing written."""

    def run(command, *argv):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        before = sorted(tmp_path.rglob("*"))
        told = refused(command, *argv, "--device", "cuda")
        assert told.startswith(f"lowmem {command}: --device=cuda: torch ")
        assert "leave --device out to use the CPU, or run python -c" in told
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture(autouse=True)
def unknown_memory(monkeypatch):
    """Let the machine not tell what memory is left, so that each machine trains alike, and no run is planned."""
    monkeypatch.setattr("lowmem.tools.fit_memory.available_memory_or_none", lambda: None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of a tiny llama with a tokenizer, and a file of examples."""
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    from tests.integrations.transformers.folders import write
    from tests.integrations.transformers.tokens import write_tokenizer

    monkeypatch.chdir(tmp_path)
    write_tokenizer(write(Path("llama")))
    config = Path("llama", "tokenizer_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": CHAT}))
    Path("data.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    Path("text.txt").write_text(" ".join(line["text"] for line in LINES[:20]))
    return tmp_path
