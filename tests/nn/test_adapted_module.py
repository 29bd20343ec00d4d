"""A module with adapters stays what it is, and computes with W + s B A whoever reads its weight."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowmem
from lowmem import EightBit, FourBit, Half, LoRA, convert, restore
from lowmem.nn.adapted_module import AdaptedModule
from lowmem.nn.adapted_weight import AdaptedWeight
from tests.models import out_of_file
from tests.selection import covering
from tests.test_any_model import Experts, Transposed


class Kernels(nn.Module):
    """Convolutions of all dimensions, plain and transposed, with every option."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(8, 12, 3, stride=2, padding=1, groups=4, padding_mode="circular")
        self.grow = nn.ConvTranspose1d(12, 8, 4, stride=2, groups=2, output_padding=1, bias=False)
        self.two = nn.Conv2d(1, 4, (3, 2), padding="same", dilation=2)
        self.wide = nn.ConvTranspose2d(4, 3, 2, stride=(2, 1), dilation=2)
        self.three = nn.Conv3d(1, 2, 2)
        self.last = nn.ConvTranspose3d(2, 4, 2, groups=2)

    def forward(self, x):
        x = self.grow(self.one(x))[:, None]  # (batch, 1, 8, length)
        x = self.wide(self.two(x))[:, None]
        return self.last(self.three(x).sigmoid())


class Attentions(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True, add_bias_kv=True)

    def forward(self, x):
        x = x + self.same(x, x, x, need_weights=False)[0]
        x = x + self.same(x, x.flip(1), x.flip(1))[0]
        return x + self.other(x, x[..., :8], x[..., 8:])[0]


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.bag = nn.Embedding(50, 16, padding_idx=3), nn.EmbeddingBag(50, 16, mode="mean")
        self.sums = nn.EmbeddingBag(50, 16, mode="sum")

    def forward(self, indices):
        weights = torch.linspace(0, 1, indices.numel()).view(indices.shape).to(self.sums.weight.dtype)
        return self.tokens(indices).sum(1) + self.bag(indices) + self.sums(indices, per_sample_weights=weights)


class TransposedExperts(Experts):
    """Stacks of (in, out) matrices, as gpt-oss has them, which all tokens see."""

    is_transposed = True
    grouped = hasattr(F, "grouped_mm")

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 48) / 4)
        self.down = nn.Parameter(torch.randn(4, 24, 16) / 5)

    def forward(self, x):
        x = x.flatten(0, 1)
        gate, up = torch.bmm(x.expand(4, -1, -1), self.up).chunk(2, -1)
        first = torch.stack([h @ self.down[e] for e, h in enumerate(F.silu(gate) * up)])
        offsets = torch.tensor([3, 3, 7, 12], dtype=torch.int32)
        if not self.grouped or x.dtype == torch.float64:
            return first.sum(0)
        return first.sum(0) + F.grouped_mm(F.grouped_mm(x, self.up, offs=offsets)[:, :24], self.down, offs=offsets)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(16, 8, batch_first=True, bidirectional=True), nn.GRU(16, 12, batch_first=True)
        self.cell, self.last = nn.GRUCell(12, 16), nn.LSTMCell(16, 8)

    def forward(self, x):
        x = self.gru(self.lstm(x)[0])[0].flatten(0, 1)
        x = self.cell(x, x.new_ones(len(x), 16))
        return self.last(x, (x.new_ones(len(x), 8), x.new_zeros(len(x), 8)))[0]


