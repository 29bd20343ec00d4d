"""Training steps that run on the CPU through the dispatch of GPUs, and every operation of which is recorded.

No GPU is needed: its backend serves the CPU, and launches of Triton's kernels write what plain torch computes.
``python -m tests.gpu_steps`` stores the counts of ``STEPS`` (``tests/kernels/gpu_steps.json``) for this version of
torch, and writes the table of docs/kernels.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

import lowmem
from lowmem import AdamW8bit, EightBit, FourBit, Half, LoRA, convert, measure, prepare_training
from lowmem.bignet import Block
from lowmem.kernels import gpu
from lowmem.quant.backend import backend_for, set_backend
from lowmem.quant.scale_search import nearest_codes
from lowmem.quant.tensor import QuantizedTensor
from tests.compiled import on_threads

ROOT = Path(__file__).parents[1]
STORED, PAGE = ROOT / "tests" / "kernels" / "gpu_steps.json", ROOT / "docs" / "kernels.md"
TABLE = re.compile(r"(?<=<!-- gpu steps -->\n).*?(?=<!-- end of gpu steps -->)", re.DOTALL)
VERSION = ".".join(torch.__version__.split(".")[:2])
LOWMEM = str(Path(lowmem.__file__).parent)

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution", "convolution_backward")
"""``aten`` operators that multiply matrices; names of attention operators begin with ``_scaled_dot_product``."""

ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "resize_"}
"""Operators that start no kernel, beside those that return views."""

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""Operators for which the host waits for a GPU: it reads a value, or a shape depends on one."""

READS = {"tolist", "numpy", "__array__", "cpu"}
"""Methods of tensors that read values, and reach no operator on the CPU."""


class Launch(NamedTuple):
    """A launch of one of Triton's kernels, and the tensors whose addresses it gets."""

    name: str
    tensors: tuple[Tensor, ...]
    write: Callable[[], object]


class RecordedStep(measure.PeakMemory):
    """Records each operation of the block, with the function of lowmem that called it; and the peak of memory.

    Attributes:
        kernels: how often each operator was called that starts a kernel.
        launches: of Triton's kernels.
        float32_products, misaligned, waits: what a step should not do, as text for each place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.float32_products: Counter[str] = Counter()
        self.misaligned: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        indexes_by_mask = name in ("index", "index_put_", "index_put") and any(
            tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:]
        )
        if name in WAITS or indexes_by_mask:
            self.waits[f"{name} in {_caller()}"] += 1
        elif name not in ALLOCATIONS and not _returns_view(func):
            self.kernels[name] += 1
        if name.removesuffix("_") in PRODUCTS or name.startswith("_scaled_dot_product"):
            self.record_product(name, tensors[:3])  # behind them, attention has statistics of rows
        return super().__torch_dispatch__(func, types, args, kwargs)

    @property
    def counts(self) -> dict[str, int]:
        """What is stored: exact, and equal on every machine."""
        launches = self.launches.total()
        return {
            "kernels": self.kernels.total() + launches,
            "launches of Triton": launches,
            "float32 products": self.float32_products.total(),
            "misaligned": self.misaligned.total(),
            "waits": self.waits.total(),
            "peak bytes": self.peak,
        }

    def record_product(self, name: str, tensors: list[Tensor]) -> None:
        """Note the dtype, addresses and leading dimensions of a product's operands."""
        shapes = " x ".join(str(tuple(tensor.shape)) for tensor in tensors)
        if any(tensor.dtype is torch.float32 for tensor in tensors):
            self.float32_products[f"{name} of {shapes} in {_caller()}"] += 1
        leading = not name.startswith("convolution")  # of a kernel of 3 x 3 there is none
        if off := [text for tensor in tensors if (text := _misalignment_or_none(tensor, leading))]:
            self.misaligned[f"{name} of {shapes} in {_caller()}: {'; '.join(off)}"] += 1

    def record_launch(self, launch: Launch) -> None:
        """Note a launch, and addresses that 16 does not divide."""
        self.launches[launch.name] += 1
        if any(tensor.data_ptr() % 16 for tensor in launch.tensors):
            self.misaligned[f"launch of {launch.name} in {_caller()}"] += 1


class _ReadValues(TorchFunctionMode):
    """Notes the methods that read values of tensors on the CPU without an operator."""

    def __init__(self, step: RecordedStep) -> None:
        super().__init__()
        self.step = step

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS:
            self.step.waits[f"{name} in {_caller()}"] += 1
        return function(*args, **kwargs or {})


def _returns_view(func: Any) -> bool:
    return any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)


