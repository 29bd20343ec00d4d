"""Every foreign format against the package that writes it, bit for bit: ``tox -e formats``.

The default run reads small files that ``python -m tests.formats`` made with the same packages.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: tox -e formats")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: tox -e formats")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: tox -e formats")
pytest.importorskip("transformers", reason="transformers is not installed: tox -e formats")

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from lowmem.io.formats.gguf.gguf_block_types import BLOCKS
from lowmem.io.formats.gguf.gguf_tensor_names import FAMILIES, tensor_name_map_from_metadata
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from tests.formats.makers import MAKERS, bitsandbytes, compressed_tensors, gguf, gguf_values, raw_blocks
from tests.io.formats.test_open_foreign import values_of

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages


def check(path, expected):
    with open_foreign_checkpoint(path) as file:
        assert expected.keys() == file.tensors.keys()
        for name, values in expected.items():
            found = values_of(file.tensors[name])
            assert torch.equal(found.view(torch.int32), values.contiguous().view(torch.int32)), name


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_package_writes_is_read_to_the_bit(tmp_path, name):
    for seed in range(20):
        check(tmp_path / name, MAKERS[name](tmp_path / name, seed))


def test_every_scale_and_code_of_a_gguf_block_is_exact(tmp_path):
    """A tensor of a megabyte has scales of every size, and each part of a block takes every value."""
    check(tmp_path / "a.gguf", gguf(tmp_path / "a.gguf", seed=100, rows=64, columns=4096))


def test_every_dense_type_of_gguf_is_exact():
    """Also those that the samples have not: what the package dequantizes, bit for bit."""
    for block in BLOCKS.values():
        if block.dense is not None:
            raw = raw_blocks(block.name, 16, 1024, np.random.default_rng(1))
            found = block.dense(torch.from_numpy(raw).view(16, -1, block.nbytes)).flatten(1).float()
            assert torch.equal(found.view(torch.int32), gguf_values(block.name, raw).view(torch.int32)), block.name


def test_bitsandbytes_blocks_over_the_ends_of_rows(tmp_path):
    path = tmp_path / "a.safetensors"
    for columns in (8, 24, 48, 96, 160):
        for kind in ("nf4", "fp4"):
            check(path, bitsandbytes(path, columns, kind, double=True, shape=(64, columns)))


def test_compressed_tensors_in_groups_of_any_length(tmp_path):
    path = tmp_path / "a.safetensors"
    for group in (8, 16, 64):
        check(path, compressed_tensors(path, group, group=group))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_are_those_of_the_package(architecture):
    """The package maps the names of transformers to those of GGUF; here the other way."""
    number = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    assert isinstance(number, MODEL_ARCH)
    package = get_tensor_name_map(number, 3)
    heads = {f"{architecture}.attention.head_count": 2}
    names = tensor_name_map_from_metadata({"general.architecture": architecture, **heads})
    parts = [f"blk.2.{part}" for part in FAMILIES[architecture].parts] + ["token_embd", "output_norm", "output"]
    for part in parts:
        found = names.transformers_name_or_none(f"{part}.weight")
        assert package.get_name(found, try_suffixes=(".weight",)) == f"{part}.weight"
