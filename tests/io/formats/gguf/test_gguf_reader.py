"""GGUF files are read in bounded time and memory, whatever they claim."""

import struct
from pathlib import Path

import pytest
import torch

from lowmem.errors import FileError
from lowmem.io.formats.gguf.gguf_file import MAX_ITEMS
from lowmem.io.formats.gguf.gguf_reader import open_gguf_and_list_tensors
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from tests.io.formats.written import LLAMA, QWEN, gguf, read_all, text

SAMPLE = (Path(__file__).parents[1] / "samples" / "types.gguf").read_bytes()
NORM = ("blk.0.attn_norm.weight", (8,), 0, 0)


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    error = read_all(path)
    assert error is not None
    return error


def test_metadata_of_every_type_is_stepped_over_and_tensors_are_found_behind_it(tmp_path):
    nested = struct.pack("<IIQ", 9, 9, 2) + (struct.pack("<IQ", 8, 1) + text("a")) * 2
    metadata = {
        **QWEN,
        **dict(enumerate_types()),
        "numbers": list(range(9)),
        "many": [0.5] * 70_000,
        "texts": ["a", "", "\u00e9"],
        "none": [],
        "nested": nested,
        "long": "x" * 70_000,
    }
    data = torch.arange(16.0).numpy().tobytes()
    tensors = [NORM, ("blk.1.attn_q.bias", (8,), 0, 32)]
    for version in (2, 3):
        (tmp_path / "a.gguf").write_bytes(gguf(metadata, tensors, data, version))
        with open_foreign_checkpoint(tmp_path / "a.gguf") as file:
            assert file.tensors["model.layers.0.input_layernorm.weight"].read().tolist() == list(range(8))
            assert file.tensors["model.layers.1.self_attn.q_proj.bias"].read().tolist() == list(range(8, 16))


def enumerate_types():
    for kind, size in {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}.items():
        yield f"type{kind}", struct.pack("<I", kind) + b"\1" * size


def test_every_cut_of_a_file_is_refused(tmp_path):
    for end in range(len(SAMPLE)):
        if end % 11 == 0 or end > len(SAMPLE) - 40:
            assert refused(tmp_path / "a.gguf", SAMPLE[:end])


CASES = {
    "it is big-endian": gguf(QWEN, version=3 << 24),
    "has version 1": gguf(QWEN, version=1),
    "has version 4": gguf(QWEN, version=4),
    "metadata has 'a' twice": b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (text("a") + struct.pack("<IB", 0, 0)) * 2,
    "it claims 9223372036854775808 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(64),
    "it claims 9223372036854775808 metadata keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(64),
    "type 13, which is unknown": gguf({"a": struct.pack("<I", 13)}),
    "no UTF-8": gguf({"a": struct.pack("<I", 8) + text(b"\xff")}),
    "the name of a metadata key is empty": gguf({"": 1}),
    "longer than 1024": gguf({"x" * 1025: 1}),
    "arrays lie 5 deep": gguf({"a": struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40}),
    "more than 4194304 texts": gguf({"a": struct.pack("<IIQ", 9, 8, MAX_ITEMS + 1)}),
    "wants 9223372036854775808 bytes": gguf({"a": struct.pack("<IIQ", 9, 0, 2**63)}),
    "wants 18446744073709551615 bytes": gguf({"a": struct.pack("<IQ", 8, 2**64 - 1)}),
    "general.alignment=0": gguf({**QWEN, "general.alignment": 0}),
    "general.alignment=24": gguf({**QWEN, "general.alignment": 24}),
    "it has tensor 'blk.0.attn_norm.weight' twice": gguf(QWEN, [NORM, NORM], bytes(64)),
    "lie on the same bytes": gguf(QWEN, [NORM, ("blk.1.attn_norm.weight", (16,), 0, 0)], bytes(64)),
    "unaligned or beyond": gguf(QWEN, [("output.weight", (8,), 0, 4)], bytes(64)),
    "takes 64 bytes at": gguf(QWEN, [("output.weight", (16,), 0, 32)], bytes(64)),
    "holds nothing": gguf(QWEN, [("output.weight", (0, 2**63), 0, 0)], bytes(64)),
    "no multiple of 32 in Q4_0": gguf(QWEN, [("output.weight", (16,), 2, 0)], bytes(64)),
    "0 dimensions": gguf(QWEN, [("output.weight", (), 0, 0)], bytes(64)),
    "5 dimensions": gguf(QWEN, [("output.weight", (1,) * 5, 0, 0)], bytes(64)),
    "general.architecture=None": gguf({}, [NORM], bytes(64)),
    "no known place": gguf(QWEN, [("blk.0.ffn_gate_exps.weight", (2, 8), 0, 0)], bytes(64)),
    "are 'model.layers.1.input_layernorm.weight'": gguf(
        QWEN, [("blk.1.attn_norm.weight", (8,), 0, 0), ("blk.01.attn_norm.weight", (8,), 0, 32)], bytes(64)
    ),
    "it holds no tensors": gguf(QWEN),
    "do not divide into 2 heads": gguf(LLAMA, [("blk.0.attn_q.weight", (3, 4), 0, 0)], bytes(64)),
    "scales that are NaN": gguf(QWEN, [("output.weight", (1, 32), 2, 0)], b"\xff" * 32),
    "exponent of 255": gguf(QWEN, [("output.weight", (1, 32), 39, 0)], b"\xff" * 32),
}