def _misalignment_or_none(tensor: Tensor, has_leading_dimension: bool) -> str | None:
    """Return what of a matrix is no multiple of 16 bytes: its address, or its leading dimension."""
    if tensor.data_ptr() % 16:
        return f"an address of {tensor.shape} is {tensor.data_ptr() % 16} bytes off 16"
    strides = [
        stride * tensor.element_size()
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if has_leading_dimension and size > 1 and stride != 1
    ]
    off = [stride for stride in strides if stride % 16]
    return f"a leading dimension of {tuple(tensor.shape)} has {off[0]} bytes" if off else None


def _caller() -> str:
    """Return the innermost function of lowmem on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(LOWMEM) and frame.f_code.co_name != "__torch_function__":
            return f"{path[len(LOWMEM) + 1 :]}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd or the model"


def _launches(record: Callable[[Launch], None]) -> SimpleNamespace:
    """Return what stands for ``lowmem.kernels.triton.launch``: launches write what plain torch computes."""

    def run(launch: Launch) -> Callable[[], None]:
        def start() -> None:
            record(launch)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                launch.write()

        return start

    def dequantize_launch(
        weight: QuantizedTensor, out: Tensor, levels: tuple[float, ...] | None = None, start: int = 0
    ) -> Callable[[], None]:
        columns = slice(start, start + out.shape[1])
        return run(
            Launch(
                "dequantize",
                (weight.packed, out),
                lambda: out.copy_(weight.restore(slice(None), levels)[:, columns]),
            )
        )

    def small_batch_product_launch(
        x: Tensor, weight: QuantizedTensor, bias: Tensor | None, out: Tensor
    ) -> Callable[[], None]:
        def write() -> None:
            product = x.float() @ weight.restore(slice(None)).t()
            out.copy_(product if bias is None else product + bias)

        return run(Launch("few", (weight.packed, out), write))

    def quantize_launch(
        weight: Tensor, scales: Tensor, form: Any, block_size: int, packed: Tensor, used: Tensor
    ) -> Callable[[], None]:
        def write() -> None:
            codes = nearest_codes(weight, scales, form, block_size)
            packed.copy_(form.width.pack_rows(codes, block_size, form.zero_code))
            used.fill_(1)

        return run(Launch("quantize", (weight, packed), write))

    return SimpleNamespace(
        dequantize_launch=dequantize_launch,
        small_batch_product_launch=small_batch_product_launch,
        quantize_launch=quantize_launch,
    )


@contextmanager
def gpu_backend_on_cpu(record: Callable[[Launch], None] = lambda launch: None) -> Iterator[None]:
    """Let the GPU's backend serve the CPU inside the block, with launches that write what plain torch computes."""
    before = backend_for("cpu")
    with ExitStack() as stack:
        for name, value in (
            ("triton_skip_reason_or_none", lambda *_: None),
            ("_import_triton_launch", lambda: _launches(record)),
        ):
            stack.enter_context(patch.object(gpu, name, value))
        set_backend("cpu", gpu.GpuBackend())
        try:
            yield
        finally:
            set_backend("cpu", before)


def record(run: Callable[[], object]) -> RecordedStep:
    """Run a function on the CPU through the dispatch of GPUs, and return its operations."""
    step = RecordedStep()
    with gpu_backend_on_cpu(step.record_launch), step, _ReadValues(step):
        run()
    return step


# Models in plain torch: a layer of each kind, with an embedding and an output layer

WIDTH, INNER, HEADS, GROUPS, VOCABULARY, TOKENS, EXPERTS = 256, 384, 4, 2, 512, 64, 8


