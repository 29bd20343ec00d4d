"""A model calibrated on samples of its inputs, layer by layer, in order, or left as it was."""

import copy
import gc
import types
import weakref
from itertools import count

import pytest
import torch
from torch import nn

from lowmem import (
    Budget,
    Conv4Bit,
    Embedding4Bit,
    Embedding8Bit,
    FourBit,
    Half,
    Linear4Bit,
    Linear8Bit,
    calibrate,
    convert,
    quantize,
    summary,
)
from lowmem.measure import peak_bytes
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.calibration import gptq_solver
from tests.refusing import refused


class Net(nn.Module):
    """Attention-like: three layers get one input; then a normalization, dropout and two more, one of them twice."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(16, 4)
        self.last = nn.Linear(32, 5)
        self.twice = nn.Linear(32, 32)
        self.q, self.k, self.v = (nn.Linear(48, 32) for _ in range(3))
        self.norm, self.drop = nn.LayerNorm(32), nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        x = self.norm(torch.tanh(self.q(x) * self.k(x)) + self.v(x)) * scale
        return self.last(self.drop(self.twice(torch.relu(self.twice(x)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(48, 48, generator=generator) * torch.linspace(0.05, 1, 48) ** 2
    return [torch.randn(4, 25, 48, generator=generator) @ mix.T for _ in range(3)]


NO_BATCH = pytest.mark.filterwarnings("ignore:layers were quantized by their weights alone")
SKIP = {"skip": "unused"}


def test_the_model_computes_more_nearly_what_it_did(net, samples):
    dense, searched = copy.deepcopy(net).eval(), convert(copy.deepcopy(net), FourBit(search=True), **SKIP).eval()
    assert calibrate(net, samples, **SKIP) is net
    net.eval()

    @torch.no_grad()
    def error(model):
        return float(sum((model(x) - dense(x)).norm() for x in samples))

    assert error(net) < 0.75 * error(searched)
    for layer in (net.q, net.k, net.v, net.twice, net.last):
        assert type(layer) is Linear4Bit
        assert layer.quantized.method == "calibrated"
        assert 0 < layer.weight_error < 0.3
    assert type(net.unused) is nn.Linear


def test_each_layer_sees_what_the_layers_before_it_give_in_4_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    x = torch.randn(60, 24)
    dense = copy.deepcopy(model)
    calibrate(model, [x])
    hidden = torch.relu(model[0](x)).detach()
    inputs = gptq_solver.prepare_hessian_or_none(hidden.T @ hidden / 60, 0.01)
    expected = gptq_solver.quantize_gptq(dense[2].weight, FourBit(search=True), inputs)
    assert torch.equal(model[2].packed, expected.packed)


def test_layers_that_get_the_same_input_share_a_run(net, samples):
    runs = []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    calibrate(net, samples, **SKIP)
    assert len(runs) == len(samples) * (1 + 3)  # for the order; q with k and v, twice, last


def test_one_layers_second_moments_are_alive_at_a_time(net, samples, monkeypatch):
    alive = []
    told = gptq_solver.prepare_hessian_or_none

    def watch(moments, damping):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        said = told(moments, damping)
        alive.extend(weakref.ref(tensor) for tensor in (moments, *said))
        return said

    monkeypatch.setitem(calibrate.__wrapped__.__globals__, "prepare_hessian_or_none", watch)
    calibrate(net, samples, **SKIP)
    assert len(alive) == 3 * 5


@pytest.mark.parametrize("enabled", [False, True])
def test_modes_come_back_and_so_does_the_fused_path_which_is_off_meanwhile(net, samples, enabled):
    net.train()
    net.norm.eval()
    before, seen = torch.backends.mha.get_fastpath_enabled(), []
    net.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mha.get_fastpath_enabled()))
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        calibrate(net, samples, **SKIP)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert set(seen) == {False}
    assert net.training and net.q.training and net.drop.training and not net.norm.training  # noqa: PT018
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:layers were quantized by their weights alone")
def test_layers_that_were_compiled_are_calibrated_the_same(net, samples, monkeypatch):
    plain = calibrate(copy.deepcopy(net), samples, FourBit(block_size=8))
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call, *_, **__: lambda *args: (calls.append(args), call(*args))[1])
    for layer in (net.q, net.twice, net.last):
        layer.compile()
    compiled = calibrate(net, samples, FourBit(block_size=8))
    assert calls
    for name in ("q", "k", "v", "twice", "last"):
        one, other = getattr(compiled, name).quantized, getattr(plain, name).quantized
        assert torch.equal(one.packed, other.packed)
        assert one.method == other.method == "calibrated"


@NO_BATCH
def test_the_layers_of_a_fused_encoder_are_reached():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    calibrate(model, [torch.randn(5, 7, 16)])
    assert model.layers[1].linear2.quantized.method == "calibrated"


def test_a_layer_that_no_batch_reaches_is_named_and_quantized_by_its_weight(net, samples):
    expected = quantize(net.unused.weight, "nf4", search=True)
    with pytest.warns(UserWarning, match=r"\(unused: no batch reached it\)"):
        calibrate(net, samples, FourBit("nf4"))
    assert net.unused.quantized.method == "search"
    assert torch.equal(net.unused.packed, expected.packed)


def test_inputs_that_are_all_zero_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"\(0: its inputs are all zero; 1: its inputs are all alike\)"):
        calibrate(model, [torch.zeros(9, 8)])
    assert model[0].quantized.method == "search"


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
def test_biases_make_up_for_the_whole_error_of_inputs_that_are_all_alike(tmp_path, diagonal, rows):
    torch.manual_seed(0)
    x = torch.randn(1, 16).expand(rows, 16)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    expected = dense(x).detach()
    for more in ({"diagonal": True},) if diagonal else ({"resume": tmp_path / str(rows)},) * 2:
        with pytest.warns(UserWarning, match=r"\(0, 1: its inputs are all alike\)"):
            model = calibrate(copy.deepcopy(dense), [x], **more)
        # Each layer is off by its roundings to float32: of products of 16 numbers, of the mean, and of the bias.
        sizes = x.abs() @ dense[0].weight.abs().T @ dense[1].weight.abs().T
        assert ((model(x) - expected).abs() <= 1e-5 * (1 + sizes)).all()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_nan_and_infinite_inputs_are_an_error_and_the_model_stays(net, samples, value, diagonal):
    broken = [*samples, samples[0].clone()]
    broken[3][1, 2, 7] = value
    assert_stays(net, ValueError, "^q: its inputs hold NaN or inf", lambda: calibrate(net, broken, diagonal=diagonal))


def test_without_the_search_scales_are_the_largest_magnitudes():
    layer = nn.Linear(16, 4)
    expected = quantize(layer.weight, "nf4")
    calibrated = calibrate(layer, [torch.randn(19, 16)], FourBit("nf4", search=False))
    assert calibrated.quantized.method == "calibrated"
    assert torch.equal(calibrated.scales, expected.scales)


class Language(nn.Module):
    """A language model with an output layer of its own, or one tied to its embeddings."""

    def __init__(self, tied):
        super().__init__()
        self.tokens, self.conv = nn.Embedding(30, 16), nn.Conv1d(16, 16, 1)
        self.mid, self.head = nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, i):
        return self.head(self.mid(self.conv(self.tokens(i).mT).mT))


def test_diagonal_is_a_choice_and_no_vector(net, samples):
    said = "diagonal=.* must be True or False"
    assert_stays(net, ValueError, said, lambda: calibrate(net, samples, diagonal=torch.ones(3)))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_output_layers_are_stored_as_convert_stores_them(tied, diagonal):
    """In 8 bits by default, which are not calibrated: no batch is needed for them."""
    model = Language(tied)
    converted = convert(copy.deepcopy(model), FourBit(search=True))
    calibrate(model, [torch.randint(0, 30, (2, 12))], diagonal=diagonal)
    assert [type(model.tokens), type(model.head)] == [Embedding8Bit, Linear8Bit]
    for path in ("tokens", "head", "conv"):
        one, two = model.get_submodule(path), converted.get_submodule(path)
        assert torch.equal(one.packed, two.packed)
        assert torch.equal(one.scales, two.scales)
    assert (model.head.packed is model.tokens.packed) is tied
    assert model.mid.quantized.method == ("search" if diagonal else "calibrated")
    rows = [{row.path: row for row in summary(one)} for one in (model, converted)]
    assert [rows[0][path] for path in ("tokens", "head", "conv")] == [
        rows[1][path] for path in ("tokens", "head", "conv")
    ]


@NO_BATCH
def test_in_4_bits_tied_layers_go_by_their_weights_and_an_output_layer_is_calibrated():
    batches, technique = [torch.randint(0, 30, (2, 12))], FourBit(embeddings="4bit")
    model = calibrate(Language(tied=True), batches, technique)
    assert type(model.tokens) is Embedding4Bit
    assert isinstance(model.conv, Conv4Bit)
    assert model.head.packed is model.tokens.packed
    assert [model.head.quantized.method, model.mid.quantized.method] == ["search", "calibrated"]
    assert calibrate(Language(tied=False), batches, technique).head.quantized.method == "calibrated"


def test_layers_of_other_types_are_named_by_type_a_few_of_each():
    """Such a layer may compute with its weight what it likes: its inputs say nothing of its errors."""

    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(*(Own(16, 16) for _ in range(5)), nn.Linear(16, 16))
    expected = convert(copy.deepcopy(model), FourBit(search=True))
    message = r"alone \(0, 1, 2 and 2 more: of type Own, not nn.Linear itself\)"
    with pytest.warns(UserWarning, match=message):
        calibrate(model, [torch.randn(40, 16)])
    assert torch.equal(model[0].weight_packed, expected[0].weight_packed)
    assert model[5].quantized.method == "calibrated"


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (iter([torch.ones(1, 48)]), TypeError, r"list_iterator, which can be read only once; .* list\(batches\)"),
        ((x for x in [torch.ones(1, 48)]), TypeError, "generator, which can be read only once"),
        ([], ValueError, "batches is empty"),
        (torch.ones(2, 48), TypeError, "batches is a Tensor; pass a list"),
        ({"x": torch.ones(2, 48)}, TypeError, "batches is a dict; pass a list"),
        (3, TypeError, "batches is a int; pass a list"),
        (["text"], TypeError, "a batch is a str; it must be"),
        ([torch.ones(1, 48), 3], TypeError, "a batch is a int; it must be"),
        ([torch.ones(1, 47)], RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_invalid_batches_are_refused_and_the_model_stays(net, batches, error, message):
    assert_stays(net, error, message, lambda: calibrate(net, batches, **SKIP))
    assert_stays(net, error, message, lambda: calibrate(net, batches, Budget(5.5), **SKIP))


@pytest.mark.parametrize(
    ("technique", "options", "error", "message"),
    [
        (Half(), {}, TypeError, "technique=.* must be a FourBit or a Budget"),
        (FourBit, {}, TypeError, "technique=.* must be a FourBit or a Budget"),
        (FourBit(), {"progress": 3}, TypeError, "progress=3 must be callable"),
        (FourBit(), {"offload": 3}, TypeError, "offload=3 must be the path"),
        (FourBit(), {"resume": 3}, TypeError, "resume=3 must be the path"),
        (Budget(4), SKIP, ValueError, r"Budget\(bits=4\) is out of reach"),
        (Budget(4.5, inputs=[]), SKIP, ValueError, "inputs is empty"),
        *(
            (FourBit(), {"diagonal": True, name: "x*"}, ValueError, f"{name}=.* does not apply with diagonal=True")
            for name in ("blocks", "offload", "resume")
        ),
        (FourBit(), {"damping": 0}, ValueError, "damping=0 must be a number above 0"),
        (FourBit(), {"damping": float("nan")}, ValueError, "damping=nan must be"),
        (FourBit(), {"damping": True}, ValueError, "damping=True must be"),
        (FourBit(), {"skip": "nowhere"}, ValueError, "skip='nowhere' matches no module"),
        (FourBit(), {"where": lambda *_: False}, ValueError, "nothing to convert"),
    ],
)
def test_invalid_arguments_are_refused_and_the_model_stays(net, samples, technique, options, error, message):
    assert_stays(net, error, message, lambda: calibrate(net, samples, technique, **options))


def test_a_weight_that_cannot_be_stored_is_named_and_the_model_stays(net, samples):
    with torch.no_grad():
        net.last.weight[0, 0] = torch.nan
    assert_stays(net, ValueError, "^last: weight holds 1 values", lambda: calibrate(net, samples, **SKIP))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(net, samples):
    assert_stays(net, UserWarning, "no batch reached it", lambda: calibrate(net, samples))


def assert_stays(net, error, message, run):
    net.train()
    net.q.forward = types.MethodType(nn.Linear.forward, net.q)  # a user's own
    fused = torch.backends.mha.get_fastpath_enabled()
    with refused(net, error, message):
        run()
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert torch.is_grad_enabled()


class Layer(nn.Module):
    """A block of a decoder: attention over what is before, and an MLP."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(width), *(nn.Linear(width, width) for _ in range(3))
        self.out, self.up = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.calls = 0

    def forward(self, x, mask=None):
        self.calls += 1
        y = self.norm(x)
        y = nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), attn_mask=mask)
        x = x + self.out(y)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """Tokens to logits; what is between its blocks is its own."""

    def __init__(self, depth=3, width=16, tokens=40):
        super().__init__()
        self.embed, self.project = nn.Embedding(tokens, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, input_ids, attention_mask=None):
        length = input_ids.shape[-1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None]
        mask = mask if attention_mask is None else mask & (attention_mask != 0)[:, None]
        mask = mask | torch.eye(length, dtype=torch.bool)
        return self.head(self.through(self.project(self.embed(input_ids)), mask))

    def through(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask=mask).mul_(1.01)  # in place: what a block returns is the model's own
        return x


