"""Calls of lowmem under other defaults of torch, in a process that may die: ``python -m tests.defaults meta``.

It prints which results are those under torch's own defaults, bit for bit, and ends with 1 if some are not.
"""

import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lowmem
from lowmem import EightBit, FineTuning, FourBit, Half, LoRA
from tests.finetuning.language import Characters
from tests.io.formats.folders import CONFIG, shapes, write_folder

VOCABULARY, WIDTH = 64, 64
FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), **FLOAT)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(VOCABULARY, shape, generator=generator, dtype=torch.int64, device="cpu")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH, **FLOAT)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 96, bias=False, **FLOAT)
        self.up = nn.Linear(WIDTH, 96, bias=False, **FLOAT)
        self.down = nn.Linear(96, WIDTH, bias=False, **FLOAT)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """A causal language model that sees one token: with blocks, an embedding, an output layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, **FLOAT)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1, **FLOAT)
        self.head = nn.Linear(WIDTH, VOCABULARY, **FLOAT)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.conv(x.transpose(1, 2)).transpose(1, 2))


def model(*techniques: Any) -> nn.Module:
    """Return a model with the same weights under any default."""
    made = Model()
    for number, (_, one) in enumerate(made.named_parameters()):
        with torch.no_grad():
            one.copy_(numbers(*one.shape, seed=number) / 8)
    return lowmem.convert(made, *techniques) if techniques else made


def everything(one: nn.Module) -> Any:
    """Return what a model stores, its logits, and its gradients."""
    one.zero_grad()
    logits = one(tokens(3, 5))
    needs = [p for p in one.parameters() if p.requires_grad]
    if logits.requires_grad:
        functional.cross_entropy(logits.flatten(0, 1), tokens(15, seed=1)).backward()
    return logits, {name: value.clone() for name, value in one.state_dict().items()}, [p.grad for p in needs]


def adapted() -> nn.Module:
    made = lowmem.add_adapter(model(FourBit("nf4", 32), LoRA(4, init="zero")), "second", LoRA(2))
    for number, (name, one) in enumerate(made.named_parameters()):
        if "lora" in name:
            with torch.no_grad():
                one.copy_(numbers(*one.shape, seed=number) / 8)
    lowmem.activate(made, "default")
    return made


def quantized(_: Path) -> Iterator[Any]:
    weight = numbers(24, 100)
    weight[3] = 0.0
    for name in lowmem.FORMATS:
        for scales in ("float32", "float16", "double"):
            found = lowmem.quantize(weight, name, block_size=32, scales=scales, search=scales == "float32")
            yield found.packed, found.scales, found.dequantize(), found.error_bound(), found.dequantize(torch.float16)
    found = lowmem.quantize(weight, "nf4", importance=numbers(100, seed=1).abs())
    yield found.packed, lowmem.unpack(found.packed, found.block_size), lowmem.quantize(weight, ("nf4", "fp4")).packed
    yield lowmem.pack(lowmem.unpack(found.packed, found.block_size), found.block_size)


def products(_: Path) -> Iterator[Any]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for technique in (FourBit("nf4", 32), FourBit("nf4", 32, offsets=True), EightBit(), Half(torch.bfloat16)):
            made = nn.Sequential(nn.Linear(96, 80, **FLOAT))
            with torch.no_grad():
                made[0].weight.copy_(numbers(80, 96) / 8)
                made[0].bias.copy_(numbers(80, seed=1))
            layer = lowmem.convert(made, technique)[0]
            for rows in (1, 7, 40, 300):
                x = numbers(rows, 96, seed=2).to(dtype).requires_grad_()
                out = layer(x)
                yield out, *torch.autograd.grad(out.sum(), x)
    made = lowmem.convert(nn.Linear(96, 80, **FLOAT), FourBit("nf4", 32, compute_dtype=torch.int8))
    yield from (type(made)(made.quantized, None, torch.int8)(numbers(rows, 96)).shape for rows in (1, 30))


def converted(_: Path) -> Iterator[Any]:
    for technique in (FourBit(compute_dtype=torch.int8), EightBit(), Half(), lowmem.Budget(6)):
        yield everything(model(technique))
    yield lowmem.restore(model(FourBit())).state_dict()
    yield everything(adapted())
    yield lowmem.convert(model(), FourBit(), at_most=6.0).state_dict()


def adapters(folder: Path) -> Iterator[Any]:
    made = adapted()
    lowmem.save_adapter(made, folder / "adapter.safetensors", "default")
    lowmem.save_adapter(made, folder / "peft", "default", format="peft")
    again = model(FourBit("nf4", 32))
    yield everything(lowmem.load_adapter(again, folder / "adapter.safetensors"))
    yield lowmem.active_adapters(again), lowmem.adapter_names(made)
    yield everything(lowmem.load_adapter(again, folder / "peft", "peft"))
    yield [len(group["params"]) for group in lowmem.adapter_parameter_groups(made, lr=1e-3)]
    yield sorted(lowmem.adapter_layers(made, "default"))
    lowmem.deactivate(made)
    yield everything(made)
    lowmem.activate(made, "default", "second")
    yield everything(made)
    lowmem.merge_adapter(made, "default")
    yield everything(made)
    lowmem.unmerge_adapter(made)
    yield everything(lowmem.delete_adapter(made, "second"))
    for to in ("same format", torch.float32):
        yield everything(lowmem.merge(adapted(), to))
    merged, report = lowmem.merge(adapted(), inputs=tokens(3, 5), report=True)
    yield merged.state_dict(), str(report)


def files(folder: Path) -> Iterator[Any]:
    for number, technique in enumerate((FourBit(), Half())):
        path = folder / f"{number}.safetensors"
        lowmem.save(model(technique), path)
        yield path.read_bytes()
        yield everything(lowmem.load(path, Model))


def exported(folder: Path) -> Iterator[Any]:
    weights: Any = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes())}
    coded = {name: one if one.dim() == 1 else lowmem.quantize(one, "q4_0") for name, one in weights.items()}
    source = write_folder(folder / "model", coded, CONFIG)
    for name, options in {"codes": {}, "dense": {"dtype": torch.bfloat16}}.items():
        yield str(lowmem.export(source, folder / f"{name}.gguf", **options))
        yield (folder / f"{name}.gguf").read_bytes()


def sharded(folder: Path) -> Iterator[Any]:
    """In a group of this process alone; FSDP2 shards packed codes from torch 2.12 on only."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        return
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(folder / "store"), 1), rank=0, world_size=1
    )
    try:
        made = lowmem.shard(model(Half(torch.float16), LoRA(4)))
        logits = made(tokens(3, 5))
        logits.square().sum().backward()
        yield logits
        whole = lowmem.gather(made)
        assert whole is not None
        yield whole.state_dict()
    finally:
        distributed.destroy_process_group()


