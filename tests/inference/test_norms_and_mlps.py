"""RMS norms and gated MLPs in one call: the values of the modules, and when their own forward runs."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import lowmem
from lowmem import (
    EightBit,
    FourBit,
    Half,
    LoRA,
    convert,
    inference_report,
    kernels,
    prepare_inference,
    release_inference,
)
from lowmem.inference.norms_and_mlps import make_unchanged_check
from lowmem.kernels.native_program import NativeProgram
from lowmem.kernels.rms_norm_and_gating import ACTIVATIONS
from lowmem.quant.backend import backend_for
from tests.compiled import compiled, needs_kernel
from tests.training.blocks import INNER, MLP, WIDTH, Block, Norm

pytestmark = needs_kernel
TECHNIQUES = [FourBit(), FourBit("int4", 32, scales="float16_offsets"), EightBit(), Half(torch.bfloat16)]


def model_of(technique=TECHNIQUES[0], dtype=torch.float32, joined=False):
    torch.manual_seed(0)
    return convert(nn.Sequential(Block(joined), Block(joined)).to(dtype), technique).eval()


def inputs(dtype=torch.float32, rows=2):
    return torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def ran(monkeypatch):
    """Counts the calls of C."""
    count, run = [], NativeProgram.try_run

    def counted(steps, **given):
        found = run(steps, **given)
        count.append(found)
        return found

    monkeypatch.setattr(NativeProgram, "try_run", counted)
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_outputs_are_those_of_the_modules_within_rounding(technique, dtype, joined, ran, monkeypatch):
    """Each number is rounded at the same places; sums may be taken in another order."""
    model, x = model_of(technique, dtype, joined), inputs(dtype)
    with torch.no_grad():
        expected = model(x)
        assert prepare_inference(model) is model
        with monkeypatch.context() as patched:
            for kind in (MLP, Norm):
                patched.setattr(kind, "forward", None)  # which is not called
            got = model(x)
        assert ran == [True] * 4
        assert release_inference(model) is model
        assert torch.equal(model(x), expected)
    assert len(ran) == 4
    bound = 64 * torch.finfo(dtype).eps * expected.abs().max()
    assert (got.double() - expected.double()).abs().max() <= bound


def test_a_gate_that_is_the_second_half_of_a_layer_is_the_gate(ran):
    class UpFirst(MLP):
        def forward(self, x):
            up, gate = self.gate_up(x).chunk(2, -1)
            return self.down(self.act(gate) * up)

    mlp, x = convert(UpFirst(joined=True), TECHNIQUES[0]).eval(), inputs()
    with torch.no_grad():
        expected = mlp(x)
        got = prepare_inference(mlp)(x)
    assert ran == [True]
    assert (got - expected).abs().max() <= 64 * torch.finfo(x.dtype).eps * expected.abs().max()


class SquaredReLU(nn.Module):
    def forward(self, x):
        return functional.relu(x).square()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
def test_a_gate_may_be_a_squared_relu(joined, dtype, ran):
    torch.manual_seed(0)
    mlp, x = MLP(joined).to(dtype), 4 * inputs(dtype)
    mlp.act = SquaredReLU()
    convert(mlp, TECHNIQUES[0]).eval()
    with torch.no_grad():
        expected = mlp(x)
        got = prepare_inference(mlp)(x)
    assert inference_report(mlp) == {"": "gated MLP in one call (squared ReLU)"}
    assert ran == [True]
    assert (got.double() - expected.double()).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_report_says_what_was_done_and_why_not():
    model = nn.Sequential(model_of(), Block().eval())
    prepare_inference(model)
    report = inference_report(model)
    assert report["0.0.norm"] == "RMS norm in one call"
    assert report["0.0.mlp"] == "gated MLP in one call (SiLU)"
    assert report["1.mlp"] == "as before: gate is dense"
    assert inference_report(release_inference(model)) == {}


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("technique", [FourBit(compute_dtype=torch.int8), EightBit(compute_dtype=torch.int8)])
@compiled
def test_products_in_integers_are_those_of_the_layers(technique, dtype, joined, rows, isa, ran):
    """Bit for bit, beside the kernel's own activation: inputs are rounded as the layers round them."""
    with kernels.temporary_cpu_backend(isa), torch.no_grad():
        mlp, x = model_of(technique, dtype, joined)[0].mlp, 3 * inputs(dtype, rows)
        parts = mlp.gate_up(x).chunk(2, -1) if joined else (mlp.gate(x), mlp.up(x))
        hidden = backend_for().gated(*parts, ACTIVATIONS["SiLU"], dtype)
        expected, floats = mlp.down(hidden), model_of(type(technique)(), dtype, joined)[0].mlp(x)
        assert inference_report(prepare_inference(mlp)) == {"": "gated MLP in one call (SiLU)"}
        assert torch.equal(mlp(x), expected)
        assert ran == [True]
        assert not torch.equal(expected, floats)


