"""What a config of PEFT says: which layers are meant, of which rank and alpha. The real PEFT is in tests/formats."""

import pytest

from lowmem import LoRA
from lowmem.io.formats.peft.config import PeftConfig, ends_of
from tests.selection import rows_in_one_case

PATHS = ["fc", "inner.fc", "model.layers.0.fc", "model.layers.11.mlp.fc", "model.layers.1.experts.0.fc", "head"]


def matcher(**fields):
    return PeftConfig({"peft_type": "LORA", **fields})


@rows_in_one_case(
    ("fields", "expected"),
    [
        ({"target_modules": ["fc"]}, PATHS[:5]),
        ({"target_modules": ["inner.fc", "nner.fc", "c"]}, ["inner.fc"]),
        ({"target_modules": "fc"}, ["fc"]),
        ({"target_modules": r".*\.\d\..*fc"}, ["model.layers.0.fc", "model.layers.1.experts.0.fc"]),
        ({"target_modules": ["fc", "head"], "exclude_modules": ["0.fc", "head"]}, ["fc", "inner.fc", PATHS[3]]),
        ({"target_modules": ["fc"], "exclude_modules": "model.*"}, ["fc", "inner.fc"]),
        ({"target_modules": ["fc"], "modules_to_save": ["inner", "1"]}, ["fc", *PATHS[2:4]]),
        ({"target_modules": ["fc"], "layers_to_transform": [1, 11]}, ["fc", *PATHS[3:5]]),
        ({"target_modules": ["fc"], "layers_to_transform": 0, "layers_pattern": "layers"}, ["fc", PATHS[2]]),
        ({"target_modules": [".fc"]}, []),
        ({"target_modules": []}, []),
    ],
)  # fmt: skip
def test_layers_are_found_as_peft_finds_them(fields, expected):
    assert [path for path in PATHS if matcher(**fields).takes(path)] == expected


@rows_in_one_case(
    ("patterns", "expected"),
    [
        ({"fc": 2}, [2, 2, 2, 2, 2, 8]),
        ({"^fc": 2, "head": 3}, [2, 8, 8, 8, 8, 3]),
        ({"inner.fc": 2, "fc": 3}, [3, 2, 3, 3, 3, 8]),
        ({"fc": 3, "inner.fc": 2}, [3, 3, 3, 3, 3, 8]),
        ({r"layers\.\d\..*": 4, "head|inner.fc": 5}, [8, 5, 4, 8, 4, 5]),
        ({r"layers\.0\.fc": 6, "l.*": 7}, [8, 8, 6, 7, 7, 8]),
        ({"c": 2, "": 3, "layers": 4}, [8, 8, 8, 8, 8, 8]),
        ({r"^model\.layers\.11\.mlp\.fc": 2, r"\w+": 3}, [3, 3, 3, 2, 3, 3]),
    ],
)
def test_the_first_pattern_that_matches_a_path_or_its_end_counts(patterns, expected):
    found = matcher(rank_pattern=patterns, alpha_pattern={key: one / 2 for key, one in patterns.items()})
    for path, rank in zip(PATHS, expected, strict=True):
        assert found.technique(path) == LoRA(rank, 8 if rank == 8 else rank / 2, 0.0)


def test_what_is_saved_and_adapted_by_name():
    found = matcher(
        modules_to_save=["ead", "mlp"], target_parameters=["experts.up"], use_rslora=True, lora_dropout=0.1
    )
    assert [path for path in (*PATHS, "model.mlp") if found.saves(path)] == ["head", "model.mlp"]
    assert [name for name in ("experts.up", "a.experts.up", "xperts.up") if found.takes_parameter(name)] == [
        "experts.up", "a.experts.up",
    ]  # fmt: skip
    assert found.technique("fc") == LoRA(8, 8, 0.1, rank_stabilized=True)
    assert ends_of("a.b.c") == ["a.b.c", "b.c", "c"]
    for digits, taken in ((9, True), (10, False), (9999, False)):  # the number of a layer has at most nine digits
        number = "1" * digits
        for pattern in ([], ["layers"]):
            found = matcher(target_modules=["fc"], layers_to_transform=[int(number[:10])], layers_pattern=pattern)
            assert found.takes(f"model.layers.{number}.fc") is taken


def test_keys_without_effect_are_left_and_others_refused_by_name():
    content = {
        "peft_type": "LORA",
        "peft_version": "9",
        "runtime_config": {"x": 1},
        "unknown": None,
        "other": [],
        "new": 0,
    }
    assert PeftConfig({**content, "init_lora_weights": "gaussian"}).default == LoRA(8, 8)
    for key, message in (
        ("new_method", "new_method=True is something that lowmem does not know"),
        ("lora_bias", "its matrices B have biases"),
        ("layer_replication", "it repeats layers of the base"),
        ("velora_config", "velora_config=True is something"),
    ):
        with pytest.raises(ValueError, match=message):
            PeftConfig({**content, key: True})
    for init in ("loftq", "corda", 1, 0, ["gaussian"], "lora_ga"):
        with pytest.raises(ValueError, match="has changed the base's weights"):
            PeftConfig({**content, "init_lora_weights": init})
