"""Which layers get an adapter, and of which rank; the output layer of a language model gets none."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FourBit, Half, LoRA, LoRALinear, adapter_layers, add_adapter, convert, merge, summary
from lowmem.nn.fold import unadapted_shallow_copy
from tests.refusing import refused
from tests.test_any_model import Experts

STORED = {"dense": (), "half": (Half(),), "4-bit": (FourBit(),)}
every_storage = pytest.mark.parametrize("stored", STORED)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.q, self.v = nn.Linear(16, 16), nn.Linear(16, 16)


class Tied(nn.Module):
    """A plain model whose head is tied, and no method says that it is one."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(16, 50)
        self.head.weight = self.body.tokens.weight


class Causal(nn.Module):
    """As a causal model of transformers: a method returns its head, and another layer shares the head's weight."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = Body(), nn.Linear(16, 50, bias=False)
        self.draft = nn.Linear(16, 50)
        self.draft.weight = self.lm_head.weight

    def get_output_embeddings(self):
        return self.lm_head


def adapted(model):
    return [path for path, module in model.named_modules() if isinstance(module, LoRALinear)]


class Several(nn.Module):
    """A head of several layers, inside another model."""

    def __init__(self):
        super().__init__()
        self.inner = Causal()
        self.inner.lm_head = nn.ModuleList([nn.Linear(16, 50), nn.Linear(16, 50)])


HEADS = [(Tied, ["head"]), (Causal, ["lm_head", "draft"]), (Several, ["inner.lm_head.0", "inner.lm_head.1"])]


@every_storage
@pytest.mark.parametrize(("kind", "heads"), HEADS, ids=lambda value: getattr(value, "__name__", ""))
def test_output_layers_get_no_adapter_unless_where_names_them(stored, kind, heads):
    rest = [path for path, module in kind().named_modules() if type(module) is nn.Linear and path not in heads]
    once = lambda **options: convert(kind(), *STORED[stored], LoRA(2), **options)  # noqa: E731
    convert_all = lambda: convert(kind(), *STORED[stored]) if stored != "dense" else kind()  # noqa: E731
    later = lambda **options: add_adapter(convert_all(), "mine", LoRA(2), **options)  # noqa: E731
    for change in (once, later):
        assert adapted(change()) == rest
        assert set(adapted(change(where=lambda path, _: path in heads or "token" in path))) == set(heads)
        assert set(adapted(change(where=lambda *_: True))) == {*rest, *heads}
    model = once()
    plain = convert_all()
    for head in heads:
        assert type(model.get_submodule(head)) is type(plain.get_submodule(head))
    add_adapter(model, "more", LoRA(3))
    assert adapted(model) == rest
    everywhere = once(where=lambda *_: True)
    add_adapter(everywhere, "more", LoRA(3))
    assert all(everywhere.get_submodule(head).adapters.names == ("default",) for head in heads)


@every_storage
def test_the_summary_says_why_an_output_layer_has_no_adapter(stored):
    reasons = {row.path: row.reason for row in summary(convert(Tied(), *STORED[stored], LoRA(2)))}
    why = "no adapter: its weight is tied to the embedding `body.tokens`; where= would give it one"
    wider = {"head": "its weight is tied to the embedding `body.tokens`", "lm_head": "it is the model's output layer"}
    wider = {
        path: f"8 bits, since {text}: FourBit(embeddings='4bit') stores it in 4; " * (stored == "4-bit")
        for path, text in wider.items()
    }
    assert reasons["head"] == wider["head"] + why
    assert reasons["body.q"] is None
    reasons = {row.path: row.reason for row in summary(convert(Causal(), *STORED[stored], LoRA(2)))}
    why = "no adapter: it is the model's output layer; where= would give it one"
    assert reasons["lm_head"] == wider["lm_head"] + why
    assert "no adapter: its weight is that of the output layer `lm_head`" in reasons["draft"]
    everywhere = summary(convert(Causal(), *STORED[stored], LoRA(2), where=lambda *_: True))
    assert all("no adapter" not in (row.reason or "") for row in everywhere)
    if stored != "dense":  # a model without adapters has nothing to say of them
        reasons = {row.path: row.reason for row in summary(convert(Causal(), *STORED[stored]))}
        assert reasons["lm_head"] == (wider["lm_head"].removesuffix("; ") or None)


@every_storage
def test_an_adapter_on_one_of_two_linear_layers_with_one_weight_says_so(stored):
    """It acts in its own layer, and there alone; two adapters act each in its own."""
    told = "^q shares its weight with v, which get no adapter: the one of q acts in that layer alone. Select all"

    def make():
        model = Body()
        model.q.weight, model.also = model.v.weight, model.q  # messages name the first of its paths
        model.v.bias.data.copy_(model.q.bias)
        return convert(model, *STORED[stored]) if STORED[stored] else model

    def one(path, _):
        return path in ("q", "also")

    for add in (lambda m: convert(m, LoRA(2), where=one), lambda m: add_adapter(m, "mine", LoRA(2), skip="v")):
        model = make()
        with pytest.warns(UserWarning, match=told) as caught:
            add(model)
        assert len(caught) == 1
        assert adapted(model) == ["q"]
    both = convert(make(), LoRA(2))  # warns of nothing
    assert adapted(both) == ["q", "v"]
    nn.init.normal_(both.v.lora_b)
    x = torch.randn(3, 16)
    assert not torch.equal(both.v(x), both.q(x))
    assert torch.equal(unadapted_shallow_copy(both.v)(x), unadapted_shallow_copy(both.q)(x))
    with pytest.raises(ValueError, match="v shares its weight with q, and their merged weights would differ"):
        merge(both)


@pytest.mark.parametrize("techniques", [(LoRA(2),), (FourBit(), LoRA(2))], ids=["lora", "qlora"])
def test_a_model_of_output_layers_alone_is_refused_and_stays(techniques):
    model = nn.ModuleDict({"tokens": nn.Embedding(50, 16), "head": nn.Linear(16, 50)})
    model["head"].weight = model["tokens"].weight
    message = "nothing to adapt: head is left out, since its weight is tied to the embedding `tokens`; .* with where="
    with refused(model, ValueError, message):
        convert(model, *techniques)
    with refused(model, ValueError, message):
        add_adapter(model, "mine", LoRA(2))
    assert adapted(convert(model, *techniques, where=lambda *_: True)) == ["head"]


def test_a_pattern_of_an_output_layer_matches_where_where_selects_it():
    technique = LoRA(2, ranks={"head": 1})
    with pytest.raises(ValueError, match="ranks: pattern 'head' matches no layer of Tied that gets an adapter"):
        convert(Tied(), technique)
    assert convert(Tied(), technique, where=lambda *_: True).head.rank == 1


class Router(nn.Module):
    """A mixture: a linear layer chooses of experts, which are stacks, or a list of modules."""

    def __init__(self, listed):
        super().__init__()
        self.gate, self.mix = nn.Linear(16, 4), nn.Linear(16, 16)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)]) if listed else Experts()


@every_storage
@pytest.mark.parametrize("listed", [True, False])
def test_what_chooses_experts_gets_no_adapter_unless_where_names_it(stored, listed):
    places = [f"experts.{number}" for number in range(4)] if listed else ["experts.up", "experts.down"]
    model = convert(nn.Sequential(Router(listed)), *STORED[stored], LoRA(2))
    assert [*adapter_layers(model, "default")] == ["0.mix", *(f"0.{place}" for place in places)]
    reasons = {row.path: row.reason for row in summary(model)}
    assert reasons["0.gate"] == "no adapter: it chooses experts; where= would give it one"
    add_adapter(model, "more", LoRA(2))
    assert "0.gate" not in adapter_layers(model, "more")
    add_adapter(model, "gate", LoRA(2), where=lambda path, _: path == "0.gate")
    assert [*adapter_layers(model, "gate")] == ["0.gate"]


def test_patterns_name_layers_and_their_parameters():
    technique = LoRA(2, ranks={"*.up": 3, "*.experts": 5}, alphas={"*.down": 7.0})
    for model in (
        convert(nn.Sequential(Router(False)), technique),
        convert(nn.Sequential(Router(False)), FourBit(), technique),
    ):
        found = {place: part.technique for place, part in adapter_layers(model, "default").items()}
        assert found == {"0.mix": LoRA(2), "0.experts.up": LoRA(3), "0.experts.down": LoRA(5, 7.0)}
    with pytest.raises(ValueError, match=r"pattern '\*.left' matches no layer"):
        convert(Router(False), LoRA(2, ranks={"*.left": 1}))


@every_storage
def test_embeddings_and_convolutions_get_adapters_where_where_names_them(stored):
    def make():
        return nn.ModuleDict({"tokens": nn.Embedding(9, 16), "conv": nn.Conv1d(16, 16, 2), "mix": nn.Linear(16, 4)})

    assert [*adapter_layers(convert(make(), *STORED[stored], LoRA(2)), "default")] == ["mix"]
    model = convert(make(), *STORED[stored], LoRA(2), where=lambda path, _: path != "mix")
    assert [*adapter_layers(model, "default")] == ["tokens", "conv"]
    with pytest.raises(ValueError, match="tokens is a Embedding: LoRA leaves embeddings out: where= takes them"):
        convert(make(), LoRA(2), skip="mix")


class Whole(Causal):
    """Everything that an adapter can have, and LoRA leaves out by default."""

    def __init__(self):
        super().__init__()
        self.conv, self.moe, self.norm = nn.Conv1d(16, 16, 2), Router(True), nn.LayerNorm(16)


@every_storage
@pytest.mark.filterwarnings("ignore:.* are weights that stay dense")
def test_a_where_that_only_leaves_out_is_refused_with_the_other_layers_that_it_takes(stored):
    make = lambda: convert(Whole(), *STORED[stored]) if stored != "dense" else Whole()  # noqa: E731
    taken = {  # it names layers, takes everything, or nothing that is left out by default
        "names": lambda path, _: path in ("lm_head", "body.q", "conv", "moe.gate"),
        "types": lambda _, module: isinstance(module, nn.Linear | nn.Conv1d),
        "everything": lambda *_: True,
        "a part": lambda path, _: "moe" in path,
        "nothing else": lambda path, _: path not in ("body.q", "body.v", "moe.mix") and "experts" not in path,
        "not the model": lambda path, _: path not in ("", "lm_head"),
    }
    for where in taken.values():
        convert(Whole(), *STORED[stored], LoRA(2), where=where)
        add_adapter(make(), "mine", LoRA(2), where=where)
    left_out = {
        lambda path, _: path != "lm_head": r"body\.tokens \(\w+\)|draft \(\w+\)",
        lambda path, _: not path.startswith("body"): r"lm_head \(\w+\)",
    }
    for where, names in left_out.items():
        says = f"^where= is true of the model itself, and of .*({names}).* skip= leaves out more than the default"
        with refused(model := Whole(), ValueError, says):
            convert(model, *STORED[stored], LoRA(2), where=where)
        with refused(model := make(), ValueError, says):
            add_adapter(model, "mine", LoRA(2), where=where)
    default = set(adapter_layers(convert(Whole(), LoRA(2)), "default"))
    assert set(adapter_layers(convert(Whole(), LoRA(2), skip="moe.mix"), "default")) == default - {"moe.mix"}


@pytest.mark.parametrize(
    ("technique", "where", "told"),
    [
        (
            LoRA(1000),
            None,
            "^98% .*: body.q .16 x 16., one of 2 such layers, can use a rank of 16 at most, and gets 1",
        ),
        (LoRA(21), None, "lower rank=, or that of such layers alone, as ranks={'body.q': 16}"),
        (LoRA(20), None, None),
        (LoRA(2, ranks={"*.q": 21}), None, r"^22% .*body.q \(16 x 16\) can use a rank of 16 at most, and gets 21;"),
        (LoRA(16), "body.tokens", None),
        (LoRA(21), "body.tokens", "body.tokens .16 x 50. can use a rank of 16"),
        (LoRA(32), "conv", None),
        (LoRA(41), "conv", "conv .64 x 32. can use a rank of 32"),
        (LoRA(16), "experts", None),
        (LoRA(21), "experts", "experts.up .48 x 16., one of 2 such layers, can use a rank of 16"),
    ],
)
def test_a_rank_that_no_change_of_a_weight_can_have_is_told_once(technique, where, told):
    for adapt in (convert, lambda model, one, **given: add_adapter(model, "mine", one, **given)):
        model = Tied()
        model.conv, model.experts = nn.Conv1d(16, 64, 2), Experts()
        options = {"skip": ["conv", "experts"]} if where is None else {"where": lambda path, _: path == where}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapt(model, technique, **options)
        assert [one.filename for one in caught] == [__file__] * (told is not None)
        assert all(re.search(told, str(one.message)) for one in caught)


def test_the_root_s_rank_has_its_own_pattern_and_that_of_a_small_head_is_left():
    with pytest.warns(UserWarning, match=r"the model itself \(64 x 64\) can use .* as ranks=\{'': 64\}"):
        convert(nn.Linear(64, 64), LoRA(1000))
    convert(nn.Linear(64, 64), LoRA(1000, ranks={"": 64}))
    convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), LoRA(8))


class Stack(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.embed.weight = shared.weight

    def forward(self, tokens):
        return self.mix(self.embed(tokens))


class Translates(nn.Module):
    """As T5 does, it never calls the embedding whose table the others share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Embedding(50, 16)
        self.encoder, self.decoder = Stack(self.shared), Stack(self.shared)

    def forward(self, tokens):
        return self.encoder(tokens) + self.decoder(tokens.flip(1))


