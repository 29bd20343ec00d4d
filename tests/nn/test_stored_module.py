"""A module with stored parameters is what it was for everyone who reads, copies, saves or moves it."""

import copy
import io
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lowmem
from lowmem import EightBit, FourBit, Half, LoRA, StoredTensor, convert, restore
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.stored_module import StoredModule

BF16 = torch.bfloat16
TECHNIQUES = {"4-bit": FourBit("nf4"), "half": Half(BF16)}
techniques = pytest.mark.parametrize("technique", TECHNIQUES.values())
FORMS = TECHNIQUES | {"4-bit": FourBit("nf4", embeddings="4bit"), "8-bit": EightBit()}
FORMS["offsets"] = FourBit("int4", 8, offsets=True, embeddings="4bit")
forms = pytest.mark.parametrize("technique", FORMS.values())


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind(16, 24, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Own(nn.Linear):
    """A subclass with a state of its own, which reads its weight as Falcon does."""

    def __init__(self):
        super().__init__(16, 8)
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        self.calls += 1
        return x.to(self.weight.dtype) @ self.weight.T + self.bias


KINDS = {
    "Linear": (lambda: nn.Linear(16, 8), (3, 16)),
    "subclass": (Own, (3, 16)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2, padding_mode="circular"), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "Embedding": (lambda: nn.Embedding(12, 16), torch.tensor([[1, 11], [0, 4]])),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(12, 16, mode="sum"), torch.tensor([[1, 11], [0, 4]])),
    "attention": (Attention, (2, 3, 16)),
    "attention of other sizes": (lambda: Attention(kdim=16, vdim=16, add_bias_kv=True), (2, 3, 16)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (2, 3, 16)),
    "GRU": (lambda: Recurrent(nn.GRU), (2, 3, 16)),
    "RNN": (lambda: Recurrent(nn.RNN), (2, 3, 16)),
}
"""Kind of module -> what makes one, and its input or the shape of that."""
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, technique):
    """Return a dense model, the converted one, and an input."""
    make, x = KINDS[kind]
    torch.manual_seed(0)
    dense = make().eval()
    return dense, convert(copy.deepcopy(dense), technique), torch.randn(x) if isinstance(x, tuple) else x


