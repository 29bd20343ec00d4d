"""Writes files of each kind that lowmem writes, for ``tests/test_golden.py``, which loads them.

The files in a folder of this one are never written again: every later version loads them. Where a layout changes, its
version number is raised, the reader of the earlier number is kept, and ``python -m tests.golden NAME``, in the
environment of ``tox -e transformers``, writes a new folder beside the earlier ones.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lowmem
from lowmem import EightBit, FourBit, Half, LoRA
from lowmem.finetuning.loop import Outcome, Step, finetune
from lowmem.finetuning.settings import FineTuning
from lowmem.finetuning.training_state import States
from lowmem.io.convert_checkpoint import convert_checkpoint
from lowmem.io.formats.lazy_model import open_lazy_model
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint
from lowmem.io.lowmem_file import tensor_bytes_view
from lowmem.nn.adapter_buffers import without_adapter_buffers_if_equal
from lowmem.nn.stored_module import StoredModule
from lowmem.quant.tensor import QuantizedTensor
from lowmem.testing.memory_baseline import BaselineKey, write_baseline_figures
from tests.finetuning.killed import Killed
from tests.finetuning.language import VOCABULARY, rows, texts
from tests.io.formats import peft_model
from tests.io.formats.test_gptq_awq import layer

FOLDER = Path(__file__).parent
SAMPLES = FOLDER.parent / "io" / "formats" / "samples"
STORED = {  # by path
    "embedding": EightBit(),  # and the head, which is tied to it
    "half": Half(),
    "bfloat16": Half(torch.bfloat16),
    "int4": FourBit("int4", 16, "float16"),
    "nf4": FourBit("nf4", 32, "double", compute_dtype=torch.int8),
    "fp4": FourBit("fp4", 32, "float32"),
    "bof4s": FourBit(),
    "conv": FourBit("nf4", 16),
    "attention": FourBit("bof4s", 16, "double"),
}
FOREIGN = (
    "gpt-oss.safetensors",
    "bitsandbytes-fp4-double.safetensors",
    "compressed-tensors-asymmetric.safetensors",
    "types.gguf",
)
KEY = BaselineKey("portable", "2.13", 2)
FIGURES = {"tests/test_model.py::test_small": {"stored_bytes": 4096, "forward_bytes": 512}}
SETTINGS = FineTuning(lr=0.01, batch_size=2, steps=4, save_every=2)
ORIGIN = {"base": "golden", "rank": 2}
TEXT = "".join(f"item {n} costs {n * 7 % 10}. " for n in range(24))
STEP = 2  # after which the state is saved, and the run is killed


class Parts(nn.Module):
    """A layer of each kind, and of each way to store one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 32)
        self.half, self.bfloat16 = nn.Linear(32, 8), nn.Linear(32, 8)
        self.int4, self.nf4, self.fp4, self.bof4s = (nn.Linear(32, 8, bias=number % 2 == 0) for number in range(4))
        self.conv = nn.Conv1d(16, 8, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.dense, self.norm = nn.Linear(32, 8), nn.LayerNorm(8)
        self.head = nn.Linear(32, 12)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(5))


def fill(tensors: dict[str, Tensor]) -> None:
    """Write values that follow from names and places by integers alone: no version of torch makes others."""
    for number, name in enumerate(sorted(tensors)):
        one = tensors[name]
        places = torch.arange(1, one.numel() + 1, dtype=torch.int64) + 1000 * number
        with torch.no_grad():
            one.copy_(((places * 2654435761 % 2**32).double() / 2**31 - 1).view(one.shape) / 4)


def dense() -> Parts:
    model = Parts().eval()
    fill(dict(model.named_parameters()))
    return model


def model() -> Parts:
    """Return the model with two adapters; the second is active."""
    made = dense()
    for path, technique in STORED.items():
        places = (path, "head") if path == "embedding" else (path,)
        lowmem.convert(made, technique, where=lambda place, _, own=places: place.split(".")[0] in own)
    lowmem.add_adapter(
        made, "first", LoRA(2, alpha=3, dropout=0.25), where=lambda place, _: place in ("nf4", "half", "dense")
    )
    lowmem.add_adapter(made, "second", LoRA(2, rank_stabilized=True), where=lambda place, _: place in ("nf4", "conv"))
    lowmem.activate(made, "second")
    fill({name: one for name, one in made.named_parameters() if "lora_" in name})
    return made


