"""BigNet in the 4- and 8-bit layers of other libraries, beside ours in the same run: ``pip install '.[peers]'``.

What is not installed is skipped.
"""

import copy

import pytest
import torch
from torch import nn

import lowmem
from benchmarks.cases import BATCHES, inference_input

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)

# Products in bfloat16: bitsandbytes takes them in it, whatever the dtype of its input.
NF4 = lowmem.FourBit("nf4", compute_dtype=torch.bfloat16)


def bitsandbytes_nf4(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace each linear layer by bitsandbytes' 4-bit one, block 64."""
    import bitsandbytes as bnb

    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            how = {"quant_type": "nf4", "compress_statistics": False}
            replaced = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=dtype, **how)
            replaced.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, **how)
            replaced.bias = layer.bias
            model.set_submodule(path, replaced)
    return model.to("cpu")  # which quantizes


def torchao_int8(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    from torchao import quantization

    model = model.to(dtype)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


PEERS = {"bitsandbytes": bitsandbytes_nf4, "torchao": torchao_int8}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", BATCHES, ids="batch{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("peer", PEERS)
def test_peer(benchmark, timed, peer, dtype, batch):
    """The ratio is to nf4 with products in bfloat16, of the same input: above 1, the peer is slower."""
    pytest.importorskip(peer, reason=f"{peer} is not installed: pip install '.[peers]'")
    benchmark.group = f"peers, {dtype}, batch {batch:3}"
    torch.manual_seed(0)
    plain = lowmem.BigNet().eval()
    ours = lowmem.convert(copy.deepcopy(plain), NF4).to(dtype).eval()
    theirs = PEERS[peer](copy.deepcopy(plain), dtype).to(dtype).eval()  # bitsandbytes has a kernel for inference only
    x = inference_input(batch).to(dtype)

    with torch.no_grad():
        output = timed(lambda: theirs(x), reference=lambda: ours(x))
        expected = plain(x.float())

    assert output.dtype == dtype
    assert lowmem.measure.difference(expected, output.float()).relative < 0.15