def cast(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x


def kinds_of(model):
    return [type(one) for one in model.modules()]


@kinds
@forms
def test_it_computes_what_its_dequantized_weights_give_with_gradients(kind, technique):
    dense, model, x = made(kind, technique)
    twin = restore(copy.deepcopy(model))
    assert kinds_of(twin) == kinds_of(dense)
    for one in model.modules():
        for name in one.forms if isinstance(one, StoredModule) else ():
            assert getattr(one, name) is getattr(one, name)
            assert isinstance(getattr(one, name), nn.Parameter)
    if kind != "LSTM":  # torch's own needs a processor with AVX-512 for it
        with torch.autocast("cpu", BF16):
            assert model(x).dtype == dense(x).dtype
    x = cast(x, torch.float64)
    x.requires_grad_(x.is_floating_point())
    out, expected = model.double()(x), twin.double()(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    names = [name for name, p in model.named_parameters() if p.requires_grad]  # of biases
    if x.requires_grad:
        grads = (
            torch.autograd.grad(y.square().sum(), [x, *map(one.get_parameter, names)])
            for one, y in ((model, out), (twin, expected))
        )
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@kinds
@forms
def test_it_survives_every_way_a_model_travels(kind, technique, tmp_path):
    """Copies, pickles, states of plain tensors, and files."""
    _, model, x = made(kind, technique)
    expected, buffer = model(x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    if kind != "subclass":  # whose own state is no tensor
        lowmem.save(model, tmp_path / "model")
        twins.append(lowmem.load(tmp_path / "model", lambda: KINDS[kind][0]().eval()))
    assert all(type(value) in (torch.Tensor, dict) for value in model.state_dict().values())
    assert not any(isinstance(p, StoredTensor) for p in model.parameters())
    for state in (model.state_dict(), dict(model.state_dict())):
        for assign in (False, True):
            twins.append(convert(KINDS[kind][0]().eval(), technique))
            twins[-1].load_state_dict(copy.deepcopy(state), strict=True, assign=assign)
    for twin in twins:
        assert str(twin) == str(model)
        assert torch.equal(twin(x), expected)
        assert not any(p.requires_grad for n, p in twin.named_parameters() if n.endswith(("packed", "rounded")))


@kinds
def test_codes_of_another_format_are_refused_with_and_without_metadata(kind):
    _, model, x = made(kind, FORMS["4-bit"])
    for technique, form in (
        (FourBit("fp4", scales="double", embeddings="4bit"), "fp4"),
        (FourBit("nf4", 32, "double", embeddings="4bit"), "nf4, block_size=32"),
        (FourBit("nf4", 64, "float32", embeddings="4bit"), "nf4, block_size=64, scales=float32"),
        (EightBit(), "int8"),
    ):
        other = convert(KINDS[kind][0]().eval(), technique)
        before = other(x)
        for state, assign in itertools.product((model.state_dict(), dict(model.state_dict())), (False, True)):
            with pytest.raises(RuntimeError, match=f"stores .*{form}.*the state holds .*nf4, block_size=64"):
                other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), before)


@kinds
@forms
def test_a_cast_changes_no_stored_bit_and_what_is_computed_in(kind, technique):
    _, model, x = made(kind, technique)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    expected = model(x)
    wide = model.to(torch.float64)(cast(x, torch.float64))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-5)
    model.type(BF16)  # which casts integers, too
    assert model(cast(x, BF16)).dtype == BF16
    stored = [one for one in model.modules() if isinstance(one, StoredModule)]
    assert all(getattr(one, name).dtype == BF16 for one in stored for name in one.forms)
    after = model.state_dict()
    parts = ("_packed", "_scales", "_rounded")
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.endswith(parts))
    assert model.to("meta").to_empty(device="cpu")


