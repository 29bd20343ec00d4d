"""An adapter alone: saved, loaded onto its own base, and refused by every other."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FourBit, Linear4Bit, LoRA, convert, load_adapter, save_adapter
from lowmem.errors import FileError
from lowmem.io.adapter_files import base_layers_sha256
from lowmem.io.lowmem_file import verify_and_map_file, write_tensors_returning_digest
from tests import refusing
from tests.models import INDICES, TECHNIQUES, out_of_file, small


def base(name="qlora", seed=0):
    """The model that ``small`` adapts, without its adapter."""
    model = small(name, seed)
    return lowmem.delete_adapter(model, "default").eval()


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_an_adapter_comes_back_on_its_own_base(name, tmp_path):
    model = small(name)
    expected = model(INDICES)
    save_adapter(model, tmp_path / "a")
    assert all("lora_" in key for key in verify_and_map_file(tmp_path / "a").tensors)
    assert torch.equal(out_of_file(load_adapter(base(name), tmp_path / "a")).eval()(INDICES), expected)
    fresh = convert(base(name), TECHNIQUES[name][-1], where=lambda *_: True).eval()  # has an adapter of that name
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(out_of_file(fresh)(INDICES), expected)
    content = (tmp_path / "a").read_bytes()
    save_adapter(fresh, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content


def test_rank_stabilized_adapters_and_ranks_by_pattern_come_back(tmp_path):
    def make(*techniques):
        torch.manual_seed(0)
        return convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), FourBit(), *techniques)

    model = make(LoRA(2, 5, rank_stabilized=True, ranks={"1": 4}))
    for adapter in lowmem.adapter_layers(model, "default").values():
        nn.init.normal_(adapter.lora_b)
    save_adapter(model, tmp_path / "a")
    lowmem.save(model, tmp_path / "m")
    own = {place: adapter.technique for place, adapter in lowmem.adapter_layers(model, "default").items()}
    assert own == {"0": LoRA(2, 5, rank_stabilized=True), "1": LoRA(4, 5, rank_stabilized=True)}
    x = torch.randn(3, 16)
    dense = lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))  # noqa: E731
    for loaded in (load_adapter(make(), tmp_path / "a"), lowmem.load(tmp_path / "m", dense)):
        assert torch.equal(loaded(x), model(x))
        assert {p: a.technique for p, a in lowmem.adapter_layers(loaded, "default").items()} == own
        load_adapter(loaded, tmp_path / "a")
    refused(
        convert(make(), LoRA(2, 5, ranks={"1": 4})), tmp_path / "a", "of other layers, ranks, alphas, dropouts or"
    )


def test_several_adapters_are_saved_and_loaded_by_name(tmp_path):
    model = base()
    outputs = {}
    for seed, name in enumerate(["french", "legal"]):
        torch.manual_seed(seed)
        lowmem.add_adapter(model, name, LoRA(seed + 1), skip=["conv", "again", "layers.0"] if seed else [])
        with torch.no_grad():
            for adapter in lowmem.adapter_layers(model, name).values():
                adapter.lora_b.normal_()
        lowmem.deactivate(model)
        lowmem.activate(model, name)
        outputs[name] = model.eval()(INDICES)
        save_adapter(model, tmp_path / name, name)
    with pytest.raises(ValueError, match="one of several adapters: french, legal"):
        save_adapter(model, tmp_path / "x")
    for name, expected in outputs.items():
        assert torch.equal(load_adapter(base(), tmp_path / name).eval()(INDICES), expected)
        renamed = load_adapter(base(), tmp_path / name, "mine")
        assert lowmem.adapter_names(renamed) == ["mine"]
    both = base()
    for name in outputs:
        load_adapter(both, tmp_path / name)
    assert lowmem.active_adapters(both) == ["french", "legal"]


def refused(model, path, message, **options):
    with refusing.refused(model, FileError, message) as caught:
        load_adapter(model, path, **options)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600 + len(str(path))


def test_what_it_does_not_fit_is_left_as_it_was(tmp_path):
    save_adapter(small("qlora"), tmp_path / "a")
    refused(base(seed=1), tmp_path / "a", "trained on another base")
    refused(small("dense"), tmp_path / "a", "trained on another base")
    refused(small("nf4"), tmp_path / "a", "trained on another base")  # another block size
    refused(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a", "of another architecture")
    narrow = base()
    narrow.head = nn.Linear(20, 50)
    refused(narrow, tmp_path / "a", "head.lora_a is .* the model takes")
    odd = base()
    odd.head = nn.modules.linear.NonDynamicallyQuantizableLinear(24, 50)
    refused(odd, tmp_path / "a", "trained on another base")
    odd.head = nn.Bilinear(24, 24, 50)
    refused(odd, tmp_path / "a", "head, and LoRA has no form of it: both of its inputs")
    odd.head = nn.GRU(24, 50)
    refused(odd, tmp_path / "a", "head, and the model has a GRU there, whose adapters change weight_ih_l0, weight_hh")
    other_rank = convert(base(), LoRA(2))
    refused(other_rank, tmp_path / "a", "an adapter 'default' of other layers, ranks")


def test_other_files_are_refused(tmp_path):
    lowmem.save(small("qlora"), tmp_path / "m")
    refused(base(), tmp_path / "m", "no adapter alone")
    (tmp_path / "p").write_bytes(b"\x80\x04.")
    refused(base(), tmp_path / "p", "executed nothing")
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(small("nf4"), tmp_path / "x")
    with pytest.raises(TypeError, match="model must be"):
        load_adapter([], tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "its metadata is not lowmem's: name=None must be a string; upgrade lowmem, or get the file"),
        ({"name": "adapters_by_parameter"}, "name='adapters_by_parameter' must not be empty"),
        ({"name": "\x1b[2J." * 10**5}, r"name='\\x1b\[2J"),
        ({"base": 3}, "base=3 must be a string"),
        ({"base": "0" * 64}, "trained on another base"),
        ({"layers": []}, r"its record of the layers is not lowmem's: it is \[\], and must be an object"),
        ({"layers": {}}, "its record of the layers is not lowmem's: it names no layer"),
        (
            {"layers": {"\x1b[2J": {"rank": 3, "alpha": 6, "dropout": 0.1}}},
            r"adapts \\x1b\[2J, and the model has no layer .*: it is of another architecture",
        ),
        ({"more": 1}, "its metadata is not lowmem's: 'more' is unknown"),
        ({"rank": 10**18}, r"head.lora_a is .*\(3, 24\) in it; the model takes \(10{18}, 24\) .* at rank 10{18}$"),
        ({"active": True}, "its record of head is not lowmem's: 'active' is unknown"),
    ],
)
def test_a_record_that_says_something_else_is_refused(change, message, tmp_path):
    save_adapter(small("qlora"), tmp_path / "a")
    file = verify_and_map_file(tmp_path / "a")
    metadata = dict(file.metadata)
    if change.keys() <= {"name", "base", "layers", "more"}:
        metadata |= change
    else:
        metadata["layers"] = {**metadata["layers"], "head": {**metadata["layers"]["head"], **change}}
    write_tensors_returning_digest(tmp_path / "b", file.tensors, metadata)
    refused(base(), tmp_path / "b", message)


def test_tensors_of_no_layer_are_named(tmp_path):
    save_adapter(small("qlora"), tmp_path / "a")
    file = verify_and_map_file(tmp_path / "a")
    write_tensors_returning_digest(tmp_path / "b", {**file.tensors, "\x1b[2J": torch.ones(1)}, file.metadata)
    refused(base(), tmp_path / "b", r"it has tensors of no layer that it adapts, as '\\x1b\[2J'")


class Places(nn.Module):
    """One layer, in one place or in two."""

    def __init__(self, twice):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
        if twice:
            self.a = layer
        self.b = layer


def test_a_layer_that_stands_in_several_places_here_is_one(tmp_path):
    model = lowmem.add_adapter(Places(False), "mine", LoRA(2))
    nn.init.normal_(model.b.lora_b)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(Places(True), tmp_path / "a")
    assert loaded.a is loaded.b
    assert torch.equal(loaded.a.lora_b, model.b.lora_b)
    load_adapter(loaded, tmp_path / "a")  # onto its own
    save_adapter(loaded, tmp_path / "b")
    assert torch.equal(load_adapter(Places(True), tmp_path / "b").b.lora_b, model.b.lora_b)


def test_a_merged_adapter_takes_no_values(tmp_path):
    model = small("lora")
    save_adapter(model, tmp_path / "a")
    lowmem.merge_adapter(model, "default")
    refused(model, tmp_path / "a", "is merged: call unmerge_adapter")


def test_a_name_that_cannot_be_one_is_refused(tmp_path):
    save_adapter(small("qlora"), tmp_path / "a")
    for name in ("adapters_by_parameter", "a.b", "", 7):
        refused(base(), tmp_path / "a", "name=", name=name)


class Holds(nn.Module):
    """A layer that stores one tensor under a name."""

    def __init__(self, name: str, value: torch.Tensor):
        super().__init__()
        self.register_buffer(name, value)


BYTES = torch.arange(6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("other", BYTES.view(2, 3)),
        ("a", BYTES.view(3, 2)),
        ("a", BYTES),
        ("a", BYTES.view(2, 3).view(torch.int8)),
        ("a", BYTES.view(2, 3) + 1),
    ],
)
def test_the_fingerprint_of_a_base_is_of_each_tensor_s_name_shape_dtype_and_bytes(name, value):
    of = lambda *stored: base_layers_sha256(nn.Sequential(Holds(*stored)), ["0"])  # noqa: E731
    assert of(name, value) != of("a", BYTES.view(2, 3)) == of("a", BYTES.clone().view(2, 3))


def test_the_fingerprint_is_of_the_layers_paths_and_of_those_named_alone():
    one, other = (Holds("a", value) for value in (BYTES, BYTES + 1))
    first = base_layers_sha256(nn.Sequential(one, other), ["0"])
    assert base_layers_sha256(nn.Sequential(other, one), ["1"]) != first
    assert base_layers_sha256(nn.Sequential(one, one), ["0"]) == first
    assert base_layers_sha256(nn.Sequential(one, other), ["0", "1"]) != first
    for layer, counts in (
        (nn.Linear(16, 8), True),
        (convert(nn.Linear(16, 8), FourBit()), True),
        (nn.Conv1d(16, 8, 3), False),  # of which the weight alone is adapted
        (convert(nn.Conv1d(16, 8, 3), FourBit()), False),
    ):
        model = nn.Sequential(layer)
        first = base_layers_sha256(model, ["0"])
        with torch.no_grad():
            layer.bias += 1
        assert (base_layers_sha256(model, ["0"]) != first) is counts


def test_how_scales_were_found_makes_no_other_base():
    """It does not change what the bytes mean."""
    model = convert(nn.Sequential(nn.Linear(16, 8)), FourBit())
    stored = model[0].quantized
    found = replace(stored, packed=stored.packed.clone(), method="calibrated")
    other = nn.Sequential(Linear4Bit(found, model[0].bias))
    assert other[0].quantized.method == "calibrated" != stored.method
    assert base_layers_sha256(model, ["0"]) == base_layers_sha256(other, ["0"])
    other[0].packed[0, 0] ^= 1
    assert base_layers_sha256(model, ["0"]) != base_layers_sha256(other, ["0"])


def normed(seed=0):
    """A base with running statistics of its own data, in evaluation mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    model(torch.randn(64, 16))
    return model.eval()


