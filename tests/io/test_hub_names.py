"""What counts as a name of the Hub, and which folders of the cache hold a model of it."""

from pathlib import Path

import pytest

from lowmem.io.hub_names import displayed_model_name, hub_name_and_commit_or_none, is_hub_name

COMMIT = "0123456789" * 4


@pytest.mark.parametrize("name", ["owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "me_2/x.y_z-1.5B"])
def test_a_name_of_the_hub_is_an_owner_and_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "name", "owner/", "/name", "./owner/name", "../name", "owner/./name", "owner//name"),
        *("owner/name/", "a/b/c", "~/name", "~me/name", "/a/b", "owner\\name", "owner/name ", "owner/name\n"),
        *("owner/..", ".a/b", "a/-b"),
        *("module:factory", "owner/name:x", "owner/name@v1", "hf://owner/name", "https://a/b", "öwner/name"),
        *("models/file.gguf", "models/file.safetensors", "models/model.safetensors.index.json"),
        *("data/texts.doc", "data/texts.CSV", "data/texts.parquet"),
    ],
)
def test_other_names_never_reach_the_network(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name(name)


def test_what_is_here_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/name.thing")
    Path("owner").mkdir()
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name-1.5")
    assert is_hub_name("owner/name-2.5B")
    # A misspelt file of this folder
    assert not is_hub_name("owner/name.thing")
    Path("owner", "name").symlink_to("nowhere")
    assert not is_hub_name("owner/name")
    Path("owner", "name").unlink()
    Path("owner", "name").mkdir()
    assert not is_hub_name("owner/name")


def test_a_folder_of_the_cache_has_the_name_of_its_model():
    folder = Path("cache", "models--me--one-2", "snapshots", COMMIT)
    assert hub_name_and_commit_or_none(folder) == ("me/one-2", COMMIT)
    assert displayed_model_name(folder) == "me/one-2"
    assert displayed_model_name("llama") == "llama"
    for other in (folder.parent, folder / "file", Path("models--me", "snapshots", COMMIT), Path(COMMIT), Path()):
        assert hub_name_and_commit_or_none(other) is None