def values(model: nn.Module) -> dict[str, str]:
    """Return digests of what a model holds: dequantized weights, adapters, and what is dense."""
    names = {id(module): path for path, module in model.named_modules()}
    found = {
        f"{names[id(module)]}.{name}".lstrip("."): module.stored_weight(name)
        for module in model.modules()
        if isinstance(module, StoredModule)
        for name in module.forms
    }
    parts = ("_packed", "_scales", "_rounded", "_order", "_extra_state")
    state = without_adapter_buffers_if_equal(model, model.state_dict())
    found |= {name: one for name, one in state.items() if not name.endswith(parts)}
    return digests(found)


def plain_values(path: Path) -> dict[str, str]:
    """Return digests of the weights of a file or index as ``lowmem export`` reads them, which needs no model."""
    with open_lazy_model(path) as stored:
        return digests(
            {name: weight.weight_in_model_layout(dtype=torch.float32) for name, weight in stored.weights.items()}
        )


def digests(tensors: Mapping[str, Tensor | QuantizedTensor]) -> dict[str, str]:
    """Return the SHA-256 of each tensor's dtype, shape and values."""
    found = {name: one if isinstance(one, Tensor) else one.dequantize() for name, one in sorted(tensors.items())}
    kinds = {name: f"{one.dtype} {tuple(one.shape)} ".encode() for name, one in found.items()}
    return {name: hashlib.sha256(kinds[name] + tensor_bytes_view(one)).hexdigest() for name, one in found.items()}


class Learner(nn.Module):
    """A language model that sees no token but the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.head(self.layer(self.tokens(input_ids)))


def learner() -> Learner:
    """Return a model that has not learned anything."""
    made = lowmem.add_adapter(Learner(), "default", LoRA(2))
    fill(dict(made.named_parameters()))
    return made


def train(made: Learner, folder: Path, scratch: Path, watch: Callable[[Step], object] = lambda step: None) -> Outcome:
    """Train to the end; if the folder has a state, from there on."""
    examples = rows(made, texts(scratch, TEXT))
    return finetune(made, examples, SETTINGS, states=States(folder, ORIGIN), watch=watch)


def kill(step: Step) -> None:
    """End a run when the state after ``STEP`` steps is saved."""
    if step.number > STEP:
        raise Killed


def write(folder: Path, scratch: Path) -> dict[str, dict[str, str]]:
    """Write what needs no other package; return digests of the values in the models."""
    made = model()
    lowmem.save(made, folder / "model.safetensors")
    for name in ("first", "second"):
        lowmem.save_adapter(made, folder / f"{name}.adapter.safetensors", name)
    own = {name: one.detach().clone() for name, one in dense().state_dict().items() if name != "head.weight"}
    save_file(own, scratch / "dense.safetensors")
    convert_checkpoint(scratch / "dense.safetensors", folder / "shards.safetensors", FourBit(), shard_bytes=4096)
    gptq = scratch / "gptq" / "gptq.safetensors"
    gptq.parent.mkdir()
    parts = layer(3, 32, 8, 16, order=(torch.arange(32) * 5 % 32) // 16)[0]
    save_file({f"gathered.{name}": value for name, value in parts.items()}, gptq)
    gptq.with_name("config.json").write_text('{"quantization_config": {"bits": 4, "group_size": 16}}')
    for source in (gptq, *(SAMPLES / name for name in FOREIGN)):
        import_foreign_checkpoint(source, folder / f"{source.stem}.safetensors")
    lowmem.save_adapter(with_adapter(peft_model.parts().float()), folder / "peft", format="peft")
    with suppress(Killed):
        train(learner(), folder / "training", scratch, kill)
    write_baseline_figures(KEY.file_path(folder), KEY, FIGURES)
    named = ["shards.safetensors.index.json", *(f"{Path(name).stem}.safetensors" for name in ("gptq", *FOREIGN))]
    found = {name: plain_values(folder / name) for name in named}
    return {**found, "model.safetensors": values(made)}


def with_adapter(made: nn.Module) -> nn.Module:
    """Return the model of ``tests/io/formats/peft_model.py`` with an adapter."""
    lowmem.add_adapter(made, "default", LoRA(2, alpha=3), where=lambda path, _: path in ("fc", "conv", "experts"))
    fill({name: one for name, one in made.named_parameters() if "lora_" in name})
    return made