WRONG = {
    "Linear": (
        (torch.randn(3, 9), "must end in in_features=16"),
        (torch.tensor(1.0), "must end in in_features=16"),
        (torch.ones(3, 16, dtype=torch.int64), "torch.int64 must be a floating-point"),
        (torch.ones(3, 16, dtype=torch.complex64), "torch.complex64 must be a floating-point"),
    ),
    "Conv2d": (
        (torch.randn(2, 3, 8, 8), "must be .*with in_channels=4"),
        (torch.randn(4, 8), r"must be \(batch, in_channels, height, width\)"),
        (torch.randn(1, 1, 4, 8, 8), "must be .*in_channels=4"),
        (torch.randn(1, 4, 2, 8), r"smaller than the kernel \(3, 3\)"),
        (torch.ones(1, 4, 8, 8, dtype=torch.int64), "torch.int64 must be a floating-point"),
    ),
    "Embedding": tuple(
        (x, None) for x in (torch.tensor([0, 12]), torch.tensor([-1]), torch.zeros(1), torch.tensor([True]))
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@forms
def test_a_wrong_input_raises_what_the_dense_module_raises(kind, technique):
    dense, model, _ = made(kind, technique)
    for x, message in WRONG[kind]:
        with pytest.raises((IndexError, RuntimeError)) as expected:
            dense(x)
        for given in (x, x.clone().requires_grad_()) if x.is_floating_point() else (x,):
            with pytest.raises(expected.type, match=message):
                model(given)


@techniques
def test_a_layer_moves_says_how_it_is_stored_and_takes_no_dense_state(technique):
    layer = convert(nn.Linear(16, 8), technique)
    form = "nf4, block_size=64, scales=double" if isinstance(technique, FourBit) else "bfloat16"
    assert f"in_features=16, out_features=8, bias=True, stored in {form}" in repr(layer)
    with pytest.raises(
        RuntimeError, match=f"weight is dense in the state, and stored in {form}.*load it before convert"
    ):
        layer.load_state_dict(nn.Linear(16, 8).state_dict())
    assert layer.to("meta").weight.is_meta
    assert layer(torch.empty(2, 16, device="meta")).shape == (2, 8)


@techniques
def test_ties_stay_ties_and_can_be_tied_again(technique):
    tokens, head = nn.Embedding(10, 32), nn.Linear(32, 10, bias=False)
    head.weight = tokens.weight
    model = convert(nn.ModuleList([tokens, head]), technique)
    assert model[0].weight is model[1].weight
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight is not model[0].weight
    assert len({id(p) for p in model.parameters()}) == len(model[0].part_parameter_names)
    twin[1].weight = model[0].weight
    assert twin[1].weight is model[0].weight is not twin[0].weight
    assert {id(p) for p in twin[1].parameters()} == {id(p) for p in model[0].parameters()}
    read = model[0].weight  # noqa: F841 - one of the two is kept
    model[1].to(BF16)  # a cast of one is seen by both
    twin = copy.deepcopy(model)
    for one in (model, twin, pickle.loads(pickle.dumps(model))):
        assert one[0].weight is one[1].weight
        assert one[0].weight.dtype == one[0](torch.tensor([1])).dtype == BF16
    assert model[0].float().weight is model[1].weight
    assert (model[1].weight.dtype, twin[1].weight.dtype) == (torch.float32, BF16)


@techniques
def test_a_dense_weight_makes_the_class_what_it_was(technique):
    layer = convert(nn.Linear(16, 8), technique)
    weight = nn.Parameter(torch.randn(8, 16))
    layer.weight = weight
    bias = layer.bias.dequantize() if isinstance(layer.bias, StoredTensor) else layer.bias
    x = torch.randn(2, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
    assert layer.weight is weight
    assert weight.requires_grad
    if isinstance(technique, FourBit):
        assert type(layer) is nn.Linear
        assert {*dict(layer.named_parameters())} == {"weight", "bias"}


@techniques
def test_a_part_of_a_model_is_restored_and_then_the_rest(technique):
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    keys, x = model.state_dict().keys(), torch.arange(4)
    expected = convert(model, technique)(x)
    restore(model, where=lambda path, _: path == "1", dtype=torch.float64)
    assert [isinstance(one, StoredModule) for one in model] == [True, False, True]
    assert model[1].weight.dtype == torch.float64
    torch.testing.assert_close(restore(model, dtype=torch.float32)(x), expected)
    assert model.state_dict().keys() == keys
    assert {one.dtype for one in restore(model, dtype=torch.float64).parameters()} == {torch.float64}
    convert(model.float(), technique)
    with pytest.raises(ValueError, match="no module of Sequential that where= and skip= leave has stored parameters"):
        restore(model, where=lambda path, _: path == "")


@techniques
def test_restore_keeps_adapters_and_ties(technique):
    model = nn.ModuleList([nn.Embedding(10, 32), nn.Linear(32, 10, bias=False)])
    model[1].weight = model[0].weight
    convert(model, technique)
    model[1] = convert(model[1], LoRA(2))
    restore(model)
    assert isinstance(model[1], nn.Linear)
    assert unadapted_parameter(model[1], "weight") is model[0].weight
    assert not model[0].weight.requires_grad


def test_a_tie_of_one_part_after_the_other_is_whole():
    one, other = convert(nn.Linear(32, 16), FourBit()), convert(nn.Linear(32, 16, bias=False), FourBit())
    weight = one.weight
    for part in one.part_parameter_names:  # as tie_weights of transformers does it, which reads the weight in between
        setattr(other, part, getattr(one, part))
        assert other.weight.shape == (16, 32)
    assert one.weight is weight
    assert other.weight is weight
    model = restore(nn.ModuleList([one, other]))
    assert model[0].weight is model[1].weight


def test_modules_that_share_parts_multiply_in_their_own_dtypes():
    stored = FourBit().store(torch.randn(32, 8))
    first, second = (convert(nn.Sequential(nn.LSTM(8, 8)), FourBit(compute_dtype=one))[0] for one in (None, BF16))
    for module in (first, second):
        module.set_stored_weight("weight_ih_l0", stored, (8,), torch.float32)
    assert first.weight_ih_l0_packed is second.weight_ih_l0_packed
    for module, dtype in ((first, None), (second, BF16), (first, None)):
        assert module.weight_ih_l0.form.compute_dtype is dtype
    first.weight_ih_l0.data = torch.randn(40, 8)
    assert second.weight_ih_l0.shape == (40, 8)
    assert second.weight_ih_l0.form.compute_dtype is BF16


@pytest.mark.parametrize("technique", [FourBit(compute_dtype=torch.bfloat16), EightBit(compute_dtype=torch.bfloat16)])
def test_a_table_is_multiplied_in_the_dtype_of_products_whoever_reads_it_first(technique):
    x = torch.randn(3, 16)
    for first in ("table", "head"):
        model = nn.ModuleDict({"table": nn.Embedding(24, 16), "head": nn.Linear(16, 24, bias=False)})
        model["head"].weight = model["table"].weight
        convert(model, technique)
        getattr(model[first], "weight")  # noqa: B009 - reads it
        out = nn.functional.linear(x, model["table"].weight)
        assert model["head"].weight is model["table"].weight
        assert torch.equal(out, out.bfloat16().float())
        assert torch.equal(out, model["head"](x))


def test_what_a_stored_parameter_cannot_become_is_refused_with_the_remedy():
    model, other = (convert(nn.Sequential(nn.Linear(16, 16)), FourBit()) for _ in range(2))
    dense, plain = nn.Linear(16, 16), torch.zeros(16, 16)
    names, weight = [*model.state_dict()], other[0].weight
    no_tensor = "cannot assign Tensor as parameter 'weight', which is stored in bof4s"
    for change, error, message in (
        (
            lambda: delattr(model[0], "weight"),
            AttributeError,
            r"weight is stored in .* cannot be deleted.*lowmem.restore",
        ),
        (
            lambda: setattr(model[0], "weight", weight.t()),
            RuntimeError,
            "transposed .* cannot be shared: give weight.deq",
        ),
        (lambda: setattr(model[0], "weight", plain), TypeError, no_tensor),
        (
            lambda: torch.func.functional_call(model, {"0.weight": plain}, (torch.randn(2, 16),)),
            TypeError,
            no_tensor,
        ),
        (
            lambda: setattr(dense, "weight", weight),
            RuntimeError,
            "dense module cannot hold a weight that is stored .*convert both",
        ),
        (
            lambda: prune.l1_unstructured(model[0], "weight", 0.5),
            RuntimeError,
            "cannot hold a weight that is stored in bof4s",
        ),
    ):
        with pytest.raises(error, match=message):
            change()
        assert isinstance(model[0].weight, StoredTensor)
        assert model[0].weight is not weight
    assert [*model.state_dict()] == names


def test_a_weight_of_another_form_changes_the_class():
    for technique, given in ((FourBit(), Half()), (Half(), FourBit())):
        layer, other = convert(nn.Linear(16, 8), technique), convert(nn.Linear(16, 8), given)
        x = torch.randn(2, 16)
        bias = layer.bias.dequantize() if isinstance(layer.bias, StoredTensor) else layer.bias
        layer.weight = other.weight
        assert layer.weight is other.weight
        torch.testing.assert_close(layer(x), nn.functional.linear(x, other.weight.dequantize(), bias))


def test_codes_without_their_scales_or_of_other_rows_are_not_taken():
    layer, other = (convert(nn.Linear(16, 8), FourBit()) for _ in range(2))
    before = layer.weight.dequantize()
    state = other.state_dict()
    del state["weight_scales"]
    with pytest.raises(RuntimeError, match="weight: the state holds packed of packed, scales"):
        layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight.dequantize(), before)
    for technique, told in (
        (FourBit("nf4", 8), "do not hold a weight of shape (2, 8, 16) in nf4"),
        (Half(BF16), "rounded.shape=(3, 8, 16) does not hold a weight of (2, 8, 16)"),
    ):
        layer, other = (convert(nn.Bilinear(8, 16, rows, bias=False), technique) for rows in (2, 3))
        inputs = torch.randn(4, 8), torch.randn(4, 16)
        assert torch.func.functional_call(layer, dict(layer.named_parameters()), inputs).shape == (4, 2)
        with pytest.raises(RuntimeError, match=re.escape(told)):
            torch.func.functional_call(layer, dict(other.named_parameters()), inputs)
        for name, part in other.named_parameters() if isinstance(technique, FourBit) else ():
            with pytest.raises(RuntimeError, match=re.escape(told)):  # one of two parts
                torch.func.functional_call(layer, {**dict(layer.named_parameters()), name: part}, inputs)


def test_models_that_are_stacked_compute_as_each_alone_or_say_that_they_cannot():
    def make(technique):
        return convert(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), technique)

    x = torch.randn(3, 5, 8)
    for technique in (Half(torch.bfloat16), FourBit("nf4")):
        models = [make(technique) for _ in range(3)]
        stacked = torch.func.stack_module_state(models)

        def call(parameters, buffers, x, one=models[0]):
            return torch.func.functional_call(one, (parameters, buffers), (x,))

        for in_dims, given in (((0, 0, None), x[0]), ((0, 0, 0), x)):
            run = torch.func.vmap(call, in_dims)
            if isinstance(technique, Half):
                expected = [model(given if in_dims[2] is None else given[n]) for n, model in enumerate(models)]
                torch.testing.assert_close(run(*stacked, given), torch.stack(expected))
            else:
                with pytest.raises(RuntimeError, match=r"vmap cannot compute with a stack of stored.*lowmem.restore"):
                    run(*stacked, given)
        torch.testing.assert_close(torch.func.vmap(models[0])(x), models[0](x))


@pytest.mark.parametrize("technique", [FourBit("nf4", search=True), FourBit("bof4s", 16), Half(torch.float16)])
def test_rows_that_stay_keep_their_bits_when_others_are_set(technique):
    for make in (lambda: nn.Embedding(16, 40), lambda: nn.Conv1d(6, 16, 3)):
        layer = convert(make(), technique)
        old = layer.weight.detach().clone()
        for cast, rows in ((torch.float32, 20), (torch.float32, 9), (torch.bfloat16, 9)):
            layer.to(cast)
            values = torch.randn(rows, *old.shape[1:]).to(cast)
            kept = min(rows, 9)
            values[1:kept] = layer.weight.dequantize()[1:kept]
            layer.weight.data = values
            assert layer.weight.shape == values.shape
            for part, before in zip(layer.weight.parts, old.parts, strict=True):
                assert torch.equal(part[1:kept], before[1:kept])
            assert not torch.equal(layer.weight[0].dequantize(), old[0].dequantize())


@pytest.mark.compile
@techniques
def test_a_layer_that_torch_compile_leaves_to_eager_computes_the_same(technique, request):
    """Dynamo breaks the graph at recurrent layers, and would compile functions of this library that they call."""
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    for options in ({}, {"bidirectional": True}):
        model, x = (
            convert(nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 16, 2, **options)), technique),
            torch.randn(3, 2, 16),
        )
        expected, _ = model(x)
        got, _ = torch.compile(model, backend="aot_eager")(x)
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("technique", [FourBit("nf4"), Half(torch.bfloat16), LoRA(2)])
def test_torch_s_script_is_told_what_does_the_same(technique):
    for layer in (nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Embedding(8, 8), nn.MultiheadAttention(8, 2)):
        model = convert(nn.Sequential(layer), technique, where=lambda *_: True)
        with pytest.raises(
            RuntimeError, match=r"torch.jit.script cannot compile .*: .*lowmem.(restore|merge)\(model"
        ):
            torch.jit.script(model)


