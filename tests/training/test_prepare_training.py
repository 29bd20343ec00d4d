"""A prepared model takes less memory, learns the same, and is what it was after its release."""

import copy
import functools
import inspect
import types

import pytest
import torch
from torch import nn

from lowmem import (
    FourBit,
    LoRA,
    convert,
    kernels,
    prepare_training,
    release_training,
    summary,
    training_report,
)
from lowmem.measure import PeakMemory
from lowmem.training import activation_compression
from lowmem.training import prepare_training as prepare_training_file
from tests.refusing import refused
from tests.training import blocks
from tests.training.blocks import MLP, Block, Language

VOCABULARY, WIDTH = 512, 32


def language(depth=4, kind=Language):
    return kind(VOCABULARY, WIDTH, (nn.Linear(WIDTH, WIDTH) for _ in range(depth)))


def make(*techniques, depth=4):
    torch.manual_seed(0)
    model = language(depth)
    return convert(model, *techniques) if techniques else model


def batch():
    return torch.randint(0, VOCABULARY, (2, 4, 64), generator=torch.Generator().manual_seed(1)).unbind()


def step(model):
    """Return the loss, all gradients, and the peak bytes of a step."""
    model.zero_grad()
    memory = PeakMemory()
    with memory:
        loss = model(*batch())
        loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], memory.peak


class Gated(Language):
    """Blocks of a norm and a gated MLP, one of which has dropout."""

    def __init__(self):
        super().__init__(VOCABULARY, blocks.WIDTH, [Block() for _ in range(2)])
        self.layers[-1].mlp.forward = functools.partial(MLP.forward, self.layers[-1].mlp)


