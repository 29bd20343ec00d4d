"""What the benchmarks and the latency gate measure alike.

It imports neither pytest nor scipy: the gate's workers have only what the library needs.
"""

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

import lowmem

BATCHES = (1, 8, 32, 128, 512)  # inputs of an inference
STEP_BATCH, CLASSES = 16, 10  # of a training step
FILE_LAYERS = 16  # of 4 MiB in float32: what is saved and loaded
PAST = 255  # tokens before the one that a decode step computes


@cache
def built_variant(variant: str) -> nn.Module:
    """Return a variant, built once; what changes a model takes a copy."""
    return lowmem.build(variant).eval()


def inference_input(batch: int) -> torch.Tensor:
    """Return inputs of BigNet: (batch, 1024)."""
    return torch.randn(batch, 1024, generator=torch.Generator().manual_seed(batch))


def weight_to_quantize(rows: int = 4096) -> torch.Tensor:
    """Return a matrix of normal weights: (rows, 1024)."""
    return torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0))


def dense_model() -> nn.Sequential:
    """Return the layers that are saved and loaded, in float32."""
    return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(FILE_LAYERS)])


class Block(nn.Module):
    """A block of SmolLM2-135M, in plain torch: computes a token behind ``PAST`` others, whose keys it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.RMSNorm(576), nn.RMSNorm(576)
        self.query, self.key, self.value = (nn.Linear(576, 64 * heads, bias=False) for heads in (9, 3, 3))
        self.output, self.down = nn.Linear(576, 576, bias=False), nn.Linear(1536, 576, bias=False)
        self.gate, self.up = nn.Linear(576, 1536, bias=False), nn.Linear(576, 1536, bias=False)
        angles = torch.outer(torch.tensor([PAST]), 10_000 ** -torch.linspace(0, 1, 33)[:-1]).repeat(1, 2)
        self.register_buffer("cosine", angles.cos())  # (1, 64)
        self.register_buffer("sine", angles.sin())
        self.register_buffer("keys", torch.randn(1, 3, PAST + 1, 64))
        self.register_buffer("values", torch.randn(1, 3, PAST + 1, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (1, 1, 576)
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).unflatten(-1, (-1, 64)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # (1, heads, 1, 64)
        self.keys[:, :, PAST:], self.values[:, :, PAST:] = self._rotate(key), value
        y = nn.functional.scaled_dot_product_attention(self._rotate(query), self.keys, self.values, enable_gqa=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cosine + torch.cat((-second, first), -1) * self.sine


def assert_near_dense(model: nn.Module, x: torch.Tensor, output: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Hold an output to that of the dense model of the stored weights; tests/kernels has the bounds of products."""
    with torch.no_grad():
        expected = lowmem.restore(copy.deepcopy(model))(x)
    assert lowmem.measure.difference(expected, output).relative <= tolerance


class Training:
    """A variant of BigNet under a classifier, so that each has something to train, and its optimizer.

    ``memory`` is that of ``prepare_training``; ``body`` is the variant, where it has been built already.
    """

    def __init__(
        self,
        variant: str,
        memory: str | None = None,
        optimizer: Any = torch.optim.AdamW,
        batch: int = STEP_BATCH,
        body: nn.Module | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 1024, generator=generator)
        self.labels = torch.randint(CLASSES, (batch,), generator=generator)
        self.model = nn.Sequential(body or lowmem.build(variant), nn.Linear(1024, CLASSES))
        if memory is not None:
            lowmem.prepare_training(self.model, memory)
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
