"""A file's record of a layer or an adapter says all that is needed to make it again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import Half, LoRA, add_adapter, convert, merge_adapter
from lowmem.io.metadata_records import (
    FLAGS,
    adapter_record_dicts_by_parameter,
    adapter_to_record_dict,
    form_to_record_dict,
    parameter_record_key,
    parse_form_record,
    parse_lora_record,
    parse_loras_and_active_flags_by_name,
    technique_that_stores_form,
)
from lowmem.nn.adapter import Adapter
from lowmem.nn.forms import CodedForm, HalfForm
from lowmem.nn.techniques import blockwise_technique
from tests import strategies


@given(
    strategies.formats,
    strategies.block_sizes,
    strategies.encodings,
    st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from(["absmax", "search", "calibrated"]),
)
def test_a_record_of_codes_comes_back(format, block_size, scales, dtype, method):
    for flags in ((), *((flag,) for flag in FLAGS)):
        form = CodedForm(format, block_size, scales, method, compute_dtype=dtype, **dict.fromkeys(flags, True))
        record = form_to_record_dict(form)
        assert parse_form_record(record) == form
        assert technique_that_stores_form(form) == blockwise_technique(format, block_size, scales, dtype)
        assert record.keys() & FLAGS == {*flags}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_record_comes_back(dtype):
    assert parse_form_record(form_to_record_dict(HalfForm(dtype))) == HalfForm(dtype)
    assert technique_that_stores_form(HalfForm(dtype)) == Half(dtype)


@given(st.integers(1, 9), st.none() | st.floats(0.5, 64), st.floats(0, 0.9), st.booleans())
def test_an_adapter_s_record_comes_back(rank, alpha, dropout, rank_stabilized):
    technique = LoRA(rank, alpha, dropout, rank_stabilized)
    assert parse_lora_record(adapter_to_record_dict(Adapter(nn.Linear(2, 2), technique))) == technique


def test_the_record_of_several_adapters_comes_back():
    layer = add_adapter(nn.Linear(4, 4), "a", LoRA(3, 6.0))
    second = LoRA(2, dropout=0.5, rank_stabilized=True)
    add_adapter(layer, "b", second)
    layer.adapters.active = ("b",)
    assert parse_loras_and_active_flags_by_name(adapter_record_dicts_by_parameter(layer)["weight"]) == {
        "a": (LoRA(3, 6.0), False),
        "b": (second, True),
    }


def test_only_a_rank_stabilized_adapter_s_record_has_a_key_that_older_readers_refuse():
    records = [adapter_to_record_dict(Adapter(nn.Linear(2, 2), LoRA(2, rank_stabilized=on))) for on in (False, True)]
    assert records == [{"rank": 2, "alpha": None, "dropout": 0.0}, {**records[0], "rank_stabilized": True}]


HALF = form_to_record_dict(HalfForm(torch.float16))
FOUR = form_to_record_dict(CodedForm("nf4", 64, "double", "search", compute_dtype=torch.int8))
ADAPTER = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
NAMED = {**ADAPTER, "name": "a", "active": True}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


LAYER_MISTAKES = [
    (None, "it is None, and must be an object"),
    ([HALF], "it is .*, and must be an object"),
    ({}, "technique=None is unknown"),
    ({"technique": "Magic"}, "technique='Magic' is unknown"),
    ({**HALF, "technique": ["Half"]}, r"technique=\['Half'\] is unknown"),
    (without(HALF, "dtype"), "it has no 'dtype'"),
    ({**HALF, "dtype": "int8"}, "dtype='int8' is none of float16, bfloat16"),
    ({**HALF, "dtype": "float32"}, "dtype='float32' is none of float16, bfloat16"),
    ({**HALF, "dtype": None}, "dtype=None is none of"),
    ({**HALF, "dtype": ["float16"]}, "dtype=.* is none of"),
    ({**HALF, "\x1b[2J": 1}, r"'\\x1b\[2J' is unknown"),
    *((without(FOUR, key), f"it has no '{key}'") for key in ("format", "block_size", "scales", "method")),
    *(({**FOUR, key: None}, f"{key}=None") for key in without(FOUR, "technique")),
    *(({**FOUR, key: True}, f"{key}=True") for key in without(FOUR, "technique")),
    *(({**FOUR, key: [[1]]}, f"{key}=") for key in without(FOUR, "technique")),
    *(({**FOUR, key: {}}, f"{key}=") for key in without(FOUR, "technique")),
    *(({**FOUR, key: "x" * 10**6}, f"{key}=") for key in without(FOUR, "technique")),
    *(({**FOUR, "block_size": size}, "block_size=") for size in (-2, 0, 7, 2**63, 10**18, 64.0, "64")),
    ({**FOUR, "format": ["nf4", "fp4"]}, "format=.* is none of int4, nf4"),
    ({**FOUR, "search": True}, "'search' is unknown"),
    *(
        ({**FOUR, flag: value}, f"{flag}=.* must be true, or absent")
        for flag in FLAGS
        for value in (False, 1, None, [])
    ),
    *(({**HALF, flag: True}, f"'{flag}' is unknown") for flag in FLAGS),
]


def test_what_is_no_record_of_a_layer_is_refused():
    for record, reason in LAYER_MISTAKES:
        with pytest.raises(ValueError, match=reason) as caught:
            parse_form_record(record)
        assert len(str(caught.value)) < 300


ADAPTER_MISTAKES = [
    (None, "it is None, and must be an object"),
    (3, "it is 3, and must be an object"),
    *((without(ADAPTER, key), f"it has no '{key}'") for key in ADAPTER),
    ({**ADAPTER, "more": 1}, "'more' is unknown"),
    *(
        ({**ADAPTER, "rank_stabilized": v}, "rank_stabilized=.* must be true, or absent")
        for v in (False, 1, None, [])
    ),
    *(({**ADAPTER, "rank": rank}, "rank=") for rank in (0, -1, None, True, 2.0, "2", [2])),
    *(({**ADAPTER, "alpha": alpha}, "alpha=") for alpha in (0, -1.0, True, "2", [2], {})),
    *(({**ADAPTER, "dropout": dropout}, "dropout=") for dropout in (1, -0.1, 2.0, None, True, "0", [])),
]


def test_what_is_no_record_of_an_adapter_is_refused():
    for record, reason in ADAPTER_MISTAKES:
        with pytest.raises(ValueError, match=reason):
            parse_lora_record(record)
        named = {**record, "name": "a", "active": True} if isinstance(record, dict) else record
        with pytest.raises(ValueError, match=reason):
            parse_loras_and_active_flags_by_name([NAMED | {"name": "b"}, named])


ADAPTERS_MISTAKES = [
    (None, "they are None, and must be a list of at least one"),
    (NAMED, "and must be a list"),
    ([], r"they are \[\], and must be a list of at least one"),
    ([ADAPTER], "it has no '(name|active)'"),
    ([NAMED, NAMED], "adapter 'a' is there twice"),
    *(([{**NAMED, "name": name}], "name=") for name in (None, 3, True, ["a"])),
    *(([{**NAMED, "active": active}], "active=") for active in (None, 0, 1, "a", [])),
]


def test_what_is_no_record_of_several_adapters_is_refused():
    for record, reason in ADAPTERS_MISTAKES:
        with pytest.raises(ValueError, match=reason):
            parse_loras_and_active_flags_by_name(record)


def test_a_merged_adapter_is_recorded_as_active():
    model = convert(nn.Sequential(nn.Linear(4, 4)), LoRA(2))
    merge_adapter(model, model[0].adapters.active[0])
    model[0].adapters.active = ()
    assert [record["active"] for record in adapter_record_dicts_by_parameter(model[0])["weight"]] == [True]


def test_the_record_of_a_weight_is_that_of_its_layer():
    assert [parameter_record_key(name) for name in ("a.b.weight", "weight", "a.experts", "a.myweight")] == [
        *("a.b", "", "a.experts", "a.myweight")
    ]
