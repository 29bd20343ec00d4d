"""What ``training.json`` says of the base: each technique comes back, and what it does not say is None."""

import json

import pytest

from lowmem import Budget, EightBit, FourBit, Half
from lowmem.errors import FileError
from lowmem.io.training_record import (
    FILES_KEY,
    RECORD_FILE,
    base_files_sha256,
    check_unchanged_since_training,
    read_training_technique_or_none,
    sha256_by_file,
    technique_format_name,
)
from lowmem.quant.formats import EIGHT_BIT, FORMATS, IMPORTED

TECHNIQUES = [
    None,
    Half(),
    Budget(4.9),
    Budget(5),
    *map(FourBit, (*FORMATS, *IMPORTED)),
    FourBit(embeddings="4bit"),
    FourBit("iq4_nl", embeddings="q8_0"),
    *(EightBit(format=name) for name in EIGHT_BIT),
]


def write_record(folder, run, **more):
    (folder / RECORD_FILE).write_text(json.dumps({"run": run, **more}))


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_the_technique_of_training_is_read_from_its_record(tmp_path, technique):
    run = {"format": technique_format_name(technique), "embeddings": getattr(technique, "embeddings", None)}
    write_record(tmp_path, run, block_size=getattr(technique, "block_size", None))
    assert read_training_technique_or_none(tmp_path) == technique


def test_an_adapter_without_a_record_says_nothing(tmp_path):
    assert read_training_technique_or_none(tmp_path) is None


@pytest.mark.parametrize("technique", [FourBit(), FourBit("nf4"), EightBit()], ids=str)
def test_a_record_of_an_earlier_version_is_read(tmp_path, technique):
    write_record(tmp_path, {"format": technique.format})
    assert read_training_technique_or_none(tmp_path) == technique


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is damaged"),
        ("[]", r"it is \[\], and must be an object"),
        ("{}", "run=None must be an object"),
        ('{"run": {}}', "format=None is none of"),
        ('{"run": {"format": "nf5"}}', "format='nf5' is none of"),
        ('{"run": {"format": "0 bits"}}', "bits=0"),
        ('{"run": {"format": "x bits"}}', "format='x bits' is none of"),
        ('{"run": {"format": "nf4", "embeddings": "2bit"}}', "embeddings='2bit'"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, text, why):
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(FileError, match=f"training.json.*{why}"):
        read_training_technique_or_none(tmp_path)


@pytest.fixture
def trained(tmp_path):
    """An adapter's folder with a record of its files and its base, and the base."""
    base, folder = tmp_path / "a", tmp_path / "tuned"
    for place, texts in ((base, "ab"), (folder, "cd"), (folder / "base", "ef")):
        place.mkdir()
        for name, text in zip(("config.json", "model.safetensors"), texts, strict=True):
            (place / name).write_text(text)
    (folder / "README.md").write_text("a card")
    record = {"run": {"base": base_files_sha256(base)}, FILES_KEY: sha256_by_file(folder)}
    (folder / RECORD_FILE).write_text(json.dumps(record))
    return folder, base


def test_files_of_an_adapter_and_its_base_are_those_of_the_record(trained):
    folder, base = trained
    assert set(sha256_by_file(folder)) == {
        *("config.json", "model.safetensors", "base/config.json", "base/model.safetensors")
    }
    for place in (base, folder / "base"):
        check_unchanged_since_training(folder, place)
    (folder / "README.md").write_text("another card")
    check_unchanged_since_training(folder, base)
    (folder / "base" / "config.json").write_text("other")
    with pytest.raises(FileError, match="base/config.json': it was changed after the training"):
        check_unchanged_since_training(folder, base)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_another_base_is_named(trained, name):
    folder, base = trained
    (base / name).write_text("other")
    with pytest.raises(FileError, match="a': .*tuned' was trained on another base, or on other files: name the base"):
        check_unchanged_since_training(folder, base)
    check_unchanged_since_training(folder, folder / "base")


def test_an_adapter_without_a_record_of_files_is_taken(trained):
    folder, base = trained
    (folder / RECORD_FILE).unlink()
    (base / "config.json").write_text("other")
    check_unchanged_since_training(folder, base)