class Skipping(Decoder):
    """Its later blocks, and its head, read what earlier ones returned."""

    def through(self, x, mask):
        outputs = [x]
        for number, layer in enumerate(self.layers):
            outputs.append(layer(outputs[-1] + (outputs[1] if number > 1 else 0), mask=mask))
        return sum(outputs)


class Crossing(Decoder):
    """Two lists of blocks, of which the second reads the end of the first at each block."""

    def __init__(self, depth=3):
        super().__init__(depth)
        self.others = nn.Sequential(*(Layer(16) for _ in range(depth)))

    def through(self, x, mask):
        end, x = super().through(x, mask), x
        for layer in self.others:
            x = layer(x + end, mask=mask)
        return x


class Writing(Decoder):
    """Its blocks return nothing: each writes what it computes where the next one reads it."""

    class Block(Layer):
        def forward(self, state, mask):
            state["x"] = super().forward(state["x"], mask)

    def __init__(self, depth=3):
        super().__init__(depth)
        self.layers = nn.ModuleList(self.Block(16) for _ in range(depth))

    def through(self, x, mask):
        state = {"x": x}
        for layer in self.layers:
            layer(state, mask=mask)
        return state["x"]


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, 40, (3, 20), generator=generator)} for _ in range(4)]


def made(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options)


