"""What a config of PEFT says: which layers are meant, of which rank and alpha. The real PEFT is in tests/formats."""

import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowmem import LoRA
from lowmem.io.formats.peft.peft_config import PeftConfig, dotted_path_suffixes

PATHS = ["fc", "inner.fc", "model.layers.0.fc", "model.layers.11.mlp.fc", "model.layers.1.experts.0.fc", "head"]


def matcher(**fields):
    return PeftConfig({"peft_type": "LORA", **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["fc"]}, PATHS[:5]),
        ({"target_modules": ["inner.fc", "nner.fc", "c"]}, ["inner.fc"]),
        ({"target_modules": "fc"}, ["fc"]),
        ({"target_modules": r"model\..*fc|inner\.fc"}, PATHS[1:5]),
        ({"target_modules": r".*\.\d\..*fc"}, PATHS),
        ({"target_modules": ["fc", "head"], "exclude_modules": ["0.fc", "head"]}, ["fc", "inner.fc", PATHS[3]]),
        ({"target_modules": ["fc"], "exclude_modules": "model.*"}, ["fc", "inner.fc"]),
        ({"target_modules": ["fc"], "exclude_modules": r"model\.\w*"}, PATHS[:5]),
        ({"target_modules": ["fc"], "modules_to_save": ["inner", "1"]}, ["fc", *PATHS[2:4]]),
        ({"target_modules": ["fc"], "layers_to_transform": [1, 11]}, ["fc", *PATHS[3:5]]),
        ({"target_modules": ["fc"], "layers_to_transform": 0, "layers_pattern": "layers"}, ["fc", PATHS[2]]),
        ({"target_modules": ["fc"], "layers_to_transform": 0, "layers_pattern": "(layers|h)"}, PATHS[:5]),
        ({"target_modules": ["fc"], "layers_to_transform": 0, "layers_pattern": ["experts", "layers"]},
         ["fc", *PATHS[2:3], PATHS[4]]),
        ({"target_modules": [".fc"]}, []),
        ({"target_modules": []}, []),
    ],
)  # fmt: skip
def test_layers_are_found_as_peft_finds_them(fields, expected):
    assert [path for path in PATHS if matcher(**fields).is_target_module(path)] == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"fc": 2}, [2, 2, 2, 2, 2, 8]),
        ({"^fc": 2, "head": 3}, [2, 8, 8, 8, 8, 3]),
        ({"inner.fc": 2, "fc": 3}, [3, 2, 3, 3, 3, 8]),
        ({"fc": 3, "inner.fc": 2}, [3, 3, 3, 3, 3, 8]),
        ({r"layers\.0\..*": 4, "head|inner.fc": 5}, [8, 5, 4, 8, 8, 5]),
        ({"^fc|^fc|i.*er.fc": 2, "layers.*m.*p.*": 3, "fc.*fc": 4, "layers.*1.*fc": 5}, [2, 2, 8, 3, 5, 8]),
        ({r"layers\.0\.fc": 6, "l.*": 7}, [8, 8, 6, 7, 7, 8]),
        ({"c": 2, "": 3, "layers": 4}, [8, 8, 8, 8, 8, 8]),
        ({r"^model\.layers\.11\.mlp\.fc": 2, ".*": 3}, [3, 3, 3, 2, 3, 3]),
        ({"mlp.*": 2, "^layers.*": 3, "^mod.*fc|^": 4}, [8, 8, 4, 2, 4, 8]),
    ],
)
def test_the_first_pattern_that_matches_a_path_or_its_end_counts(patterns, expected):
    found = matcher(rank_pattern=patterns, alpha_pattern={key: one / 2 for key, one in patterns.items()})
    for path, rank in zip(PATHS, expected, strict=True):
        assert found.lora_technique(path) == LoRA(rank, 8 if rank == 8 else rank / 2, 0.0)


