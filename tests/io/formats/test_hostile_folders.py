"""Folders whose index, shards, links and config.json contradict each other: they are refused, or read as they were.

What is drawn changes no tensor: so whatever is read in spite of it has the values that the whole folder has. Files
that are damaged inside are drawn in test_fuzzed_files.py.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowmem.errors import FileError
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from tests.io.formats.test_gptq_awq import awq_layer
from tests.io.formats.test_gptq_awq import layer as gptq_layer
from tests.io.formats.test_open_foreign import SAMPLES, values_of

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def parts_of(kind: str) -> dict[str, torch.Tensor]:
    if kind == "gptq":
        return {f"q.{name}": value for name, value in gptq_layer(1, 64, 16, 32)[0].items()}
    if kind == "awq":
        zeros = torch.randint(0, 16, (2, 16), generator=torch.Generator().manual_seed(0))
        return awq_layer(1, 64, 16, 32, zeros)[0]
    return load_file(SAMPLES / f"{kind}.safetensors")


CONFIGS = {
    "bitsandbytes-nf4-double": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors-int4": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "gpt-oss": {"quant_method": "mxfp4"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
}


def write(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write a folder of two shards; return what it holds, by the names in the model."""
    folder.mkdir()
    parts = parts_of(kind) | {"dense.weight": torch.ones(3, 4), "dense.bias": torch.zeros(3)}
    names = sorted(parts)
    for file, own in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({name: parts[name].contiguous() for name in own}, folder / file)
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIGS[kind]}))
    return read(folder)


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_foreign_checkpoint(path) as file:
        return {name: values_of(tensor) for name, tensor in file.tensors.items()}


def regular(path: Path) -> Path:
    """Return a path that an earlier change has not made a pipe or a device, which would block or never end."""
    if not path.is_file():
        raise OSError(f"{path} is no file")
    return path


