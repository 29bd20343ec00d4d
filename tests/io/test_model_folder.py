"""Where a folder's weights lie, and which of its files are copied."""

import json
import os
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from lowmem.errors import FileError
from lowmem.io.model_folder import (
    check_config_files_are_regular,
    check_layer_and_expert_counts,
    check_layer_counts_of_folder,
    copy_non_weight_files,
    move_files_replacing_weights,
    read_json_object,
    weights_or_index_path,
)
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint

INDEX = "model.safetensors.index.json"


def test_the_weights_are_a_file_or_an_index_and_never_both(tmp_path):
    with pytest.raises(FileError, match=f"no model.safetensors and no {INDEX}.*executed nothing; name a folder"):
        weights_or_index_path(tmp_path)
    (tmp_path / "gptq_model-4bit.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match=f"no {INDEX}; name its file 'gptq_model-4bit.safetensors', or rename it"):
        weights_or_index_path(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_or_index_path(tmp_path) == tmp_path / "model.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(FileError, match=f"^cannot export .*{INDEX}, and model.safetensors, too: remove the one"):
        weights_or_index_path(tmp_path, "export")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert weights_or_index_path(tmp_path) == tmp_path / INDEX
    (tmp_path / "model.safetensors").unlink()
    assert weights_or_index_path(tmp_path) == tmp_path / INDEX


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_file_of_a_config_or_tokenizer_that_is_none_is_named(tmp_path):
    check_config_files_are_regular(tmp_path)
    for name, make in {
        "tokenizer.json": os.mkfifo,
        "generation_config.json": os.mkdir,
        "vocab.txt": lambda path: path.symlink_to("/dev/zero"),
        "chat_template.jinja": lambda path: path.symlink_to(path),
        "merges.txt": lambda path: path.symlink_to(path.with_name("nothing")),
    }.items():
        (tmp_path / name[:3]).mkdir()
        make(tmp_path / name[:3] / name)
        with pytest.raises(OSError, match=f"^cannot read '.*{name}': "):
            check_config_files_are_regular(tmp_path / name[:3])


def test_what_is_no_weight_is_copied(tmp_path):
    source = tmp_path / "in"
    templates, pooling, checkpoint = "additional_chat_templates", "1_Pooling", "checkpoint-5"
    target = source / ".out-part"  # beside OUT, which may lie in the folder itself
    kept = ["größe.txt", "tokenizer.json", f"{templates}/a/b.jinja", f"{pooling}/config.json"]
    left = ["a.bin", "b.onnx", "b.onnx_data", INDEX, "config.json", ".git/HEAD", ".out-part/x.txt", "out/y.txt"]
    left += [f"{checkpoint}/model.safetensors", f"{checkpoint}/tokenizer.json", f"{checkpoint}/inner/c.txt"]
    for name in kept + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "gone.txt").symlink_to("nowhere")
    (source / "again").symlink_to(source, target_is_directory=True)
    (source / "linked.txt").symlink_to("größe.txt")
    copy_non_weight_files(source, target, source / "out", ("config.json",))
    found = {file.relative_to(target).as_posix(): file for file in target.rglob("*") if file.is_file()}
    assert sorted(found) == sorted([*kept, "linked.txt", "x.txt"])
    assert all(found[name].read_text() == name for name in kept)
    assert not found["linked.txt"].is_symlink()


def test_links_lead_nowhere_else_but_into_the_cache_of_the_hub(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("key")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "12ab"
    blobs = snapshot.parents[1] / "blobs"
    for folder in (snapshot / "inner", blobs, tmp_path / "one", tmp_path / "two"):
        folder.mkdir(parents=True)
    (blobs / "34cd").write_text("text")
    (snapshot / "inner" / "a.txt").symlink_to(blobs / "34cd")
    copy_non_weight_files(snapshot, tmp_path / "one", tmp_path / "out", ())
    assert (tmp_path / "one" / "inner" / "a.txt").read_text() == "text"
    for place in (snapshot / "b.txt", snapshot / "inner" / "b.txt"):
        place.symlink_to(secret)
        with pytest.raises(FileError, match=r"b\.txt.*outside.*copy the file itself"):
            copy_non_weight_files(snapshot, tmp_path / "two", tmp_path / "out", ())
        place.unlink()
    assert not [*(tmp_path / "two").rglob("b.txt")]


def test_it_is_bounded(tmp_path, monkeypatch):
    source = tmp_path / "in"
    (source / "a" / "b" / "c").mkdir(parents=True)
    (source / "a" / "x.txt").write_text("1234")
    (source / "a" / "b" / "c" / "y.txt").write_text("1234")
    for name, limit, says in (
        ("MAX_FILES", 1, "more than 1 files"),
        ("MAX_BYTES", 7, "more than 7 bytes"),
        ("MAX_DEPTH", 2, "more than 2 folders deep"),
    ):
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(f"lowmem.io.model_folder.{name}", limit)
            with pytest.raises(FileError, match=f"{says}.*move"):
                copy_non_weight_files(source, tmp_path / name, tmp_path / "out", ())
    (tmp_path / "all").mkdir()
    copy_non_weight_files(source, tmp_path / "all", tmp_path / "out", ())
    assert len([*(tmp_path / "all").rglob("*.txt")]) == 2


def test_a_file_that_cannot_be_read_is_named_and_not_the_target(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("a")
    monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(OSError, match=r"cannot read .*vocab.txt.*name a file that can be read"):
        copy_non_weight_files(tmp_path, tmp_path / "part", tmp_path / "out", ())


def write_model(folder, files, value):
    """Write a model of four tensors, in so many files; with a file beside that is no weight."""
    folder.mkdir()
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    names = ["model.safetensors"] if files == 1 else names
    places = {f"{tensor}": names[tensor % files] for tensor in range(4)}
    for name in names:
        own = {tensor: torch.full((2,), value) for tensor, place in places.items() if place == name}
        save_file(own, folder / name)
    if files > 1:
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(str(value))


def values_in(folder):
    with SafetensorsCheckpoint(weights_or_index_path(folder)) as source:
        return {float(source.read_tensor(name)[0]) for name in source.specs}


def test_old_weights_give_way_to_new_ones_and_an_interruption_mixes_none(tmp_path, monkeypatch):
    steps = 0
    for old, new in product((1, 2, 4), repeat=2):
        for limit in range(12):
            target, written = tmp_path / "target", tmp_path / "written"
            write_model(target, old, 1.0)
            (target / "notes.txt").write_text("kept")
            (target / "other-00001-of-00002.safetensors").write_text("kept")
            write_model(written, new, 2.0)
            left = limit

            def counted(function):
                def run(*args, **kwargs):
                    nonlocal left
                    if not left:
                        raise KeyboardInterrupt
                    left -= 1
                    function(*args, **kwargs)

                return run

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", counted(os.replace))
                patch.setattr(os, "unlink", counted(os.unlink))
                try:
                    move_files_replacing_weights(written, target)
                except KeyboardInterrupt:
                    steps += 1
                else:
                    assert values_in(target) == {2.0}
                    assert [*written.iterdir()] == []
            try:
                assert len(values_in(target)) == 1
            except (FileError, OSError):
                assert left == 0
            names = {file.name for file in target.iterdir()}
            assert names >= {"notes.txt", "other-00001-of-00002.safetensors", "config.json"}
            if left:
                assert len(names) == 4 + (new > 1) + new - 1
            shutil.rmtree(target)
            shutil.rmtree(written)
    assert steps > 30


def test_more_layers_than_tensors_and_more_than_any_model_has_are_refused(tmp_path):
    check_layer_counts_of_folder(tmp_path / "config.json", {"num_hidden_layers": 9, "text_config": {"n_layer": 9}}, 9)
    for config, words in (
        ({"num_hidden_layers": 10}, "num_hidden_layers=10, and the folder has 9 tensors; get it again"),
        ({"text_config": {"n_layer": 10}}, "n_layer=10, and the folder has 9 tensors; get it again"),
        ({"num_experts": 4097}, "num_experts=4097, more than 4096: get it again"),
        ({"depths": [1, 2**40]}, "depths=.*, more than 4096: get it again"),
    ):
        with pytest.raises(FileError, match=rf"config\.json.*{words}"):
            check_layer_counts_of_folder(tmp_path / "config.json", config, 9)
    check_layer_and_expert_counts({"num_hidden_layers": 4096, "vocab_size_per_layer_input": 262_144})


def test_a_file_of_json_is_an_object_or_is_refused(tmp_path):
    path = tmp_path / "a.json"
    for text, why in (("[1]", r"it is \[1\], and must be an object; get it again"), ("[" * 10**5, "it is damaged: ")):
        path.write_text(text)
        with pytest.raises(FileError, match=why):
            read_json_object(path)
    path.write_text('{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    with pytest.raises(FileError, match="it takes more than 7 bytes, which no tokenizer does"):
        read_json_object(path, 7, "tokenizer")
