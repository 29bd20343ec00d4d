"""A format of another program is one line: with it, its files are found, read, checked and exported to."""

import struct

import pytest
import torch
from safetensors.torch import save_file

import lowmem
from lowmem.errors import FileError
from lowmem.io.filesystem import open_regular_file
from lowmem.io.formats import format_registry
from lowmem.io.formats.export_model import checked_or_inferred_export_format
from lowmem.io.formats.foreign_format import ExportTarget, ForeignFormat, LazyForeignTensor, exact_match_predicate
from lowmem.io.formats.open_foreign import is_foreign_quantized_part, open_foreign_checkpoint
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint


def find(source, config):
    """Weights in whole eighths: ``<layer>.eighths`` int8."""
    for name, spec in source.specs.items():
        layer, _, part = name.rpartition(".")
        if part == "eighths":
            read = lambda name=name: source.read_tensor(name).float() / 8  # noqa: E731
            yield LazyForeignTensor(f"{layer}.weight", spec.shape, "eighths", spec.nbytes, read), {name}


def open_bytes(path):
    """A file of one vector of bytes."""
    file = open_regular_file(path)
    read = lambda: torch.frombuffer(bytearray(path.read_bytes()[5:]), dtype=torch.uint8)  # noqa: E731
    return file, [LazyForeignTensor("bytes", (3,), "byte", 3, read)], ["checksum"]


def write_bytes(source, out, *, requantize, progress):
    out.write_bytes(b"BYTES" + struct.pack("3B", 1, 2, 3))
    return []


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    eighths = ForeignFormat("eighths", find, ("eighths",), "eighths", {"bits": exact_match_predicate(8)})
    own_file = ForeignFormat("bytes", magic=b"BYTES", open=open_bytes, target=ExportTarget(write_bytes, ".bytes"))
    for one in (eighths, own_file):
        monkeypatch.setitem(format_registry.FOREIGN_FORMATS, one.name, one)


def test_a_made_up_format_of_safetensors_is_read_and_its_config_is_checked(tmp_path):
    save_file({"a.eighths": torch.tensor([[8, -4]], dtype=torch.int8)}, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    for text in ("{}", '{"quantization_config": {"quant_method": "eighths", "bits": 8}}'):
        config.write_text(text)
        with open_foreign_checkpoint(tmp_path) as file:
            assert file.kind == "eighths"
            assert file.tensors["a.weight"].read().tolist() == [[1.0, -0.5]]
    (row,) = import_foreign_checkpoint(tmp_path, tmp_path / "out.safetensors")
    assert (row.name, row.kind, row.kept) == ("a.weight", "eighths", "float32")
    for claim in ('"quant_method": "gptq"', '"bits": 4'):
        config.write_text(f'{{"quantization_config": {{{claim}}}}}')
        with pytest.raises(FileError, match=f"config.json says {claim.split(chr(34))[1]}="):
            open_foreign_checkpoint(tmp_path)
    assert is_foreign_quantized_part("a.eighths")


def test_a_made_up_format_of_a_file_is_read_and_exported_to(tmp_path):
    path = tmp_path / "a.bytes"
    assert (
        checked_or_inferred_export_format(path, None)
        == checked_or_inferred_export_format(tmp_path, "bytes")
        == "bytes"
    )
    assert lowmem.export(tmp_path / "in", path) == []
    with open_foreign_checkpoint(path) as file:
        assert (file.kind, file.left_out) == ("bytes", ["checksum"])
        assert file.tensors["bytes"].read().tolist() == [1, 2, 3]


def test_other_known_methods_contradict_and_unknown_ones_do_not(tmp_path):
    save_file({"a.eighths": torch.zeros(1, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    for method in ("of tomorrow", *(one.method for one in format_registry.FOREIGN_FORMATS.values() if one.method)):
        (tmp_path / "config.json").write_text(f'{{"quantization_config": {{"quant_method": "{method}"}}}}')
        if method in ("of tomorrow", "eighths"):
            open_foreign_checkpoint(tmp_path).__exit__()
        else:
            with pytest.raises(FileError, match=f"quant_method='{method}', and its tensors are those of eighths"):
                open_foreign_checkpoint(tmp_path)
