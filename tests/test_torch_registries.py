"""What importing and using lowmem adds to torch's registries: entries of its own operators and classes."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import copyreg, json, sys, torch
from importlib.util import find_spec
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module
from torch.optim import optimizer
from torch.utils import _pytree

def registries():
    found = {name: dict(value) for owner in (module, optimizer) for name, value in vars(owner).items()
             if name.startswith("_global_") and isinstance(value, dict)}
    found |= {"decompositions": torch._decomp.decomposition_table, "meta kernels": torch._decomp.meta_table,
              "pytrees": _pytree.SUPPORTED_NODES, "pickles": copyreg.dispatch_table}
    found |= {"safe globals": {one: one for one in torch.serialization.get_safe_globals()},
              "operators": {one: one for one in torch._C._dispatch_get_all_op_names()}}
    return {name: dict(value) for name, value in found.items()}

def changed(before):
    now, found = registries(), {}
    names = {"safe globals": lambda key: f"{key.__module__}.{key.__name__}"}
    for name, entries in before.items():
        assert entries.keys() <= now[name].keys(), name
        keys = [key for key, value in now[name].items() if entries.get(key, now) is not value]
        if name == "operators":
            keys = [key for key in keys if key not in entries]
        if name.endswith("hooks"):
            found[name] = sorted(f"{now[name][key].__module__}.{now[name][key].__name__}" for key in keys)
        else:
            found[name] = sorted(map(names.get(name, str), keys))
    return {name: keys for name, keys in found.items() if keys}

def step(model):
    made = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    model(torch.ones(2, 64)).sum().backward()
    made.step()

dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
step(dense)
with FakeTensorMode():  # what torch itself registers when it is first used
    step(nn.Linear(64, 64))
before = registries()
import lowmem
imported = changed(before)
before = registries()
step(lowmem.convert(dense, lowmem.FourBit("nf4"), lowmem.LoRA(2)))
lowmem.plan(lambda: nn.Sequential(nn.Linear(64, 64)), lowmem.Half(), batch=torch.ones(2, 64))
print(json.dumps([imported, changed(before), find_spec("peft") is not None]))
"""

DECOMPOSED = ["lowmem.convolve.default", "lowmem.dequantize_rows.default"]
DECOMPOSED += ["lowmem.product_16bit.default", "lowmem.product_4bit.default"]
SAFE = ["forms.CodedForm", "forms.HalfForm", "gathered_weight.GatheredTensor", "stored_tensor.StoredTensor"]
SAFE += ["stored_tensor._rebuild"]


@pytest.mark.processes(keep=1)
def test_importing_and_using_lowmem_adds_entries_of_its_own_alone():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, used, with_peft = json.loads(shown.stdout)
    assert all(name.startswith("lowmem::") for name in imported.pop("operators"))
    assert imported == {
        "decompositions": DECOMPOSED,  # so that torch.onnx.export needs no lowmem
        "meta kernels": DECOMPOSED,
        "safe globals": [f"lowmem.nn.{name}" for name in SAFE],  # so that torch.load(weights_only=True) reads them
    }
    # Without this hook PEFT leaves out stored parameters in silence: tests/transforms/test_peft_models.py.
    peft = {"_global_module_registration_hooks": ["lowmem.transforms.peft_models._check_peft_child_now_or_later"]}
    assert used == (peft if with_peft else {})