@techniques
def test_a_module_that_is_asked_to_train_what_it_stores_refuses(technique):
    """A whole model asks no layer, and codes refuse it; see the next test for 16 bits."""
    layer = convert(nn.Linear(8, 8), technique)
    before = [one.requires_grad for one in layer.parameters()]
    with pytest.raises(
        RuntimeError, match=r"Linear\S* stores weight in .*frozen: train an adapter .*restore\(model\)"
    ):
        layer.requires_grad_()
    assert [one.requires_grad for one in layer.parameters()] == before
    assert layer.requires_grad_(False) is layer
    assert not any(one.requires_grad for one in layer.parameters())
    model = nn.Sequential(layer, nn.LayerNorm(8))
    if isinstance(technique, FourBit):
        with pytest.raises(RuntimeError, match="floating point"):
            model.requires_grad_(True)
        return
    model.requires_grad_(True)
    for data in (layer.bias.data, layer.bias.detach()):  # of which nobody asks a gradient
        assert torch.equal(nn.functional.pad(data, (0, 1))[:-1], layer.bias.dequantize())


def test_a_weight_that_is_stored_again_is_multiplied_in_the_same_dtype():
    model = convert(nn.Sequential(nn.LSTM(8, 8)), FourBit(compute_dtype=torch.bfloat16))
    before = model[0].forms["weight_hh_l0"]
    model[0].weight_hh_l0.data = torch.randn(32, 8)
    assert model[0].weight_hh_l0.form == before
    model[0].set_stored_weight("weight_hh_l0", FourBit().store(torch.randn(32, 8)), (8,), torch.float32)
    assert model[0].weight_hh_l0.form.compute_dtype is torch.bfloat16
    other = convert(nn.Sequential(nn.LSTM(8, 8)), FourBit())
    model[0].weight_hh_l0.data = other[0].weight_hh_l0  # of the same form, but for the dtype
    assert torch.equal(model[0].weight_hh_l0.dequantize(), other[0].weight_hh_l0.dequantize())
    assert model[0].weight_hh_l0.form.compute_dtype is torch.bfloat16


