"""In training a frozen layer and its adapter are one product in bfloat16, as exact as its roundings allow."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lowmem
from lowmem import FORMATS, FourBit, Half, LoRA, convert, kernels, restore
from lowmem.nn.adapter_autograd import is_marked_exact_in_bfloat16
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.nn.fold import unadapted_shallow_copy
from tests.rounding import OF_4_BITS, assert_product, assert_sum, stored_weight
from tests.selection import covering

IN, OUT, RANK = 48, 40, 4
BF16 = torch.bfloat16
QUANTIZED = {name: FourBit(name, compute_dtype=BF16) for name in FORMATS} | {
    "offsets": FourBit("int4", offsets=True, compute_dtype=BF16),
    "odd blocks": FourBit("nf4", block_size=10, compute_dtype=BF16),
}
BASES = {**QUANTIZED, "half": Half(BF16), "dense": None}


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch):
    """Take the product on processors that are slow at it, too."""
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)


def adapted(base="nf4", bias=True, seed=0, **options):
    """Return a layer with an adapter that is not zero; a dense base is frozen and in bfloat16."""
    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias)
    technique = BASES[base]
    if technique is None:
        linear.to(BF16)
    layer = convert(linear, *([technique] if technique else []), LoRA(RANK, alpha=6, **options))
    nn.init.normal_(layer.lora_b, std=0.2)
    return layer


def inputs(*leading, dtype=torch.float32, seed=1):
    return torch.randn(*leading, IN, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def nodes(out):
    """Return the names of the nodes of a graph."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [one for one, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


def is_one_product(out):
    return "_AdaptedProductFunctionBackward" in nodes(out)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_layer_in_8_bit_integers_trains_as_one_in_bfloat16(dtype):
    layer, x = adapted(), inputs(70, dtype=dtype)
    expected = taken_gradients(layer, x)
    layer.compute_dtype = torch.int8
    found = taken_gradients(layer, x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.no_grad():
        evaluated = layer.eval()(x)
        layer.compute_dtype = BF16
        assert not torch.equal(evaluated, layer(x))


def taken_gradients(layer, x):
    """Return the output of a layer, and the gradients of its input and its adapter."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    assert is_one_product(out)
    out.sum().backward()
    return out, x.grad, layer.lora_a.grad, layer.lora_b.grad


def taken_step(call, leading, wide, kernel):
    """Return the input of a product, which has its gradient, the output, and the gradient that it got."""
    x = inputs(*leading, dtype=BF16 if wide == "bfloat16" else torch.float32)
    with kernels.temporary_cpu_backend(
        kernels.available_cpu_backend_names()[-1] if kernel == "best" else "reference"
    ):
        with torch.autocast("cpu", BF16, enabled=wide == "autocast"):
            out = call(x)
        assert is_one_product(out)
        assert out.dtype is (torch.float32 if wide == "float32" else BF16)
        assert out.shape == (*leading, OUT)
        grad = torch.randn(out.shape).to(out.dtype)
        out.backward(grad)
    return x, out, grad


def hold_step(x, out, grad, w, lora_a, lora_b, s, offset):
    """Hold an output and the gradients to those in float64, of a weight (out, in) in float64."""
    a, b = lora_a.double(), lora_b.double()
    rows, g = x.detach().double().reshape(-1, IN), grad.double().reshape(-1, OUT)

    def hold(got, exact_of, terms, roundings):
        values = [one.detach() for one in (rows, g, w, a, b)]
        exact, most = exact_of(*values), exact_of(*(one.abs() for one in values))
        assert_sum(got.reshape(exact.shape), exact, most, terms + 6, rounded=[BF16] * roundings)

    def offset_of(rows):
        if offset is None:
            return 0
        return abs(offset) if (rows >= 0).all() else offset

    hold(out, lambda x, g, w, a, b: x @ w.t() + offset_of(x) + s * (x @ a.t()) @ b.t(), IN + RANK, 6)
    hold(x.grad, lambda x, g, w, a, b: g @ w + s * (g @ b) @ a, OUT + RANK, 6)
    hold(lora_a.grad, lambda x, g, w, a, b: s * (g @ b).t() @ x, len(rows) + OUT, 5)
    hold(lora_b.grad, lambda x, g, w, a, b: s * g.t() @ (x @ a.t()), len(rows) + IN, 5)
    assert lora_a.grad.dtype is lora_b.grad.dtype is torch.float32


CASES = {
    "base": list(BASES),
    "leading": [(64,), (3, 30)],
    "wide": ["float32", "autocast", "bfloat16"],
    "kernel": ["best", "reference"],
}


def test_a_fresh_adapter_changes_the_order_of_sums_alone_and_that_in_training():
    """Both are the base's product; bfloat16 rounds a term 3 times at most: its factors, if any, and the sum."""
    for base in ("nf4", "half"):
        layer = adapted(base)
        nn.init.zeros_(layer.lora_b)
        x = inputs(200, dtype=BF16)
        with torch.no_grad():
            expected = unadapted_shallow_copy(layer)(x)
        out = layer(x)
        assert is_one_product(out)
        factors = x, stored_weight(layer), layer.bias
        for got in (out, expected):
            assert_product(got, *factors, rounded=[BF16] * 3, more=OF_4_BITS)
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), expected)