def test_numbers_that_8_bits_cannot_represent_run_as_before(ran):
    mlp, x = model_of(FourBit(compute_dtype=torch.int8))[0].mlp, inputs()
    x[0, 0, 0], x[1, 1] = float("inf"), 2.0**-70
    with torch.no_grad():
        expected = mlp(x)
        prepare_inference(mlp)
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=0, equal_nan=True)
    assert ran == [False]


def test_a_layer_that_computes_in_another_dtype_runs_as_before(ran):
    """The report says so; and where the model gets that dtype, C computes it."""
    model, x = model_of(FourBit(compute_dtype=torch.bfloat16)), inputs()
    report = inference_report(prepare_inference(model))
    assert report["0.mlp"].startswith("as before: gate takes torch.float32 and computes in torch.bfloat16: C needs")
    with torch.no_grad():
        model(x)
    assert len(ran) == 2  # the norms
    model.to(torch.bfloat16)
    report = inference_report(prepare_inference(model))
    assert report["0.mlp"].startswith("gated MLP")
    report = inference_report(prepare_inference(model.to(torch.float16)))
    assert report["0.mlp"].startswith("as before: gate takes torch.float16")
    assert report["0.norm"].startswith("as before: C computes no norms of torch.float16")


CHANGES = {
    "a hook": lambda model: model[0].mlp.gate.register_forward_hook(lambda *given: None),
    "an adapter": lambda model: convert(model[0].mlp.down, LoRA(2)),
    "a layer that is replaced": lambda model: setattr(model[0].mlp, "up", nn.Linear(WIDTH, INNER, bias=False)),
    "training mode": lambda model: model.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_runs_as_before(change, ran):
    model = model_of()
    prepare_inference(model)
    CHANGES[change](model)
    x = inputs()
    with torch.no_grad():
        got = model(x)
        release_inference(model)
        bound = 64 * torch.finfo(x.dtype).eps * got.abs().max()
        assert (got - model(x)).abs().max() <= bound
    assert len(ran) == (3 if change != "training mode" else 0)


def test_gradients_are_recorded_as_before(ran):
    model = prepare_inference(model_of())
    model[0].norm.weight.requires_grad_(True)
    x = inputs().requires_grad_()
    model(x).sum().backward()
    assert ran == []
    assert x.grad.any()
    assert model[0].norm.weight.grad.any()


def test_new_values_of_stored_parameters_are_used():
    first, second, x = model_of(), model_of(), inputs()
    for layer in (second[0].mlp.gate, second[0].mlp.down):
        layer.weight_packed.data = layer.weight_packed.data.flip(0)
        layer.weight_scales.data = layer.weight_scales.data.flip(0)
    prepare_inference(first)
    with torch.no_grad():
        first(x)
        first.load_state_dict(second.state_dict())
        expected = second(x)
        bound = 64 * torch.finfo(x.dtype).eps * expected.abs().max()
        assert (first(x) - expected).abs().max() <= bound
        for parameter in first.parameters():
            parameter.data = parameter.data.clone()
        assert (first(x) - expected).abs().max() <= bound


def test_other_shapes_dtypes_and_devices_run_as_before(ran):
    model = prepare_inference(model_of())
    with torch.no_grad():
        assert model(inputs(rows=3)[:, ::2]).shape == (2, 2, WIDTH)
        assert model(torch.empty(0, WIDTH)).shape == (0, WIDTH)
        assert model.to("meta")(torch.empty(3, WIDTH, device="meta")).shape == (3, WIDTH)
        with pytest.raises(RuntimeError):
            model_of()(torch.ones(2, WIDTH + 1))


def test_products_in_another_dtype_are_computed_by_the_modules(ran):
    model, x = model_of(FourBit(compute_dtype=torch.bfloat16)), inputs()
    with torch.no_grad():
        expected = model(x)
        got = prepare_inference(model)(x)
    assert len(ran) == 2  # norms
    assert torch.equal(got, expected)


def test_inputs_that_c_does_not_read_and_autocast_are_left_to_the_modules(ran):
    x, plain, model = inputs(rows=3), model_of()[0], prepare_inference(model_of())[0]
    with torch.no_grad():
        for other in (x[:, ::2], x.transpose(0, 1), x.double(), x.half(), x[0, 0]):
            assert torch.equal(model.norm(other), plain.norm(other))
            assert torch.equal(model.mlp(other), plain.mlp(other))
        assert torch.equal(model.norm(x[0, 0, 0]), plain.norm(x[0, 0, 0]))
        with torch.autocast("cpu", torch.bfloat16):
            got = model.mlp(x)
            assert got.dtype is torch.bfloat16
            assert torch.equal(got, plain.mlp(x))
    assert ran == []


def test_copies_and_pickles_are_plain():
    model = prepare_inference(model_of())
    pickled = [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), copy.copy(model[0].mlp), *pickled, torch.load(file, weights_only=False)):
        assert not inference_report(twin)
        assert not any("in_one_call" in vars(one) for one in twin.modules() if one not in set(model.modules()))
    assert type(copy.deepcopy(model[0].mlp)) is MLP
    assert model.state_dict().keys() == model_of().state_dict().keys()
    model[1].mlp.owner, model[1].norm = [model[1].mlp], model[0].norm  # a cycle, and a module that is shared
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[1].mlp.owner == [twin[1].mlp]
        assert twin[1].norm is twin[0].norm
        assert torch.equal(twin[0](inputs()), model_of()[0](inputs()))


