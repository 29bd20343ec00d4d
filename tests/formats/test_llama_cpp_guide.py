"""The guide to llama.cpp runs as it is written, and its files in llama.cpp and PEFT."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: tox -e formats")
pytest.importorskip("peft", reason="peft is not installed: tox -e formats")
pytest.importorskip("llama_cpp_py_sync", reason="llama-cpp-py-sync is not installed: tox -e formats")

import lowmem
from tests.formats.llama_cpp import llama_cpp
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.tokens import write_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "llama-cpp.md"
pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_the_base_and_the_adapter_in_llama_cpp_and_in_peft(tmp_path, monkeypatch):
    write_tokenizer(write(tmp_path / "llama"))
    lines = [f"line {n}: weights are levels times scales, and each error has a bound" for n in range(8)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "guide"}
    for program in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), flags=re.DOTALL):
        exec(compile(program, str(PAGE), "exec"), space)
    model, tokenizer = space["model"].eval(), space["tokenizer"]
    tokens = tokenizer("weights are levels")["input_ids"]
    batch = torch.tensor([tokens])
    with torch.no_grad():
        tuned = model(batch).logits[0]
        lowmem.deactivate(model, "tuned")
        base = model(batch).logits[0]
        lowmem.activate(model, "tuned")
        assert distance(space["tuned"].eval()(batch).logits[0], tuned) < 1e-5
    assert distance(tuned, base) > 0.01  # it has learned something
    lowmem.export("base", "dense.gguf", dtype=torch.float32)
    found = {}
    for name in ("dense", "base"):
        with llama_cpp(tmp_path / f"{name}.gguf") as loaded:
            assert loaded.tokens("weights are levels") == tokens
            found[name] = loaded.logits(tokens)
            loaded.adapt(tmp_path / "adapter.gguf")
            found[f"{name} tuned"] = loaded.logits(tokens)
    assert distance(found["dense"], base) < 1e-5
    assert distance(found["dense tuned"], tuned) < 1e-5
    # The 4-bit file differs by the rounding of activations to 8 bits, with an adapter as without.
    of_rounding = distance(found["base"], base)
    assert of_rounding < 0.05
    assert distance(found["base tuned"], tuned) < 2 * of_rounding