class Read(nn.Linear):
    """Is called, and reads its weight: (out, in)."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Transposed(type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})):
    """Reads a weight (in, out), as GPT-2's layers do."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(IN, OUT)), nn.Parameter(torch.randn(OUT))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], OUT)


def read(base, transposed):
    """Return a module that reads a weight with an adapter that is not zero."""
    torch.manual_seed(0)
    module, technique = Transposed() if transposed else Read(IN, OUT), BASES[base]
    module.to(BF16 if technique is None else torch.float32)
    techniques = [] if technique is None else [technique]
    model = convert(nn.Sequential(module), *techniques, LoRA(RANK, alpha=6), where=lambda *_: True)
    (part,) = lowmem.adapter_layers(model, "default").values()
    nn.init.normal_(part.lora_b, std=0.2)
    model[0].bias.requires_grad_(False)
    return model, part


@covering(2, how=["layer", "layer without a bias", "read", "read, transposed"], **CASES)
def test_output_and_gradients_are_as_exact_as_their_roundings_allow(how, base, leading, wide, kernel):
    """Count the roundings to bfloat16 of a term: of x, A, x A, s B, the thin product, and the sum; and likewise."""
    of_16_bits = base in ("half", "dense")
    if how.startswith("read"):
        model, part = read(base, how == "read, transposed")
        wide = "bfloat16" if of_16_bits else wide
        dense = lowmem.delete_adapter(copy.deepcopy(model), "default")
        dense = (dense if base == "dense" else restore(dense))[0]
        w, bias = dense.weight.detach().double(), dense.bias
        w = w.t() if how == "read, transposed" else w
    else:
        model = part = adapted(base, bias=how == "layer")
        wide = "autocast" if of_16_bits and wide == "float32" else wide
        w, bias = stored_weight(model), model.bias
    x, out, grad = taken_step(model, leading, wide, kernel)
    bias = None if bias is None else bias.detach().double()
    hold_step(x, out, grad, w, part.lora_a, part.lora_b, part.scaling, bias)


def test_the_table_of_an_embedding_is_no_linear_layer_s_weight():
    """A as the table has it counts its rows, which are the outputs of the layer that reads it."""
    torch.manual_seed(0)
    technique = FourBit("nf4", embeddings="4bit")
    table = convert(nn.Sequential(nn.Embedding(IN, IN)), technique, LoRA(RANK), where=lambda *_: True)
    (part,) = lowmem.adapter_layers(table, "default").values()
    nn.init.normal_(part.lora_a)
    x = inputs(64, dtype=BF16)
    out, x = nn.functional.linear(x, table[0].weight), x.detach().double()
    weight = table[0].weight.dense_values().detach().double()
    assert (out.double() - x @ weight.t()).norm() <= 0.02 * (x @ weight.t()).norm()