def test_training_and_inference_are_prepared_one_at_a_time():
    model = convert(model_of(), LoRA(2), where=lambda name, _: "gate" in name)
    lowmem.prepare_training(model)
    with pytest.raises(RuntimeError, match="prepared for training: call lowmem.release_training"):
        prepare_inference(model)
    lowmem.release_training(model)
    prepare_inference(model)
    for change in (lowmem.prepare_training, lambda model: convert(model, Half())):
        with pytest.raises(RuntimeError, match="prepared for inference: call lowmem.release_inference"):
            change(model)
    with pytest.raises(TypeError, match="Module"):
        prepare_inference("model")


class OfModes(MLP):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * (1 if self.training else 2))


class NormOfModes(Norm):
    def forward(self, x):
        return super().forward(x) * (1 if self.training else 2)


class Dropout(MLP):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, self.training)


def test_modules_are_recognized_by_what_they_compute_in_evaluation(ran):
    for made, takes in ((OfModes(), False), (NormOfModes(), False), (Dropout(), True)):
        model, x = convert(nn.Sequential(made, MLP()), FourBit()).eval(), inputs()
        with torch.no_grad():
            expected = model(x)
            assert ("in one call" in inference_report(prepare_inference(model)).get("0", "")) == takes
            assert (model(x) - expected).abs().max() <= 64 * torch.finfo(x.dtype).eps * expected.abs().max()
            assert len(ran) == 1 + takes
            ran.clear()
            model.train()(x)
            assert not ran


class OfFunction(MLP):
    def __init__(self):
        super().__init__()
        self.function = functional.silu

    def forward(self, x):
        return self.down(self.function(self.gate(x)) * self.up(x))


class OfBuffer(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * self.factor)


def test_functions_and_buffers_of_a_module_may_change(ran):
    for kind, change in (
        (OfFunction, lambda mlp: setattr(mlp, "function", functional.relu)),
        (OfBuffer, lambda mlp: mlp.factor.fill_(3.0)),
    ):
        torch.manual_seed(0)
        model, x = convert(nn.Sequential(kind()), FourBit()).eval(), inputs()
        prepare_inference(model)
        with torch.no_grad():
            model(x)
            change(model[0])
            got = model(x)
            assert torch.equal(got, release_inference(model)(x))


def test_watch_notices_each_change():
    model = model_of()
    mlp = model[0].mlp

    for change in (
        lambda: setattr(mlp.gate.weight_packed, "data", mlp.gate.weight_packed.data.clone()),
        lambda: setattr(mlp, "act", nn.SiLU().eval()),
        lambda: setattr(mlp.gate, "weight_packed", nn.Parameter(mlp.gate.weight_packed.data, requires_grad=False)),
        lambda: convert(mlp.down, LoRA(2)).eval(),
        lambda: mlp.gate.train(),
        lambda: mlp.gate.register_forward_pre_hook(lambda *given: None),
    ):
        seen = make_unchanged_check(mlp, [(mlp.gate._parameters, "weight_packed")])
        assert seen()
        change()
        assert not seen()
        mlp.gate.eval()
