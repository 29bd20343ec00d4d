"""Models under torch.compile beside the same ones without: the ratio is above 1 where compiling does not pay."""

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FourBit, Half

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)

WIDTH, HEADS, LAYERS, TOKENS = 128, 4, 12, 16


class Block(nn.Module):
    """A block of a transformer, with its norms before attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (3, batch, heads, ...)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


MODELS = {
    "bignet": (lowmem.BigNet, (1024,)),
    "transformer": (lambda: nn.Sequential(*[Block() for _ in range(LAYERS)]), (TOKENS, WIDTH)),
}
TECHNIQUES = {"nf4": FourBit("nf4"), "half": Half(torch.bfloat16)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [1, 64], ids="batch{}".format)
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("name", MODELS)
def test_compiled(benchmark, timed, name, technique, batch):
    benchmark.group = f"compiled, {name}, batch {batch:3}"
    torch.manual_seed(0)
    torch.compiler.reset()
    make, shape = MODELS[name]
    eager = lowmem.convert(make().eval(), TECHNIQUES[technique])
    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
    x = torch.randn(batch, *shape)

    with torch.no_grad():
        expected = eager(x)
        assert lowmem.measure.difference(expected, compiled(x)).relative < 1e-5
        timed(lambda: compiled(x), reference=lambda: eager(x))
