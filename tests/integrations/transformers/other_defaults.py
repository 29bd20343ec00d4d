"""Logits of a Llama with lowmem's attention, cache and blocks under other defaults of torch.

``python -m tests.integrations.transformers.other_defaults bfloat16`` ends with 1 where a bit differs, or dies.
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lowmem

CONFIG = LlamaConfig(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def logits(dense: torch.nn.Module) -> list[torch.Tensor]:
    """Return logits of a prompt and of later tokens, of the model unprepared and prepared, with each cache."""
    found = []
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(60, (2, 90), generator=generator, dtype=torch.int64, device="cpu")
    for dtype in (torch.float32, torch.bfloat16):
        for prepared in (False, True):
            model = lowmem.convert(copy.deepcopy(dense).to(dtype), lowmem.FourBit("nf4", 32)).eval()
            model.set_attn_implementation("lowmem")
            if prepared:
                lowmem.prepare_inference(model)
                assert lowmem.inference_report(model)
            for bits in (None, 8):
                cache = lowmem.KeyValueCache(model, bits=bits)
                with torch.no_grad():
                    for start, stop in ((0, 80), (80, 81), (81, 82), (82, 90)):
                        found.append(model(tokens[:, start:stop], cache=cache).logits)
    return found


def main(default: str) -> int:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    expected = logits(dense)
    if default == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, default))
    same = [torch.equal(one, other) for one, other in zip(logits(dense), expected, strict=True)]
    print(same)
    return int(not all(same))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
