"""Models of the Hub, by a local server of its protocol: what is fetched, what the cache answers, what is refused."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from lowmem.integrations.transformers.hub_models import download_model
from lowmem.io.hub_names import hub_name_and_commit_or_none
from tests.integrations.transformers.folders import assert_same, load, write
from tests.integrations.transformers.hub import serve_hub, use_hub
from tests.integrations.transformers.tokens import write_tokenizer

TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in one file, and in shards, with what lies in repositories beside them."""
    home = tmp_path_factory.mktemp("models")
    for name, options in (("one", {}), ("shards", {"max_shard_size": "100KB"})):
        write_tokenizer(write(home / name, **options))
        for other in ("pytorch_model.bin", "consolidated.safetensors", "modeling_own.py", "README.md", "model.onnx"):
            (home / name / other).write_bytes(b"not needed")
        (home / name / "onnx").mkdir()
        (home / name / "onnx" / "config.json").write_text("{}")
    return home


@pytest.fixture
def hub(tmp_path, monkeypatch, folders):
    """A Hub with both models; another revision of the first is the second."""
    with serve_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        hub.add("me/one", folders / "one")
        hub.add("me/shards", folders / "shards")
        yield hub


@pytest.mark.parametrize("name", ["one", "shards"])
def test_what_is_needed_is_fetched_and_loads(hub, folders, name):
    seen = []
    folder = download_model(f"me/{name}", progress=lambda done, total: seen.append((done, total)))
    weights = sorted(path.name for path in (folders / name).glob("model*.safetensors*"))
    assert hub.fetched() == sorted([*TEXTS, *weights])
    assert sorted(path.name for path in folder.iterdir()) == hub.fetched()
    assert_same(load(folder), load(folders / name))
    assert seen[-1][0] == seen[-1][1] > 100_000
    assert hub_name_and_commit_or_none(folder) == (f"me/{name}", hub_commit(hub, f"me/{name}"))


def hub_commit(hub, name, revision="main"):
    revisions = hub.commits[name]
    return next(key for key, value in revisions.items() if value == revisions[revision] and len(key) == 40)


def test_texts_alone_are_fetched_where_weights_are_not_needed(hub):
    folder = download_model("me/shards", weights=False)
    assert hub.fetched() == TEXTS
    assert (folder / "config.json").is_file()
    assert (download_model("me/shards") / "model.safetensors.index.json").is_file()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, folders):
    commit = hub.add("me/one", folders / "shards", "v2")
    main = download_model("me/one")
    other = download_model("me/one", "v2")
    assert (main / "model.safetensors").is_file()
    assert (other / "model.safetensors.index.json").is_file()
    assert other.name == commit != main.name
    hub.requests.clear()
    assert download_model("me/one", commit) == other
    assert hub.requests == []  # a commit never changes


def test_a_model_in_the_cache_is_looked_up_and_not_fetched_again(hub):
    first = download_model("me/one")
    hub.requests.clear()
    assert download_model("me/one") == first
    assert hub.fetched() == []


def test_a_token_opens_a_gated_model(hub, tmp_path, monkeypatch):
    hub.gated.add("me/one")
    with pytest.raises(ValueError, match=f"it is gated: accept its terms at {hub.address}/me/one, and log in"):
        download_model("me/one")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert (download_model("me/one") / "model.safetensors").is_file()


def test_a_missing_or_private_model_is_told_with_the_cache_and_the_command(hub, monkeypatch):
    hub.private.add("me/one")
    for name in ("me/one", "me/missing"):
        with pytest.raises(ValueError, match="has no such model, or it is private") as told:
            download_model(name)
        assert constants.HF_HUB_CACHE in str(told.value)
        assert f"`hf download {name}` fetches it" in str(told.value)
        assert f"model='{name}' is no file or folder here" in str(told.value)
    monkeypatch.setenv("HF_TOKEN", "good")
    download_model("me/one")