def edit_index(folder: Path, change) -> None:
    index = json.loads(regular(folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_entry(folder, number):
    """Let an entry lead to the other shard, or drop, rename or add one."""

    def change(entries):
        name = sorted(entries)[number // 4 % max(1, len(entries))]
        match number % 4:
            case 0:
                entries[name] = SHARDS[entries[name] == SHARDS[0]]
            case 1:
                del entries[name]
            case 2:
                entries[name + "_"] = entries.pop(name)
            case _:
                entries[f"new{number}"] = SHARDS[number // 4 % 2]

    edit_index(folder, change)


AWAY = ("../outside.safetensors", "a/../" + SHARDS[0], "", ".", "..", INDEX, "config.json", "\0", "x" * 300)
AWAY += (SHARDS[0].upper(), SHARDS[0] + " ", 3, None, [SHARDS[0]], {})


def lead_away(folder, number):
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(regular(folder / SHARDS[0]).read_bytes())
    away = (*AWAY, str(outside))[number % (len(AWAY) + 1)]
    edit_index(
        folder, lambda entries: entries.update((name, away) for name, at in entries.items() if at == SHARDS[0])
    )


def copy_tensor(folder, number):
    """Let a tensor be in both shards."""
    first, second = (load_file(regular(folder / shard)) for shard in SHARDS)
    name = sorted(first)[number % max(1, len(first))]
    value = first[name] + 1 if first[name].is_floating_point() else first[name]
    save_file({**second, name: value}, folder / SHARDS[1])


def second_model(folder, number):
    """Add another model beside the index: one that transformers would read in its place, or one that it ignores."""
    values = {"dense.weight": torch.full((3, 4), 9.0)}
    name = ("model.safetensors", "other.safetensors.index.json")[number % 2]
    if name.endswith("json"):
        (folder / name).write_text(json.dumps({"weight_map": {"dense.weight": "third.safetensors"}}))
        save_file(values, folder / "third.safetensors")
    else:
        save_file(values, folder / name)


def replace_by_link(folder, number):
    """Put a link in the place of a file: to itself, a folder, a device, a pipe, nothing, or the same content."""
    path = regular(folder / (*SHARDS, INDEX, "config.json")[number % 4])
    kept = folder.parent / f"kept{path.suffix}"
    kept.write_bytes(path.read_bytes())
    path.unlink()
    how = number // 4 % 6
    if how == 3:
        os.mkfifo(path)
        return
    path.symlink_to((path, folder, Path("/dev/zero"), None, folder / "nothing", kept)[how])


WAYS = (change_entry, lead_away, copy_tensor, second_model, replace_by_link)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.lists(st.tuples(st.sampled_from(WAYS), st.integers(0, 500)), min_size=1, max_size=3),
)
@example("gptq", [(second_model, 0)])
@example("gptq", [(second_model, 1)])
@example("gptq", [(replace_by_link, 2)])
@example("gpt-oss", [(change_entry, 1 + 4 * 1), (change_entry, 1 + 4 * 2)])
@example("gptq", [(replace_by_link, 3 + 4 * 4)])
@example("gptq", [(replace_by_link, 3 + 4 * 3)])
def test_a_folder_that_contradicts_itself_is_refused_or_read_as_it_was(tmp_path_factory, kind, changes):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    expected = write(folder, kind)
    for change, number in changes:
        with suppress(OSError, ValueError, LookupError, AttributeError, RuntimeError, SafetensorError):
            change(folder, number)  # an earlier one may have left nothing to change
    try:
        found = read(folder)
    except (FileError, OSError) as error:
        said = str(error)
        assert said.isprintable()
        assert len(said) < 1000
        return
    assert all(number % 2 for change, number in changes if change is second_model)  # those that it ignores
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


LIES = (
    ("gptq", {"quant_method": "awq"}),
    ("gptq", {"quant_method": "compressed-tensors"}),
    ("gptq", {"bits": 8}),
    ("gptq", {"group_size": 64}),
    ("gptq", {"checkpoint_format": "marlin"}),
    ("awq", {"quant_method": "gptq"}),
    ("awq", {"bits": 8}),
    ("awq", {"group_size": 128}),
    ("awq", {"version": "gemv"}),
    ("bitsandbytes-nf4-double", {"quant_method": "gptq"}),
    ("bitsandbytes-nf4-double", {"load_in_4bit": False, "load_in_8bit": True}),
    ("gpt-oss", {"quant_method": "bitsandbytes"}),
    ("compressed-tensors-int4", {"quant_method": "awq"}),
    ("compressed-tensors-int4", {"format": "mxfp4-pack-quantized"}),
    *(
        ("compressed-tensors-int4", {"config_groups": {"a": {"weights": {"num_bits": 4, name: value}}}})
        for name, values in (
            ("num_bits", (8,)),
            ("symmetric", (False,)),
            ("group_size", (64, 0, -1, "32")),
            ("type", ("float", 3)),
            ("strategy", ("channel", "tensor", 3)),
            ("actorder", (1, ["group"])),
        )
        for value in values
    ),
)


def test_a_config_that_lies_about_the_quantization_is_refused(tmp_path):
    for number, (kind, lie) in enumerate(LIES):
        folder = tmp_path / str(number)
        write(folder, kind)
        (folder / "config.json").write_text(json.dumps({"quantization_config": {**CONFIGS[kind], **lie}}))
        with pytest.raises(FileError, match=r"config\.json|4 are read|groups of"):
            read(folder)
        for name, value in lie.get("config_groups", {}).get("a", {}).get("weights", {}).items():
            if name not in ("num_bits", "symmetric"):
                with pytest.raises(FileError, match=re.escape(f"config.json says {name}={value!r}, and ")):
                    read(folder)


def test_what_a_config_says_truly_or_not_at_all_is_read(tmp_path):
    groups = {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True}}}
    for number, (kind, truth) in enumerate(
        (
            ("gptq", {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}),
            ("gptq", {"group_size": None}),
            ("compressed-tensors-int4", {"config_groups": groups}),
            (
                "compressed-tensors-int4",
                {"config_groups": {"a": {"weights": {"strategy": "group", "actorder": None}}}},
            ),
            ("compressed-tensors-int4", {"config_groups": {"a": {"weights": {"actorder": "static"}}}}),
            ("compressed-tensors-int4", {"config_groups": {"b": {"weights": {"num_bits": 8}}, **groups}}),
            ("compressed-tensors-int4", {"config_groups": {"b": {"weights": {"group_size": 64}}, **groups}}),
            ("awq", {"backend": "autoawq"}),
        )
    ):
        folder = tmp_path / str(number)
        expected = write(folder, kind)
        (folder / "config.json").write_text(json.dumps({"quantization_config": {**CONFIGS[kind], **truth}}))
        found = read(folder)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
