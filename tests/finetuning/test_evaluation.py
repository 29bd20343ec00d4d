"""Perplexity is torch's cross entropy of the tokens that count, also where processes share the rows."""

import math

import pytest
import torch
from torch.nn import functional

from lowmem import FineTuning, finetune, perplexity
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.text_examples import IGNORED
from tests.finetuning.language import language, rows, texts


class Both(TrainingProcessGroup):
    """One of two processes, whose sums hold what the other has found."""

    world = 2

    def __init__(self, rank, others):
        self.rank, self.others = rank, others

    def all_reduce_sum(self, value):
        self.others.append(value)
        return sum(self.others)


def test_perplexity_is_of_the_mean_over_the_tokens_that_count(tmp_path):
    model = language(dropout=0.5)
    found = rows(model, texts(tmp_path))
    model.eval()
    total = 0.0
    for batch in (found.batch([number]) for number in range(len(found))):
        logits = model(**batch.inputs)[0].detach().double()
        total += float(functional.cross_entropy(logits, batch.targets[0], ignore_index=IGNORED, reduction="sum"))
    model.train()
    expected = math.exp(total / int(found.counted.sum()))
    assert perplexity(model, found) == pytest.approx(expected, rel=1e-6)
    assert model.training
    sums = []
    perplexity(model, found, Both(0, sums))
    assert perplexity(model, found, Both(1, sums)) == pytest.approx(expected, rel=1e-6)


def test_a_perplexity_that_overflows_is_infinite_and_nan_stays(tmp_path):
    model = language()
    found = rows(model, texts(tmp_path))
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    assert perplexity(model, found) == math.inf
    with torch.no_grad():
        model.head.weight[3, 5] = torch.nan
    assert math.isnan(perplexity(model, found))  # not infinite, which a run would go on with


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model, found: perplexity(torch.ones(3), found), r"model must be a torch\.nn\.Module, found Tensor"),
        (lambda model, found: perplexity(model, [1, 2]), r"rows=\[1, 2\] must be lowmem\.Rows"),
        (lambda model, found: finetune(torch.ones(3), found, FineTuning()), "model must be a torch"),
        (lambda model, found: finetune(model, ["a"], FineTuning()), r"rows=\['a'\] must be lowmem\.Rows"),
        (lambda model, found: finetune(model, found, FineTuning(), held_out="a"), "held_out='a' must be lowmem"),
        (lambda model, found: finetune(model, found, 3), "settings=3 must be lowmem.FineTuning"),
    ],
)
def test_an_argument_of_another_type_is_named(call, said, tmp_path):
    model = language()
    with pytest.raises(TypeError, match=said):
        call(model, rows(model, texts(tmp_path)))