def assert_same_bytes(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_each_block_runs_twice_for_a_batch_whatever_the_depth(depth, texts):
    model = made(Decoder, depth)
    calibrate(model, texts)
    # Twice more for the first batch, which tells the order of calls, and whether blocks can be run one by one.
    assert [layer.calls for layer in model.layers] == [2 + 2 * len(texts)] * depth


@pytest.mark.filterwarnings("ignore:blocks read more than what those before them return")
@pytest.mark.parametrize("kind", [Decoder, Skipping, Crossing, Writing])
def test_each_block_is_quantized_by_what_it_gets_in_the_quantized_model(kind, texts):
    """Moments come from a run of the block's dense layers on inputs of the blocks before, which are quantized."""
    model, seen = made(kind), {}
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, Layer)}
    handles = [
        block.q.register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, []).append(args[0].clone())
        )
        for path, block in blocks.items()
    ]
    calibrate(model, texts)
    calibrated = {path: inputs[-len(texts) :] for path, inputs in seen.items()}
    seen.clear()
    with torch.no_grad():
        for batch in texts:
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    assert set(calibrated) == set(blocks)
    for path, inputs in seen.items():
        assert all(torch.equal(*both) for both in zip(inputs, calibrated[path], strict=True)), path
    for layer in (module for module in model.modules() if isinstance(module, Linear4Bit)):
        assert layer.quantized.method == "calibrated"


