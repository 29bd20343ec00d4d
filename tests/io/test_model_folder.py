"""Where a folder's weights lie, and which of its files are copied."""

import json

import pytest

from lowmem.errors import FileError
from lowmem.io.model_folder import copy_others, weights_in

INDEX = "model.safetensors.index.json"


def test_the_weights_are_a_file_or_an_index_and_never_both(tmp_path):
    with pytest.raises(FileError, match=f"no model.safetensors and no {INDEX}.*executed nothing; name a folder"):
        weights_in(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_in(tmp_path) == tmp_path / "model.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(FileError, match=f"^cannot export .*{INDEX}, and model.safetensors, too: remove the one"):
        weights_in(tmp_path, "export")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert weights_in(tmp_path) == tmp_path / INDEX
    (tmp_path / "model.safetensors").unlink()
    assert weights_in(tmp_path) == tmp_path / INDEX


def test_what_is_no_weight_is_copied(tmp_path):
    source, target = tmp_path / "in", tmp_path / "part"
    (source / "inner").mkdir(parents=True)
    target.mkdir()
    for name in ("tokenizer.json", "größe.txt", "a.bin", "b.onnx", INDEX, "config.json", "inner/c.txt"):
        (source / name).write_text(name)
    (source / "gone.txt").symlink_to("nowhere")
    copy_others(source, target, tmp_path / "out", ("config.json",))
    assert sorted(file.name for file in target.iterdir()) == ["größe.txt", "tokenizer.json"]
    assert all(file.read_text() == file.name for file in target.iterdir())


def test_a_file_that_cannot_be_read_is_named_and_not_the_target(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("a")
    monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(OSError, match=r"cannot read .*vocab.txt.*name a file that can be read"):
        copy_others(tmp_path, tmp_path / "part", tmp_path / "out", ())
