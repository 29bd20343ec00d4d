"""A warning tells the share that stays dense, the reasons and their remedies."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowmem import FourBit, Half, LoRA, convert
from lowmem.nn.stored_module import StoredModule
from tests.selection import rows_in_one_case
from tests.transforms.models import Cosine, Table

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")


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


@rows_in_one_case(
    ("layer", "remedy"),
    [
        (prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5), "torch.nn.utils.prune.remove"),
        (parametrizations.spectral_norm(nn.Linear(32, 64)), "remove_parametrizations"),
        (nn.Embedding(24, 64, max_norm=1.0), "max_norm = None"),
        (nn.LayerNorm((64, 64)), "parameters="),
        (Cosine(64, 64), "parameters="),
    ],
)
def test_each_reason_that_is_told_has_its_remedy(layer, remedy):
    with pytest.warns(UserWarning, match=f"are weights that stay dense.*{remedy}"):
        convert(nn.Sequential(layer, nn.Linear(8, 8)), FourBit())
