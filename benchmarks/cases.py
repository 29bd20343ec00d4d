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
