"""Blocks of norms and gated MLPs, plain and fused, and what must hold of two of them."""

import torch
from torch import nn
from torch.nn import functional

from lowmem import convert
from lowmem.training.fused import GatedMLPSpec, RMSNormSpec, fuse

WIDTH, INNER = 64, 96


class Norm(nn.Module):
    """As in Llama."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-5

    def normed(self, x, epsilon):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)

    def forward(self, x):
        return self.weight * self.normed(x, self.variance_epsilon).to(x.dtype)


class MLP(nn.Module):
    """As in Llama, or with one layer for gate and up, as in Phi-3."""

    def __init__(self, joined=False):
        super().__init__()
        if joined:
            self.gate_up = nn.Linear(WIDTH, 2 * INNER, bias=False)
        else:
            self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        if hasattr(self, "gate_up"):
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    def __init__(self, joined=False):
        super().__init__()
        self.norm, self.mlp = Norm(), MLP(joined)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Language(nn.Module):
    """An embedding, layers whose outputs are added up, and an output layer that is tied to the embedding."""

    def __init__(self, vocabulary=512, width=WIDTH, layers=()):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(vocabulary, width), nn.ModuleList(layers)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def hidden(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + functional.gelu(layer(x)) if isinstance(layer, nn.Linear) else layer(x)
        return x

    def forward(self, ids, labels=None):
        logits = self.head(self.hidden(ids))
        return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


NORM = RMSNormSpec("weight", "variance_epsilon", 0.0, rounds_first=True, mixes=True)
SEPARATE, JOINED = GatedMLPSpec("gate", "up", "down", "SiLU"), GatedMLPSpec("gate_up", None, "down", "SiLU")


def make(*techniques, joined=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = Block(joined).to(dtype)
    if techniques:
        convert(model, *techniques)
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(p, std=0.1)
    return model


def fused(model):
    fuse(model.norm, NORM)
    fuse(model.mlp, JOINED if hasattr(model.mlp, "gate_up") else SEPARATE)
    return model


def batch(dtype=torch.float32, rows=40):
    x = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.requires_grad_()


def gradients(model, x, call=None):
    """Return the output, and the gradients of the input and of all parameters that train."""
    out = (call or model)(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.float().sin().sum(), [x, *trained])]


def assert_near(found, expected, bound):
    for got, one in zip(found, expected, strict=True):
        assert got.dtype is one.dtype
        assert (got.double() - one.double()).norm() <= bound * one.double().norm()


def saved(function, model=None):
    """Return the bytes of the distinct storages that autograd saves in a call, without those of parameters."""
    kept, own = {}, {one.untyped_storage()._cdata for one in ([] if model is None else model.parameters())}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(one.nbytes() for one in kept.values())