def test_a_missing_revision_is_named_also_of_a_model_in_the_cache(hub):
    download_model("me/one")
    with pytest.raises(ValueError, match=r"has no revision 'v9' of it; `hf download me/one --revision v9`"):
        download_model("me/one", "v9")


def test_without_a_network_the_cache_answers_at_once(hub, monkeypatch):
    folder = download_model("me/shards")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert download_model("me/shards") == folder
    assert hub.requests == []
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lacks its {shard.name}, and the network is off \(HF_HUB_OFFLINE\)"):
        download_model("me/shards")
    with pytest.raises(ValueError, match="lacks it, and the network is off"):
        download_model("me/one")


def test_a_hub_that_cannot_be_reached_is_told_once_and_the_cache_is_taken(hub, monkeypatch):
    folder = download_model("me/one")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=f"cannot be reached .*: commit {folder.name[:12]} of me/one in the cache"):
        assert download_model("me/one") == folder
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9 cannot be reached \(ConnectError"):
        download_model("me/shards")


def test_a_failing_hub_is_told_with_its_status(hub):
    hub.status = 503
    with pytest.raises(ValueError, match="answers with status 503"):
        download_model("me/one")


def test_a_broken_transfer_goes_on_where_it_ended(hub, folders, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.broken["model.safetensors"] = 2
    folder = download_model("me/one")
    assert_same(load(folder), load(folders / "one"))
    ranges = [part for method, path, part in hub.requests if path.endswith("model.safetensors") and method == "GET"]
    assert len(ranges) == 3
    assert ranges[0] is None
    assert all(part.startswith("bytes=") for part in ranges[1:])


def test_a_transfer_that_breaks_off_is_taken_up_by_the_next_command(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    last = sorted(path.name for path in hub.commits["me/shards"]["main"].glob("model-*"))[-1]
    hub.broken[last] = 100
    with pytest.raises(ValueError, match=f"lacks its {last}, and .* cannot be reached"):
        download_model("me/shards")
    hub.broken.clear()
    hub.requests.clear()
    download_model("me/shards")
    assert hub.fetched() == [last]


def test_pickles_and_files_of_gguf_are_named_and_not_fetched(hub, tmp_path):
    for name, file, told in (
        ("me/pickle", "pytorch_model.bin", "but pytorch_model.bin: name a model in safetensors; nothing was fetched"),
        ("me/gguf", "model-Q4.gguf", "`hf download me/gguf model-Q4.gguf --local-dir .` fetches a file of GGUF"),
        ("me/nothing", "README.md", "but none at all"),
    ):
        Path(name).mkdir(parents=True)
        Path(name, file).touch()
        Path(name, "config.json").write_text("{}")
        hub.add(name, tmp_path / name)
        with pytest.raises(ValueError, match="has no weights in safetensors") as error:
            download_model(name)
        assert told in str(error.value)
    assert hub.fetched() == []


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "pytorch_model.bin"])
def test_an_index_of_what_is_no_safetensors_file_beside_it_is_refused(hub, folders, tmp_path, shard):
    shutil.copytree(folders / "shards", tmp_path / "bad")
    index = tmp_path / "bad" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    hub.add("me/bad", tmp_path / "bad")
    with pytest.raises(ValueError, match=shard):
        download_model("me/bad")
    assert hub.fetched() == ["model.safetensors.index.json"]


def test_a_repository_without_a_config_is_refused_before_its_weights_are_fetched(hub, folders, tmp_path):
    shutil.copytree(folders / "one", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    hub.add("me/bare", tmp_path / "bare")
    for weights in (True, False):
        with pytest.raises(ValueError, match="model='me/bare' has no config.json.*nothing was fetched"):
            download_model("me/bare", weights=weights)
    assert hub.fetched() == []


def test_the_cache_lies_where_huggingface_hub_has_it(hub, tmp_path):
    folder = download_model("me/one")
    assert folder.parent == tmp_path / "home" / "hub" / "models--me--one" / "snapshots"
    assert os.path.islink(folder / "model.safetensors")
