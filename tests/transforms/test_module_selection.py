"""Which modules and parameters a call converts."""

import copy

import pytest
import torch
from torch import nn

from lowmem import FourBit, Half, Linear4Bit, LoRA, convert, restore, summary
from tests.transforms.models import EVERY, Cosine, Odd, Table, kinds

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.* are weights that stay dense"),  # of these few; the warning has its own test
]


@pytest.mark.parametrize("technique", [Half(), FourBit(), LoRA(2)])
def test_where_is_asked_once_for_each_path_and_chooses(technique):
    seen = []
    model = convert(Odd(), technique, where=lambda path, module: seen.append(path) or path.startswith("list"))
    assert [type(model.list[0]) is nn.Linear, type(model.shared) is nn.Linear] == [False, True]
    assert {"", "shared", "list", "list.0", "dict", "inner.0.0", "special"} <= set(seen)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("list.*", {"list.0"}),
        (["dict.head", "inner.*"], {"dict.head", "inner.0.0"}),
        ("again", {"shared"}),  # any path of a shared module
        ("*.0", {"list.0", "inner.0.0"}),
    ],
)
def test_skip_leaves_matching_paths_alone(skip, left):
    model = convert(Odd(), FourBit(), skip=skip)
    assert {path for path, kind in kinds(model).items() if kind is nn.Linear} == left


@pytest.mark.parametrize("alias", ["shared", "again", "dict.shared"])
def test_where_leaves_a_shared_module_alone_when_it_refuses_any_of_its_paths(alias):
    model = convert(Odd(), FourBit(), where=lambda path, _: path != alias)
    assert type(model.shared) is nn.Linear
    assert type(model.list[0]) is Linear4Bit


@pytest.mark.parametrize("technique", [Half(), FourBit()])
def test_a_model_whose_layers_all_have_adapters_says_so(technique):
    model = convert(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), LoRA(2))
    with pytest.raises(ValueError, match=r"nothing to convert: .*; 0 is a Linear: it has an adapter: convert"):
        convert(model, technique)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Sequential(nn.PReLU(1), nn.PReLU(1), nn.ReLU()), "found PReLU x2, ReLU x1"),
        (nn.Sequential(), "found Sequential x1"),
        (nn.Sequential(Cosine(4, 4)), "found Cosine x1"),
        (convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Half()), "found HalfLinear x1, ReLU x1"),
    ],
)
def test_a_model_with_nothing_to_convert_says_what_it_has(model, found):
    with pytest.raises(ValueError, match=f"FourBit looks for Linear.*{found}"):
        convert(model, FourBit())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("techniques", EVERY)
def test_a_layer_with_an_empty_weight_stays_dense_and_the_rest_is_converted(techniques):
    empty = nn.Linear(0, 4), nn.Linear(4, 0), nn.Conv1d(0, 4, 3), nn.Embedding(0, 4)
    model = convert(nn.ModuleList([*empty, nn.Linear(4, 4)]), *techniques)
    for layer, row in zip(model, summary(model)[:4], strict=False):
        assert type(layer) in (nn.Linear, nn.Conv1d, nn.Embedding)
        assert not row.converted
        assert "its weight is empty" in row.reason or "LoRA leaves" in row.reason
    assert type(model[4]) is not nn.Linear
    assert torch.equal(model[0](torch.zeros(2, 0)), model[0].bias.expand(2, 4))
    with pytest.raises(ValueError, match="nothing to convert.*0 is a Linear: its weight is empty"):
        convert(nn.Sequential(nn.Linear(0, 4)), *techniques)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("techniques", EVERY)
def test_what_is_left_may_be_lazy_or_sparse(techniques):
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), nn.LazyBatchNorm1d())
    model.register_parameter("sparse", nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False))
    convert(model, *techniques, skip="1")
    rows = {row.path: row for row in summary(model)}
    assert [path for path, row in rows.items() if row.converted] == ["0"]
    if not isinstance(techniques[0], LoRA):
        assert "it is lazy and has no shape yet" in rows["2"].reason
    assert model(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("technique", [Half(torch.bfloat16), FourBit("nf4", 16)])
def test_parameters_names_what_the_registry_does_not_know(technique):
    seen = []
    model = convert(
        Table(), technique, parameters=lambda path, p: seen.append((path, p.dim())) or path == "positions"
    )
    assert seen == [("positions", 2), ("head.weight", 2)]
    assert isinstance(model, Table)
    assert [*model.forms] == ["positions"]
    x = torch.randn(4, 16)
    twin = restore(copy.deepcopy(model))
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="parameters= chose no further parameter"):
        convert(Table(), technique, parameters=lambda path, _: path == "head.weight")


def test_parameters_is_refused_for_lora_alone():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="parameters=.*LoRA alone"):
        convert(model, LoRA(2), parameters=lambda path, _: True)
    for technique in (LoRA(2), FourBit()):
        with pytest.raises(TypeError, match="parameters='l' must be callable"):
            convert(model, technique, parameters="l")
    assert type(model[0]) is nn.Linear
