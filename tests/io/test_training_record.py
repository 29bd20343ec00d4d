"""What ``training.json`` says of the base: each technique comes back, and what it does not say is None."""

import json

import pytest

from lowmem import Budget, EightBit, FourBit, Half
from lowmem.errors import FileError
from lowmem.io.training_record import RECORD_FILE, read_training_technique_or_none, technique_format_name
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