def test_of_a_weight_that_is_read_what_it_does_not_serve_is_computed_as_before():
    def second(model):
        lowmem.add_adapter(model, "second", LoRA(2), where=lambda *_: True)

    def trained_bias(model):
        model[0].bias.requires_grad_()

    def frozen(model):
        model.requires_grad_(False)

    for change in (second, trained_bias, frozen):
        for transposed in (False, True):
            model, _ = read("nf4", transposed)
            assert is_one_product(model(inputs(64)))
            assert not is_one_product(model(inputs(63)))
            change(model)
            out = model(inputs(64))
            assert is_one_product(out) == (change is frozen)  # of which the input gets a gradient
    plain = convert(nn.Sequential(Transposed()), FourBit("nf4"), LoRA(RANK), where=lambda *_: True)
    assert not is_one_product(plain(inputs(64)))
    assert is_one_product(plain(inputs(64, dtype=BF16)))


@pytest.mark.parametrize("transposed", [False, True])
def test_in_evaluation_the_adapter_of_a_weight_that_is_read_multiplies_in_float32(transposed):
    """However many rows there are."""
    model, _ = read("nf4", transposed)
    x = inputs(64)
    with torch.no_grad():
        assert is_marked_exact_in_bfloat16(model(x))
        out = model.eval()(x)
    assert not is_marked_exact_in_bfloat16(out)
    assert not torch.equal(out, out.bfloat16().float())
    assert is_one_product(model(x))


def test_functions_of_matrices_refuse_inputs_of_three_dimensions():
    model, _ = read("nf4", True)
    x, bias = inputs(2, 64), model[0].bias
    assert is_one_product(torch.matmul(x, model[0].weight))
    assert is_one_product(torch.mm(x[0], model[0].weight))
    for function in (torch.mm, torch.Tensor.mm, partial(torch.addmm, bias), partial(torch.Tensor.addmm, bias)):
        with pytest.raises(RuntimeError):
            function(x, model[0].weight)


def test_what_it_does_not_serve_is_computed_as_before():
    def second(layer):
        lowmem.add_adapter(layer, "second", LoRA(2))

    def frozen(layer):
        layer.requires_grad_(False)

    def trained_bias(layer):
        layer.bias.requires_grad_()

    def trained_weight(layer):
        unadapted_parameter(layer, "weight").requires_grad_()

    def moved_bias(layer):
        bias = layer.bias.detach()
        del layer.bias
        layer.bias = bias

    for change in (second, frozen, trained_bias):
        layer, x = adapted(), inputs(64)
        change(layer)
        assert not is_one_product(layer(x.detach() + 0 if change is frozen else x)), change
    for change in (trained_bias, trained_weight):
        layer, x = adapted("dense"), inputs(64, dtype=BF16)
        assert is_one_product(layer(x))
        change(layer)
        out = layer(x)
        assert not is_one_product(out), change
        out.float().sum().backward()
        assert all((one.grad is None) != one.requires_grad for one in layer.parameters()), change
    layer, x = adapted("dense"), inputs(64, dtype=BF16)
    expected = layer(x)
    moved_bias(layer)
    assert torch.equal(layer(x), expected)
    layer = adapted("dense")
    x, plain = inputs(64, dtype=BF16), {"weight": unadapted_parameter(layer, "weight").detach()}
    assert not is_one_product(torch.func.functional_call(layer, plain, x))
    layer.float()
    for x in (inputs(64), inputs(64, dtype=BF16)):
        with torch.autocast("cpu", BF16, enabled=x.dtype is BF16):
            assert not is_one_product(layer(x))
    layer = adapted()
    for x in (inputs(63), inputs(), inputs(64).double(), inputs(64).unsqueeze(0)[:, :0]):
        assert not is_one_product(layer(x))
    with torch.no_grad():
        x = inputs(64)
        assert not torch.equal(layer(x), layer.eval()(x))  # in evaluation the adapter multiplies in float32
        assert not layer.train()(x).requires_grad
    assert not is_one_product(convert(nn.Linear(IN, OUT), FourBit(), LoRA(RANK))(inputs(64)))  # in float32
    with pytest.raises(RuntimeError, match="in_features=48"):
        layer(torch.randn(80, IN + 1, requires_grad=True))
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs(64)), layer(inputs(64)), rtol=2**-5, atol=0.05)


def test_autocast_to_another_dtype_rounds_the_output_alone():
    layer, x = adapted(), inputs(64)
    with torch.autocast("cpu", torch.float16):
        out = layer(x)
        assert is_one_product(out)
        out.float().sum().backward()
    assert out.dtype is torch.float16
    assert torch.equal(out, layer(x).half())


