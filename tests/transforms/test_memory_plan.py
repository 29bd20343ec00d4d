"""A plan says, without the weights, what a real run of the same model measures."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import lowmem
from lowmem import BigNet, EightBit, FourBit, Half, LoRA, convert, measure, plan
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms import memory_plan as module
from lowmem.transforms.bits_per_weight import techniques_as_code
from lowmem.transforms.memory_plan import OPTIMIZERS, parse_byte_count
from tests.models import INDICES, Small

MIB = 2**20

TECHNIQUES = {
    "dense": (),
    "half": (Half(),),
    "bfloat16": (Half(torch.bfloat16),),
    "nf4": (FourBit("nf4"),),
    "int4": (FourBit("int4", 16, "float16"),),
    "bof4s": (FourBit("bof4s", 128, "float32"),),
    "offsets": (FourBit("int4", 32, offsets=True),),
    "int8": (FourBit(block_size=32, compute_dtype=torch.int8),),
    "q8_0": (EightBit(format="q8_0"),),
    "gguf": (FourBit("iq4_nl", embeddings="q8_0"),),
    "lora": (LoRA(2),),
    "half lora": (Half(), LoRA(3)),
    "qlora": (FourBit(block_size=32), LoRA(3, alpha=6, dropout=0.1)),
}


class Convolutions(nn.Module):
    """Pictures in, with a batch norm: buffers, one of which is no float."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


def encoder():
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)


MODELS = {
    "BigNet": (BigNet, torch.ones(8, 1024)),
    "linear": (lambda: nn.Sequential(nn.Linear(37, 64), nn.ReLU(), nn.Linear(64, 5, bias=False)), torch.ones(3, 37)),
    "root": (lambda: nn.Linear(37, 64), torch.ones(3, 37)),
    "convolutions": (Convolutions, torch.ones(4, 3, 20, 20)),
    "tied": (Small, INDICES),
    "encoder": (encoder, torch.ones(8, 16, 64)),
    "double": (lambda: nn.Linear(16, 8, dtype=torch.float64), torch.ones(3, 16, dtype=torch.float64)),
}


def converted(make, technique):
    model = make()
    return convert(model, *TECHNIQUES[technique]) if TECHNIQUES[technique] else model


def step(model, batch, optimizer):
    optimizer.zero_grad(set_to_none=True)
    model(batch).sum().backward()  # the output is not held meanwhile, as in lowmem.measure
    optimizer.step()


def state_bytes(optimizer):
    return sum(
        t.nbytes for of_one in optimizer.state.values() for t in of_one.values() if isinstance(t, torch.Tensor)
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_figure_of_one_model_is_what_a_real_one_measures(name, technique):
    """Stored bytes, gradients and optimizer to the byte; peaks, too, but for the scratch of products."""
    make, batch = MODELS[name]
    found = plan(make, *TECHNIQUES[technique], batch=batch)
    model = converted(make, technique)
    assert found.stored_bytes == measure.theoretical_bytes(model) == measure.actual_bytes(model)
    assert found.dense == measure.theoretical_bytes(make())
    assert found.inputs == batch.nbytes
    adapters = sum(p.nbytes for key, p in model.named_parameters() if ".adapters." in f".{key}")
    assert found.stored.get("adapters", 0) == adapters
    layers = [m for m in model.modules() if isinstance(m, StoredModule)]
    frozen = {getattr(m, part) for m in layers for part in m.part_parameter_names}
    assert sum(found.stored.get(kind, 0) for kind in ("Half", "FourBit", "EightBit")) == sum(t.nbytes for t in frozen)

    assert found.scratch == (8 * MIB if technique == "offsets" else MIB if layers else 0)
    forward, backward = measure.forward_bytes(model, batch), measure.backward_bytes(model, batch)
    assert found.forward <= forward <= found.forward + found.scratch
    assert found.backward <= backward <= found.backward + found.scratch
    if technique == "dense":
        assert (found.forward, found.backward) == (forward, backward)

    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        assert found.gradients == found.optimizer == found.update == 0
        return
    optimizer = torch.optim.AdamW(trained)
    step(model.train(), batch, optimizer)
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert (found.gradients, found.optimizer) == (gradients, state_bytes(optimizer))


def layers():
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("make", "rows", "technique", "training"),
    [
        (BigNet, 64, "dense", "adamw"),  # the optimizer's step takes most
        (BigNet, 64, "dense", "sgd"),
        (layers, 4096, "dense", "adamw"),  # the backward does
        (BigNet, 512, "qlora", "adamw"),
    ],
)
def test_the_total_of_training_is_the_peak_of_a_step_with_state_within_five_percent(make, rows, technique, training):
    batch = torch.ones(rows, 256 if make is layers else 1024)
    found = plan(make, *TECHNIQUES[technique], batch=batch, training=training)
    model = converted(make, technique)
    optimizer = OPTIMIZERS[training]([p for p in model.parameters() if p.requires_grad])
    assert (found.optimizer > 0) == (training == "adamw")
    memory = measure.PeakMemory()
    with memory:
        for _ in range(2):
            step(model, batch, optimizer)
    real = measure.theoretical_bytes(model) + batch.nbytes + memory.peak
    counts = 4 * len(optimizer.state)  # AdamW's counts of steps come from no operation, and are not measured
    assert found.training_bytes - found.scratch - counts <= real <= found.training_bytes <= 1.05 * real