def trained_on(model, shift):
    """Its adapter and running statistics are those of other data; the last norm stays as it was."""
    model.train()[4].eval()
    for adapter in lowmem.adapter_layers(model, lowmem.active_adapters(model)[-1]).values():
        nn.init.normal_(adapter.lora_b)
    model(torch.randn(64, 16) * 2 + shift)
    return model.eval()


@pytest.mark.parametrize("technique", [None, FourBit("nf4", 16)], ids=["dense", "stored"])
def test_running_statistics_that_training_changed_are_saved_and_loaded(technique, tmp_path):
    def made():
        return normed() if technique is None else convert(normed(), technique)

    x = torch.randn(8, 16)
    model = trained_on(lowmem.add_adapter(made(), "tuned", LoRA(2)), 3)
    save_adapter(model, tmp_path / "a")
    file = verify_and_map_file(tmp_path / "a")
    assert file.metadata["buffers"] == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    loaded = load_adapter(made(), tmp_path / "a")
    assert torch.equal(loaded(x), model(x))
    lowmem.deactivate(loaded)
    assert torch.equal(loaded(x), made()(x))
    save_adapter(model, tmp_path / "same")
    save_adapter(loaded, tmp_path / "again")  # inactive: its own are saved, not those that the model computes with
    assert (tmp_path / "again").read_bytes() == (tmp_path / "same").read_bytes()


