"""The formula of what a process takes: ``test_shard`` measures the same model in one, two and four processes."""

import gc

import pytest
import torch
from torch import nn

import lowmem
from tests.compiled import on_threads
from tests.distributed.ranks import Language
from tests.profiled import profiled_peak

SIZES = {"vocabulary": 512, "width": 384, "depth": 5}


def large():
    torch.manual_seed(0)
    return lowmem.convert(Language(**SIZES), lowmem.FourBit("nf4", embeddings="4bit"), lowmem.LoRA(8))


def tokens():
    return torch.randint(SIZES["vocabulary"], (1, 24), generator=torch.Generator().manual_seed(0))


def loss(logits):
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens().flatten())


def measured_bytes(model):
    """Return the peak bytes of a step: weights, moments, and all that torch's allocator gives meanwhile.

    It is the middle of five, since what was received is sometimes freed a little later.
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step():
        loss(model(tokens())).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    kept = [getattr(one, "_local_tensor", one) for one in (*model.parameters(), *moments)]
    start = sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in kept}.values())
    return start + sorted(profiled_peak(step) for _ in range(5))[2]


def expected_bytes(ranks):
    model = large()
    adapters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    dense = Language(**SIZES)
    parameters = sum(one.numel() for one in dense.parameters())
    rest = parameters - sum(one.numel() for one in dense.layers.parameters())
    with on_threads(1):  # as processes have here; each thread has scratch of its own
        activations = lowmem.measure.backward_bytes(model, tokens(), loss=loss) - 4 * adapters
    sizes = parameters, adapters, len(dense.layers), rest, ranks
    return lowmem.bytes_per_rank(*sizes, activations=activations, rest_bits=4.5)


def test_the_formula_is_what_one_process_takes():
    with on_threads(1):
        used = measured_bytes(large())
    assert used == pytest.approx(expected_bytes(1), rel=0.05)


def test_sizes_that_cannot_be_are_refused():
    assert lowmem.bytes_per_rank(800, 10, 2, 200, 1, bits=8) == 800 + 160
    assert lowmem.bytes_per_rank(800, 10, 2, 200, 2, bits=8, activations=7) == 400 + 80 + 200 + 3 * 320 + 40 + 7
    for wrong in ({"ranks": 0}, {"blocks": 0}, {"bits": -1}, {"rest": 801}, {"adapters": -1}, {"activations": -1}):
        sizes = {"parameters": 800, "adapters": 10, "blocks": 2, "rest": 200, "ranks": 2}
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))} "):
            lowmem.bytes_per_rank(**(sizes | wrong))
