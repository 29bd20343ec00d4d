"""What lowmem wrote, read one weight at a time."""

import json

import pytest
import torch
from safetensors.torch import load, save_file

import lowmem
from lowmem.errors import FileError
from lowmem.io.formats.lazy_model import open_lazy_model
from lowmem.io.lowmem_file import write_tensors_returning_digest
from lowmem.quant.tensor import QuantizedTensor
from tests.io.formats.folders import CONFIG, fourbit, weights_of, write_file, write_folder


def check(path, weights):
    with open_lazy_model(path) as model:
        assert [*model.weights] == sorted(weights)
        for name, expected in weights.items():
            weight = model.weights[name]
            found = weight.read()
            assert weight.shape == tuple(expected.shape)
            assert weight.nbytes == expected.nbytes
            if isinstance(expected, QuantizedTensor):
                assert isinstance(found, QuantizedTensor)
                assert torch.equal(found.packed, expected.packed)
                assert torch.equal(found.scales, expected.scales)
                assert (found.format, found.block_size, found.method) == ("nf4", 64, expected.method)
                assert weight.form_name == "nf4, block_size=64, scales=double"
            else:
                assert torch.equal(found, expected)
        return model


def test_folders_shards_and_files_hold_the_same_weights(tmp_path):
    weights = weights_of(fourbit("nf4"))
    for shards in (1, 3):
        model = check(write_folder(tmp_path / f"f{shards}", weights, shards=shards), weights)
        assert model.config == CONFIG
        assert model.folder == tmp_path / f"f{shards}"
    model = check(write_file(tmp_path / "a.safetensors", weights), weights)
    assert (model.config, model.folder) == (None, None)
    check(write_folder(tmp_path / "dense", dense := weights_of(lambda values: values.half())), dense)


def test_a_tied_weight_is_named_and_a_16_bit_one_has_its_own_name(tmp_path):
    weights = weights_of(fourbit("nf4"), {**CONFIG, "tie_word_embeddings": True})
    folder = write_folder(tmp_path / "f", weights)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"][0]["names"].append("lm_head")
    (folder / "config.json").write_text(json.dumps(config))
    parts = load((folder / "model.safetensors").read_bytes())
    parts["model.norm.weight_rounded"] = parts.pop("model.norm.weight").half()
    save_file(parts, folder / "model.safetensors")
    with open_lazy_model(folder) as model:
        assert model.tied == ("lm_head.weight",)
        assert model.weights["model.norm.weight"].form_name == "float16"


def write_flagged(path, weight, flags, orders):
    """Write a file of one weight in nf4, whose record has flags."""
    record = {"technique": "FourBit", "format": "nf4", "block_size": 64, "scales": "double", "method": "absmax"}
    layers = {"a": {**record, **dict.fromkeys(flags, True)}}
    parts = {"a.weight_packed": weight.packed, "a.weight_scales": weight.scales, **orders}
    write_tensors_returning_digest(path, parts, {"kind": "model", "layers": layers})
    return path


def test_columns_in_another_order_and_swapped_dimensions_are_put_back(tmp_path):
    weight, order = lowmem.quantize(torch.randn(2, 8, 64), "nf4"), torch.randperm(64).int()
    for flags, shape in (
        (["transposed"], (2, 64, 8)),
        (["gathered"], (2, 8, 64)),
        (["gathered", "transposed"], None),
    ):
        orders = {"a.weight_order": order} if "gathered" in flags else {}
        with open_lazy_model(write_flagged(tmp_path / "a.safetensors", weight, flags, orders)) as model:
            found = model.weights["a.weight"]
            assert shape in (None, found.shape)
            values = found.weight_in_model_layout()
            values = values.mT if "transposed" in flags else values
            index = order.long() if "gathered" in flags else slice(None)
            assert torch.equal(values[..., index], weight.dequantize())


def refused(path, words):
    with pytest.raises(FileError, match=words), open_lazy_model(path):
        pass


def test_what_lowmem_did_not_write_is_refused_with_the_remedy(tmp_path):
    folder = write_folder(tmp_path / "f", weights_of(fourbit("nf4")))
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    record = config["quantization_config"]
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    refused(tmp_path / "a.gguf", "it is a GGUF file: make it lowmem's first, by lowmem quantize")
    first, *others = record["layers"]
    for changes, words in (
        ({"quant_method": "gptq"}, "gptq.*lowmem quantize"),
        ({"adapters": {"model.layers.0": [{}]}}, "model.layers.0.*merge"),
        ({"layers": [{**first, "format": "nf5"}, *others]}, "nf5"),
        ({"layers": [{**first, "sorted": True}]}, "sorted.*upgrade"),
        ({"layers": others}, "nothing says how"),
        ({"layers": [{**first, "block_size": 32}]}, "_scales' is .*, and no weight in nf4, block_size=32"),
        ({"layers": [{**first, "gathered": True}]}, "_order' is None, and no weight in nf4, .* gathered has"),
        *(
            ({"layers": one}, "layers=.* must be a list of objects|record of layers")
            for one in ("x", [1], [{"names": 3}])
        ),
        ({"skip": 5}, r"config\.json.*skip=5 must be glob patterns of paths"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {**record, **changes}}))
        refused(folder, words)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**63}))
    refused(folder, rf"config\.json.*num_hidden_layers={2**63}, and the folder has \d+ tensors; get it again")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json")
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, "config.json")
    save_file({"a": torch.ones(3)}, tmp_path / "theirs.safetensors")
    refused(tmp_path / "theirs.safetensors", "lowmem did not write")


def test_an_order_that_leaves_columns_out_is_refused_when_it_is_read(tmp_path):
    weight = lowmem.quantize(torch.randn(8, 64), "nf4")
    for wrong in (0, 64, -1):
        order = torch.arange(64).int()
        order[5] = wrong
        with (
            open_lazy_model(
                write_flagged(tmp_path / "a.safetensors", weight, ["gathered"], {"a.weight_order": order})
            ) as model,
            pytest.raises(FileError, match=r"a.weight_order' does not name each of 64 columns once; get it again"),
        ):
            model.weights["a.weight"].weight_in_model_layout()
