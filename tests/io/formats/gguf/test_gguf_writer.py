"""GGUF files of whole models, read back by the reader of GGUF. That llama.cpp runs them is held in tests/formats."""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowmem
from lowmem.errors import FileError
from lowmem.io.formats.gguf.gguf_file import encode_metadata_field
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.quant.tensor import QuantizedTensor
from tests.compiled import on_threads
from tests.io.formats.folders import CONFIG, fourbit, weights_of, write_file, write_folder
from tests.io.formats.gguf.test_gguf_tokenizer_fields import bytes_bpe
from tests.io.formats.written import header_of

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer is written")

FORMATS = {"q4_0": {}, "iq4_nl": {}, "uint4": {"scales": "float16_offsets"}, "q8_0": {}}


def check_same(path, weights):
    """Check that a file holds weights to the bit, dense vectors in float32."""
    with open_foreign_checkpoint(path) as file:
        assert file.tensors.keys() == weights.keys()
        for name, expected in weights.items():
            found = file.tensors[name].read()
            if isinstance(expected, QuantizedTensor):
                assert (found.format, found.block_size) == (expected.format, 32)
                assert torch.equal(found.dequantize(), expected.dequantize())
                if expected.block_size == 32:
                    assert torch.equal(found.packed, expected.packed)
                    assert torch.equal(found.encoding.decode(found.scales), expected.encoding.decode(expected.scales))
            else:
                assert found.dtype == (torch.float32 if expected.dim() == 1 else expected.dtype)
                assert torch.equal(found.float(), expected.float())


