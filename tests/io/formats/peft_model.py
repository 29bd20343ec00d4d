"""A small model with a layer of each kind that PEFT adapts, of values that any version of torch makes."""

import torch
from torch import nn


class Experts(nn.Module):
    """Three experts, of which each token takes the mean."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 12, 8))
        self.down = nn.Parameter(torch.empty(3, 8, 12))

    def forward(self, x):
        hidden = torch.relu(torch.einsum("nh,eoh->eno", x, self.up))
        return torch.einsum("eno,eho->nh", hidden, self.down) / 3


class Parts(nn.Module):
    """Takes (batch, length) of indices below 20. ``fc`` is the end of another path, too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False)})
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.experts = Experts()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.inner["fc"](torch.relu(self.fc(self.embed(tokens))))
        x = self.conv(x.mT).mT
        x = x + self.experts(x.flatten(0, 1)).view(x.shape)
        return self.head(self.norm(self.attention(x, x, x, need_weights=False)[0]))


TOKENS = torch.arange(10).view(2, 5) * 3 % 20


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give all parameters values that depend on their place alone, in float64."""
    module = module.double().eval()
    with torch.no_grad():
        for number, one in enumerate(module.parameters()):
            values = torch.sin(torch.arange(1, one.numel() + 1, dtype=torch.float64) * (1.3 + 0.17 * number + seed))
            one.copy_(values.view(one.shape) / 2)
    return module


def parts() -> nn.Module:
    return filled(Parts())
