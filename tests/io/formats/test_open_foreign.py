"""Files of other programs are recognized, and their weights are bit for bit what those programs say they are."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowmem.errors import FileError
from lowmem.io.formats.foreign_format import LazyForeignTensor
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.nn.forms import CodedForm
from lowmem.quant.tensor import QuantizedTensor
from tests.rounding import default_dtype

SAMPLES = Path(__file__).parent / "samples"
MADE = json.loads((SAMPLES / "samples.json").read_text())


def values_of(tensor: LazyForeignTensor) -> torch.Tensor:
    """Return a weight in float32, in the model's shape."""
    weight = tensor.read()
    if isinstance(weight, QuantizedTensor):
        flags = {"transposed": tensor.transposed, "gathered": tensor.order is not None}
        assert replace(CodedForm.from_quantized_tensor(weight), **flags) == tensor.storage_form()
        assert tuple(weight.shape) == tensor.shape
        weight.check_layout()
        values = weight.dequantize()
        assert torch.equal(values, weight.restore(slice(None)).view(weight.shape))
    else:
        assert weight.dtype == tensor.storage_form()
        values = weight.float()
    values = values if tensor.order is None else values[..., tensor.order().argsort()]
    return values.transpose(-1, -2).contiguous() if tensor.transposed else values


@pytest.mark.parametrize("name", MADE["sha256"])
def test_a_file_that_another_program_wrote_holds_what_that_program_says_to_the_bit(name):
    """tests/formats/makers.py wrote it with that program's own package, and noted its version and its values."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # of tensors without one: no reader depends on it
        with open_foreign_checkpoint(SAMPLES / name) as file, default_dtype(dtype):
            assert file.kind in ("gguf", "bitsandbytes", "gpt-oss", "compressed-tensors")
            assert file.tensors.keys() == MADE["sha256"][name].keys()
            for key, digest in MADE["sha256"][name].items():
                values = values_of(file.tensors[key])
                assert hashlib.sha256(values.numpy()).hexdigest() == digest, key


def test_a_folder_is_its_only_model_and_its_config_says_how_it_was_quantized(tmp_path):
    dense = {"a.weight": torch.randn(4, 8), "b": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(FileError, match=r"no \.safetensors file"):
        open_foreign_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileError, match="folder of GGUF files"):
        open_foreign_checkpoint(tmp_path)
    save_file(dense, tmp_path / "model.safetensors")
    for config in (None, "{}", '{"quantization_config": {"bits": 4}}'):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        for path in (tmp_path, tmp_path / "model.safetensors"):
            with open_foreign_checkpoint(path) as file:
                assert file.kind == "safetensors"
                assert all(torch.equal(file.tensors[name].read(), value) for name, value in dense.items())
    for config in ("{", "[]" * 9, '{"quantization_config": 1}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(FileError, match="config"):
            open_foreign_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    own = tmp_path / "quantize_config.json"  # AutoGPTQ's, of before there was another
    own.write_text('{"bits": 4}')
    with open_foreign_checkpoint(tmp_path) as file:
        assert file.kind == "safetensors"
    for content in ("[4]", '"gptq"', "null"):
        own.write_text(content)
        with pytest.raises(FileError, match="quantize_config.json': it is .*, and must be an object; get it again"):
            open_foreign_checkpoint(tmp_path)
    own.unlink()
    (tmp_path / "config.json").unlink()
    save_file(dense, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="2 files"):
        open_foreign_checkpoint(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_of_a_models_folder_the_files_are_read_that_transformers_reads(tmp_path, shards):
    """Hubs have other forms of a model beside it: the authors' own, and variants such as float16."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)] if shards > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        save_file({f"{number}.weight": torch.ones(2, 2)}, tmp_path / name)
    if shards > 1:
        places = {f"{number}.weight": name for number, name in enumerate(names)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "consolidated.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "consolidated.safetensors"}})
    )
    for other in ("consolidated.safetensors", "model.fp16.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / other)
    (tmp_path / "config.json").write_text("{}")
    with open_foreign_checkpoint(tmp_path) as file:
        assert [*file.tensors] == [f"{number}.weight" for number in range(shards)]


def test_parts_of_a_format_without_the_others_are_never_taken_for_dense_tensors(tmp_path):
    for part in ("qweight", "qzeros", "weight_scale", "weight_zero_point"):
        save_file({f"layer.{part}": torch.ones(2, 2)}, tmp_path / "model.safetensors")
        with pytest.raises(FileError, match=re.escape(part)):
            open_foreign_checkpoint(tmp_path)
