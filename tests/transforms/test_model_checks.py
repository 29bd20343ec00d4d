"""Every call that changes a model refuses the same faults: one clear error each, and the model stays as it was."""

import sys

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FourBit, Half, LoRA, convert
from lowmem.nn.sharded_parameters import imported_dtensor_types
from lowmem.transforms.model_checks import check_layers_are_changeable, check_model_is_changeable
from tests.refusing import facts, refused


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def make(*techniques):
    torch.manual_seed(0)
    return lowmem.convert(Net(), *techniques) if techniques else Net()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a"
    lowmem.save_adapter(make(FourBit(), LoRA(2)), path)
    return path


# A call -> the techniques of the model before it, and what it does. With ``where`` and ``skip`` unless it has none.
CALLS = {
    "convert to 16 bits": ((), lambda model, _, **options: lowmem.convert(model, Half(), **options)),
    "convert to 4 bits": ((), lambda model, _, **options: lowmem.convert(model, FourBit(), **options)),
    "convert with LoRA": ((), lambda model, _, **options: lowmem.convert(model, LoRA(2), **options)),
    "calibrate": ((), lambda model, _, **options: lowmem.calibrate(model, [torch.ones(2, 16)], **options)),
    "add_adapter": ((FourBit(),), lambda model, _, **options: lowmem.add_adapter(model, "x", LoRA(2), **options)),
    "restore": ((FourBit(), LoRA(2)), lambda model, _, **options: lowmem.restore(model, **options)),
    "load_adapter": ((FourBit(),), lambda model, file: lowmem.load_adapter(model, file)),
    "load_adapter again": ((FourBit(), LoRA(2)), lambda model, file: lowmem.load_adapter(model, file)),
    "merge": ((FourBit(), LoRA(2)), lambda model, _: lowmem.merge(model)),
    "merge to a dtype": ((FourBit(), LoRA(2)), lambda model, _: lowmem.merge(model, torch.bfloat16)),
    "merge_adapter": ((FourBit(), LoRA(2)), lambda model, _: lowmem.merge_adapter(model, "default")),
}


class DistributedDataParallel(nn.Module):
    """As torch's, whose own needs a group of processes; ``load_adapter`` looks into that one."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class FullyShardedDataParallel(DistributedDataParallel):
    pass


class PeftLinear(nn.Module):
    """As PEFT's LoRA layer is built; its class says that it is PEFT's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


PeftLinear.__module__ = "peft.tuners.lora.layer"


class Shard(torch.Tensor):
    """As a DTensor, of which no other process has a part."""


def of_inference_mode(model):
    with torch.inference_mode():
        model.d = nn.Linear(4, 4)
    return model


def on_meta(model):
    model.b.to("meta")
    return model


def sharded(model):
    layer = getattr(model.b, "base", model.b)
    name = next(iter(layer._parameters))
    layer._parameters[name] = nn.Parameter(layer._parameters[name].detach().as_subclass(Shard), requires_grad=False)
    return model


def inside_peft(model):
    model.b = PeftLinear(model.b)
    return model


def prepared(model):
    layer = getattr(model.b, "base", model.b)
    layer.__class__ = type("Prepared", (type(layer),), {"released_by": "release_training"})
    return model


def lazy(model):
    model.b = nn.LazyLinear(16)
    return model


# A fault -> how a model gets it, the error, its text for all calls but those of the last entry, which take the model.
FAULTS = {
    "DDP": (DistributedDataParallel, ValueError, "the model itself is a DistributedDataParallel.*model.module", []),
    "FSDP": (
        lambda m: nn.Sequential(FullyShardedDataParallel(m)),
        ValueError,
        "0 is a FullyShardedData",
        ["load_ad"],
    ),
    "inference tensors": (of_inference_mode, RuntimeError, r"d.weight was made inside torch.inference_mode\(\)", []),
    "no values": (on_meta, ValueError, r"b\S*( is on|: weight is on) the meta device and has no values", []),
    "shards": (sharded, ValueError, r"b\S* is sharded \(a DTensor\): .*before fully_shard", []),
    "PEFT": (
        inside_peft,
        ValueError,
        "b is inside b, a PeftLinear of PEFT|b.base_layer is inside b|it adapts b, and LoRA has no form of it",
        ["restore"],
    ),
    "prepared": (prepared, RuntimeError, r"b\S* is prepared for training: call lowmem.release", []),
    "lazy": (lazy, ValueError, "b is lazy and has no shape yet|b, which is a LazyLinear", ["merge", "restore"]),
    "no module": (lambda _: "model", TypeError, "model must be a torch.nn.Module, found str", []),
}