def test_a_model_that_reads_earlier_outputs_takes_one_more_run_and_no_more(texts):
    model = made(Skipping, 6)
    calibrate(model, texts)
    calls = [layer.calls for layer in model.layers]
    assert max(calls) <= 3 + 3 * len(texts) + 1


@pytest.mark.parametrize("blocks", [None, "layers.*"])
def test_blocks_that_hand_on_more_than_they_return_are_run_behind_those_before_them(blocks, texts):
    model = made(Writing, 4)
    if blocks is None:  # no layer is outside of the blocks
        model.project, model.head = nn.Identity(), nn.Identity()
    why = r"blocks read more than what those before them return \(layers.1 gets other inputs where blocks"
    with pytest.warns(UserWarning, match=why):
        calibrate(model, texts, blocks=blocks)
    found = [layer for layer in model.layers.modules() if isinstance(layer, Linear4Bit)]
    assert len(found) == 24
    assert all(layer.quantized.method == "calibrated" for layer in found)
    calls = [layer.calls for layer in model.layers]
    assert calls == sorted(calls, reverse=True)
    assert calls[0] <= 4 + (4 + 2) * len(texts)  # a run for each block, and for each layer outside


class Reading(Decoder):
    """Its later blocks read an earlier one's output in some layers, and what comes before them in others."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.own, self.other, self.out = (nn.Linear(width, width) for _ in range(3))

        def forward(self, x, memory):
            return x + self.out(torch.tanh(self.own(x)) * self.other(memory))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Block(16) for _ in range(4))

    def through(self, x, mask):
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1], outputs[1] if len(outputs) > 1 and self.reads(x) else outputs[-1]))
        return outputs[-1]

    def reads(self, x):
        return True


class ReadingOfLongTexts(Reading):
    """A first batch of a short text does not tell that its blocks read earlier outputs."""

    def reads(self, x):
        return x.shape[1] > SHORT


SHORT = 3


@pytest.mark.parametrize("kind", [Reading, ReadingOfLongTexts])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_block_of_which_some_layers_read_earlier_outputs_is_calibrated_as_a_whole(kind, resumed, texts, tmp_path):
    more = {"resume": tmp_path / kind.__name__} if resumed else {}
    short = {name: value[:, :SHORT] for name, value in texts[0].items()}
    model = calibrate(made(kind), [short, *texts], **more)
    methods = {layer.quantized.method for layer in model.modules() if isinstance(layer, Linear4Bit)}
    assert methods == {"calibrated"}


def test_hidden_states_on_disk_give_the_same_bytes_and_leave_no_file(texts, tmp_path):
    expected = calibrate(made(Crossing), texts)
    assert_same_bytes(calibrate(made(Crossing), texts, offload=tmp_path / "hidden"), expected)
    assert list((tmp_path / "hidden").iterdir()) == []
    (tmp_path / "file").write_text("kept")
    model = made(Crossing)
    with refused(model, NotADirectoryError, "offload=.*file' is a file: name a folder"):
        calibrate(model, texts, offload=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.thorough
def test_peak_memory_is_the_hidden_states_and_one_blocks_moments(tmp_path):
    """What a deeper model needs more is what its further layers store; on disk, hidden states need nothing."""
    tokens = [torch.randint(0, 40, (4, 256), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    hidden = 8 * 4 * 256 * 16 * 4  # bytes of what a block returns for all batches

    def peak(depth, **options):
        model = made(Decoder, depth)
        found = peak_bytes(lambda: calibrate(model, tokens, FourBit("nf4"), **options))
        return found, sum(part.nbytes for part in model.layers.parameters())

    (short, stored), (deep, more), (on_disk, _) = peak(3), peak(9), peak(3, offload=tmp_path)
    assert deep - short <= 2 * (more - stored) < hidden / 4
    assert on_disk <= short - hidden * 7 / 8  # the batch that runs is in memory


@pytest.mark.parametrize("units", [1, 3, 5])
def test_a_resumed_calibration_gives_the_same_bytes(units, texts, tmp_path, monkeypatch):
    """What is left takes as long as what was done, without what was done before: a clock goes on when it is read."""
    expected = calibrate(made(Decoder, 4), texts)
    model = made(Decoder, 4)
    clock = count()
    monkeypatch.setitem(
        calibrate.__wrapped__.__globals__, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
    )

    def end(done, total, left):
        assert total == 6
        assert left == 6 - done
        if done == units:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts, resume=tmp_path, progress=end)
    assert len(list(tmp_path.iterdir())) == units
    assert_same_bytes(model, made(Decoder, 4))
    quantized = []
    again = calibrate(model, texts, resume=tmp_path, progress=lambda *seen: quantized.append(seen))
    assert_same_bytes(again, expected)
    assert [(done, total) for done, total, _ in quantized] == [(number, 6) for number in range(1, 7)]
    assert [left for *_, left in quantized] == [done / max(1, done - units) * (6 - done) for done in range(1, 7)]
    finished = [layer.calls for layer in made(Decoder, 4).layers]
    assert finished == [0] * 4
    done = made(Decoder, 4)
    assert_same_bytes(calibrate(done, texts, resume=tmp_path), expected)
    assert [layer.calls for layer in done.layers] == [2 + len(texts)] * 4  # no moments are taken again
    with pytest.raises(ValueError, match="another model, other batches or settings"):
        calibrate(made(Decoder, 4), texts, resume=tmp_path, damping=0.02)


def stored_as(model):
    """How each layer is stored, and why."""
    layers = {path: one for path, one in model.named_modules() if isinstance(one, StoredModule)}
    return {
        path: (one.quantized.format, one.quantized.block_size, one.chosen_because) for path, one in layers.items()
    }


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_budget_is_divided_as_convert_divides_it_and_4_bits_are_calibrated(net, samples, diagonal):
    other = [batch.flip(-1) ** 3 for batch in samples]
    found, x = {}, samples[0]
    with torch.no_grad():
        expected = net.eval()(x)
    for name, inputs in {"own": None, "other": other}.items():
        calibrated = calibrate(copy.deepcopy(net), samples, Budget(5.5, inputs=inputs), diagonal=diagonal, **SKIP)
        converted = convert(copy.deepcopy(net), Budget(5.5, inputs=inputs or samples), **SKIP)
        assert stored_as(calibrated) == stored_as(converted)
        found[name] = stored_as(calibrated)
        methods = {(layer.quantized.format, layer.quantized.method) for layer in (calibrated.q, calibrated.twice)}
        assert methods <= {("bof4s", "search" if diagonal else "calibrated"), ("int8", "absmax")}
        with torch.no_grad():
            errors = [float((model.eval()(x) - expected).norm()) for model in (calibrated, converted)]
        assert errors[0] < errors[1]
    assert len({found["own"][path][:2] for path in "qkv"}) > 1  # layers of one input, stored in different ways
    assert found["own"] != found["other"]


def test_a_budget_is_resumed_unless_it_is_divided_otherwise(texts, tmp_path):
    expected = calibrate(made(Decoder, 3), texts, Budget(7))
    calibrate(made(Decoder, 3), texts, Budget(7), resume=tmp_path)
    assert_same_bytes(calibrate(made(Decoder, 3), texts, Budget(7), resume=tmp_path), expected)
    with pytest.raises(ValueError, match="another model, other batches or settings"):
        calibrate(made(Decoder, 3), texts, Budget(6), resume=tmp_path)


@NO_BATCH
def test_layers_that_were_not_calibrated_come_back_with_their_reasons(tmp_path, net, samples):
    with pytest.warns(UserWarning, match=r"unused: no batch reached it"):
        expected = calibrate(copy.deepcopy(net), samples, FourBit(("nf4", "int4")), resume=tmp_path)
    with pytest.warns(UserWarning, match=r"unused: no batch reached it"):
        assert_same_bytes(calibrate(net, samples, FourBit(("nf4", "int4")), resume=tmp_path), expected)


def test_padding_does_not_count(texts):
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, 15:], mask[2, 4:] = 0, 0
    results = []
    for padding in (1, 7):
        batches = [{"input_ids": torch.where(mask == 0, padding, batch["input_ids"])} for batch in texts]
        results.append(
            [calibrate(made(Decoder), [b | more for b in batches]) for more in ({}, {"attention_mask": mask})]
        )
    (all_1, counted_1), (all_7, counted_7) = results
    assert_same_bytes(counted_1, counted_7)
    assert not torch.equal(all_1.layers[0].up.packed, all_7.layers[0].up.packed)
    with refused(stay := made(Decoder), ValueError, "batch 2 of batches is padding alone"):
        calibrate(stay, [texts[0], texts[1] | {"attention_mask": mask * 0}])


def test_a_bias_takes_over_the_mean_of_the_error_and_a_shared_one_stays():
    torch.manual_seed(0)
    x = torch.randn(90, 32) * torch.linspace(0.1, 1, 32) + 3
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(32, 8))
    model[1].bias = model[0].bias

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.pair = nn.Linear(32, 8), nn.ModuleDict({"a": model[0], "b": model[1]})

        def forward(self, x):
            return self.own(x) + self.pair["a"](x) + self.pair["b"](x)

    for diagonal in (False, True):
        both = copy.deepcopy(Both())
        dense, shared = both.own(x).detach(), both.pair["a"].bias.detach().clone()
        calibrate(both, [x[:50], x[50:]], FourBit("int4", block_size=32), diagonal=diagonal)
        off = (both.own(x).detach() - dense).double()
        assert off.abs().mean() > 1e-3
        assert off.mean(0).abs().max() < 1e-5
        assert both.pair["a"].bias is both.pair["b"].bias
        assert torch.equal(both.pair["a"].bias, shared)
        assert both.own.bias.requires_grad


def test_diagonal_weighs_the_search_by_the_variance_of_each_column(net, samples):
    weights = {path: getattr(net, path).weight.detach().clone() for path in ("q", "v", "last")}
    runs, inputs = [], []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    net.q.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 48)))
    seen = []
    told = {"progress": lambda *one: seen.append(one)}
    calibrate(net, samples, FourBit("nf4", block_size=16), diagonal=True, **SKIP, **told)
    assert seen == [(1, 1, 0.0)]
    assert len(runs) == len(samples)
    assert net.q.quantized.method == "search"
    assert (net.q.quantized.error_bound() >= (weights["q"] - net.q.quantized.dequantize()).abs()).all()
    rows = torch.cat(inputs).double()
    importance = (rows - rows.mean(0)).square().mean(0)

    def weighted(found):
        return float(((weights["q"] - found.dequantize()).double().square() * importance).sum())

    assert weighted(net.q.quantized) < weighted(quantize(weights["q"], "nf4", block_size=16, search=True))


def test_fewer_rows_than_columns_are_told_and_damped(net):
    x = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    few = r"fewer rows than columns reached 5 layers, least of all q \(9 rows, 48 columns\), which are damped"
    expected = copy.deepcopy(net)
    with pytest.warns(UserWarning, match=few):
        calibrate(net, [x], **SKIP)
    centred = x[0] - x[0].mean(0)
    hessian = gptq_solver.prepare_hessian_or_none(centred.T @ centred / 9, 0.01 * 48 / 9)
    wanted = gptq_solver.quantize_gptq(expected.q.weight, FourBit(search=True), hessian)
    assert (wanted.dequantize() - net.q.quantized.dequantize()).norm() < 0.02 * wanted.dequantize().norm()


@pytest.mark.parametrize(
    ("error", "call"),
    [
        *((error, call) for error in (KeyboardInterrupt, RuntimeError) for call in (1, 2, 13, 17, 20, 24)),
        *((KeyboardInterrupt, call) for call in (4, 6, 9, 11)),  # in the runs that find out what has to be kept
    ],
)
def test_an_error_in_any_block_leaves_the_model_as_it_was(texts, error, call):
    model, calls = made(Decoder), []

    def fail(*_):
        calls.append(1)
        if len(calls) == call:
            raise error("now")

    for layer in model.layers:
        layer.register_forward_pre_hook(fail)
    with refused(model, error, "now"):
        calibrate(model, texts)


def test_layer_by_layer_is_as_without_blocks(texts):
    model, other = made(Decoder), made(Decoder)
    other.layers = nn.ModuleDict({str(number): layer for number, layer in enumerate(other.layers)})
    other.through = types.MethodType(
        lambda self, x, mask: Decoder.through(types.SimpleNamespace(layers=self.layers.values()), x, mask), other
    )
    assert_same_bytes(calibrate(model, texts, blocks=()), calibrate(other, texts))
