"""The operators in plain ones: they hold the same weights, and torch.onnx.export writes them."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from lowmem import FORMATS, FourBit, Half, LoRA, convert, quantize, restore
from lowmem.kernels import decompositions
from lowmem.kernels.frozen_weight_operator import codes_scales_and_description
from lowmem.quant.formats import EIGHT_BIT
from lowmem.quant.scale_encodings import ENCODINGS
from tests import strategies
from tests.rounding import gamma

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_weight_is_decoded_to_the_same_bits():
    """Scales of every magnitude, of both signs, zero and with short last blocks; given as they are and as bytes."""
    for format, encoding, columns in itertools.product([*FORMATS, *EIGHT_BIT], ENCODINGS, (1, 24, 40)):
        dense = strategies.make_weight("normal", (6, columns), 0, 0)
        exponents = torch.tensor([-20, -7, 0, 3, 14, 0])[:, None]
        dense = dense.clamp(-1.9, 1.9) * 2.0**exponents
        dense[5] = 0
        weight = quantize(dense, format, block_size=16, scales=encoding)
        packed, scales, text = codes_scales_and_description(weight)
        for given in (scales, scales.view(torch.uint8)):
            for dtype in (torch.float32, torch.bfloat16):
                got = decompositions.decomposed_dequantize(packed, given, text, dtype)
                assert torch.equal(got, weight.dequantize(dtype)), (format, encoding, columns)


def test_numbers_of_16_and_32_bits_are_decoded_from_their_bytes():
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    assert torch.equal(decompositions._floats_from_bytes(halves.view(torch.uint8)[None], 2), halves.float()[None])
    random = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    floats = random.to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, 1.0, -1.0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny])
    floats = torch.cat([floats[floats.isfinite() & (floats.abs() >= edges[-1])], edges])
    assert torch.equal(decompositions._floats_from_bytes(floats.view(torch.uint8)[None], 4), floats[None])


@pytest.fixture
def in_onnx():
    """Export a model to ONNX, with any batch; return what runs it, and the size of the file."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: tox -e zoo has it")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: tox -e zoo has it")

    def export(model, x):
        shapes = ({0: torch.export.Dim("batch")} if len(x) > 1 else {},)
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
        file = io.BytesIO()
        program.save(file)
        session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (name,) = [one.name for one in session.get_inputs()]
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), len(file.getvalue())

    return export


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(50, 32), nn.Linear(32, 32)
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 10, bias=False)

    def forward(self, indices):
        x = self.mix(self.tokens(indices)).relu()
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


TECHNIQUES = {  # of each kind of scale and of each product one
    "nf4 and an adapter": (FourBit("nf4", 16), LoRA(2)),
    "int4": (FourBit("int4"),),
    "half": (Half(),),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_onnx_runs_what_the_model_gives_in_float64_for_any_batch(name, in_onnx):
    """Two orders of addition differ by 1e-15 of a sum: 1e-9 allows for any condition."""
    torch.manual_seed(0)
    model = convert(Net(), *TECHNIQUES[name]).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_b" in key:
                parameter.normal_()
        run, _ = in_onnx(model, torch.randint(50, (2, 7)))
        for batch in (1, 2, 5):
            x = torch.randint(50, (batch, 7))
            torch.testing.assert_close(run(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("technique", [FourBit("nf4", 16), Half()], ids=["nf4", "half"])
def test_onnx_runs_convolutions_in_float32(technique, in_onnx):
    """A sum of n products is off by at most gamma(n + 2) times the sum of their magnitudes, in any order."""
    torch.manual_seed(0)
    for layer in (nn.Conv1d(8, 12, 3, 2, 1, groups=2), nn.ConvTranspose1d(8, 6, 4, 2, 1, 1, bias=False)):
        model = convert(layer.eval(), technique)
        dense = restore(copy.deepcopy(model)).double().requires_grad_(False)
        run, _ = in_onnx(model, torch.randn(2, 8, 9))
        x = torch.randn(3, 8, 9)
        expected = dense(x.double())
        for parameter in dense.parameters():
            parameter.data.abs_()
        magnitudes = dense(x.double().abs())
        assert ((run(x).double() - expected).abs() <= gamma(8 * 4 + 2) * magnitudes).all()


def test_onnx_files_hold_weights_as_they_are_stored(in_onnx):
    model = convert(nn.Linear(1024, 512, bias=False), FourBit()).eval()
    run, size = in_onnx(model, torch.randn(2, 1024))
    assert size < model.quantized.nbytes + 2**16
    x = torch.randn(3, 1024)
    weight = model.quantized.dequantize().double()
    magnitudes = x.double().abs() @ weight.abs().t()
    assert ((run(x).double() - x.double() @ weight.t()).abs() <= gamma(1024 + 1) * magnitudes).all()


def test_products_in_8_bit_integers_are_refused_with_the_remedy(in_onnx):
    model = convert(nn.Linear(16, 16), FourBit(compute_dtype=torch.int8)).eval()
    with pytest.raises(RuntimeError, match="compute_dtype=None"):
        in_onnx(model, torch.randn(2, 16))


def test_a_stack_of_matrices_is_written_too(in_onnx):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 16, 16))

        def forward(self, x):
            return torch.bmm(x.expand(4, -1, -1), self.up)

    model = convert(Stack(), FourBit(), parameters=lambda path, _: path == "up").double().eval()
    run, _ = in_onnx(model, torch.randn(1, 2, 16, dtype=torch.float64))
    x = torch.randn(1, 2, 16, dtype=torch.float64)
    torch.testing.assert_close(run(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_graph_of_torch_keeps_the_operators_whole():
    model = convert(nn.Linear(16, 16), FourBit()).eval()
    program = torch.export.export(model, (torch.randn(2, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = {str(node.target) for node in program.run_decompositions().graph.nodes}
    assert "lowmem.product_4bit.default" in targets
    assert not any("index_select" in one for one in targets)