def test_values_are_replaced_by_those_of_a_file_with_their_statistics(tmp_path):
    x = torch.randn(8, 16)
    fresh = lowmem.add_adapter(normed(), "tuned", LoRA(2))
    save_adapter(fresh, tmp_path / "fresh")
    assert "buffers" not in verify_and_map_file(tmp_path / "fresh").metadata
    model = trained_on(lowmem.add_adapter(normed(), "tuned", LoRA(2)), 3)
    load_adapter(model, tmp_path / "fresh")
    assert torch.equal(model(x), normed()(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buffers": ["1.nothing"]}, "holds a buffer '1.nothing' that the model has not"),
        (
            {"buffers": ["4.running_mean"]},
            "holds a buffer '4.running_mean' that the model has not, or of another shape",
        ),
        ({"buffers": "1.running_mean"}, "buffers='1.running_mean' must be a list of names"),
        ({"buffers": []}, "has tensors of no layer that it adapts, as '1.num_batches_tracked'"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(change, message, tmp_path):
    save_adapter(trained_on(lowmem.add_adapter(normed(), "tuned", LoRA(2)), 3), tmp_path / "a")
    file = verify_and_map_file(tmp_path / "a")
    write_tensors_returning_digest(tmp_path / "b", file.tensors, {**file.metadata, **change})
    model = normed()
    refused(model, tmp_path / "b", message)
    assert type(model[0]) is nn.Linear


def test_gguf_has_no_form_of_running_statistics(tmp_path):
    model = trained_on(lowmem.add_adapter(normed(), "tuned", LoRA(2)), 3)
    with pytest.raises(
        ValueError, match=r"training changed 1.num_batches_tracked, a buffer, of which GGUF has no form"
    ):
        save_adapter(model, tmp_path / "a", format="gguf")