@given(
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b", r"\.", ".*", "|", "ab", r"a\.b"]), min_size=1, max_size=6).map("".join),
    st.booleans(),
)
@example(["a.b"], "a|", True)
@example(["aba"], "ab.*ba", False)
def test_patterns_match_what_they_match_in_peft(places, pattern, whole):
    pattern = f"^{pattern}" if whole else pattern
    found = matcher(rank_pattern={pattern: 2}, target_modules=pattern)
    for place in places:
        assert found.lora_technique(place).rank == (2 if re.match(rf"(.*\.)?({pattern})$", place) else 8)
        assert found.is_target_module(place) == bool(re.fullmatch(pattern, place))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern", [r"layers\.\d", "(a|b)", "a+", "a?", "[ab]", "a{2}", "a$", "a^", "a*", "(?=a)", "\\"]
)
def test_other_patterns_of_ranks_are_refused_by_name(key, pattern):
    with pytest.raises(ValueError, match="lowmem reads names, .* and a.b: name the layers by their paths") as caught:
        matcher(**{key: {pattern: 2}})
    assert f"{key} has the regular expression {pattern!r}" in str(caught.value)


BASE = {"peft_type": "LORA", "target_modules": ["a"], "layers_to_transform": 1}
HOSTILE = {
    "rank_pattern": [{f"(a*)*b{number}": 2 for number in range(100)}, {".*a" * 10**5: 2}, {"a|" * 10**6: 2},
                     {f".*{number}.*": 2 for number in range(10**4)}, {"(" * 10**5: 2}],
    "target_modules": ["(a|a)*b", "(.*.*.*.*.*.*)x", "(a?){30}a{30}b", "(a+)+b", ".*a" * 10**5, "a|" * 10**6,
                       [f"a{number}" for number in range(10**5)]],
    "exclude_modules": ["(a*)*b", ".*a" * 600 + "b", "(?:a|a)+b"],
    "layers_pattern": ["(a*)*", [f"a{number}" for number in range(10**5)], [".*a" * 1000]],
    "modules_to_save": [[f"(a*)*{number}" for number in range(10**5)], [".*a" * 1000 + "b"]],
}  # fmt: skip


def test_hostile_patterns_take_no_longer_than_others():
    """Python's re takes hours for some of these. The limit is a hundred times what all of them take here."""
    program = (
        "import sys; from lowmem.io.formats.peft.peft_config import PeftConfig; paths = ['a' * 40, 'a.' * 40 + "
        "'1.a']\n"
        "from tests.io.formats.peft.test_peft_config import BASE, HOSTILE\n"
        "for key, values in HOSTILE.items():\n"
        "    for value in values:\n"
        "        try:\n"
        "            config = PeftConfig({**BASE, key: value})\n"
        "            for path in paths:\n"
        "                config.is_target_module(path), config.is_in_modules_to_save(path)\n"
        "                config.lora_technique(path)\n"
        "        except ValueError:\n"
        "            pass\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_what_is_saved_and_adapted_by_name():
    found = matcher(
        modules_to_save=["ead", "mlp"], target_parameters=["experts.up"], use_rslora=True, lora_dropout=0.1
    )
    assert [path for path in (*PATHS, "model.mlp") if found.is_in_modules_to_save(path)] == ["head", "model.mlp"]
    assert [name for name in ("experts.up", "a.experts.up", "xperts.up") if found.is_target_parameter(name)] == [
        "experts.up", "a.experts.up",
    ]  # fmt: skip
    assert found.lora_technique("fc") == LoRA(8, 8, 0.1, rank_stabilized=True)
    assert dotted_path_suffixes("a.b.c") == ["a.b.c", "b.c", "c"]
    for digits, taken in ((9, True), (10, False), (9999, False)):  # the number of a layer has at most nine digits
        number = "1" * digits
        for pattern in ([], ["layers"]):
            found = matcher(target_modules=["fc"], layers_to_transform=[int(number[:10])], layers_pattern=pattern)
            assert found.is_target_module(f"model.layers.{number}.fc") is taken


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