def test_slow_processors_multiply_apart(monkeypatch):
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", property(lambda self: self.name == "avx512bf16"))
    for name in kernels.available_cpu_backend_names():
        with kernels.temporary_cpu_backend(name):
            assert is_one_product(adapted()(inputs(64))) == (name in ("reference", "avx512bf16"))


def test_layers_that_read_one_input_share_its_copy():
    layers = [adapted(seed=seed) for seed in range(3)]
    source = inputs(4, 20)
    x = source * 2
    kept = []
    with saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        outs = [layer(x) for layer in layers]
    copies = {one.untyped_storage().data_ptr() for one in kept if one.shape == x.shape and one.dtype is BF16}
    assert len(copies) == 1
    assert not any(one.dtype is torch.float32 and one.shape == x.shape for one in kept)
    before = outs[0].detach()
    gradients = torch.autograd.grad(sum(outs).sum(), source)[0]
    alone = [torch.autograd.grad(layer(source * 2).sum(), source)[0].double() for layer in layers]
    most = sum(one.abs() for one in alone)
    assert ((gradients.double() - sum(alone)).abs() <= 2.1 * 2**-8 * most).all()  # the sum is rounded twice
    with torch.no_grad():
        x.mul_(2)  # another version: another copy
    assert not torch.equal(layers[0](x).detach(), before)
    copy = weakref.ref(x._lowmem_converted[1])
    del x, outs
    kept.clear()
    gc.collect()
    assert copy() is None


def test_a_call_without_gradients_leaves_no_copy_without_a_graph():
    """The first pass of a reentrant checkpoint is one, of an input that another layer reads, too."""
    first, second = adapted(), adapted(seed=1)

    def gradient(run):
        source = inputs(80)
        x = source * 2
        out = run(x)
        return torch.autograd.grad((out + second(x)).square().sum(), source)[0]

    def after_a_look(x):
        with torch.no_grad():
            first(x)
        return first(x)

    expected = gradient(first)
    assert torch.equal(gradient(after_a_look), expected)
    source = inputs(80)
    x = source * 2
    (checkpoint(first, x, use_reentrant=True) + second(x)).square().sum().backward()
    assert (source.grad - expected).norm() <= 0.01 * expected.norm()


def test_a_result_in_float32_says_that_its_numbers_are_those_of_bfloat16():
    layer = adapted()
    out = layer(inputs(4, 64))
    assert out.dtype is torch.float32
    assert torch.equal(out.bfloat16().float(), out)
    assert is_marked_exact_in_bfloat16(out)
    assert is_marked_exact_in_bfloat16(out[1:].view(-1))
    assert not is_marked_exact_in_bfloat16(out + 0)
    assert not is_marked_exact_in_bfloat16(out.detach().clone())
    with torch.no_grad():
        out.view(-1)[3] += 2**-20
    assert not is_marked_exact_in_bfloat16(out)
    assert not is_marked_exact_in_bfloat16(layer(inputs(8)))  # too few rows for this product
    assert not is_marked_exact_in_bfloat16(layer(inputs(64, dtype=BF16)))
    with torch.inference_mode():
        assert not is_marked_exact_in_bfloat16(layer(torch.randn(64, IN)))