EMBEDDINGS = ["shared", "encoder.embed", "decoder.embed"]


@pytest.mark.parametrize("base", [(), (FourBit("nf4", 16),), (Half(),)], ids=["dense", "nf4", "half"])
def test_embeddings_that_share_a_table_share_its_adapter(base, tmp_path):
    """So that none is without effect, whichever of them are called."""
    model = Translates()
    model = convert(model, *base) if base else model
    with refused(model, ValueError, "shared shares its weight with encoder.embed, decoder.embed, which get no"):
        lowmem.add_adapter(model, "default", LoRA(2), where=lambda path, module: path == "shared")
    model = lowmem.add_adapter(model, "default", LoRA(2, ranks={"shared": 4}), where=lambda path, module: True)
    adapters = lowmem.adapter_layers(model, "default")
    assert [*adapters] == ["shared", "encoder.embed", "encoder.mix", "decoder.embed", "decoder.mix"]
    assert len({adapters[path] for path in EMBEDDINGS}) == 1
    assert adapters["shared"].rank == 4
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_a, 0, 0.3)
        nn.init.normal_(adapter.lora_b, 0, 0.3)
    tokens = torch.randint(50, (2, 6))
    out = model(tokens)
    out.sum().backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)
    lowmem.save(model, tmp_path / "model.safetensors")
    lowmem.save_adapter(model, tmp_path / "adapter.safetensors", "default")
    plain = Translates()
    plain = convert(plain, *base) if base else plain
    for twin in (
        copy.deepcopy(model),
        lowmem.load(tmp_path / "model.safetensors", Translates),
        lowmem.load_adapter(plain, tmp_path / "adapter.safetensors", "default"),
    ):
        assert torch.equal(twin(tokens), out)
        assert len({lowmem.adapter_layers(twin, "default")[path] for path in EMBEDDINGS}) == 1
    lowmem.merge(model, to=torch.float32)
    torch.testing.assert_close(model(tokens), out, rtol=1e-4, atol=1e-4)
    assert model.shared.weight is model.encoder.embed.weight is model.decoder.embed.weight
