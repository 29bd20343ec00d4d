"""AWQ, written here as AutoAWQ packs it for its "gemm" kernel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowmem.errors import FileError
from lowmem.io.formats.recognize import open_foreign
from tests import strategies
from tests.io.formats.written import opened, words

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is output ORDER[i]


def layer(seed, inputs, outputs, group, zeros=None):
    """Return the parts of a layer, and its weight in float32."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
    scales = (torch.randn(inputs // group, outputs, generator=generator) * 0.01).half()
    zeros = torch.full(scales.shape, 8) if zeros is None else zeros

    def packed(values):
        return words(values.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2))

    wide = (codes - zeros.repeat_interleave(group, 0)).float() * scales.float().repeat_interleave(group, 0)
    return {"q.qweight": packed(codes), "q.qzeros": packed(zeros), "q.scales": scales}, wide.T


@given(strategies.seeds, st.integers(1, 4), st.integers(1, 3), st.sampled_from([8, 32, 128]), st.booleans())
def test_weights_are_exact(tmp_path_factory, seed, groups, words_of, group, symmetric):
    path = tmp_path_factory.mktemp("awq") / "a.safetensors"
    zeros = None if symmetric else torch.randint(0, 16, (groups, 8 * words_of))
    parts, weight = layer(seed, groups * group, 8 * words_of, group, zeros)
    save_file(parts, path)
    with open_foreign(path) as file:
        assert file.kind == "awq"
        stored = file.tensors["q.weight"].read()
        assert stored.format == ("q4_0" if symmetric else "uint4")
        assert torch.equal(stored.dequantize(), weight)


def test_what_is_not_exact_is_refused_and_its_values_are_known(tmp_path):
    for reason, group, zeros in (("more bits", 16, torch.randint(0, 16, (2, 8))), ("no blocks", 4, None)):
        parts, weight = layer(1, 32, 8, group, zeros)
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