def calibrated(_: Path) -> Iterator[Any]:
    batches = [tokens(3, 5, seed=seed) for seed in range(4)]
    yield everything(lowmem.calibrate(model(), batches, FourBit("nf4", 32, offsets=True)))
    yield everything(lowmem.calibrate(model(), batches, FourBit("int4", 16), diagonal=True))
    yield str(lowmem.summary(lowmem.convert(model(), lowmem.Budget(5, batches))))


def trained(_: Path) -> Iterator[Any]:
    """Steps in every mode of memory."""
    for memory in (None, "fast", "lean"):
        for optimizer in (lowmem.AdamW8bit, torch.optim.AdamW)[: 1 if memory else 2]:
            made = lowmem.add_adapter(model(FourBit("nf4", 32)), "default", LoRA(4), skip="head")
            if memory is not None:
                lowmem.prepare_training(made, memory, output="head")
                yield lowmem.training_report(made)
            stepping = optimizer([p for p in made.parameters() if p.requires_grad])
            for seed in range(2):
                functional.cross_entropy(made(tokens(3, 5)).flatten(0, 1), tokens(15, seed=seed)).backward()
                stepping.step()
                stepping.zero_grad()
            yield everything(lowmem.release_training(made))
    for kind in (lowmem.master_weights, lowmem.step_in_backward):
        made = model().to(torch.bfloat16)
        given = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
        kind(given)
        functional.cross_entropy(made(tokens(3, 5)).float().flatten(0, 1), tokens(15)).backward()
        if kind is lowmem.master_weights:
            given.step()
        yield made.state_dict()
    made = model()
    with lowmem.compressed_activations(made):
        functional.cross_entropy(made(tokens(3, 5)).flatten(0, 1), tokens(15)).backward()
    yield [p.grad for p in made.parameters()]
    made = model(FourBit(), LoRA(4))
    kept = checkpoint(made, tokens(3, 5), use_reentrant=False, context_fn=lowmem.keep_products)
    kept.square().sum().backward()
    yield kept, [p.grad for p in made.parameters()]


def losses(_: Path) -> Iterator[Any]:
    labels = tokens(30)
    for dtype in (torch.float32, torch.bfloat16):
        for weight in (numbers(VOCABULARY, WIDTH).to(dtype), model(FourBit()).head.weight):
            hidden = numbers(30, WIDTH, seed=1).to(dtype).requires_grad_()
            loss = lowmem.linear_cross_entropy(hidden, weight, labels, chunk=8, label_smoothing=0.1)
            yield loss, *torch.autograd.grad(loss, hidden)