X = lambda: torch.randn(2, 6, 16)  # noqa: E731
MODELS = {
    "Linear": (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), X, ["0", "2"]),
    "Conv1D": (lambda: nn.Sequential(Transposed(16, 24), nn.ReLU(), Transposed(24, 8)), X, ["0", "2"]),
    "experts": (lambda: nn.Sequential(nn.Identity(), TransposedExperts()), X, ["1.up", "1.down"]),
    "attention": (
        Attentions,
        X,
        [
            *("same.in_proj_weight", "same.out_proj"),
            *("other.q_proj_weight", "other.k_proj_weight", "other.v_proj_weight", "other.out_proj"),
        ],
    ),
    "tables": (Tables, lambda: torch.randint(50, (2, 6)), ["tokens", "bag", "sums"]),
    "kernels": (Kernels, lambda: torch.randn(2, 8, 12), ["one", "grow", "two", "wide", "three", "last"]),
    "subclass": (lambda: nn.Sequential(Doubled(16, 8)), X, ["0"]),
    "recurrent": (
        Recurrent,
        X,
        [
            *(f"lstm.weight_{of}_l0{way}" for way in ("", "_reverse") for of in ("ih", "hh")),
            *("gru.weight_ih_l0", "gru.weight_hh_l0", "cell.weight_ih", "cell.weight_hh"),
            *("last.weight_ih", "last.weight_hh"),
        ],
    ),
}
CODED = {
    "nf4": (FourBit("nf4", 16),),
    "offsets": (FourBit("int4", 8, offsets=True, embeddings="4bit"),),
    "int8": (EightBit(16),),
}
BASES = {"dense": (), "bfloat16": (Half(torch.bfloat16),), **CODED}
models = pytest.mark.parametrize("name", MODELS)


def everywhere(path, module):
    return True


def make(name, base, **options):
    """Return a model with adapters on all of its parameters that can have some, filled, and an input."""
    torch.manual_seed(0)
    model = convert(MODELS[name][0](), *BASES[base], LoRA(2, alpha=3, **options), where=everywhere)
    return fill(model.eval()), MODELS[name][1]()


def fill(model, name="default"):
    with torch.no_grad():
        for adapter in lowmem.adapter_layers(model, name).values():
            adapter.lora_a.normal_(0, 0.3)
            adapter.lora_b.normal_(0, 0.3)
    return model


def twin_of(model):
    """Return a dense model with the adapters added to its weights."""
    deltas = {place: adapter.delta() for place, adapter in lowmem.adapter_layers(model, "default").items()}
    twin = lowmem.delete_adapter(copy.deepcopy(model), "default")
    twin = restore(twin) if any(hasattr(module, "forms") for module in twin.modules()) else twin
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for place, delta in deltas.items():
            parameters[place if place in parameters else f"{place}.weight"] += delta
    return twin


def gradients(model, out):
    model.zero_grad()
    out.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("base", BASES)
@models
def test_it_is_the_dense_module_of_the_sum_and_trains_without_making_it(name, base, monkeypatch):
    model, x = make(name, base)
    plain = MODELS[name][0]()
    assert [*lowmem.adapter_layers(model, "default")] == MODELS[name][2]
    for place, module in plain.named_modules():
        assert isinstance(model.get_submodule(place), type(module))
    if name != "recurrent":  # torch's recurrent kernels take whole weights
        monkeypatch.setattr(AdaptedWeight, "values", lambda self: pytest.fail("the sum was made"))
    out = model(x)
    twin = twin_of(model)
    torch.testing.assert_close(out, twin(x), rtol=1e-4, atol=1e-4)
    found = gradients(model, out)
    trained = [p for place in lowmem.adapter_layers(model, "default").values() for p in (place.lora_a, place.lora_b)]
    assert len(found) == len(trained)
    assert all(p.requires_grad and p.grad.any() for p in trained)
    again = gradients(model, checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(found[key], again[key]) for key in found)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert (model(x).float() - out).norm() < 0.05 * out.norm()
    wide = copy.deepcopy(model).double()
    exact = wide(x.double() if x.is_floating_point() else x)
    if name != "experts":  # whose last terms need grouped_mm
        assert (exact - out).norm() < 1e-4 * exact.norm()
    lowmem.deactivate(model)
    assert not any(isinstance(getattr(module, "weight", None), AdaptedWeight) for module in model.modules())