@given(
    format=st.sampled_from([*FORMATS]),
    size=st.sampled_from([32, 64]),
    changes=st.fixed_dictionaries(
        {
            "num_attention_heads": st.sampled_from([2, 4]),
            "num_key_value_heads": st.sampled_from([1, 2]),
            "head_dim": st.sampled_from([16, 32]),
            "num_hidden_layers": st.integers(1, 2),
            "tie_word_embeddings": st.booleans(),
            "model_type": st.sampled_from(["llama", "mistral", "qwen2"]),
        }
    ),
    shards=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_codes_and_scales_go_there_and_come_back(format, size, changes, shards, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    weights = weights_of(fourbit(format, block_size=size, **FORMATS[format]), {**CONFIG, **changes}, seed)
    source = write_folder(folder / "in", weights, {**CONFIG, **changes}, shards)
    rows = lowmem.export(source, folder / "out.gguf")
    check_same(folder / "out.gguf", weights)
    assert [row.name for row in rows] == sorted(weights)
    assert all(row.error is None for row in rows)
    for row in rows:
        assert row.after_bytes == header_of(folder / "out.gguf").tensors[row.target].nbytes


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = write_folder(tmp_path / "in", weights_of(fourbit("nf4")))
    (source / "tokenizer.json").write_text(json.dumps(bytes_bpe()))
    contents = []
    for threads in (1, 3):
        with on_threads(threads):
            lowmem.export(source, tmp_path / f"{threads}.gguf", requantize=True)
        contents.append((tmp_path / f"{threads}.gguf").read_bytes())
    assert contents[0] == contents[1]


def test_dense_matrices_keep_their_dtype_and_a_dtype_is_for_all_of_them(tmp_path):
    for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        dense = weights_of(lambda values: values.to(dtype))  # noqa: B023
        lowmem.export(write_folder(tmp_path / f"d{number}", dense), tmp_path / f"d{number}.gguf")
        check_same(tmp_path / f"d{number}.gguf", dense)
        weights = weights_of(fourbit("nf4"))
        source = write_folder(tmp_path / f"q{number}", weights)
        rows = lowmem.export(source, tmp_path / f"q{number}.gguf", dtype=dtype)
        values = {
            name: weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight
            for name, weight in weights.items()
        }
        check_same(tmp_path / f"q{number}.gguf", values)
        assert {row.error is None for row in rows if len(row.shape) > 1} == {dtype == torch.float32}
    with pytest.raises(ValueError, match=r"torch\.float64"):
        lowmem.export(source, tmp_path / "a.gguf", dtype=torch.float64)
    lowmem.export(
        write_folder(tmp_path / "f64", weights_of(torch.Tensor.double)), tmp_path / "b.gguf", dtype=torch.float32
    )


def test_what_is_not_exact_is_refused_by_name_or_quantized_again_with_its_error(tmp_path):
    weights = weights_of(fourbit("q4_0"))
    for place, make in (
        ("q_proj", fourbit("nf4")),
        ("v_proj", fourbit("q4_0", block_size=16)),
        ("up_proj", fourbit("fp4")),
        ("gate_proj", fourbit("q4_0", scales="float32")),
        ("down_proj", lambda values: lowmem.quantize(values, "q4_0")),
        ("o_proj", fourbit("int8")),
    ):
        name = next(one for one in weights if place in one)
        weights[name] = make(weights[name].dequantize())
    source = write_folder(tmp_path / "in", weights)
    with pytest.raises(FileError, match=r"gate_proj.*float16.*up_proj.*times 6") as error:
        lowmem.export(source, tmp_path / "out.gguf")
    assert "--requantize" in str(error.value)
    assert "and 3 other kinds" in str(error.value)
    assert " more " not in str(error.value)  # each has a reason of its own
    assert not (tmp_path / "out.gguf").exists()
    rows = {row.name.split(".")[-2]: row for row in lowmem.export(source, tmp_path / "out.gguf", requantize=True)}
    changed = {name: row.kind for name, row in rows.items() if row.error is not None}
    again = dict.fromkeys(("q_proj", "v_proj", "up_proj"), "IQ4_NL")
    assert changed == {**again, "gate_proj": "Q4_0", "o_proj": "Q8_0"}
    with open_foreign_checkpoint(tmp_path / "out.gguf") as file:
        for row in rows.values():
            if row.error is not None:
                before, after = weights[row.name].dequantize(), file.tensors[row.name].read()
                after = after if isinstance(after, torch.Tensor) else after.dequantize()
                assert row.error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)
    assert rows["gate_proj"].error < 2**-11
    assert rows["o_proj"].error < 1 / 127  # half a step of 1/127 of a block's largest weight
    source = write_folder(tmp_path / "alike", weights_of(fourbit("nf4")))
    with pytest.raises(FileError, match=r"lm_head\.weight and 8 more in nf4, .*, GGUF has no type with the levels"):
        lowmem.export(source, tmp_path / "out2.gguf")


def test_rows_that_are_no_multiple_of_32_are_dense_where_asked(tmp_path):
    config = {**CONFIG, "intermediate_size": 80}
    source = write_folder(tmp_path / "in", weights_of(fourbit("q4_0"), config), config)
    with pytest.raises(FileError, match="rows of 80"):
        lowmem.export(source, tmp_path / "out.gguf")
    rows = lowmem.export(source, tmp_path / "out.gguf", requantize=True)
    assert {row.kind for row in rows if "down_proj" in row.name} == {"F16"}


def test_values_beyond_float16_are_refused(tmp_path):
    weights = weights_of(lambda values: values * 1e5)
    source = write_folder(tmp_path / "in", weights)
    with pytest.raises(ValueError, match=r"beyond float16.*bf16"):
        lowmem.export(source, tmp_path / "out.gguf", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_tokenizer_comes_from_the_folder_or_an_existing_file_or_there_is_none(tmp_path):
    weights = weights_of(fourbit("q4_0"))
    source = write_folder(tmp_path / "in", weights)
    with pytest.warns(UserWarning, match="no tokenizer"):
        lowmem.export(source, tmp_path / "none.gguf")
    header = header_of(tmp_path / "none.gguf")
    assert header.metadata["tokenizer.ggml.model"] == "no_vocab"
    assert header.metadata["general.file_type"] == header.metadata["general.quantization_version"] == 2
    (source / "tokenizer.json").write_text(json.dumps(bytes_bpe()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowmem.export(source, tmp_path / "own.gguf")
        (source / "tokenizer.json").unlink()
        lowmem.export(source, tmp_path / "like.gguf", like=tmp_path / "own.gguf")
        alone = write_file(tmp_path / "alone.safetensors", weights)
        lowmem.export(alone, tmp_path / "alone.gguf", like=str(tmp_path / "own.gguf"))
    own, *others = (header_of(tmp_path / f"{name}.gguf") for name in ("own", "like", "alone"))
    raw = [(tmp_path / f"{name}.gguf").read_bytes() for name in ("own", "like", "alone")]
    for header, content in zip(others, raw[1:], strict=True):
        assert {key: content[place] for key, place in header.field_slices.items()} == {
            key: raw[0][place] for key, place in own.field_slices.items()
        }
    with pytest.raises(FileError, match=r"config\.json.*--like"):
        lowmem.export(alone, tmp_path / "x.gguf")


def test_factors_of_frequencies_are_written_or_copied(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {**CONFIG, "rope_parameters": {**rope, "original_max_position_embeddings": 32}}
    weights = weights_of(fourbit("q4_0"))
    lowmem.export(write_folder(tmp_path / "in", weights, config), tmp_path / "a.gguf")
    check_same(tmp_path / "a.gguf", weights)
    alone = write_file(tmp_path / "alone.safetensors", weights)
    lowmem.export(alone, tmp_path / "b.gguf", like=tmp_path / "a.gguf")
    first, second = ((tmp_path / f"{name}.gguf").read_bytes() for name in "ab")
    found = header_of(tmp_path / "a.gguf").tensors["rope_freqs.weight"]
    assert (found.shape, found.type) == ((8,), 0)
    other = header_of(tmp_path / "b.gguf").tensors["rope_freqs.weight"]
    assert first[found.begin :][: found.nbytes] == second[other.begin :][: other.nbytes]


def test_another_model_or_a_damaged_one_is_refused(tmp_path):
    weights = weights_of(fourbit("q4_0"))
    source = write_folder(tmp_path / "in", weights)
    lowmem.export(source, tmp_path / "good.gguf")

    def refused(words, weights=weights, config=CONFIG, **options):
        number = len([*tmp_path.iterdir()])
        folder = write_folder(tmp_path / f"f{number}", weights, config)
        with pytest.raises((FileError, OSError), match=words):
            lowmem.export(folder, tmp_path / "out.gguf", **options)
        assert not (tmp_path / "out.gguf").exists()

    refused("model_type='gpt2'", config={**CONFIG, "model_type": "gpt2"})
    refused("num_attention_heads", config={**CONFIG, "num_attention_heads": "4"})
    refused("output.weight", weights={name: one for name, one in weights.items() if name != "lm_head.weight"})
    refused(r"blk\.1\.", config={**CONFIG, "num_hidden_layers": 2})
    refused(r"blk\.0\.attn_v", weights={name: one for name, one in weights.items() if "v_proj" not in name})
    refused("block_count is 1", weights={**weights, "model.layers.1.mlp.up_proj.weight": torch.ones(96, 64)})
    refused("extra.weight", weights={**weights, "model.extra.weight": torch.ones(64)})
    refused("shape.*128", config={**CONFIG, "hidden_size": 128, "head_dim": 16})
    refused("attn_k.*shape.*64", config={**CONFIG, "num_key_value_heads": 4})
    refused("token_embd.*shape.*97", config={**CONFIG, "vocab_size": 97})
    refused("heads", config={**CONFIG, "num_attention_heads": 5, "head_dim": 16})
    refused("dimensions", weights={**weights, "model.norm.weight": torch.ones(2, 2, 2)})
    refused("int64", weights={**weights, "model.norm.weight": torch.ones(64).long()})
    content = (tmp_path / "good.gguf").read_bytes()
    like = tmp_path / "like.gguf"
    refused(r"like\.gguf", like=like)
    for broken in (
        content[:500],
        b"",
        content.replace(b"blk.0.ffn_gate", b"blk.0.ffn_date"),
        content.replace(b"llama.block_count", b"llama.block_counT"),
    ):
        like.write_bytes(broken)
        refused(r"like\.gguf|block_count", like=like)
    arch = encode_metadata_field("general.architecture", "llama")
    like.write_bytes(content.replace(arch, encode_metadata_field("general.architecture", "gemma")))
    refused(r"like\.gguf.*same model", like=like)
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(bytes_bpe()))
    lowmem.export(source, tmp_path / "tokens.gguf")
    like.write_bytes((tmp_path / "tokens.gguf").read_bytes().replace(b".ggml.merges", b".ggml.scores"))
    refused(r"like\.gguf': tokenizer\.ggml\.scores=.* must be an array for 96 tokens; name another", like=like)
    more = {**CONFIG, "vocab_size": 97}
    refused(
        r"token_embd.*97.*tokens\.gguf.*96",
        weights=weights_of(fourbit("q4_0"), more),
        config=more,
        like=tmp_path / "tokens.gguf",
    )


def test_norms_of_a_gemma_3_are_one_more_in_the_file_and_come_back(tmp_path):
    config = {**CONFIG, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16}
    config |= {"tie_word_embeddings": True, "rope_parameters": None}
    weights = weights_of(fourbit("q4_0"), config)
    layer = "model.layers.0"
    for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        weights[f"{layer}.{name}.weight"] = torch.zeros(16 if "self_attn" in name else 64)
    norms = {name: weight for name, weight in weights.items() if not isinstance(weight, QuantizedTensor)}
    for number, name in enumerate(norms):
        weights[name] = torch.randint(-255, 999, norms[name].shape) / (256 + number)  # of which 1 + w is rounded
    source = write_folder(tmp_path / "in", weights, config)
    rows = lowmem.export(source, tmp_path / "out.gguf")
    assert all(row.error is None for row in rows)
    assert len(norms) == 7
    header = header_of(tmp_path / "out.gguf")
    assert header.metadata["general.architecture"] == "gemma3"
    content = (tmp_path / "out.gguf").read_bytes()
    with open_foreign_checkpoint(tmp_path / "out.gguf") as file:
        for row in rows:
            if row.name in norms:
                place = header.tensors[row.target]
                values = torch.frombuffer(
                    bytearray(content[place.begin : place.begin + place.nbytes]), dtype=torch.float32
                )
                assert torch.equal(values, 1 + weights[row.name])
                found = file.tensors[row.name].read()
                assert torch.equal(1 + found, values)  # what the model computes of it
                weights[row.name] = found
    check_same(tmp_path / "out.gguf", weights)
    del weights[f"{layer}.self_attn.q_norm.weight"]
    with pytest.raises(
        FileError, match="it has no weight for blk.0.attn_q_norm.weight, which a gemma3 of 1 layers has"
    ):
        lowmem.export(write_folder(tmp_path / "lacks", weights, config), tmp_path / "lacks.gguf")
