"""An ``at_most`` out of reach is an error that names the least; a large dense share is a warning with its reasons."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

from lowmem import FORMATS, BigNet, FourBit, Half, LoRA, convert, measure
from lowmem.nn.stored_module import StoredModule
from lowmem.quant.packing import MAX_BLOCK_SIZE
from lowmem.quant.scale_encodings import ENCODINGS, OFFSETS
from lowmem.transforms.bits_per_weight import (
    SMALLEST,
    bits_per_weight_without_adapters,
    check_bit_limit,
    techniques_as_code,
)
from tests.refusing import refused
from tests.transforms.models import Table

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")


def tied():
    model = nn.Sequential(nn.Embedding(32, 16), nn.LayerNorm(16), nn.Linear(16, 32, bias=False))
    model[2].weight = model[0].weight
    return model


MODELS = {
    "short rows": lambda: nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16)),
    "long rows": lambda: nn.Linear(5 * MAX_BLOCK_SIZE, 2),
    "rows of one weight": lambda: nn.Linear(1, 64),  # 16 bits are less than a code and a scale
    "tied, in float16": lambda: tied().half(),
    "attention and LSTM": lambda: nn.ModuleList([nn.MultiheadAttention(16, 2), nn.LSTM(8, 24), nn.Conv2d(3, 8, 3)]),
}
CHOICES = [
    *(
        FourBit(name, size, scales, embeddings=embeddings)
        for name in FORMATS
        for size in (8, 64, MAX_BLOCK_SIZE)
        for scales in ENCODINGS
        for embeddings in ("8bit", "4bit")
    ),
    *(FourBit("int4", MAX_BLOCK_SIZE, scales, embeddings="4bit") for scales in OFFSETS),
    Half(),
    Half(torch.bfloat16),
]


def bits_of(model, *techniques):
    model = convert(copy.deepcopy(model), *techniques)
    return 8 * measure.theoretical_bytes(model) / measure.weight_count(model)


@pytest.mark.parametrize("name", MODELS)
def test_the_error_names_the_least_that_any_technique_gives(name):
    model = MODELS[name]()
    given = {technique: bits_of(model, technique) for technique in CHOICES}
    least = min(given.values())
    for techniques in ((FourBit(block_size=8),), (FourBit(("nf4", "int4")),), (Half(), LoRA(2))):
        techniques = techniques if name not in ("attention and LSTM", "tied, in float16") else techniques[:1]
        with refused(model, ValueError, "bits a weight are out of reach") as caught:
            convert(model, *techniques, at_most=least * (1 - 1e-6))
        told = str(caught.value)
        if min(bits_of(model, one) for one in techniques if not isinstance(one, LoRA)) > least:
            named = next(one for one in SMALLEST if f"with {techniques_as_code([one])}." in told)
            assert f"the least that is possible is {least:.3f}, with" in told
            assert bits_of(model, named) == least
    best = min(given, key=given.__getitem__)
    with pytest.raises(ValueError, match=f"give {least:.3f}, which is the least that is possible. What stays"):
        convert(model, best, at_most=least * (1 - 1e-6))
    convert(model, best, at_most=least)


def test_nothing_is_quantized_for_an_at_most_that_is_out_of_reach(monkeypatch):
    monkeypatch.setattr("lowmem.nn.techniques.quantize", lambda *_, **__: pytest.fail("a weight was quantized"))
    with pytest.raises(
        ValueError, match=r"give 4.\d\d\d, and the least that is possible is 4\.0\d\d, with FourBit\("
    ):
        convert(BigNet(), FourBit(), at_most=4.05)
    for wrong, technique in itertools.product((0, -1, True, "4.5", float("nan"), [4]), (FourBit(), LoRA())):
        with pytest.raises(ValueError, match="at_most=.* must be a number of bits above 0"):
            convert(nn.Linear(8, 8), technique, at_most=wrong)
    check_bit_limit(1)


def test_the_least_is_that_of_what_where_skip_and_parameters_select():
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    half_dense = (32 + 4 + 16 / 64) / 2
    with pytest.raises(ValueError, match=rf"is {half_dense:.3f}, with .*dense: b.weight \(0\.02 MiB\); parameters="):
        convert(model, FourBit(), skip="b", at_most=4.5)
    with pytest.raises(ValueError, match=rf"is {half_dense:.3f}, with .*dense: b.weight"):
        convert(model, FourBit(), where=lambda path, _: path == "a", at_most=4.5)
    with pytest.raises(ValueError, match=r"give 32\.000, and the least that is possible is 4\.250, with FourBit\("):
        convert(model, LoRA(2), at_most=4.5)
    assert bits_of(model, FourBit(block_size=4096, scales="float16")) == 4.25
    with pytest.raises(ValueError, match=r"dense: bias \(0\.00 MiB\); allow more bits$"):  # no technique stores it
        convert(nn.Linear(64, 64), FourBit(), at_most=4.1)


def test_adapters_do_not_count():
    stored, adapted = (convert(nn.Linear(64, 64), FourBit("nf4"), *more) for more in ((), (LoRA(4),)))
    assert bits_per_weight_without_adapters(adapted, {}) == bits_per_weight_without_adapters(stored, {})


def test_the_text_of_techniques_makes_them_again():
    for given in [(), (FourBit(),), SMALLEST, (Half(torch.bfloat16), LoRA(4))]:
        if given:
            namespace = {"FourBit": FourBit, "Half": Half, "LoRA": LoRA, "torch": torch}
            assert eval(f"({techniques_as_code(given)},)", namespace) == given
    assert techniques_as_code(()) == "dense"


def test_a_large_dense_share_is_told_once_with_its_reasons():
    told = "Table.positions: FourBit has no form of it; parameters= names what to store"
    share = "^67% of the bytes of Table are weights that stay dense: 65%"
    with pytest.warns(UserWarning, match=f"{share} {told}; 2% Linear.bias: a vector") as seen:
        convert(Table(), FourBit())
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="Table.positions: Half has no form of it"):
        convert(Table(), Half())
    long = nn.Sequential(nn.Linear(8, 8))
    long.register_parameter("flat", nn.Parameter(torch.zeros(2**16 + 1)))
    with pytest.warns(UserWarning, match="^100% of .*: 100% Sequential.flat: a vector: only matrices have rows"):
        convert(long, FourBit())
    norms = nn.Sequential(nn.Linear(64, 64), *[nn.LayerNorm(64) for _ in range(129)])  # 4225 and 16,512 numbers
    with pytest.warns(UserWarning, match=r"^80% .*: 40% LayerNorm.weight: a vector.*to\(torch.bfloat16\) casts it"):
        convert(norms, FourBit())
    assert norms[1](norms[0](torch.ones(2, 64))).shape == (2, 64)
    kept = nn.Sequential(nn.Linear(64, 64))  # 4160 numbers
    kept.register_buffer("table", torch.zeros(256, 64), persistent=False)
    kept.register_buffer("mask", torch.zeros(99999, dtype=torch.bool))
    with pytest.warns(UserWarning, match="^80% .*: 80% Sequential.table: a buffer: .*; 0% Linear.bias: a vector"):
        convert(kept, FourBit())
    for quiet in (
        lambda: convert(Table(1), FourBit()),  # less than a tenth
        lambda: convert(Table(), FourBit(), where=lambda path, _: path == "head"),  # asked for
        lambda: convert(Table(), FourBit(), parameters=lambda path, _: path == "positions"),
        lambda: convert(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(64)), FourBit()),  # a few bytes of vectors
        lambda: convert(Table(), LoRA(2)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quiet()


@pytest.mark.parametrize("technique", [FourBit("nf4"), Half()])
def test_what_was_stored_before_counts_as_in_the_dense_model(technique):
    def make(rows):
        return nn.ModuleList([nn.Linear(256, 256, bias=False), nn.Linear(64, 64, bias=False), Table(rows)])

    with warnings.catch_warnings():  # 7% of the dense model's bytes stay dense, and 28% or 12% of those that are left
        warnings.simplefilter("error")
        convert(convert(make(320), technique, skip=["1", "2*"]), technique, skip="0")
    told = []
    for parts in ([], [["1", "2*"]], [["0", "2*"]]):
        model = make(1024)
        for skip in parts:
            convert(model, technique, skip=skip)
        with pytest.warns(UserWarning, match="are weights that stay dense") as seen:
            convert(
                model, technique, skip=[path for path in ("0", "1") if isinstance(model[int(path)], StoredModule)]
            )
        told.append(str(seen[0].message))
    assert told == told[:1] * 3
