"""Layers of other libraries, beside ours in the same run: ``pip install '.[peers]'``.

BigNet in 4- and 8-bit layers, and products of 4-bit weights with inputs in 8-bit integers. What is not installed is
skipped.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from time import sleep

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


def onnxruntime_product(stored: lowmem.QuantizedTensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return ONNX Runtime's product with a weight in q4_0: ``MatMulNBits``, which rounds inputs to 8 bits, too.

    The first call makes the session: its thread spins on a core for a second, in which nothing else has that core.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = stored.shape
    codes = lowmem.unpack(stored.packed, stored.block_size).view(rows, -1, stored.block_size)
    given = {
        "W": codes[..., ::2] | codes[..., 1::2] << 4,  # neighbours share a byte
        "scales": stored.scales.float().flatten() / 8,  # ours are those of levels from -1 to 7/8
    }
    bits = {"K": columns, "N": rows, "bits": 4, "block_size": stored.block_size, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", *given], ["y"], domain="com.microsoft", **bits)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("x", columns), ("y", rows))
    ]
    initializers = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in given.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = cache(
        partial(onnxruntime.InferenceSession, model.SerializeToString(), options, ["CPUExecutionProvider"])
    )
    return lambda x: torch.from_numpy(session().run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 256], ids="rows{}".format)
@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (1024, 1024), (4096, 4096)], ids="{0[0]}x{0[1]}".format)
def test_int8_product(benchmark, timed, shape, rows):
    """The ratio is to ours: above 1, ONNX Runtime is slower."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[peers]'")
    pytest.importorskip("onnx", reason="onnx is not installed: pip install '.[peers]'")
    benchmark.group = f"int8 products, rows {rows:3}"
    torch.manual_seed(0)
    technique = lowmem.FourBit("q4_0", block_size=32, scales="float16", compute_dtype=torch.int8)
    layer = lowmem.convert(nn.Linear(*shape[::-1], bias=False), technique).eval()
    theirs, x = onnxruntime_product(layer.quantized), torch.randn(rows, shape[1])

    sleep(0.5)  # the session before has taken a core, and our kernel then leaves it alone for a quarter of a second

    with torch.no_grad():
        output = timed(lambda: theirs(x), reference=lambda: layer(x))
        expected = x @ layer.quantized.dequantize().T

    assert lowmem.measure.difference(expected, output).relative < 0.02
    assert lowmem.measure.difference(expected, layer(x)).relative < 0.02