@pytest.fixture
def dtensor(monkeypatch):
    """Let this process believe that it has shards: a real one needs a group of processes."""
    monkeypatch.setattr("lowmem.transforms.model_checks.imported_dtensor_types", lambda: (Shard,))


@pytest.mark.usefixtures("dtensor")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_refuses_every_fault_and_the_model_stays(fault, file):
    spoil, error, text, passing = FAULTS[fault]
    for call, (techniques, change) in CALLS.items():
        if not any(call.startswith(one) for one in passing):
            with refused(model := spoil(make(*techniques)), error, text):
                change(model, file)


def test_every_call_refuses_inference_mode_and_bad_choices(file):
    for call, (techniques, change) in CALLS.items():
        model = make(*techniques)
        with refused(model, RuntimeError, r"inside torch.inference_mode\(\).*leave it"), torch.inference_mode():
            change(model, file)
        wrong = {
            "where": [
                ("a", TypeError, "where='a' must be callable"),
                (lambda path: True, TypeError, "where=.* must be callable with a path and a module, or None"),
                (
                    lambda *_: False,
                    ValueError,
                    "no module: where= gets paths as a, b, c|^no module of Net that where= and",
                ),
            ],
            "skip": [
                ("zz*", ValueError, r"skip='zz\*' matches no module of Net"),
                (3, TypeError, r"skip=\(3,\) must be glob patterns of paths"),
                (["a", 3], TypeError, r"skip=\('a', 3\) must be glob patterns"),
            ],
        }
        for name, cases in ({} if call.startswith(("load", "merge")) else wrong).items():
            for value, error, text in cases:
                with refused(model, error, text):
                    change(model, file, **{name: value})


def test_what_is_prepared_elsewhere_or_lazy_elsewhere_does_not_hinder(file):
    """An adapter is merged after training, and lazy layers that are left out stay lazy."""
    for call, (techniques, change) in CALLS.items():
        model = make(*techniques)
        model.more = nn.LazyLinear(4)
        options = {"skip": "more"} if call in ("convert with LoRA", "add_adapter") else {}
        if call.startswith("convert to") or call == "calibrate":
            continue  # other tests have these
        change(model, file, **options)
        assert not model.more.weight.requires_grad or call not in ("convert with LoRA", "add_adapter", "load_adapter")
        model.more(torch.ones(1, 3))


def test_merging_what_is_peft_s_says_so():
    for merge in (lowmem.merge, lambda model: lowmem.merge_adapter(model, "default")):
        with pytest.raises(
            ValueError, match=r"holds b, a PeftLinear of PEFT, whose adapters are not .*: call merge_and_unl"
        ):
            merge(inside_peft(Net()))
        with pytest.raises(ValueError, match="Net has no adapter"):
            merge(Net())


def test_a_valid_model_passes_and_a_layer_on_meta_does_not(monkeypatch):
    assert all(kind.__name__ == "DTensor" for kind in imported_dtensor_types())
    with monkeypatch.context() as patch:  # no module may be imported yet
        patch.delitem(sys.modules, "torch.distributed.tensor", raising=False)
        assert imported_dtensor_types() == ()
    check_model_is_changeable("f", Net())
    check_layers_are_changeable("f", {Net(): ""})
    with pytest.raises(ValueError, match="weight is on the meta device and has no values: load its values before f"):
        check_layers_are_changeable("f", {nn.Linear(2, 2, device="meta"): ""})


class UsersPeftLinear(PeftLinear):
    """A user's own kind of it."""


ADAPTS = ("convert with LoRA", "add_adapter")  # after which only the adapters of lowmem train


@pytest.mark.filterwarnings("ignore:layers were quantized by their weights alone", "ignore:fewer rows than columns")
@pytest.mark.parametrize("kind", [PeftLinear, UsersPeftLinear])
@pytest.mark.parametrize("call", ["convert to 4 bits", "convert to 16 bits", "calibrate", *ADAPTS])
def test_layers_inside_peft_s_are_refused_and_the_model_stays(kind, call):
    change = CALLS[call][1]
    model = nn.Sequential(nn.Linear(16, 16), kind(nn.Linear(16, 16)))
    model[1].base_layer.requires_grad_(False)
    message = r"1.base_layer is inside 1, a \w+ of PEFT.*before get_peft_model, or call merge_and_unload"
    with refused(model, ValueError, message):
        change(model, None)
    inner = facts(model[1])
    if call in ADAPTS:
        with refused(model, ValueError, r"the model holds 1, a \w+ of PEFT.*before get_peft_model"):
            change(model, None, skip="1.*")
    else:
        change(model, None, skip="1.*")
    assert facts(model[1]) == inner