MODELS = {
    "dense": make,
    "qlora": lambda: make(FourBit(), LoRA(4, init="loftq")),
    "gated": lambda: convert(Gated(), FourBit(), LoRA(4)),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_steps_are_smaller_and_learn_the_same_and_are_as_before_after_a_release(kind, memory):
    torch.manual_seed(0)
    model = MODELS[kind]()
    before = {one: type(one) for one in model.modules()}, [*model.state_dict()]
    loss, gradients, peak = step(model)
    assert prepare_training(model, memory, chunk=32) is model
    assert isinstance(model, Language)
    assert type(model).__name__ == ("Gated" if kind == "gated" else "Language")
    assert inspect.signature(model.forward) == inspect.signature(Language.forward.__get__(model))
    report = training_report(model)
    if kind == "gated":
        assert report["layers.0.norm"] == report["layers.1.norm"] == "RMS norm fused: keeps its input"
        does = {"fast": "keeps", "lean": "computes again"}[memory]
        assert report["layers.0.mlp"] == f"gated MLP fused (SiLU): {does} the outputs of gate, up"
        assert report["layers.1.mlp"].startswith("as before: it has a forward of its own")
        shown = {row.path: row.computed for row in summary(model)}
        assert all(report[path] in shown[path] for path in ("layers.0.norm", "layers.0.mlp", "head"))
    found, near, less = step(model)
    logits = 4 * 64 * VOCABULARY * 4  # of which the plain step has several
    assert less < peak - logits
    # Rows of logits are summed in another order; 8-bit saves are documented to move gradients by up to 6%.
    assert abs(found - loss) <= 1e-5 * loss
    bound = 1e-4 if memory == "fast" else 0.06
    whole = torch.cat([one.flatten() for one in gradients])
    assert (torch.cat([one.flatten() for one in near]) - whole).norm() <= bound * whole.norm()
    twin = copy.deepcopy(model)
    assert training_report(twin) == report
    assert torch.equal(step(twin)[0], found)
    assert release_training(model) is model
    assert ({one: type(one) for one in model.modules()}, [*model.state_dict()]) == before
    assert training_report(model) == {}
    again = step(model)
    assert all(map(torch.equal, (again[0], *again[1]), (loss, *gradients)))
    assert again[2] == peak


def test_lean_takes_less_than_fast():
    """With many layers nearly all of a step's memory is what they save."""
    peaks = {}
    for memory in ("fast", "lean"):
        model = prepare_training(make(FourBit(), LoRA(4), depth=40), memory, chunk=32)
        peaks[memory] = step(model)[2]
    assert peaks["lean"] < 0.5 * peaks["fast"]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_the_report_says_for_each_part_that_plain_torch_serves_other_devices(memory):
    torch.manual_seed(0)
    model = nn.Sequential(language(0), Block(), nn.ReLU(), nn.SiLU(), nn.LayerNorm(8))
    notes = training_report(prepare_training(model, memory))
    assert set(notes) >= {"0.head", "1.norm", "1.mlp", "3", "4"}
    expected = {path: f"{note}; by plain torch on meta" for path, note in notes.items()}
    expected["4"] = "as before on meta: layer norms are fused on CPUs alone"
    assert training_report(model.to("meta")) == expected


def test_the_report_says_what_was_done():
    model = make(FourBit(), LoRA(4))
    assert training_report(model) == {}
    prepare_training(model, "lean", chunk=8)
    assert training_report(model) == {
        "": "what autograd saves is kept in 8 bits",
        "head": "logits in chunks of 8 rows, by the cross entropy that takes them",
    }
    prepare_training(model)  # replaces it
    assert training_report(model) == {"head": "logits in chunks of 256 rows, by the cross entropy that takes them"}
    adapted = make(FourBit())
    convert(adapted, LoRA(4), where=lambda path, _: path in ("head", "layers.0"))
    prepare_training(adapted)
    assert training_report(adapted) == {"head": "logits as before: the layer has an adapter"}
    release_training(adapted)


@pytest.mark.parametrize(
    ("make_model", "options", "message"),
    [
        (make, {"memory": "small"}, "memory='small'"),
        (make, {"chunk": 0}, "chunk=0"),
        (make, {"output": "head?"}, "pattern 'head\\?' matches no linear layer"),
        (make, {"output": 3}, "output=3 must be glob patterns"),
        (make, {"output": ["head", 3]}, "output=\\['head', 3\\] must be glob patterns"),
        (make, {"output": "embedding"}, "embedding: Embedding is no plain linear layer"),
        (lambda: make().requires_grad_(False), {}, "no parameter that trains"),
        (lambda: {}, {}, "found dict"),
        (torch.inference_mode()(make), {}, "inference_mode"),
        (lambda: nn.ModuleDict({"a": nn.LazyLinear(8)}), {}, "^a is lazy and has no shape yet: call the model once"),
        (lambda: with_own_forward(make()), {"memory": "lean"}, "forward of its own.*prepare the model before"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_models_and_arguments_that_cannot_be_prepared_are_named(make_model, options, message):
    with refused(model := make_model(), (ValueError, TypeError), message):
        prepare_training(model, **options)
    for function in (release_training, training_report):
        with pytest.raises(TypeError, match="found int"):
            function(3)


def with_own_forward(model):
    model.forward = model.forward
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_is_prepared_alike_in_modes_without_gradients(mode):
    model = Gated()
    with mode():
        found = training_report(prepare_training(model))
    assert found == training_report(prepare_training(Gated()))
    assert sum("fused" in line for line in found.values()) == 4


def test_a_part_that_was_prepared_is_released_with_the_whole():
    inner = prepare_training(make(), "lean")
    whole = nn.Sequential(inner)
    assert set(training_report(whole)) == {"0", "0.head"}
    release_training(whole)
    assert training_report(whole) == {}
    assert type(inner) is Language


def test_a_forward_that_a_library_holds_compresses_until_it_is_released(monkeypatch):
    """As accelerate does: it puts a wrapped forward into the model, and unwraps it as long as it can."""
    ran = []
    kept = activation_compression._SavedTensorCompressor.pack
    monkeypatch.setattr(
        activation_compression._SavedTensorCompressor, "pack", lambda self, one: ran.append(one) or kept(self, one)
    )
    model = prepare_training(make(), "lean")
    held = model.forward.__func__
    model.forward = types.MethodType(lambda self, *given: held(self, *given), model)
    assert inspect.unwrap(held) is held
    step(model)
    assert ran
    release_training(model)
    ran.clear()
    assert torch.equal(step(model)[0], step(make())[0])
    assert not ran


def test_logits_are_multiplied_in_bfloat16_where_4_bit_layers_are(monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.relu(self.block(self.embed(ids))))

    ids, found = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(0)), {}
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        technique = FourBit(compute_dtype=dtype), LoRA(4)
        model = convert(Tiny(), *technique, where=lambda path, _: path == "block")
        nn.init.normal_(model.block.lora_b, std=0.1)
        plain = nn.functional.cross_entropy(model(ids).view(-1, 50), ids.view(-1))
        prepare_training(model)
        logits = model(ids)
        assert logits.dtype is torch.float32
        assert logits.product.loss_dtype is (dtype or torch.float32)
        found[dtype] = loss = nn.functional.cross_entropy(logits.view(-1, 50), ids.view(-1))
        assert abs(float((loss - plain).detach())) <= (0.05 if dtype else 1e-5)
        assert ("in torch.bfloat16" in training_report(model)["head"]) == bool(dtype)
        with torch.autocast("cpu", torch.float16):
            assert model(ids).product.loss_dtype is torch.float16
        release_training(model)
        assert "logits_dtype" not in vars(model.head)
    assert found[None] != found[torch.bfloat16]


class Odd(Language):
    """May fail to say what its output layer is."""

    fails = False

    def get_output_embeddings(self):
        if self.fails:
            raise TypeError("no head")
        return self.head


def test_a_call_that_fails_leaves_what_was_prepared():
    """Whether an argument is refused, or the model itself raises an error."""
    whole = nn.ModuleDict({"part": prepare_training(make(), "lean", chunk=7), "other": nn.Linear(8, 8)})
    with refused(whole, ValueError, "matches no linear layer"):
        prepare_training(whole, output="nothing")
    assert step(whole["part"])
    model = prepare_training(language(kind=Odd), "lean", chunk=7)
    model.fails = True
    with refused(model, TypeError, "no head"):
        prepare_training(model)


def test_an_output_layer_whose_forward_was_replaced_is_left():
    model = make()
    model.head.forward = functools.partial(nn.Linear.forward, model.head)
    with pytest.raises(ValueError, match="head: the layer has a forward of its own"):
        prepare_training(model, output="head")
    prepare_training(model, "lean")
    assert "logits as before: the layer has a forward of its own" in training_report(model)["head"]
    assert type(model(batch()[0])) is torch.Tensor


class Tuned(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_dropout = layer, nn.ModuleDict({"default": nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, VOCABULARY, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](self.lora_dropout["default"](x)))


def test_the_report_names_output_layers_alone():
    """Not an embedding that shares their weight, nor the parts of one that another library has wrapped."""
    model = prepare_training(language(kind=Odd))
    assert training_report(model) == {"head": "logits in chunks of 256 rows, by the cross entropy that takes them"}
    model = language(kind=Odd)
    model.head = Tuned(model.head)
    expected = step(model)
    prepare_training(model, "lean")
    report = training_report(model)
    assert report == {"": report[""], "head": "logits as before: the layer has an adapter"}
    assert type(model(batch()[0])) is torch.Tensor
    assert torch.equal(step(model)[0], expected[0])


def test_what_a_step_frees_is_kept_for_the_next_one_in_fast(monkeypatch):
    kept = []
    monkeypatch.setattr(prepare_training_file, "raise_heap_trim_threshold", lambda: kept.append(True))
    with pytest.raises(ValueError, match="memory="):
        prepare_training(make(LoRA(2)), "small")
    prepare_training(make(LoRA(2)), "lean")
    assert not kept
    prepare_training(make(LoRA(2)))
    assert kept