@pytest.mark.parametrize("function", [torch.relu, torch.sigmoid, torch.tanh, torch.sin])
def test_what_a_function_keeps_of_its_result_is_not_kept_twice(function):
    """ReLU, sigmoid and tanh keep the result, in float32: backward rounds that again, to the same bits."""
    layer, kept = adapted(), []

    def keep(tensor):
        kept.append((tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(function(inputs(64)))
    copies = [one for one in kept if one[1:] == (BF16, (64, IN))]
    results = {at for at, dtype, shape in kept if (dtype, shape) == (torch.float32, (64, IN))}
    assert (len(copies), len(results)) == ((1, 1) if function is torch.sin else (0, 1))
    grad = torch.randn(64, OUT, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(out, [layer.lora_a, layer.lora_b], grad)
    plain = torch.autograd.grad(layer(function(inputs(64)) + 0), [layer.lora_a, layer.lora_b], grad)
    assert all(map(torch.equal, got, plain))


def test_a_leaf_keeps_no_copy():
    x = inputs(64)
    adapted()(x).sum().backward()
    assert not vars(x)


def test_second_derivatives_are_those_of_the_plain_formula():
    layer = adapted()
    x = inputs(64)
    wanted = [x, layer.lora_a, layer.lora_b]

    def first(out, **options):
        return torch.autograd.grad((out.float() ** 2).sum() / 100, wanted, **options)

    def second(out):
        return torch.autograd.grad(sum((one**2).sum() for one in first(out, create_graph=True)), wanted)

    got = second(layer(x))
    w, bias = stored_weight(layer), layer.bias.detach().double()
    a, b = layer.lora_a.double(), layer.lora_b.double()
    exact = second(x.double() @ w.t() + bias + layer.scaling * (x.double() @ a.t()) @ b.t())
    for one, other in zip(got, exact, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()
    for dropout in (0.0, 0.5):
        layer = adapted(dropout=dropout)
        wanted = [x, layer.lora_a, layer.lora_b]
        out = layer(x)
        assert is_one_product(out)
        for one, other in zip(first(out, create_graph=True), first(out), strict=True):
            assert (one - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("kind", ["linear", "read"])
def test_batches_of_gradients_are_those_of_each(kind):
    x = inputs(64)
    for module in (adapted(), adapted(dropout=0.5)) if kind == "linear" else (read("nf4", True)[0],):
        wanted = [x, *(one for one in module.parameters() if one.requires_grad)]
        out, grads = module(x), torch.randn(3, 64, OUT)
        assert is_one_product(out)
        found = torch.autograd.grad(out, wanted, grads, retain_graph=True, is_grads_batched=True)
        mapped = torch.func.vmap(
            lambda grad, out=out, wanted=wanted: torch.autograd.grad(out, wanted, grad, retain_graph=True)
        )(grads)
        for number, grad in enumerate(grads):
            each = torch.autograd.grad(out, wanted, grad, retain_graph=True)
            for batch in (found, mapped):
                for one, exact in zip(batch, each, strict=True):
                    assert (one[number] - exact).norm() <= 2**-6 * exact.norm()


def test_dropout_drops_the_input_of_the_thin_product():
    layer = adapted(dropout=0.5)
    x = inputs(64, dtype=BF16)
    torch.manual_seed(3)
    out = layer(x)
    assert is_one_product(out)
    grad = torch.randn(out.shape).to(BF16)
    out.backward(grad)
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones(64, IN, dtype=BF16), 0.5).double()
    w, a, b = stored_weight(layer), layer.lora_a.detach().double(), layer.lora_b.detach().double()
    rows, g, s = x.detach().double(), grad.double(), layer.scaling
    exact = rows @ w.t() + layer.bias.detach().double() + s * ((rows * mask) @ a.t()) @ b.t()
    wanted = g @ w + s * ((g @ b) @ a) * mask
    for got, one in ((out, exact), (x.grad, wanted), (layer.lora_a.grad, s * (g @ b).t() @ (rows * mask))):
        assert (got.double() - one).norm() <= 0.01 * one.norm()


def test_checkpointing_gives_the_same_bits_and_compression_the_same_gradient():
    model = nn.Sequential(adapted(), nn.SiLU(), nn.Linear(OUT, IN).requires_grad_(False), adapted(seed=1))

    def gradients(run):
        model.zero_grad()
        x = inputs(2, 200)
        run(x).square().sum().backward()
        return [x.grad, *(one.grad.clone() for one in model.parameters() if one.requires_grad)]

    def compressed(x):
        with lowmem.compressed_activations(model):
            return model(x)

    plain = gradients(model)
    for reentrant in (False, True):
        again = gradients(lambda x, mode=reentrant: checkpoint(model, x, use_reentrant=mode))
        assert all(map(torch.equal, plain, again))
    for one, other in zip(gradients(compressed), plain, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


def test_a_weight_that_changes_before_backward_is_an_error():
    layer = adapted()
    out = layer(inputs(64))
    layer.quantized.packed.data.zero_()  # unseen by autograd, as of any tensor
    layer.quantized.packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
