"""transformers alone, in a process that has not imported lowmem, never takes a stored folder for random weights."""

import json
import subprocess
import sys

import pytest
from torch import nn

import lowmem
from lowmem import EightBit, FourBit, Half
from tests.integrations.transformers.folders import IDS, load, write

PROGRAM = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
    else:
        print(json.dumps(model(torch.arange(*json.loads(sys.argv[1]))[None]).logits.sum().item()))
assert "lowmem" not in sys.modules
"""
KINDS = {
    "linear layers": ("llama", FourBit("nf4"), lambda path, module: isinstance(module, nn.Linear)),
    "embeddings": ("llama", EightBit(), lambda path, module: isinstance(module, nn.Embedding)),
    "experts": ("mixtral", FourBit("nf4"), lambda path, module: path.endswith("experts")),
    "16 bits": ("tied llama", Half(), lambda path, module: isinstance(module, nn.Linear)),
}


@pytest.mark.processes
def test_folders_are_refused_by_their_shapes_and_16_bits_are_read(tmp_path):
    """Whatever config.json says of the quantization: as it is, another name, or nothing."""
    expected = {}
    for kind, (model, technique, where) in KINDS.items():
        made = lowmem.convert(load(write(tmp_path / model, model)), technique, where=where)
        made.save_pretrained(tmp_path / kind)
        expected[kind] = lowmem.restore(made)(IDS).logits.sum().item()
        config = json.loads((tmp_path / kind / "config.json").read_text())
        for change in ("unknown", "none"):
            (tmp_path / f"{kind}, {change}").mkdir()
            for file in (tmp_path / kind).iterdir():
                (tmp_path / f"{kind}, {change}" / file.name).symlink_to(file)
            (tmp_path / f"{kind}, {change}" / "config.json").unlink()
            record = {"quantization_config": {"quant_method": "unknown"}} if change == "unknown" else {}
            changed = {name: value for name, value in config.items() if name != "quantization_config"} | record
            (tmp_path / f"{kind}, {change}" / "config.json").write_text(json.dumps(changed))
    folders = [f"{kind}{change}" for kind in KINDS for change in ("", ", unknown", ", none")]
    given = [json.dumps([10, 30]), *(str(tmp_path / folder) for folder in folders)]
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for folder, line in zip(folders, ran.stdout.splitlines(), strict=True):
        found, kind = json.loads(line), folder.partition(", ")[0]
        if kind == "16 bits":
            assert found == pytest.approx(expected[kind], rel=1e-4), folder
        else:
            assert isinstance(found, str), f"{folder} was read"
            assert "ignore_mismatched_sizes" in found, folder
