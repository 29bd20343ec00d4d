"""The summary has every module with parameters, says why it was left, and its rows add up."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lowmem import (
    EightBit,
    FourBit,
    Half,
    LoRA,
    add_adapter,
    calibrate,
    convert,
    load,
    measure,
    merge_adapter,
    restore,
    save,
    summary,
)
from lowmem.transforms.model_summary import display_name_with_index_ranges, path_parts_with_none_for_indices

WHERE = "where= leaves it out"


class Tied(nn.Module):
    """A language model in small: the output layer has the weight of the embedding, and a bias of its own."""

    def __init__(self, features=16, words=50):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, features))
        self.tokens = nn.Embedding(words, features)
        self.mix = nn.LSTM(features, features, batch_first=True)
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, words)
        self.head.weight = self.tokens.weight

    def forward(self, indices):
        return self.head(self.norm(self.mix(self.tokens(indices))[0] + self.start))


def by_path(model):
    return {row.path: row for row in summary(model)}


def test_parameters_of_one_form_name_it_once():
    model = nn.LSTM(16, 16, 2)
    (row,) = summary(convert(copy.deepcopy(model), FourBit("nf4")))
    assert row.stored == "nf4, block_size=64, scales=double"
    with torch.no_grad():
        model.weight_hh_l1.copy_(model.weight_hh_l1.sign() * 0.5)  # no format has an error there: the first is taken
    (row,) = summary(convert(model, FourBit(("nf4", "int4"))))
    nf4, int4 = "nf4, block_size=64, scales=double", "int4, block_size=16, scales=float16"
    assert row.stored == f"weight_ih_l0, weight_hh_l0, weight_ih_l1: {int4}; weight_hh_l1: {nf4}"


@pytest.mark.parametrize(
    "techniques", [(), (Half(),), (Half(torch.bfloat16),), (FourBit(),), (FourBit(), LoRA(2)), (LoRA(2),)]
)
@pytest.mark.parametrize(
    "make", [Tied, lambda: nn.TransformerEncoderLayer(16, 2, 32), lambda: nn.Sequential(nn.Linear(16, 8), nn.PReLU())]
)
def test_the_rows_add_up_to_what_the_model_stores_and_stands_for(make, techniques):
    model = make()
    weights = measure.weight_count(model)
    model = convert(model, *techniques, where=lambda *_: True) if techniques else model  # the tied head, too
    layers = summary(model)
    assert layers.weights == measure.weight_count(model) == weights
    assert layers.bytes == measure.theoretical_bytes(model)
    assert layers.bits_per_weight == 8 * layers.bytes / weights
    wider = {row.path for row in layers if row.stored.startswith("int8")}  # what FourBit keeps in 8 bits
    assert wider == ({"tokens", "head"} if make is Tied and FourBit() in techniques else set())
    assert all((row.reason is None) == (row.converted and row.path not in wider) for row in layers)


def test_embeddings_in_the_8_bits_of_another_program_are_no_choice_of_fourbit(monkeypatch):
    store = EightBit.store
    monkeypatch.setattr(EightBit, "store", lambda *given: replace(store(*given), method="imported"))
    model = convert(Tied(), EightBit(format="q8_0"), where=lambda path, _: path in ("tokens", "head"))
    convert(model, FourBit(), where=lambda path, _: path not in ("tokens", "head"))
    (row,) = [row for row in summary(model) if row.path == "tokens"]
    assert row.stored.startswith("q8_0")
    assert row.reason is None


def test_every_row_says_how_its_layer_is_stored_and_what_that_costs_and_loses():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    dense = copy.deepcopy(model)
    convert(model, FourBit("int4", block_size=32, scales="float16"), LoRA(2), where=lambda path, _: path == "0")
    convert(model, Half(), where=lambda path, _: path == "1")
    add_adapter(model, "second", LoRA(4), where=lambda path, _: path in ("0", "2"))
    first, second, third, last = summary(model)
    assert (first.type, first.stored) == ("Linear4Bit", "int4, block_size=32, scales=float16")
    assert first.adapters == (("default", 2), ("second", 4))
    assert first.weights == 64 * 32
    assert first.bytes == 64 * 32 // 2 + 64 * 2 + 4 * 6 * (64 + 32)
    assert first.bits_per_weight == 8 * first.bytes / first.weights
    lost = measure.difference(dense[0].weight, model[0].quantized.dequantize()).relative
    assert first.weight_error == pytest.approx(lost, rel=1e-3)
    assert (second.type, second.stored, second.bits_per_weight) == ("HalfLinear", "float16", 16)
    assert 0 < second.weight_error < 1e-3
    assert (third.stored, third.adapters, third.weight_error) == ("float32", (("second", 4),), None)
    assert third.converted
    assert (last.type, last.converted, last.stored, last.reason) == ("Linear", False, "float32", WHERE)
    assert summary(model).weight_error == (first.weight_error + second.weight_error) / 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm(8), "LayerNorm: vectors (biases, norms) stay dense"),
        (nn.Linear(8, 8), WHERE),
    ],
)
@pytest.mark.filterwarnings("ignore:.* are weights that stay dense")
def test_what_was_left_has_a_reason(module, reason):
    model = nn.Sequential(nn.Linear(8, 8), module)
    convert(model, FourBit(), where=lambda path, _: path != "1")
    row = by_path(model)["1"]
    assert not row.converted
    assert reason in row.reason
    assert reason in str(summary(model))


@pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # that which has an adapter
def test_the_reasons_are_those_of_the_techniques_that_were_applied():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(8, 8))
    assert by_path(model)["1"].reason == "LayerNorm: vectors (biases, norms) stay dense"
    adapted = convert(copy.deepcopy(model), LoRA(2))
    assert by_path(adapted)["2"].reason == "Embedding: LoRA leaves embeddings out: where= takes them"
    assert by_path(convert(adapted, Half()))["1"].reason == "LayerNorm: vectors (biases, norms) stay dense"


def test_each_dense_layer_says_which_call_left_it_or_that_none_did(tmp_path):
    def reasons(model):
        return [row.reason for row in summary(model)]

    def make():
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

    model = make()
    assert reasons(model) == ["never converted"] * 3
    convert(model[0], FourBit())
    assert reasons(model) == [None, *["never converted: convert was called on other layers"] * 2]
    convert(model, Half(), where=lambda path, _: path != "0", skip="*2")
    assert reasons(model) == [None, None, "skip='*2' leaves it out"]
    save(model, tmp_path / "file")
    assert reasons(copy.deepcopy(model)) == reasons(model)
    assert reasons(load(tmp_path / "file", make)) == [None, None, "dense in the file"]
    restore(model, skip="1")
    assert reasons(model) == ["lowmem.restore made it dense", None, "skip='*2' leaves it out"]
    convert(model, FourBit(), where=lambda path, _: path == "2")
    assert reasons(model) == [WHERE, None, None]
    assert reasons(calibrate(make(), [torch.randn(64, 8)], skip=["0", "1"]))[:2] == [
        "skip='0' leaves it out",
        "skip='1' leaves it out",
    ]
    adapted = add_adapter(make(), "mine", LoRA(2), where=lambda path, _: path == "1")
    assert reasons(adapted) == [WHERE, None, WHERE]
    # Which layers get adapters is not why weights are dense, where others are stored.
    both = convert(convert(make(), FourBit(), skip="0"), LoRA(2), where=lambda path, _: path == "1")
    assert reasons(both) == ["skip='0' leaves it out", None, None]


def test_parameters_that_a_container_holds_have_a_row():
    rows = by_path(Tied())
    assert (rows[""].type, rows[""].weights) == ("Tied", 16)
    assert "the model itself" in str(summary(Tied()))


def test_a_layer_that_is_the_model_is_one_row():
    for layer in (nn.Linear(4, 4), convert(nn.Linear(4, 4), FourBit(), LoRA(1))):
        (row,) = summary(layer)
        assert row.path == ""
    assert summary(nn.ReLU()) == ()
    assert summary(nn.ReLU()).bits_per_weight == 0
    assert summary(nn.ReLU()).weight_error is None
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, found OrderedDict"):
        summary(nn.Linear(2, 2).state_dict())


def test_a_module_in_several_places_is_one_row_with_all_its_paths():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    for row in (*summary(model), *summary(convert(model, FourBit()))):
        assert (row.path, row.also) == ("a", ("b.0",))
    assert "also at `b.0`" in str(summary(model))


@pytest.mark.parametrize("technique", [Half(), FourBit()])
def test_a_tied_weight_is_counted_in_its_first_row(technique):
    rows = by_path(convert(Tied(), technique))
    assert rows["head"].shared_with == "tokens"
    assert rows["head"].weights == 50  # its bias
    assert rows["head"].bytes == 50 * (2 if technique == Half() else 4)
    assert rows["tokens"].weights == 50 * 16
    assert rows["head"].bits_per_weight == pytest.approx(rows["tokens"].bits_per_weight, rel=0.4)
    assert ", shared with `tokens`" in str(summary(convert(Tied(), technique)))


@pytest.mark.parametrize("technique", [Half(), FourBit()])
def test_a_tie_to_what_is_left_is_the_reason(technique):
    model = Tied()
    model.mix = nn.Linear(16, 16)
    convert(model, technique, skip="tokens")
    rows = by_path(model)
    assert rows["mix"].converted
    assert rows["tokens"].reason == "skip='tokens' leaves it out"
    assert rows["head"].reason == "its weight is tied to `tokens`, which is left"
    model.tokens = nn.Embedding(50, 16, max_norm=1.0)
    model.tokens.weight = model.head.weight
    assert by_path(model)["head"].reason == "its weight is tied to `tokens`, which is left"


def test_a_merged_adapter_adds_bytes_and_no_weights():
    model = convert(nn.Sequential(nn.Linear(8, 8)), Half(), LoRA(2))
    before = summary(model)
    merge_adapter(model, "default")
    (row,) = summary(model)
    assert row.weights == before.weights == 72
    assert row.bytes == before.bytes + 2 * 64


def test_it_prints_an_aligned_table_with_totals():
    model = convert(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), FourBit())
    header, first, second, total = str(summary(model)).splitlines()
    assert header.split()[:6] == ["Layer", "Type", "Stored", "Weights", "MiB", "Bits/weight"]
    assert first.index("Linear4Bit") == second.index("LayerNorm") == header.index("Type")
    error = summary(model)[0].weight_error
    assert total.split() == ["total", "4,288", "0.00", f"{summary(model).bits_per_weight:.2f}", f"{error:.3g}"]
    assert copy.deepcopy(summary(model)) == summary(model)


def test_it_says_how_a_weight_is_computed():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Parameter(torch.randn(8, 4)), nn.Conv1d(8, 8, 4, groups=8)

        def forward(self, x):
            return (x.mean() * self.table).sum() + (self.conv.weight.squeeze(1)[:, :1] * x).sum() + self.conv(x).sum()

    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "scales": Scales()})
    convert(model, FourBit(), parameters=lambda path, _: path == "scales.table")
    found = {path: row.computed for path, row in by_path(model).items()}
    expected = {"linear": "as stored", "norm": "", "scales": "as its module reads it", "scales.conv": "as stored"}
    assert found == expected
    header, *lines = str(summary(model)).splitlines()
    column = header.index("Computed")
    assert all(line[column:].startswith(found[path]) for path, line in zip(found, lines[:-1], strict=True))
    # The operators that dequantize are known after a call.
    x = torch.randn(2, 8, 8)
    model["scales"](x)
    model["linear"](x)
    after = {path: row.computed for path, row in by_path(model).items()}
    assert after.pop("scales") == "dequantized by mul"
    assert after.pop("scales.conv").startswith("dequantized by s")  # squeeze or slice, as this torch has it
    assert after == {"linear": "as stored", "norm": ""}
    assert "dequantized by mul" in str(summary(model).grouped())


def test_layers_of_one_role_are_one_row_with_the_same_totals():
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)}) for _ in range(4)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(64, 8)})
    model["blocks"][3]["up"] = nn.Linear(64, 256)  # of another size
    found = summary(convert(model, FourBit(), where=lambda path, module: path != "blocks.2.down"))
    grouped = found.grouped()
    paths = ["blocks.0-2.up", "blocks.0,1,3.down", "blocks.2.down", "blocks.3.up", "head"]
    assert [row.path for row in grouped] == paths
    up = [row for row in found if row.path in ("blocks.0.up", "blocks.1.up", "blocks.2.up")]
    assert grouped[0].weights == sum(row.weights for row in up)
    assert grouped[0].bytes == sum(row.bytes for row in up)
    assert grouped[0].bits_per_weight == up[0].bits_per_weight
    assert grouped[0].weight_error == pytest.approx(sum(row.weight_error for row in up) / 3)
    assert (grouped.weights, grouped.bytes) == (found.weights, found.bytes)
    assert len(found.grouped_cells) == len(grouped) + 1
    assert found.grouped_cells[-1] == found.cells[-1]


def test_modules_that_share_tensors_or_occur_twice_keep_their_own_row():
    layers = [nn.Linear(8, 8) for _ in range(3)]
    layers[2].weight = layers[0].weight
    model = nn.ModuleList([*layers, layers[1]])
    assert [row.path for row in summary(model).grouped()] == ["0", "1", "2"]


def test_names_are_shown_without_control_characters_and_kept_as_they_are_in_the_rows():
    kind = type("L\x1b]0;title\a", (nn.Linear,), {})
    layer = kind(4, 4)
    model = nn.ModuleDict({"a\x1b[31m": layer, "b\n\u202e": layer})
    row = summary(model)[0]
    assert (row.path, row.also, row.type) == ("a\x1b[31m", ("b\n\u202e",), "L\x1b]0;title\a")
    add_adapter(model, "x\x1b[31m", LoRA(1))
    text = str(summary(model))
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"+ x\x1b[31m (rank 1)" in text
    for name in (r"a\x1b[31m", r"`b\n\u202e`", r"L\x1b]0;title\x07"):
        assert name in text
    assert len({len(row) for row in summary(model).cells}) == 1


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (["head"], "head"),
        (["blocks.0.heads.1", "blocks.0.heads.2", "blocks.1.heads.1"], "blocks.0,1.heads.1,2"),
        *(
            ([f"layers.{number}.up" for number in numbers], f"layers.{text}.up")
            for numbers, text in (([3], "3"), (range(30), "0-29"), ([0, 2, 5], "0,2,5"), ([0, 2, 4, 7], "0...7"))
        ),
    ],
)
def test_layers_of_one_role_differ_by_indices_alone_and_have_one_name(paths, name):
    assert {path_parts_with_none_for_indices(path) for path in paths} == {path_parts_with_none_for_indices(paths[0])}
    assert display_name_with_index_ranges(list(paths)) == name
    assert path_parts_with_none_for_indices("layers.0") != path_parts_with_none_for_indices("layers.0.0")
    assert path_parts_with_none_for_indices("block1.up") != path_parts_with_none_for_indices(
        "block2.up"
    )  # a name with a digit is no index
