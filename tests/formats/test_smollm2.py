"""A real model in GGUF, SmolLM2-135M in Q4_1 and Q8_0: read exactly, and run from its 4-bit codes."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: tox -e formats")

from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lowmem
from lowmem.io.import_checkpoint import import_checkpoint
from tests.formats.smollm2 import smollm2

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages


def test_logits_are_those_of_transformers_which_dequantizes_the_same_file(tmp_path):
    file = smollm2()
    rows = import_checkpoint(file, tmp_path / "model.safetensors")
    assert sum("uint4" in row.kept for row in rows) == 30 * 7
    assert all(row.error is None for row in rows)
    dense = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model = lowmem.load(tmp_path / "model.safetensors", lambda: LlamaForCausalLM(dense.config)).eval()
    expected = dict(dense.named_parameters(remove_duplicate=False))  # the output layer is tied
    for name, module in model.named_modules():
        if hasattr(module, "quantized"):
            assert torch.equal(module.quantized.dequantize(), expected[f"{name}.weight"]), name
    tokens = torch.randint(0, dense.config.vocab_size, (1, 12))
    with torch.inference_mode():
        wanted, found = (one(tokens).logits.double() for one in (dense, model))
        assert (wanted - found).norm() < 1e-5 * wanted.norm()
        generated = [one.generate(tokens, max_new_tokens=8, do_sample=False) for one in (dense, model)]
    assert torch.equal(*generated)