class Stack(nn.Module):
    """Multiplies by a stack of matrices, or by one of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return torch.bmm(x.expand(2, 2, 8), self.weight)[0] @ self.weight[1]


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.ConvTranspose1d(8, 8, 1), nn.GRU(8, 8), nn.GRUCell(8, 8), Stack()],
    ids=lambda layer: type(layer).__name__,
)
def test_a_weight_in_16_bits_that_is_asked_to_train_says_so_in_each_layer(layer):
    chosen = {"parameters": lambda *_: True} if type(layer) is Stack else {}
    layer = convert(nn.ModuleList([copy.deepcopy(layer)]), Half(torch.bfloat16), **chosen).requires_grad_(True)[0]
    x = torch.randn(2, 8) if isinstance(layer, (nn.Linear, nn.GRUCell, Stack)) else torch.randn(1, 8, 8)
    for given in (x, x.bfloat16()) if isinstance(layer, nn.Linear) else (x,):
        with torch.no_grad():
            layer(given)
        with pytest.raises(RuntimeError, match=r"in torch.bfloat16 requires a gradient.*lowmem.restore\(model\)"):
            layer(given)


def test_a_state_of_the_class_itself_travels_beside_the_formats():
    model, other = convert(Own(), FourBit()), convert(Own(), FourBit())
    model(torch.randn(1, 16))
    calls = model.calls
    assert calls >= 1
    other.load_state_dict(model.state_dict())
    assert other.calls == calls
    with pytest.raises(RuntimeError, match="stores fp4.*the state holds bof4s"):
        convert(Own(), FourBit("fp4")).load_state_dict(model.state_dict())


def test_parts_of_another_shape_or_dtype_are_not_loaded():
    make = lambda technique: convert(nn.Sequential(nn.Linear(32, 8)), technique)  # noqa: E731
    state = dict(make(FourBit("nf4", 16, "float32")).state_dict())
    del state["0._extra_state"]  # which says the format
    wrong = r"0.weight_scales has shape \(8, 4\); the state holds \(8, 8\)"
    with pytest.warns(UserWarning, match="how its 4-bit codes are stored"), pytest.raises(RuntimeError, match=wrong):
        make(FourBit("nf4", 16, "float16")).load_state_dict(state)
    with pytest.raises(RuntimeError, match="0.weight_rounded stores torch.float16; the state holds torch.bfloat16"):
        make(Half()).load_state_dict(make(Half(BF16)).state_dict())
