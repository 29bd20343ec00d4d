"""Models as users write them, and dense twins of converted ones."""

import copy

import torch
from torch import nn

from lowmem import FourBit, Half, LoRA, QuantizedTensor
from lowmem.nn.stored_module import StoredModule


class Cosine(nn.Linear):
    def forward(self, x):
        return x @ (self.weight / self.weight.norm(dim=1, keepdim=True)).T


class Subclass(nn.Linear):
    pass


class Odd(nn.Module):
    """A model as users write them: nested, shared, in containers, with things that are not layers."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.list = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])
        self.dict = nn.ModuleDict({"head": nn.Linear(8, 8), "shared": self.shared})
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Conv1d(8, 8, 1))
        self.special = Subclass(8, 8)
        self.nothing = None
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        x = self.again(self.shared(x))
        x = self.list[1](self.list[0](x)) + self.dict["head"](x) + self.dict["shared"](x)
        return self.special(self.inner[0](x)) * self.scale


def kinds(model):
    return {path: type(module) for path, module in model.named_modules() if hasattr(module, "in_features")}


class SharedBias(nn.Module):
    """A bias of two linear layers, and one that a norm has, too."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm.bias = self.a.bias
        self.c.bias = self.b.bias
        nn.init.normal_(self.a.bias)

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(x))))


class Table(nn.Module):
    """A parameter of two dimensions that no entry knows, and a layer beside it."""

    def __init__(self, rows=32):
        super().__init__()
        self.positions, self.head = nn.Parameter(torch.randn(rows, 16)), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(x + self.positions[: x.shape[0]])


EVERY = [(Half(),), (Half(torch.bfloat16),), (FourBit(block_size=16),), (FourBit(block_size=16), LoRA(2))]


def dense_twin(dense, converted):
    """Return a copy of a dense model whose weights are what the converted one stores."""
    twin = copy.deepcopy(dense)
    for path, made in converted.named_modules():
        if isinstance(made, StoredModule):
            layer = twin.get_submodule(path)
            for name in made.forms:
                weight = made.stored_weight(name)
                values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
                with torch.no_grad():
                    layer._parameters[name].copy_(values.view_as(layer._parameters[name]))
    return twin


def tensors_of(layer):
    return tuple(getattr(layer, name) for name in layer.part_parameter_names if name.startswith("weight"))
