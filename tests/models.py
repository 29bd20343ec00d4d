"""Models that the files' tests save and load: with ties, sharing, convolutions, and buffers of both kinds."""

import copy

import torch
import torch.distributed.checkpoint
from torch import nn

from lowmem import FourBit, Half, LoRA

TECHNIQUES = {
    "dense": (),
    "half": (Half(),),
    "bfloat16": (Half(torch.bfloat16),),
    "nf4": (FourBit("nf4"),),
    "searched": (FourBit("bof4s", block_size=16, compute_dtype=torch.bfloat16),),
    "chosen": (FourBit(("nf4", "int4"), block_size=16, scales="float32"),),
    "lora": (LoRA(2),),
    "qlora": (FourBit("nf4", block_size=32), LoRA(3, alpha=6, dropout=0.1)),
}


class Small(nn.Module):
    """Takes (batch, length) of indices below 50."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24, bias=False)])
        self.again = self.layers[0]  # one module in two places
        self.conv = nn.Conv1d(24, 24, 3, padding=1, groups=2)
        self.head = nn.Linear(24, 50)
        self.head.weight = self.embedding.weight  # tied
        self.register_buffer("offset", torch.arange(24.0))
        self.register_buffer("positions", torch.arange(5.0), persistent=False)

    def forward(self, indices):
        x = self.embedding(indices) + self.offset * 0.01
        for layer in (*self.layers, self.again):
            x = layer(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x) + self.positions.sum()


INDICES = torch.arange(18).view(2, 9) * 7 % 50


def small(name: str, seed: int = 0) -> nn.Module:
    """Return ``Small``, converted by one of ``TECHNIQUES``, in eval mode; its adapters are not zero.

    The head, which is tied to the embedding, has one, too.
    """
    from lowmem import convert

    torch.manual_seed(seed)
    model = Small()
    model = convert(model, *TECHNIQUES[name], where=lambda *_: True) if TECHNIQUES[name] else model
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_b" in key:
                parameter.normal_()
    return model.eval()


def out_of_file(model: nn.Module) -> nn.Module:
    """Return a copy in memory of torch's own, where weights are aligned as those of a model that was not loaded.

    A BLAS gives equal bits for equal alignment. In a file, tensors follow each other without gaps.
    """
    return copy.deepcopy(model)
