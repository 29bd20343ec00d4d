"""Whatever the factory does, a loaded model is whole, or an error says what stands in the way."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lowmem
from lowmem import FileError, FourBit, Half, LoRA, convert, load, save


def pair():
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))


def comes_back(model, factory, path, x=None):
    x = torch.ones(2, 16) if x is None else x
    save(model.eval(), path)
    loaded = load(path, factory).eval()
    assert torch.equal(loaded(x), model(x))
    return loaded


def test_buffers_that_are_no_part_of_the_state_any_more_are_passed_over(tmp_path):
    class Old(nn.Linear):
        def __init__(self, persistent):
            super().__init__(16, 8)
            self.register_buffer("positions", torch.arange(3), persistent=persistent)

    save(Old(True), tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", lambda: Old(False)).positions, torch.arange(3))


def test_a_buffer_without_values_is_named(tmp_path):
    def derived(persistent):
        model = pair()
        model.register_buffer("size", model[0].weight.abs().mean(), persistent=persistent)
        return model

    save(derived(False), tmp_path / "m")
    with pytest.raises(FileError, match="no values are known for size.*persistent buffer"):
        load(tmp_path / "m", lambda: derived(False))
    comes_back(derived(True), lambda: derived(True), tmp_path / "m")


def test_a_state_that_a_hook_copies_is_no_empty_model(tmp_path):
    def hooked():
        model = pair()
        model._register_state_dict_hook(
            lambda module, state, prefix, metadata: state.update({k: v.clone() for k, v in state.items()})
        )
        return model

    save(hooked(), tmp_path / "m")
    with pytest.raises(FileError, match="no values are known for 0.weight"):
        load(tmp_path / "m", hooked)


def test_extra_state_comes_back(tmp_path):
    class Scaled(nn.Linear):
        scale = torch.ones(1)

        def get_extra_state(self):
            return self.scale

        def set_extra_state(self, state):
            self.scale = state

        def forward(self, x):
            return super().forward(x) * self.scale

    model = Scaled(16, 8)
    model.scale = torch.full((1,), 3.0)
    comes_back(model, lambda: Scaled(16, 8), tmp_path / "m")
    comes_back(nn.Sequential(model), lambda: nn.Sequential(Scaled(16, 8)), tmp_path / "m")


@pytest.mark.parametrize("technique", [FourBit(), Half()])
def test_weights_that_share_memory_come_back(technique, tmp_path):
    def factory():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = nn.Parameter(model[0].weight.data)
        return model

    comes_back(convert(factory(), technique), factory, tmp_path / "m")


def test_a_factory_that_needs_values_is_told_so(tmp_path):
    save(convert(pair(), FourBit()), tmp_path / "m")
    for factory in (
        lambda: pair().cpu(),
        lambda: convert(pair(), FourBit()),
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 16)), nn.Linear(16, 8)),
    ):
        with pytest.raises(FileError, match="the factory needs the values of its parameters"):
            load(tmp_path / "m", factory)

    def broken():
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        load(tmp_path / "m", broken)


def test_a_model_that_was_there_before_is_left_as_it_was(tmp_path):
    save(convert(pair(), FourBit(), skip="1"), tmp_path / "m")
    existing = pair()
    with pytest.raises(FileError, match="was there before"):
        load(tmp_path / "m", lambda: existing)
    assert type(existing[0]) is nn.Linear
    assert not existing[0].weight.is_meta


def test_adapters_come_back_in_the_dtype_that_they_have(tmp_path):
    for techniques in ((FourBit(), LoRA(4)), (Half(torch.bfloat16), LoRA(4))):
        model = convert(pair(), *techniques).bfloat16()
        comes_back(model, lambda: pair().bfloat16(), tmp_path / "m", torch.ones(2, 16, dtype=torch.bfloat16))


def test_lazy_modules_are_refused_and_listed(tmp_path):
    lazy = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(8))
    with pytest.raises(ValueError, match="^1 is lazy and has no shape yet"):
        save(lazy, tmp_path / "m")
    assert lowmem.summary(lazy).weights == 16 * 16 + 16
    save(pair(), tmp_path / "m")
    with pytest.raises(FileError, match="no tensor with a shape"):
        load(tmp_path / "m", lambda: nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(8)))


def test_every_layer_that_has_no_such_form_is_named(tmp_path):
    save(convert(pair(), FourBit()), tmp_path / "m")
    with pytest.raises(FileError, match=r"0 is stored by FourBit.*; 1 is stored by FourBit"):
        load(tmp_path / "m", lambda: nn.Sequential(nn.LayerNorm(16), nn.ReLU()))
    names = [f"{number}.weight" for number in range(6)]
    for count, named in ((1, names[0]), (3, ", ".join(names[:3])), (4, f"{', '.join(names[:3])} and 1 more")):
        for saved, made, lacks in ((0, count, "it lacks"), (count, 0, "the model lacks")):
            save(nn.Sequential(*(nn.PReLU() for _ in range(saved))), tmp_path / "n")
            with pytest.raises(FileError, match=f"it holds another model than the factory makes: {lacks} {named}$"):
                load(tmp_path / "n", lambda made=made: nn.Sequential(*(nn.PReLU() for _ in range(made))))
    save(nn.ModuleDict({"0": nn.PReLU()}), tmp_path / "n")
    with pytest.raises(FileError, match="makes: it lacks 1.weight, and the model lacks 0.weight$"):
        load(tmp_path / "n", lambda: nn.ModuleDict({"1": nn.PReLU()}))
    save(nn.Sequential(nn.PReLU(init=0.5), nn.PReLU()), tmp_path / "n")
    with pytest.raises(FileError, match="0.weight and 1.weight differ in it, and are one tensor in the model$"):
        load(tmp_path / "n", lambda: nn.Sequential(*[nn.PReLU()] * 2))
    save(nn.PReLU(3), tmp_path / "n")
    for factory in (lambda: nn.PReLU(4), lambda: nn.PReLU(3).double()):
        with pytest.raises(FileError, match=r"weight is torch.float32 \(3,\) in it, and torch.float(32 \(4|64 \(3)"):
            load(tmp_path / "n", factory)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


OUTER = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)  # made before any factory that copies it runs
ENCODERS = {
    "bare": encoder,
    "of a layer made before": lambda: nn.TransformerEncoder(OUTER, 2),
    "inside": lambda: nn.Sequential(nn.Linear(16, 16), encoder()),
}


@pytest.mark.parametrize("techniques", [(), (Half(),), (FourBit(),), (FourBit(), LoRA(2))], ids=str)
@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_an_encoder_whose_layers_are_copies_comes_back(kind, techniques, tmp_path):
    torch.manual_seed(0)
    model = ENCODERS[kind]()
    model = convert(model, *techniques) if techniques else model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "lora_b")):
                parameter.normal_()
    given = [parameter.clone() for parameter in OUTER.parameters()]
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        comes_back(model, ENCODERS[kind], tmp_path / "m", x)
    assert all(torch.equal(*pair) for pair in zip(OUTER.parameters(), given, strict=True))


class Attentive(nn.Module):
    """A plain linear layer that attention may read past its ``forward``, as some libraries put it there."""

    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2) if attention else nn.Module()
        self.attn.out_proj = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)


@pytest.mark.parametrize("technique", [FourBit(), Half()])
def test_layers_that_attention_reads_past_their_forward_are_stored(technique, tmp_path):
    model = convert(Attentive(True), technique).eval()
    save(model, tmp_path / "m")
    again, x = load(tmp_path / "m", lambda: Attentive(True)).eval(), torch.randn(3, 1, 8)
    assert torch.equal(again.attn(x, x, x)[0], model.attn(x, x, x)[0])


def test_adapters_of_layers_whose_weights_attention_reads_have_their_effect(tmp_path):
    model, x = convert(Attentive(True), LoRA(2)).eval(), torch.randn(3, 1, 8)
    torch.nn.init.normal_(lowmem.adapter_layers(model, "default")["attn.out_proj"].lora_b)
    expected = model.attn(x, x, x)[0]
    assert not torch.allclose(expected, Attentive(True).attn(x, x, x)[0])
    save(model, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", lambda: Attentive(True)).eval().attn(x, x, x)[0], expected)
    lowmem.save_adapter(model, tmp_path / "a")
    assert torch.equal(lowmem.load_adapter(Attentive(True).eval(), tmp_path / "a").attn(x, x, x)[0], expected)
    with pytest.raises(FileError, match="adapters for attn.in_proj_weight: the model has no layer"):
        load(tmp_path / "m", lambda: Attentive(False))


def test_loading_changes_no_layer_that_was_there_before(tmp_path):
    save(convert(nn.Sequential(nn.Linear(32, 8)), FourBit()), tmp_path / "m")
    before = nn.Sequential(nn.Linear(32, 8))
    layer, weight, values = before[0], before[0].weight, before[0].weight.clone()
    for factory in (lambda: nn.Sequential(before[0]), lambda: before.append(nn.Identity())):
        loaded = load(tmp_path / "m", factory)
        assert type(loaded[0]) is lowmem.Linear4Bit
        assert before[0] is layer
        assert layer.weight is weight
        assert torch.equal(weight, values)


def test_what_another_thread_makes_while_a_model_is_loaded_keeps_its_values(tmp_path):
    save(nn.Sequential(nn.Linear(32, 8)), tmp_path / "m")
    made = []

    def factory():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(4, 4)))
        thread.start()
        thread.join()
        return nn.Sequential(nn.Linear(32, 8))

    load(tmp_path / "m", factory)
    assert not any(parameter.is_meta for parameter in made[0].parameters())


def test_adapters_come_back_with_the_buffers_that_are_their_own(tmp_path):
    def factory():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))

    x = torch.linspace(-1, 1, 64).view(4, 16)
    model = factory().eval()
    base = model(x)
    for name, shift in (("a", 1), ("b", 2)):
        lowmem.deactivate(model) if lowmem.adapter_names(model) else None
        lowmem.add_adapter(model, name, LoRA(2))
        model.train()(torch.randn(32, 16) + shift)
        model.eval()
    for active in (["a"], ["b"], []):
        lowmem.deactivate(model)
        lowmem.activate(model, *active) if active else None
        loaded = comes_back(model, factory, tmp_path / "m", x)
        lowmem.deactivate(loaded)
        assert torch.equal(loaded(x), base)
        lowmem.activate(loaded, "a")
        lowmem.activate(model, "a")
        assert torch.equal(loaded(x), model(x)) == ("b" not in active)
