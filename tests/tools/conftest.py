"""A tiny language model with its tokenizer, and examples to fit it to."""

import json
from pathlib import Path

import pytest

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