def test_what_contradicts_itself_is_refused_with_the_reason(tmp_path):
    for message, content in CASES.items():
        assert message in refused(tmp_path / "a.gguf", content)


def test_types_that_are_no_levels_are_refused_by_name_one_by_one(tmp_path):
    tensors = [("output.weight", (1, 256), 16, 0), ("token_embd.weight", (1, 256), 77, 160), (*NORM[:3], 192)]
    (tmp_path / "a.gguf").write_bytes(gguf(QWEN, tensors, bytes(256)))
    with open_foreign_checkpoint(tmp_path / "a.gguf") as file:
        reasons = {tensor.kind: tensor.refusal for tensor in file.tensors.values()}
        assert reasons["F32"] is None
        assert "not 16 levels" in reasons["IQ2_XXS"]
        assert "does not know this type" in reasons["type 77"]
        with pytest.raises(FileError, match="type 77 cannot be kept exactly"):
            file.tensors["model.embed_tokens.weight"].read()


def test_vectors_of_blocks_are_dense_where_the_type_says_their_values(tmp_path):
    """llama.cpp writes none; a vector has no rows, which lowmem would store."""
    raw = torch.cat([torch.tensor([0.5]).half().view(torch.uint8), torch.arange(32, dtype=torch.uint8)])
    tensors = [(NORM[0], (32,), 8, 0), ("blk.0.ffn_norm.weight", (32,), 2, 64)]
    (tmp_path / "a.gguf").write_bytes(gguf(QWEN, tensors, bytes(raw.tolist()) + bytes(96)))
    with open_foreign_checkpoint(tmp_path / "a.gguf") as file:
        dense, refused = file.tensors.values()
        assert dense.read().tolist() == [0.5 * n for n in range(32)]
        assert dense.storage_form() == torch.float32
        assert "a vector has no rows of blocks" in refused.refusal


def test_what_the_model_computes_itself_is_left_out(tmp_path):
    tensors = [("rope_freqs.weight", (8,), 0, 0), (*NORM[:3], 32)]
    (tmp_path / "a.gguf").write_bytes(gguf(LLAMA, tensors, bytes(64)))
    file, found, left_out = open_gguf_and_list_tensors(tmp_path / "a.gguf")
    file.close()
    assert left_out == ["rope_freqs.weight"]
    assert [tensor.name for tensor in found] == ["model.layers.0.input_layernorm.weight"]


def test_a_file_that_is_cut_after_it_was_opened_is_an_error_and_no_crash(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(SAMPLE)
    with open_foreign_checkpoint(path) as file:
        path.write_bytes(SAMPLE[:2000])
        with pytest.raises(FileError, match="cut after it was opened"):
            file.tensors["model.layers.0.mlp.down_proj.weight"].read()


def test_large_tensors_are_read_in_chunks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem.io.formats.gguf.gguf_reader.CHUNK_BYTES", 200)
    path = tmp_path / "a.gguf"
    path.write_bytes(SAMPLE)
    with open_foreign_checkpoint(path) as file:
        chunked = {name: tensor.read() for name, tensor in file.tensors.items()}
    monkeypatch.undo()
    with open_foreign_checkpoint(path) as file:
        for name, tensor in file.tensors.items():
            whole, parts = (
                (w if isinstance(w, torch.Tensor) else w.dequantize()) for w in (tensor.read(), chunked[name])
            )
            assert torch.equal(whole, parts)
