"""A weight whose columns lie in another order answers as the dense weight does; only products gather."""

import copy
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.nn import functional

import lowmem
from lowmem import LoRA
from lowmem.errors import FileError
from lowmem.nn.gathered_weight import GatheredTensor, check_column_permutation
from lowmem.nn.linear import GatheredLinear4Bit, shallow_copy_with_column_order
from lowmem.quant.quantize_tensor import quantize

ORDER = torch.randperm(32, generator=torch.Generator().manual_seed(5)).to(torch.int32)


def layer(bias: bool = True) -> tuple[lowmem.Linear4Bit, torch.Tensor]:
    """Return a layer whose columns are gathered, and its dense weight."""
    torch.manual_seed(2)
    dense = torch.nn.Linear(32, 8, bias=bias)
    stored = quantize(dense.weight.detach()[:, ORDER], "nf4", block_size=8)
    made = shallow_copy_with_column_order(lowmem.Linear4Bit(stored, dense.bias), ORDER.clone())
    return made, stored.dequantize()[:, ORDER.argsort()]


def test_a_product_keeps_nothing_dequantized_and_has_the_gradient_of_the_dense_one():
    made, dense = layer()
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
        sizes: list[int] = []
        functional.linear(x, made.weight).square().sum().backward()
    assert max(sizes) <= max(4 * 32, made.quantized.packed.numel())
    wanted = x.detach().requires_grad_()
    (wanted @ dense.T).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)


def test_an_order_names_each_column_once():
    check_column_permutation(ORDER, "order")
    check_column_permutation(ORDER.to("meta"), "order")
    for wrong in (torch.zeros(4, dtype=torch.int32), torch.tensor([0, 1, 4], dtype=torch.int32)):
        with pytest.raises(ValueError, match="each of . columns once"):
            check_column_permutation(wrong, "order")


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return nn.Sequential(layer()[0])


def dense_output(model, x=X):
    own = model[0]
    return x @ layer()[1].T + own.bias


def test_it_computes_as_its_dense_weight_eager_compiled_and_exported(model):
    for x in (X, X[0], X[None, :0], X.view(1, 5, 32)):
        torch.testing.assert_close(model(x), dense_output(model, x))
    with torch.no_grad():
        backend = "inductor" if shutil.which("c++") else "aot_eager"  # inductor needs a C++ compiler
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(X), model(X))
        exported = torch.export.export(model, (X,)).module()
        torch.testing.assert_close(exported(X), model(X))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16


def test_it_survives_every_way_a_model_travels(model, tmp_path):
    expected = model(X)
    path = tmp_path / "a.safetensors"
    lowmem.save(model, path)
    loaded = lowmem.load(path, lambda: nn.Sequential(nn.Linear(32, 8)))
    lowmem.save(loaded, tmp_path / "b.safetensors")
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight_order.copy_(ORDER.flip(0))
    other.load_state_dict(model.state_dict())
    for one in (loaded, other, pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model.to(torch.float32)):
        assert type(one[0]) is GatheredLinear4Bit
        assert torch.equal(one(X), expected)
    assert model.half()[0].weight_order.dtype == torch.int32


def test_a_weight_stays_gathered_in_graphs_pickles_and_files(model, request, tmp_path):
    request.addfinalizer(torch.compiler.reset)
    weight, dense = model[0].weight, layer()[1]
    compiled = torch.compile(lambda x, w: x @ (w * 2).T, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, weight), X @ (dense * 2).T)
    torch.save(weight, tmp_path / "weight.pt")
    for one in (pickle.loads(pickle.dumps(weight)), torch.load(tmp_path / "weight.pt", weights_only=True)):
        assert type(one) is GatheredTensor
        assert torch.equal(one.dequantize(), dense)


def test_an_order_that_is_no_permutation_is_refused(model, tmp_path):
    state = model.state_dict()
    state["0.weight_order"] = torch.zeros_like(ORDER)
    with pytest.raises(RuntimeError, match="0.weight_order does not name each of 32 columns once"):
        model.load_state_dict(state)
    with torch.no_grad():
        model[0].weight_order.zero_()
    lowmem.save(model, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="columns once"):
        lowmem.load(tmp_path / "a.safetensors", lambda: nn.Sequential(nn.Linear(32, 8)))
    for wrong in (ORDER[:4], ORDER.long(), ORDER.float()):
        with pytest.raises(ValueError, match="must be int32"):
            shallow_copy_with_column_order(layer()[0], wrong)


def test_codes_in_the_order_of_columns_do_not_load_into_it(model):
    plain = nn.Sequential(lowmem.Linear4Bit(model[0].quantized, None))
    with pytest.raises(RuntimeError, match="gathered"):
        nn.Sequential(layer(bias=False)[0]).load_state_dict(plain.state_dict(), strict=False)


def test_it_takes_adapters_and_merges_them_and_becomes_dense_again(model):
    expected = dense_output(model)
    adapted = lowmem.convert(copy.deepcopy(model), LoRA(2))
    torch.testing.assert_close(adapted(X), expected)
    nn.init.normal_(adapted[0].lora_b)
    expected = expected + X @ (adapted[0].lora_b @ adapted[0].lora_a).T * adapted[0].scaling
    torch.testing.assert_close(adapted(X), expected)
    to_dense, report = lowmem.merge(copy.deepcopy(adapted), to=torch.float32, report=True)
    assert type(to_dense[0]) is nn.Linear
    assert report[0].after < 1e-6
    torch.testing.assert_close(to_dense(X), expected)
    same, report = lowmem.merge(adapted, report=True)
    assert type(same[0]) is GatheredLinear4Bit
    assert float((same(X) - expected).detach().norm() / expected.detach().norm()) < 2 * report[0].after < 0.5
    restored = lowmem.restore(model)
    assert type(restored[0]) is nn.Linear
    assert [*restored.state_dict()] == ["0.weight", "0.bias"]
    assert torch.equal(restored[0].weight, layer()[1])