class Norm(nn.Module):
    """As in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """As in Llama, with rotary positions and shared keys and values."""

    def __init__(self) -> None:
        super().__init__()
        narrow = WIDTH // HEADS * GROUPS
        self.q_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, narrow, bias=False) for _ in range(2))
        angles = torch.outer(torch.arange(TOKENS).float(), 10000 ** -(torch.arange(0, 1, 2 / (WIDTH // HEADS))))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (states.repeat_interleave(HEADS // GROUPS, 1) for states in (self.rotated(k), v))
        out = functional.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """As in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(INNER, WIDTH, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """As in Mixtral: each token goes to two experts, whose products are grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).float().softmax(-1).topk(2)  # (rows, 2)
        order = chosen.flatten().argsort(stable=True)
        counts = (chosen.flatten()[:, None] == torch.arange(EXPERTS)).sum(0)  # one_hot reads values on the CPU
        ends = counts.cumsum(0).int()
        gate, up = functional.grouped_mm(rows[order // 2], self.gate_up_proj.mT, offs=ends).chunk(2, -1)
        down = functional.grouped_mm(functional.silu(gate) * up, self.down_proj.mT, offs=ends)
        scaled = down * weights.flatten()[order, None].to(down.dtype)
        return torch.zeros_like(rows).index_add(0, order // 2, scaled).view_as(x)


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, mlp: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.attention, self.next_norm, self.mlp = Norm(), Attention(), Norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.next_norm(x))


class Language(nn.Module):
    """A layer between an embedding and an output layer; returns the loss of the next tokens."""

    def __init__(self, mlp: type[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.layer, self.norm = nn.Embedding(VOCABULARY, WIDTH), Layer(mlp), Norm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.layer(self.embedding(ids))))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Sum(nn.Module):
    """Blocks of BigNet, or convolutions, with the sum of the squared outputs as a loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().sum()


def _language_input() -> tuple[Tensor, Tensor]:
    ids = torch.arange(TOKENS)[None] * 7 % VOCABULARY
    labels = ids.roll(-1, 1)
    labels[0, -1] = -100
    return ids, labels


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "Llama layer": (lambda: Language(MLP), _language_input),
    "Mixtral layer": (lambda: Language(Experts), _language_input),
    "BigNet block": (
        lambda: Sum(Block(WIDTH), nn.LayerNorm(WIDTH), Block(WIDTH)),
        lambda: (torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16),),
    ),
    "convolution": (
        lambda: Sum(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=2)),
        lambda: (torch.randn(2, 32, 16, 16, dtype=torch.bfloat16),),
    ),
}
TECHNIQUES: dict[str, tuple[Any, ...]] = {
    "FourBit": (FourBit("nf4", 64, scales="double", search=False), LoRA(16)),
    "EightBit": (EightBit(), LoRA(16)),
    "Half": (Half(torch.bfloat16), LoRA(16)),
    "LoRA": (LoRA(16),),
}
MODES = ("fast", "lean")
UPDATE = "AdamW8bit, a matrix of 16 x 512"
STEPS = [f"{model}, {technique}, {mode}" for model in MODELS for technique in TECHNIQUES for mode in MODES] + [UPDATE]


def make_step(name: str) -> Callable[[], None]:
    """Return the second step of one of ``STEPS``: forward and backward."""
    model_name, technique, mode = name.split(", ")
    make, make_input = MODELS[model_name]
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    everywhere = {"where": lambda *_: True} if model_name == "convolution" else {}  # LoRA leaves them out
    model = convert(model, *TECHNIQUES[technique], **everywhere)
    with gpu_backend_on_cpu():
        model = prepare_training(model, mode)
    inputs = make_input()

    def step() -> None:
        model(*inputs).backward()
        for parameter in model.parameters():
            parameter.grad = None

    with gpu_backend_on_cpu():
        step()
    return step


def make_update() -> Callable[[], None]:
    """Return the second step of ``AdamW8bit`` for a matrix of an adapter."""
    parameter = nn.Parameter(torch.randn(16, 512))
    parameter.grad = torch.randn(16, 512)
    optimizer = AdamW8bit([parameter])
    optimizer.step()
    return optimizer.step


def record_step(name: str) -> RecordedStep:
    """Return what one of ``STEPS`` does; by one thread, since operators are too small for more."""
    with on_threads(1):
        return record(make_update() if name == UPDATE else make_step(name))


def drawn(stored: dict[str, dict[str, int]]) -> str:
    """Return the table of docs/kernels.md: a line for a step, fast / lean where they differ."""
    titles = list(next(iter(stored.values())))
    lines = [f"| Step, fast / lean | {' | '.join(titles)} |", f"| :-- |{' --: |' * len(titles)}"]
    by_step: dict[str, list[dict[str, int]]] = {}
    for name, row in stored.items():
        by_step.setdefault(name.removesuffix(", fast").removesuffix(", lean"), []).append(row)
    for name, rows in by_step.items():
        cells = (" / ".join(dict.fromkeys(str(row[title]) for row in rows)) for title in titles)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    every = json.loads(STORED.read_text(encoding="utf8")) if STORED.exists() else {}
    every[VERSION] = {name: record_step(name).counts for name in STEPS}
    STORED.write_text(json.dumps(every, indent=1) + "\n", encoding="utf8")
    page = PAGE.read_text(encoding="utf8")
    assert TABLE.search(page), f"{PAGE} has no <!-- gpu steps --> ... <!-- end of gpu steps -->"
    PAGE.write_text(TABLE.sub(lambda _: drawn(every[VERSION]), page), encoding="utf8")