@pytest.mark.processes
@pytest.mark.parametrize("technique", ["half", "nf4", "bof4s", "lora", "qlora"])
@pytest.mark.parametrize("name", ["BigNet", "large table"])
def test_the_peak_of_convert_is_that_of_a_real_one_within_five_percent(name, technique):
    make = BigNet if name == "BigNet" else lambda: nn.Sequential(nn.Embedding(40_000, 256), nn.Linear(256, 256))
    batch = MODELS["BigNet"][1] if name == "BigNet" else torch.zeros(1, 2, dtype=torch.int64)
    found = plan(make, *TECHNIQUES[technique], batch=batch, training=None).conversion
    model = make()
    real = measure.theoretical_bytes(model)
    real += measure.peak_bytes(lambda: convert(model, *TECHNIQUES[technique]))
    assert 0.95 * real <= found <= 1.05 * real
    if technique == "lora":  # nothing is stored, and no chunk of rows quantized
        assert found < real + MIB


@pytest.mark.parametrize("technique", ["dense", "half", "qlora"])
@pytest.mark.parametrize("name", ["BigNet", "convolutions", "tied", "encoder"])
def test_the_peak_of_load_is_the_mapped_file_and_what_the_factory_allocates(name, technique, tmp_path):
    make, batch = MODELS[name]
    found = plan(make, *TECHNIQUES[technique], batch=batch, training=None).load
    lowmem.save(converted(make, technique), tmp_path / "m")
    loaded = []
    made = measure.peak_bytes(
        lambda: loaded.append(lowmem.load(tmp_path / "m", make))
    )  # mapped bytes are no storage's
    mapped = {id(t): t.nbytes for t in loaded[0].state_dict(keep_vars=True).values() if t.dtype != torch.uint8}
    mapped |= {id(p): p.nbytes for p in loaded[0].parameters()}
    real = sum(mapped.values()) + made
    assert real <= found <= 1.05 * real + 1024  # the rest: a bias beside the largest weight