def test_a_model_that_peft_has_wrapped_is_refused_whatever_is_selected():
    kind = type("PeftModel", (nn.Sequential,), {"__module__": "peft.peft_model"})
    for call in ("convert to 4 bits", "calibrate", *ADAPTS):
        model = kind(PeftLinear(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 16))
        for options, found in (
            ({}, "0.base_layer is inside the model itself, a PeftModel of PEFT"),
            ({"skip": "0.*"}, "2 is inside the model itself, a PeftModel of PEFT"),
            ({"where": lambda *_: False}, "the model is a PeftModel of PEFT"),
        ):
            with refused(model, ValueError, f"^{found}.* before get_peft_model, or call merge_and_unload"):
                CALLS[call][1](model, None, **options)
        with refused(model, ValueError, "^the model holds module, a PeftModel of PEFT"):
            CALLS[call][1](nn.ModuleDict({"module": model}), None, where=lambda *_: False)


def test_what_is_converted_first_can_go_into_peft_s_layers():
    model = convert(nn.Sequential(nn.Linear(8, 8)), FourBit())
    model[0] = PeftLinear(model[0])
    x = torch.randn(2, 8)
    model(x).sum().backward()
    assert model[0].lora_B["default"].weight.grad is not None


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, which has few operators, as torchao's are."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.alias):
            return Wrapped(args[0].values)
        if function.overloadpacket is torch.ops.aten.t:
            return Wrapped(args[0].values.t())
        if function.overloadpacket is torch.ops.aten.addmm:
            return torch.addmm(args[0], args[1], args[2].values)
        raise NotImplementedError(f"{function} is not there")


def with_wrapped():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = nn.Parameter(Wrapped(model["b"].weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "technique", [lowmem.Half(), lowmem.EightBit(), lowmem.FourBit(), lowmem.Budget(bits=6)], ids=str
)
def test_tensors_that_compute_by_themselves_are_refused_by_name_or_left(technique):
    model = with_wrapped()
    with pytest.raises(
        ValueError, match=r"^b is a Wrapped of tests, whose values convert cannot read: leave.*skip='b'"
    ):
        lowmem.convert(model, technique)
    assert type(model["a"]) is nn.Linear
    lowmem.convert(model, technique, skip="b")
    assert type(model["a"]) is not nn.Linear


def test_quantizing_a_tensor_that_computes_by_itself_names_its_class():
    for store in (lowmem.quantize, lowmem.Half().store):
        with pytest.raises(TypeError, match="weight is a Wrapped of tests, whose values cannot be read: quantize"):
            store(Wrapped(torch.ones(4, 16)))


def test_adapters_work_on_tensors_of_other_libraries_and_what_reads_them_is_refused(tmp_path):
    model = lowmem.convert(with_wrapped(), lowmem.LoRA(2))
    nn.init.ones_(model["b"].lora_b)
    x = torch.ones(3, 16)
    expected = nn.functional.linear(x, with_wrapped()["b"].weight.values, model["b"].bias).shape
    out = model["b"](x)
    out.sum().backward()
    assert out.shape == expected
    assert model["b"].lora_a.grad.any()
    for function, message in (
        (lambda: lowmem.merge(model), "b is a Wrapped of tests, whose values merging cannot read: keep the adapter"),
        (lambda: lowmem.merge_adapter(model, "default"), "b is a Wrapped of tests, whose values merging cannot read"),
        (lambda: lowmem.save_adapter(model, tmp_path / "a"), "b.weight is a Wrapped.*format='peft'"),
        (lambda: lowmem.save(model, tmp_path / "m"), "b.weight is a Wrapped of tests, whose values save cannot read"),
    ):
        with pytest.raises(ValueError, match=message):
            function()
    assert not [*tmp_path.iterdir()]
    lowmem.save_adapter(model, tmp_path / "peft", format="peft")
    assert type(lowmem.load_adapter(with_wrapped(), tmp_path / "peft")["a"]) is type(model["a"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("technique", [lowmem.FourBit(), lowmem.LoRA(2)], ids=str)
def test_nested_weights_are_refused_by_name(technique):
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["b"].weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)]))
    with pytest.raises(ValueError, match=r"b.weight is a nested tensor.*or use skip="):
        lowmem.convert(model, technique)
    assert type(model["a"]) is nn.Linear