def attention(_: Path) -> Iterator[Any]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query, key, value = (numbers(2, 4, rows, 48, seed=rows).to(dtype) for rows in (2, 300, 301))
        mask = numbers(2, 300, seed=5) > 0
        yield lowmem.scaled_dot_product_attention(query, key, value[:, :, 1:], attn_mask=mask)
        yield lowmem.scaled_dot_product_attention(query, key, value[:, :, 1:], is_causal=True, softcap=5.0)
        for bits in (None, 8):
            for window in (None, 40):
                keys, values = lowmem.CachedStates(bits, window), lowmem.CachedStates(bits, window)
                for rows in (70, 1, 3):
                    new = [numbers(2, 4, rows, 48, seed=rows + i).to(dtype) for i in range(2)]
                    seen = keys.append(new[0]), values.append(new[1])
                    yield lowmem.scaled_dot_product_attention(query[:, :, :1], *seen)
                    yield [one + 0 for one in seen]
                keys.select(torch.tensor([1, 0, 0], dtype=torch.int64, device="cpu"))
                yield keys.rows


def prepared(_: Path) -> Iterator[Any]:
    for dtype in (torch.float32, torch.bfloat16):
        made = lowmem.prepare_inference(model(FourBit("nf4", 32)).to(dtype).eval())
        yield lowmem.inference_report(made)
        with torch.no_grad():
            yield made(tokens(1, 1)), made(tokens(3, 5))
        lowmem.release_inference(made)


def finetuned(folder: Path) -> Iterator[Any]:
    made = model(FourBit("nf4", 32), LoRA(4))
    examples = [lowmem.Example.of(tokens(9, seed=seed).tolist(), [True] * 9) for seed in range(8)]
    rows = lowmem.Rows.of(made, examples, 16, VOCABULARY)
    yield lowmem.perplexity(made, rows)
    yield lowmem.finetune(made, rows, FineTuning(steps=3, batch_size=2, eval_every=2), held_out=rows).losses
    yield everything(made)
    path = folder / "text.txt"
    path.write_text("a b c d e f g h\n" * 20)
    yield [(one.ids, one.targets) for one in lowmem.read_examples(path, Characters(), 16).examples]


def resumed(folder: Path) -> Iterator[Any]:
    examples = [lowmem.Example.of(tokens(9, seed=seed).tolist(), [True] * 9) for seed in range(8)]
    for steps in (2, 4):  # the second run begins with the state of the first
        made = model(FourBit("nf4", 32), LoRA(4))
        rows, states = lowmem.Rows.of(made, examples, 16, VOCABULARY), lowmem.States(folder / "states", {})
        yield lowmem.finetune(made, rows, FineTuning(steps=steps, batch_size=2), states=states).losses
        yield everything(made)


def measured(_: Path) -> Iterator[Any]:
    planned = lowmem.plan(Model, FourBit(), LoRA(4), batch=tokens(2, 5), loss=lambda logits: logits.float().sum())
    yield str(planned)
    made = model(FourBit(), LoRA(4))
    yield str(lowmem.training_memory(made, tokens(2, 5), loss=lambda logits: logits.sum()))
    yield str(lowmem.summary(made)), lowmem.backend(), lowmem.bytes_per_rank(100, 10, 2, 10, 2)


CALLS: dict[str, Callable[[Path], Iterator[Any]]] = {
    one.__name__: one
    for one in (
        *(quantized, products, converted, adapters, files, exported, sharded, calibrated, trained, losses, attention),
        *(prepared, finetuned, resumed, measured),
    )
}

STEPS_OF_ADAMW = {"trained", "finetuned", "resumed", "measured"}


def leaves(value: Any) -> Iterator[Any]:
    """Yield tensors as dtype, shape and bytes, and other values as they are."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            yield str(value.device)
            return
        plain = value.detach().contiguous()
        yield value.dtype, tuple(value.shape), plain.flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for name in sorted(value):
            yield name
            yield from leaves(value[name])
    elif isinstance(value, list | tuple | Iterator):
        for one in value:
            yield from leaves(one)
    else:
        yield "nan" if isinstance(value, float) and math.isnan(value) else value


def results(name: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return list(leaves(CALLS[name](Path(folder))))


def fails_by_torch_itself(name: str) -> bool:
    """Whether a call takes steps of torch's own AdamW, which fails under today's default device without lowmem.

    AdamW of torch 2.9 makes its counters of steps on the default device; later ones make them on the CPU.
    """
    if name not in STEPS_OF_ADAMW:
        return False
    weight = torch.ones(1, dtype=torch.float32, device="cpu", requires_grad=True)
    weight.grad = torch.ones_like(weight)
    try:
        torch.optim.AdamW([weight]).step()
    except RuntimeError as error:
        return "meta" in str(error)
    return False


def main(*defaults: str) -> int:
    """Compare the results of all calls under default dtypes or devices with those under torch's own."""
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    expected = {name: results(name) for name in CALLS}
    differ = 0
    for default in defaults:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, default))
        for name, wanted in expected.items():
            if fails_by_torch_itself(name):
                print(f"{default}: {name}: skipped, since AdamW of torch {torch.__version__} fails there by itself")
                continue
            try:
                same = results(name) == wanted
            except Exception as error:  # noqa: BLE001 (any error is what is looked for)
                same = False
                traceback.print_exception(error)
            differ += not same
            print(f"{default}: {name}: {'the same' if same else 'differs'}, {len(wanted)} values", flush=True)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
