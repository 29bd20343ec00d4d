"""GPTQ and AWQ, written here as AutoGPTQ and AutoAWQ pack them: their modules do not install without a GPU."""

import json
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.errors import FileError
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from tests import strategies
from tests.io.formats.test_open_foreign import values_of
from tests.io.formats.written import opened, words


def layer(seed, inputs, outputs, group, zeros=None, version=1, order=None):
    """Return the parts of a layer, and its weight in float32."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
    scales = (torch.randn(groups, outputs, generator=generator) * 0.01).half()
    if zeros is None:
        zeros = torch.full((groups, outputs), 8)
    g_idx = torch.arange(inputs) // group if order is None else order
    parts = {
        "qweight": words(codes.T).T.contiguous(),
        "qzeros": words((zeros - int(version == 1)) % 16),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return parts, ((codes - zeros[g_idx]).float() * scales[g_idx].float()).T


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is output AWQ_ORDER[i]


def awq_layer(seed, inputs, outputs, group, zeros=None):
    """Return the parts of a layer of AWQ, and its weight in float32."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
    scales = (torch.randn(inputs // group, outputs, generator=generator) * 0.01).half()
    zeros = torch.full(scales.shape, 8) if zeros is None else zeros

    def packed(values):
        return words(values.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2))

    wide = (codes - zeros.repeat_interleave(group, 0)).float() * scales.float().repeat_interleave(group, 0)
    return {"q.qweight": packed(codes), "q.qzeros": packed(zeros), "q.scales": scales}, wide.T


def save(folder, parts, config=None, path="model.layers.0.q"):
    with stored(folder, parts, config, path):
        pass


@contextmanager
def stored(folder, parts, config=None, path="model.layers.0.q"):
    """Write a folder, and open its only weight."""
    named = {f"{path}.{name}".lstrip("."): value for name, value in parts.items()}
    with opened(folder, named, config) as file:
        (tensor,) = file.tensors.values()
        assert (file.kind, tensor.name) == ("gptq", f"{path}.weight".lstrip("."))
        yield tensor


@given(
    strategies.seeds,
    st.integers(1, 8).map(lambda n: 8 * n),
    st.integers(1, 3).map(lambda n: 8 * n),
    st.sampled_from([8, 16, 32, 128]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_weights_are_exact_in_both_versions_and_any_order(
    tmp_path_factory, seed, inputs, outputs, group, version, told, symmetric, mixed
):
    folder = tmp_path_factory.mktemp("gptq")
    zeros = None if symmetric else torch.randint(0, 16, (-(-inputs // group), outputs))
    told = told or not symmetric  # symmetric ones tell the version
    order = (torch.randperm(inputs) // group) if mixed else None
    parts, weight = layer(seed, inputs, outputs, group, zeros, version, order)
    told = (
        {"bits": 4, "group_size": group, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"} if told else None
    )
    with stored(folder, parts, told) as tensor:
        weight_read = tensor.read()
        in_order = bool((parts["g_idx"].diff() >= 0).all())
        assert (tensor.order is None, tensor.storage_form().gathered) == (in_order, not in_order)
        assert weight_read.format == ("q4_0" if symmetric or bool((zeros == 8).all()) else "uint4")
        assert torch.equal(values_of(tensor), weight)


def test_what_is_no_16_levels_times_scales_of_blocks_is_refused(tmp_path):
    uneven = torch.tensor([0] * 15 + [1] * 17)[torch.randperm(32)]
    for reason, more in {
        "do not have 16 columns each": {"order": uneven},
        "more bits than float32": {"zeros": torch.randint(0, 16, (2, 8)), "wide": True},
        "no blocks of an even number": {"group": 5},
    }.items():
        wide = more.pop("wide", False)
        parts, weight = layer(3, 32, 8, **{"group": 16, **more})
        parts = {**parts, "scales": parts["scales"].float()} if wide else parts
        with stored(tmp_path, parts, {"bits": 4, "group_size": more.get("group", 16)}) as tensor:
            assert reason in tensor.refusal
            assert torch.equal(tensor.values(), weight)
            with pytest.raises(FileError, match="cannot be kept exactly"):
                tensor.read()


def test_layers_of_other_bits_and_parts_that_do_not_fit_are_refused(tmp_path):
    parts, _ = layer(5, 32, 8, 16)
    with stored(tmp_path, parts, {"bits": 8}) as tensor:
        assert "8 bits" in tensor.refusal
    with stored(tmp_path, {**parts, "qweight": torch.zeros(3, 8, dtype=torch.int32)}) as tensor:
        assert "3.0 bits" in tensor.refusal
    for message, name, value in (
        ("do not fit", "qzeros", torch.zeros(3, 1, dtype=torch.int32)),
        ("2 groups of 0 of 32", "g_idx", torch.full((32,), 7, dtype=torch.int32)),
        ("do not fit", "g_idx", torch.zeros(32, 1, dtype=torch.int32)),
        ("do not fit", "g_idx", torch.zeros(1, 32, dtype=torch.int32)),
        ("do not fit", "scales", torch.zeros(2, 8, dtype=torch.int32)),
    ):
        with pytest.raises(FileError, match=message):
            save(tmp_path, {**parts, name: value})
    del parts["qzeros"]
    with pytest.raises(FileError, match="lacks"):
        save(tmp_path, parts)


def test_what_a_config_claims_is_checked(tmp_path):
    parts, weight = layer(6, 32, 8, 32)
    for size in (2**62, 33, -1, None):
        with stored(tmp_path, parts, {"group_size": size}) as tensor:
            assert torch.equal(tensor.read().dequantize(), weight)
    told = {"0": 0, "-5": -5, "31": 31, "'32'": "32", r"32\.0": 32.0, "True": True, r"\[32\]": [32]}
    for text, size in told.items():
        with pytest.raises(FileError, match=f"says group_size={text}, and '.*q' has 1 groups of 32 inputs; get both"):
            save(tmp_path, parts, {"group_size": size})
    parts, weight = layer(6, 64, 8, 32)
    without = {name: part for name, part in parts.items() if name != "g_idx"}
    with stored(tmp_path, without, {"group_size": 32}) as tensor:
        assert torch.equal(tensor.read().dequantize(), weight)
    for size in (48, -1):  # no group index says which inputs such groups have
        with pytest.raises(FileError, match=f"says group_size={size}, and '.*q' has 2 groups of 64 inputs"):
            save(tmp_path, without, {"group_size": size})


def test_a_folder_of_before_configs_had_it_says_the_version_in_a_file_of_its_own(tmp_path):
    zeros = torch.randint(0, 7, (1, 8))
    for version, more in ((1, {}), (2, {"checkpoint_format": "gptq_v2"})):
        parts, weight = layer(0, 32, 8, 32, zeros, version)
        own = tmp_path / "quantize_config.json"
        own.write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False, **more}))
        with stored(tmp_path, parts) as tensor:
            assert torch.equal(values_of(tensor), weight)
    own.write_text("[]")
    with pytest.raises(FileError, match="quantize_config.json.*must be an object"):
        open_foreign_checkpoint(tmp_path)


def test_zero_points_of_an_unknown_version_are_refused(tmp_path):
    """A file that was taken out of its folder: nothing says whether its zero points are one too small."""
    parts, _ = layer(0, 32, 8, 32, torch.randint(0, 7, (1, 8)), 2)
    for write_and_open in (
        lambda: save(tmp_path, parts),
        lambda: open_foreign_checkpoint(tmp_path / "model.safetensors"),
    ):
        with pytest.raises(FileError, match="version 1 or 2, and no config.json"):
            write_and_open()
        (tmp_path / "config.json").unlink(missing_ok=True)
    save(tmp_path, parts, {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"})
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    with open_foreign_checkpoint(tmp_path / "gptq_model-4bit-32g.safetensors") as file:
        assert file.kind == "gptq"


@given(strategies.seeds, st.integers(1, 4), st.integers(1, 3), st.sampled_from([8, 32, 128]), st.booleans())
def test_weights_of_awq_are_exact(tmp_path_factory, seed, groups, words_of, group, symmetric):
    zeros = None if symmetric else torch.randint(0, 16, (groups, 8 * words_of))
    parts, weight = awq_layer(seed, groups * group, 8 * words_of, group, zeros)
    with opened(tmp_path_factory.mktemp("awq"), parts) as file:
        assert file.kind == "awq"
        stored = file.tensors["q.weight"].read()
        assert stored.format == ("q4_0" if symmetric else "uint4")
        assert torch.equal(stored.dequantize(), weight)


def test_what_is_not_exact_of_awq_is_refused_and_its_values_are_known(tmp_path):
    for reason, group, zeros in (("more bits", 16, torch.randint(0, 16, (2, 8))), ("no blocks", 4, None)):
        parts, weight = awq_layer(1, 32, 8, group, zeros)
        parts["q.scales"] = parts["q.scales"] if zeros is None else parts["q.scales"].float()
        with opened(tmp_path, parts, {"group_size": group}) as file:
            assert reason in file.tensors["q.weight"].refusal
            assert torch.equal(file.tensors["q.weight"].values(), weight)
    for message, changed, config in (
        ("says group_size=8, and 'q' has 8 groups of 32 inputs; get both", parts, {"group_size": 8}),
        ("do not fit", {**parts, "q.qzeros": parts["q.qzeros"][:1]}, {}),
        ("lacks", {name: part for name, part in parts.items() if name != "q.qzeros"}, {}),
    ):
        with pytest.raises(FileError, match=message), opened(tmp_path, changed, config):
            pass