@models
@pytest.mark.parametrize("base", BASES)
def test_copies_pickles_states_and_files_keep_it(name, base, tmp_path):
    model, x = make(name, base)
    expected = model(x)
    fresh = lambda: convert(MODELS[name][0](), *BASES[base], LoRA(2, alpha=3), where=everywhere).eval()  # noqa: E731
    other = fresh()
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    lowmem.save(model, tmp_path / "model")
    loaded = lowmem.load(tmp_path / "model", lambda: MODELS[name][0]()).eval()
    lowmem.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    plain = MODELS[name][0]().eval()
    plain = convert(plain, *BASES[base]) if BASES[base] else plain
    lowmem.load_adapter(plain, tmp_path / "adapter")
    twins = [other, *map(out_of_file, (loaded, plain)), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
            n: p.requires_grad for n, p in model.named_parameters()
        }
    if BASES[base]:
        restored = restore(copy.deepcopy(model))
        torch.testing.assert_close(restored(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(restored(x), lowmem.delete_adapter(copy.deepcopy(restored), "default")(x))


@pytest.fixture
def without_fast_path():
    """torch's fused attention, which is taken without adapters, rounds otherwise."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fused)


@pytest.mark.usefixtures("without_fast_path")
@models
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_adapters_come_merge_and_go_and_leave_every_bit(name, base):
    torch.manual_seed(0)
    model, x = MODELS[name][0]().eval(), MODELS[name][1]()
    model = (convert(model, *BASES[base]) if BASES[base] else model).requires_grad_(
        False
    )  # of which torch's bits depend
    classes = [type(module) for module in model.modules()]
    state, before = copy.deepcopy(model.state_dict()), model(x)
    modules = [*model.modules()]
    lowmem.add_adapter(model, "a", LoRA(2), where=everywhere)
    if name == "recurrent":  # multiplied by torch, no longer by kernels of stored weights: sums in another order
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(model(x), before)
    fresh = lowmem.merge(copy.deepcopy(model))
    assert torch.equal(fresh(x), before)
    fill(model, "a")
    alone = model(x)
    lowmem.add_adapter(model, "b", LoRA(3, alpha=1), where=everywhere)
    fill(model, "b")
    both = model(x)
    assert not torch.equal(both, alone)
    lowmem.deactivate(model, "b")
    assert torch.equal(model(x), alone)
    lowmem.activate(model)
    if base in CODED:
        with pytest.warns(UserWarning, match="merge quantized"):
            lowmem.merge_adapter(model, "a")
    else:
        lowmem.merge_adapter(model, "a")
    lost = {"dense": 1e-4, "bfloat16": 0.05}.get(base, 0.5)  # by storing the sum
    assert (model(x) - both).norm() < lost * both.norm()
    assert set(model.state_dict()) == {*state, *(k for k in model.state_dict() if ".adapters." in k)}
    merged = model(x)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(copy.deepcopy(model)(x), merged)
    assert torch.equal(model(x), merged)
    lowmem.unmerge_adapter(model)
    assert torch.equal(model(x), both)
    for adapter in ("b", "a"):
        lowmem.delete_adapter(model, adapter)
    assert torch.equal(model(x), before)
    assert [type(module) for module in model.modules()] == classes
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@models
@pytest.mark.parametrize("to", ["same format", torch.bfloat16, torch.float64])
def test_a_merge_reports_each_weight_and_its_outputs(name, to):
    model, x = make(name, "bfloat16")
    places = [*lowmem.adapter_layers(model, "default")]
    expected, twin = model(x), twin_of(model)
    merged, report = lowmem.merge(copy.deepcopy(model), to, inputs=(x,), report=True)
    assert [row.path for row in report] == places
    assert all(0 <= row.after < row.before for row in report)
    assert all(row.output_after < row.output_before for row in report if row.output_after is not None)
    if to == torch.float64:
        wide = x.double() if x.is_floating_point() else x
        if name != "experts":
            torch.testing.assert_close(merged(wide), twin.double()(wide), rtol=1e-4, atol=1e-4)
    elif to == "same format":
        assert (merged(x) - expected).norm() < 0.05 * expected.norm()
    assert not any(isinstance(module, AdaptedModule) for module in merged.modules())


@pytest.mark.compile(keep=1)
@covering(1, name=MODELS, base=BASES)
@pytest.mark.no_cover
def test_it_compiles_whole_and_exports(name, base, request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    model, x = make(name, base)
    if name == "experts":
        model[1].grouped = False  # torch records grouped_mm in bfloat16 only
    expected = gradients(model, model(x))
    # torch breaks the graph at each recurrent layer, a dense one too
    out = torch.compile(model, fullgraph=name != "recurrent", backend="aot_eager")(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    for key, value in gradients(model, out).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # of torch's own fast path
def test_fast_paths_of_attention_and_encoders_do_not_pass_the_adapters_over():
    torch.manual_seed(0)
    for base in BASES.values():
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        plain = convert(copy.deepcopy(encoder), *base) if base else copy.deepcopy(encoder)
        only = lambda path, module: path == "layers.1.self_attn"  # noqa: E731
        model = fill(lowmem.add_adapter(copy.deepcopy(plain), "default", LoRA(2), where=only))
        x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.no_grad():
            fast, slow = model(x, src_key_padding_mask=mask), twin_of(model)
            torch.testing.assert_close(fast[~mask], slow(x, src_key_padding_mask=mask)[~mask], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(fast, plain(x, src_key_padding_mask=mask), atol=1e-2)
            lowmem.deactivate(model)
            torch.testing.assert_close(model(x), plain(x))


def test_loftq_lowers_the_error_of_every_kind_of_weight():
    for name in MODELS:
        torch.manual_seed(0)
        model = MODELS[name][0]()
        dense = {n: p.detach().clone() for n, p in model.named_parameters()}
        model = convert(model, FourBit("nf4", 16), LoRA(2, init="loftq"), where=everywhere)
        for place, adapter in lowmem.adapter_layers(model, "default").items():
            path, _, parameter = place.rpartition(".") if f"{place}.weight" not in dense else (place, "", "weight")
            layer = model.get_submodule(path)
            stored = layer.stored_tensor(parameter).dequantize()
            wanted = dense[f"{path}.{parameter}"]
            assert (stored + adapter.delta() - wanted).norm() < 0.95 * (stored - wanted).norm(), place
        with pytest.raises(ValueError, match="init='loftq' approximates what 4 or 8 bits lose"):
            convert(MODELS[name][0](), LoRA(2, init="loftq"), where=everywhere)


def test_weights_that_are_shared_keep_their_base_and_their_own_adapters():
    tokens, head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
    for base in BASES.values():
        model = nn.ModuleDict({"tokens": copy.deepcopy(tokens), "head": copy.deepcopy(head)})
        model["head"].weight = model["tokens"].weight
        model = convert(model, *base, LoRA(2), where=lambda path, _: path in ("tokens", "head", ""))
        fill(model)
        before = model["head"](torch.ones(1, 16))
        model["head"].weight = model["tokens"].weight  # as tie_weights() does
        assert torch.equal(model["head"](torch.ones(1, 16)), before)
        assert isinstance(model["tokens"].weight, AdaptedWeight)
        shared = [one for one in model.parameters() if one.numel() == 320 and not one.requires_grad]
        assert len(shared) <= 1


def test_recurrent_layers_are_left_out_by_default_and_named():
    model = nn.ModuleList([nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.Linear(4, 4)])
    rows = {row.path: row.reason for row in lowmem.summary(convert(model, LoRA(2)))}
    for path in "01":
        assert "LoRA leaves recurrent layers out: where= takes them" in rows[path]


class Standardized(nn.Conv2d):
    """Computes another kernel of its weight, where torch's forward convolves."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.norm(), bias)


SUBCLASSES = {
    "Linear": (nn.Linear, (16, 8), lambda: torch.randn(5, 16)),
    "Conv1D": (Transposed, (16, 8), lambda: torch.randn(5, 16)),
    "Embedding": (nn.Embedding, (30, 8), lambda: torch.randint(30, (2, 5))),
    "EmbeddingBag": (nn.EmbeddingBag, (30, 8), lambda: torch.randint(30, (2, 5))),
    "Conv2d": (nn.Conv2d, (4, 8, 3), lambda: torch.randn(2, 4, 6, 6)),
    "ConvTranspose1d": (nn.ConvTranspose1d, (4, 8, 3), lambda: torch.randn(2, 4, 6)),
}


@pytest.mark.parametrize("base", ["dense", "bfloat16", "nf4"])
@pytest.mark.parametrize("kind", SUBCLASSES)
def test_forward_of_super_adds_the_adapter_without_the_sum(kind, base, monkeypatch):
    layer, sizes, make_input = SUBCLASSES[kind]
    own = type("Own", (layer,), {"forward": lambda self, x: layer.forward(self, x) * 2})
    through_super = type("Own", (layer,), {})
    through_super.forward = lambda self, x: super(through_super, self).forward(x) * 2
    outputs, x = [], make_input()
    for made in (layer, through_super, own):
        torch.manual_seed(0)
        model = fill(convert(nn.Sequential(made(*sizes)), *BASES[base], LoRA(2), where=everywhere))
        if made is through_super and kind != "Conv1D":
            with monkeypatch.context() as patched:
                patched.setattr(AdaptedWeight, "values", lambda self: pytest.fail("the sum was made"))
                out = model(x)
        else:
            out = model(x)
        outputs.append(out if made is layer else out / 2)
        assert all(p.grad is None for p in model.parameters())
        out.sum().backward()
        assert all(part.lora_b.grad.any() for part in lowmem.adapter_layers(model, "default").values())
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-4 * float(outputs[0].detach().abs().max()))


def test_torch_fx_is_refused_where_it_looks_into_a_forward_that_calls_super():
    """It would record a call of the whole layer where the forward calls that of the dense layer."""
    model = convert(nn.Sequential(Doubled(16, 8)), LoRA(2))
    with pytest.raises(RuntimeError, match=r"cannot look into a Doubled.*lowmem.merge\(model\)"):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_convolution_that_changes_its_kernel_changes_that_of_the_sum(base):
    torch.manual_seed(0)
    model = fill(convert(nn.Sequential(Standardized(4, 8, 3)), *BASES[base], LoRA(2), where=everywhere))
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(model(x), twin_of(model)(x), rtol=1e-4, atol=1e-4)


def test_a_limit_of_norms_that_is_set_later_is_refused():
    for layer in (nn.Embedding(9, 4), nn.EmbeddingBag(9, 4, mode="sum")):
        model = convert(nn.Sequential(layer), LoRA(2), where=everywhere)
        model[0].max_norm = 0.1
        before = {name: one.clone() for name, one in model.state_dict().items()}
        with pytest.raises(RuntimeError, match="would write to a weight with adapters"):
            model(torch.tensor([[1, 2]]))
        assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_recurrent_layer_is_torch_s_own_again_without_adapters():
    torch.manual_seed(0)
    for kind in (nn.LSTM, nn.GRU):
        model, x = nn.Sequential(kind(4, 4)), torch.randn(3, 2, 4)
        before = model(x)[0]
        lowmem.add_adapter(model, "a", LoRA(2), where=everywhere)
        fill(model, "a")
        assert not torch.allclose(model(x)[0], before)
        model.double()
        lowmem.delete_adapter(model, "a")
        assert type(model[0]) is kind
        assert model[0]._flat_weights[0] is model[0].weight_ih_l0
        torch.testing.assert_close(model(x.double())[0], before.double(), rtol=1e-5, atol=1e-5)


def test_what_cannot_have_an_adapter_is_named_with_its_reason():
    for module, reason in (
        (nn.Bilinear(4, 4, 4), "both of its inputs are contracted with one weight"),
        (nn.EmbeddingBag(4, 4, mode="max"), "the largest of several rows is not linear"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm rescales its rows in place"),
    ):
        model = nn.ModuleList([module, nn.Linear(4, 4)])
        message = f"nothing to convert: LoRA looks for.*; 0 is a {type(module).__name__}: .*{reason}"
        with pytest.raises(ValueError, match=message):
            convert(model, LoRA(2), where=lambda path, _: path == "0")
        with pytest.raises(ValueError, match=message):
            lowmem.add_adapter(model, "a", LoRA(2), where=lambda path, _: path == "0")
        assert reason in {row.path: row.reason for row in lowmem.summary(convert(model, LoRA(2)))}["0"]
    odd = Transposed(4, 4)
    odd.adapters = 7
    with pytest.raises(ValueError, match="0: Transposed has an attribute `adapters` of its own"):
        convert(nn.Sequential(odd), LoRA(2))


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")  # of torch's own flags
def test_the_plan_counts_adapters_of_every_kind():
    for name in MODELS:
        if name == "experts":
            continue  # whose offsets are values
        for base in BASES.values():
            x = MODELS[name][1]()
            # A fake recurrent layer, also a dense one, has no workspace of oneDNN
            with torch.backends.mkldnn.flags(enabled=name != "recurrent"):
                planned = lowmem.plan(MODELS[name][0], *base, LoRA(2), batch=x, where=everywhere)
            model = convert(MODELS[name][0](), *base, LoRA(2), where=everywhere)
            tensors = {*model.parameters(), *model.buffers()}
            assert planned.stored_bytes == sum(tensor.nbytes for tensor in tensors)
            trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            assert trained == planned.stored["adapters"] == planned.gradients
            model = convert(MODELS[name][0](), *base, LoRA(2), where=everywhere)
            with torch.backends.mkldnn.flags(enabled=name != "recurrent"):
                measured = lowmem.measure.backward_bytes(model, x)
            assert planned.backward <= measured <= planned.backward + planned.scratch, (name, base)


def test_of_an_embedding_a_starts_at_zero_and_learns_faster():
    model = convert(nn.ModuleList([nn.Embedding(9, 16), nn.Conv1d(16, 4, 2)]), LoRA(2), where=everywhere)
    of_embedding, of_kernel = lowmem.adapter_layers(model, "default").values()
    slow, fast = lowmem.adapter_parameter_groups(model, lr=1e-4)
    assert {*fast["params"]} == {of_embedding.lora_a, of_kernel.lora_b}
    assert {*slow["params"]} == {of_embedding.lora_b, of_kernel.lora_a}
    model[0](torch.tensor([1, 4])).sum().backward()
    assert of_embedding.lora_a.grad.abs().sum(0).nonzero().flatten().tolist() == [1, 4]


def test_a_convolution_keeps_its_compute_dtype_and_its_bits():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8)
    for technique in (FourBit("nf4", 16, compute_dtype=torch.bfloat16), FourBit("nf4", 16), Half(torch.float16)):
        for options in ({}, {"padding": 1, "padding_mode": "circular"}):
            model = convert(nn.Sequential(nn.Conv1d(4, 6, 3, **options)), technique).requires_grad_(False)
            expected = model(x)
            lowmem.add_adapter(model, "a", LoRA(2), where=everywhere)
            assert torch.equal(model(x), expected)
            fill(model, "a")
            change = F.conv1d(
                F.pad(x, (1, 1), "circular") if options else x, lowmem.adapter_layers(model, "a")["0"].delta()
            )
            torch.testing.assert_close(model(x), expected + change, rtol=1e-4, atol=1e-4)
