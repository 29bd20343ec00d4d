"""Importing lowmem and its integration, and using them, replaces nothing in other libraries."""

import subprocess
import sys

PROGRAM = """
import importlib, inspect, sys, tempfile
names = ("torch", "torch.nn", "torch.nn.functional", "torch.nn.modules.module", "torch._dynamo", "torch._tensor",
         "torch.autograd.function", "torch.library", "torch.overrides", "torch.utils._pytree", "safetensors.torch",
         "transformers", "transformers.modeling_utils", "transformers.configuration_utils",
         "transformers.core_model_loading", "transformers.conversion_mapping", "transformers.quantizers.auto",
         "transformers.quantizers.base", "transformers.models.auto.configuration_auto",
         "transformers.models.llama.modeling_llama", "transformers.integrations.peft")
modules = [importlib.import_module(name) for name in names]
try:
    import peft
    modules += [peft, importlib.import_module("peft.peft_model"), importlib.import_module("peft.tuners.lora.model")]
except ImportError:
    pass
import torch, transformers
owners = {id(one): one for module in modules for one in vars(module).values() if inspect.isclass(one)}
owners |= {id(module): module for module in modules}
owners[0] = torch.Tensor
before = {(key, name): value for key, one in owners.items() for name, value in vars(one).items()}
import lowmem, lowmem.integrations.transformers as integration
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
                                  intermediate_size=32, max_position_embeddings=16)
model = lowmem.convert(transformers.LlamaForCausalLM(config), lowmem.FourBit("nf4"))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder)
own = ("next_id", "_checkpoint_conversion_mapping_cache", "__warningregistry__", "__annotations__")
for (key, name), value in before.items():
    now = vars(owners[key]).get(name, None)
    if now is not value and not name.startswith("_abc") and name not in own:
        print(getattr(owners[key], "__name__", owners[key]), name)
"""


def test_every_attribute_is_the_one_that_was_there():
    """Of the modules and classes that transformers, PEFT and torch load models with and run them by."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (0, ""), shown.stdout + shown.stderr[-2000:]