SEVENTY_BILLION = """
import resource, sys
import torch
from torch import nn
from lowmem import BigNet, FourBit, LoRA, plan

def make():
    return nn.Sequential(nn.Embedding(64_000, 16384), *(nn.Linear(16384, 16384, bias=False) for _ in range(260)))

def peak():
    if sys.platform == "linux":  # where a process inherits ru_maxrss from its parent
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

four = FourBit("nf4", embeddings="4bit")
plan(BigNet, four, LoRA(16), batch=torch.empty(1, 1024))  # imports torch's optimizers, and what these import
before = peak()
found = plan(make, four, LoRA(16), batch=torch.empty(1, 16, dtype=torch.int64, device="meta"))
print(found.dense, found.stored["FourBit"], peak() - before)
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="there is no module resource")
def test_seventy_billion_weights_are_planned_without_them():
    shown = subprocess.run([sys.executable, "-c", SEVENTY_BILLION], capture_output=True, text=True, check=True)
    dense, stored, grown = map(int, shown.stdout.split())
    assert dense > 4 * 70e9
    assert stored == pytest.approx(dense / 4 * 4.125 / 8, rel=0.001)  # 4 bits, and 8 for each block of 64
    assert grown < 256 * MIB


@pytest.mark.parametrize("given", ["values", "float"])
def test_a_factory_that_computes_from_its_values_runs_again_with_parameters_on_meta(given):
    class Rates(nn.Module):
        def __init__(self):
            super().__init__()
            rates = torch.linspace(0, 0.5, 3)
            self.drops = nn.ModuleList([nn.Dropout(rate.item()) for rate in rates])
            self.linear = nn.Linear(8, 8)
            self.register_buffer("table", torch.from_numpy(rates.numpy().copy()))
            self.plain = torch.ones(8)

        def forward(self, x):
            return self.drops[2](self.linear(x) + self.plain) * self.table.sum()

    def make():
        return Rates() if given == "values" else Rates().double()

    batch = torch.ones(2, 8, dtype=torch.float32 if given == "values" else torch.float64)
    found = plan(make, FourBit(), batch=batch)
    assert found.stored_bytes == measure.actual_bytes(convert(make(), FourBit()))
    assert found.forward > 0


def test_planning_leaves_the_generator_and_the_batch_as_they_were():
    batch = torch.ones(2, 1024, requires_grad=True)
    before = torch.get_rng_state()
    plan(BigNet, FourBit(), LoRA(4), batch=batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(batch) is torch.Tensor
    assert batch.grad is None


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x, *, bias=None):
        return {"logits": self.linear(x) + (0 if bias is None else bias)}


def test_a_batch_is_a_tensor_a_tuple_or_a_mapping_as_measure_takes_inputs():
    x, bias = torch.ones(16, 8), torch.ones(16, 4)
    real = measure.forward_bytes(Named(), x)
    assert {plan(Named, batch=given).forward for given in (x, (x,), [x], {"x": x}, (x.to("meta"),))} == {real}
    found = plan(Named, batch={"x": x, "bias": bias})
    assert found.forward == measure.forward_bytes(Named(), x, bias=bias)
    assert found.inputs == x.nbytes + bias.nbytes


def test_a_loss_of_one_s_own_is_counted():
    def loss(output):
        return nn.functional.cross_entropy(output["logits"], torch.zeros(16, dtype=torch.int64))

    x = torch.ones(16, 8)
    found = plan(Named, batch=x, loss=loss)
    assert found.backward == measure.backward_bytes(Named(), x, loss=loss)
    assert found.backward != plan(Named, batch=x).backward


@pytest.mark.parametrize("technique", ["half", "nf4"])
def test_rows_of_an_embedding_are_dequantized_a_chunk_at_a_time(technique):
    batch = torch.zeros(8, 2048, dtype=torch.int64)
    found = plan(lambda: nn.Embedding(100, 128), *TECHNIQUES[technique], batch=batch, training=None)
    assert found.forward == 8 * 2048 * 128 * 4
    model = convert(nn.Embedding(100, 128), *TECHNIQUES[technique])
    assert found.forward <= measure.forward_bytes(model, batch) <= found.forward + found.scratch


def test_the_figures_as_text_and_as_json():
    found = plan(BigNet, FourBit(block_size=128), LoRA(), batch=torch.ones(1, 1024), training="sgd")
    lines = str(found).splitlines()
    assert lines[0] == "FourBit(format='bof4s', block_size=128), LoRA()"
    assert lines[1].split() == ["Memory", "MiB"]
    assert lines[2].split() == ["dense", "model", "72.11"]
    assert lines[-1].startswith("total for training ")
    assert "total for training" not in str(plan(BigNet, batch=torch.ones(1, 1024), training=None))
    document = json.loads(json.dumps(found.as_json()))
    assert document["techniques"] == ["FourBit(format='bof4s', block_size=128)", "LoRA()"]
    assert document["training_bytes"] == found.training_bytes
    assert document["stored"] == found.stored
    large = plan(lambda: nn.Linear(2**15, 2**14), batch=torch.ones(1, 2**15), training=None)
    assert str(large).splitlines()[:3] == ["dense", "Memory                   MiB", "dense model          2048.06"]


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("training", [None, "adamw"])
def test_at_most_proposes_the_first_that_fits(training):
    batch = torch.ones(8, 1024)
    make = lambda: nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(3)))  # noqa: E731
    found = plan(make, batch=batch, training=training)
    seen = []
    refused = ""
    while not refused:
        try:
            found = plan(make, batch=batch, training=training, at_most=found.total_bytes - bool(seen))
        except ValueError as reason:
            refused = str(reason)
        else:
            assert found == plan(make, *found.techniques, batch=batch, training=training)
            seen.append(tuple(type(t) for t in found.techniques))
    assert f"({found.total_bytes:,} bytes), with {techniques_as_code(found.techniques)}" in refused
    assert seen[0] == ()
    kinds = list(dict.fromkeys(seen))
    if training is None:
        assert kinds == [(), (Half,), (EightBit,), (FourBit,)]
    else:
        assert kinds == [(), (LoRA,), (Half, LoRA), (EightBit, LoRA), (FourBit, LoRA)]
    least = FourBit("nf4", 4096, "float16", embeddings="4bit")  # double has two bytes a row besides
    assert found.techniques[0] == least


def test_at_most_passes_over_techniques_that_the_model_has_no_layers_for():
    def make():
        return nn.Sequential(nn.Conv1d(64, 64, 3), nn.ReLU())

    x = torch.ones(1, 64, 8)
    total = plan(make, batch=x).total_bytes
    assert plan(make, batch=x, at_most=total).techniques == ()
    with pytest.raises(ValueError, match=rf"\({total:,} bytes\), with dense; 0: LoRA cannot follow"):
        plan(make, batch=x, at_most=total - 1)
    batch = torch.ones(8, 1024)
    assert plan(BigNet, batch=batch, at_most="1GiB").techniques == ()
    assert plan(BigNet, batch=batch, at_most="50MiB", training=None).techniques == (Half(torch.bfloat16),)
    # The least is the least total: a small model's products with stored weights take more scratch than dense ones.
    small = {"batch": torch.ones(1, 64), "training": None}
    total = plan(lambda: nn.Linear(64, 64), **small).total_bytes
    with pytest.raises(ValueError, match=rf"\({total:,} bytes\), with dense; take a smaller batch"):
        plan(lambda: nn.Linear(64, 64), **small, at_most=100)


def test_models_that_cannot_be_the_least_are_not_run(monkeypatch):
    runs = []
    run = module.make_fake_and_measure_run
    monkeypatch.setattr(
        module, "make_fake_and_measure_run", lambda model, *rest: runs.append(model) or run(model, *rest)
    )
    with pytest.raises(ValueError, match="out of reach: the least that is possible is .*FourBit"):
        plan(BigNet, batch=torch.ones(8, 1024), at_most="1KB")  # the dense model's weights alone are more
    assert len(runs) == 1


def needs_values():
    class Model(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    return Model(8, 8)


def views():
    model, tensor = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(12, 8)
    for layer, start in zip(model, (0, 4), strict=True):
        layer.weight = nn.Parameter(tensor[start : start + 8])
    return model


@pytest.mark.parametrize(
    ("make", "given", "options", "error", "text"),
    [
        (BigNet, (), {"training": "adam"}, ValueError, "training='adam' is unknown: choose from None, sgd, adamw"),
        (BigNet, ("nf4",), {}, TypeError, "technique='nf4' must be an instance of"),
        (BigNet, (LoRA(2), LoRA(3)), {}, ValueError, "LoRA was given 2 times"),
        (BigNet, (FourBit(), Half()), {}, ValueError, "Half cannot follow the techniques before it"),
        (BigNet, (FourBit(("nf4", "int4")),), {}, ValueError, "format=.* name one format"),
        (lambda: nn.LayerNorm(1024), (FourBit(),), {}, ValueError, "nothing to convert: FourBit looks for"),
        (BigNet, (Half(),), {"at_most": "1GiB"}, ValueError, r"at_most='1GiB' proposes .*: leave out Half\(\)"),
        (BigNet, (), {"at_most": "much"}, ValueError, "'much' must be a size such as"),
        (BigNet, (), {"at_most": 1.5}, TypeError, "1.5 must be a number of bytes"),
        (BigNet, (), {"batch": 3}, TypeError, "batch=3 must be a tensor"),
        (BigNet, (), {"loss": 3}, TypeError, "loss=3 must be a function of the model"),
        (BigNet, (), {"batch": {}}, TypeError, r"batch=\{\} must be a tensor"),
        (BigNet(), (), {}, TypeError, "make is a BigNet, a model with weights: pass what makes it"),
        ("BigNet", (), {}, TypeError, "make='BigNet' must be a callable without arguments"),
        (nn.Linear, (), {}, TypeError, "make=.* must be a callable without arguments that makes the model"),
        (lambda: nn.LazyLinear(3), (), {}, ValueError, "LazyLinear has lazy parameters"),
        (needs_values, (), {"batch": torch.ones(1, 8)}, ValueError, "Model cannot be planned: its forward needs"),
        (views, (FourBit(),), {"batch": torch.ones(1, 8)}, ValueError, "1 and 0 are views of one tensor"),
    ],
)
def test_bad_input_is_one_clear_error(make, given, options, error, text):
    with pytest.raises(error, match=text):
        plan(make, *given, **{"batch": torch.ones(1, 1024), **options})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_scripted_submodule_is_planned_as_its_source():
    def make(norm, script=lambda module: module):
        inner = nn.Sequential(nn.Linear(16, 8), norm(8))
        return nn.Sequential(nn.Linear(16, 16), script(inner))

    x = torch.zeros(4, 16)
    # Beside an adapter, statistics of a scripted module have no copy: it takes no child that could hold it.
    for techniques, norm in (((), nn.BatchNorm1d), ((LoRA(2),), nn.LayerNorm)):
        given = {"batch": x, "skip": ["1", "1.*"] if techniques else ()}
        planned = plan(partial(make, norm, torch.jit.script), *techniques, **given)
        expected = plan(partial(make, norm), *techniques, **given)
        assert planned.as_json() == expected.as_json()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *((number, number) for number in (1, 7, 2**60 + 1)),
        *(("12", 12), ("1.5KB", 1500), ("3 MB", 3_000_000), ("2GB", 2_000_000_000)),
        *(("2kib", 2048), ("3MiB", 3 * MIB), ("24GiB", 24 * 2**30)),
    ],
)
def test_sizes_as_text_are_parsed(size, expected):
    assert parse_byte_count(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "1XB", "-1GB", "0", 0, "1e3", "9" * 30])
def test_invalid_sizes_are_refused(size):
    with pytest.raises(ValueError, match="must be a size"):
        parse_byte_count(size)


def test_selections_patterns_and_loftq_are_planned_as_they_are_converted():
    def make():
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    x = torch.zeros(2, 64)
    cases = [((technique,), {}) for technique in (LoRA(2, ranks={"0": 3}), LoRA(2, alphas={"1": 5}))]
    cases += [((LoRA(2, init="loftq"),), {}), ((), {"skip": "1"}), ((), {"where": lambda path, _: path != "1"})]
    for more, options in cases:
        planned = plan(make, FourBit(), *more, batch=x, **options)
        assert planned.stored_bytes == measure.actual_bytes(convert(make(), FourBit(), *more, **options))
    with pytest.raises(ValueError, match="matches no"):
        plan(make, FourBit(), LoRA(2, ranks={"7": 3}), batch=x)
    with pytest.raises(ValueError, match="loftq"):
        plan(make, LoRA(2, init="loftq"), batch=x)


def test_a_table_is_in_mib_however_large_its_model():
    made = plan(lambda: nn.Linear(2**15, 2**14, bias=False), batch=torch.ones(1, 2**15), training=None)
    assert made.columns == ["Memory", "MiB"]
    assert made.cells[0] == ["dense model", "2048.00"]
