"""BigNet, the reference model: plain torch, 18,903,040 parameters, 72 MiB of float32."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

CHANNELS = 1024
BLOCKS = 6


class Block(nn.Module):
    """``x + Linear(ReLU(Linear(ReLU(Linear(x)))))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., channels) for x (..., channels)."""
        return x + cast(Tensor, self.layers(x))


class BigNet(nn.Sequential):
    """Six residual blocks of three 1024 x 1024 linear layers, with a LayerNorm between blocks.

    It maps (..., 1024) to (..., 1024), in plain torch.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for _ in range(BLOCKS):
            layers += [Block(CHANNELS), nn.LayerNorm(CHANNELS)]
        super().__init__(*layers[:-1])
