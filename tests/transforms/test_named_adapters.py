"""Several adapters on one base: the output is the base and the active updates, and everything can be taken back."""

import copy
import pickle
import threading
import warnings
from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import lowmem
from lowmem import FourBit, Half, LoRA, LoRALinear, convert, load_adapter, merge, save_adapter
from lowmem.transforms.named_adapters import (
    activate,
    active_adapters,
    adapter_layers,
    adapter_names,
    add_adapter,
    deactivate,
    delete_adapter,
    merge_adapter,
    unmerge_adapter,
)
from tests import strategies
from tests.refusing import refused
from tests.rounding import OF_4_BITS, assert_sum, stored_weight

every_base = pytest.mark.parametrize("base", sorted(strategies.BASES))


def make_model(base=None):
    """Return a model with a layer of each base, or of one: 0, 2 and 3 are layers, 3 stands in 4 too."""
    torch.manual_seed(0)
    shared = nn.Linear(12, 12)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12, bias=False), shared, shared)
    if base is None:
        convert(model, FourBit(block_size=8), where=lambda path, _: path == "0")
        return convert(model, Half(), where=lambda path, _: path == "2")
    return convert(model, *strategies.BASES[base]) if strategies.BASES[base] else model


def fill(model, name, seed=0):
    """Give an adapter values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapter_layers(model, name).values():
            adapter.lora_b.copy_(torch.randn(adapter.lora_b.shape, generator=generator) * 0.1)


def make_adapted(*names, base=None):
    model = make_model(base)
    for seed, name in enumerate(names):
        model = add_adapter(model, name, LoRA(2 + seed, alpha=3))
        fill(model, name, seed)
    return model


def silently_merge(model, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge_adapter(model, name)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(now[name].dtype == state[name].dtype and torch.equal(now[name], state[name]) for name in state)


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def output(model, x=X):
    with torch.no_grad():
        return model(x.to(next(p.dtype for p in model.parameters() if p.is_floating_point())))


class Life(RuleBasedStateMachine):
    """Add, fill, switch, merge and delete in any order, against a list of names and plain sums."""

    @initialize()
    def start(self):
        self.model = make_model()
        self.plain = copy.deepcopy(self.model)
        self.base = bits(self.model)
        self.names, self.active, self.merged = [], set(), None

    @rule(
        name=st.sampled_from("abc"), rank=st.integers(1, 3), seed=strategies.seeds, paths=st.sampled_from(["*", "2"])
    )
    def add(self, name, rank, seed, paths):
        if name in self.names:
            with pytest.raises(ValueError, match=f"has an adapter '{name}' already"):
                add_adapter(self.model, name, LoRA(rank))
            return
        before = output(self.model)
        skip = () if paths == "*" else ["0", "3", "4"]
        assert add_adapter(self.model, name, LoRA(rank), skip=skip) is self.model
        assert torch.equal(output(self.model), before)
        fill(self.model, name, seed)
        self.names.append(name)
        self.active.add(name)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def activate(self, data):
        chosen = data.draw(st.lists(st.sampled_from(self.names)))
        activate(self.model, *chosen)
        self.active |= set(chosen or self.names)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def deactivate(self, data):
        chosen = data.draw(st.lists(st.sampled_from(self.names)))
        if self.merged in (chosen or self.names):
            with pytest.raises(ValueError, match=f"'{self.merged}' is merged into the base: call unmerge_adapter"):
                deactivate(self.model, *chosen)
            return
        deactivate(self.model, *chosen)
        self.active -= set(chosen or self.names)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def merge(self, data):
        name = data.draw(st.sampled_from(self.names))
        if self.merged is not None:
            with pytest.raises(ValueError, match=f"'{self.merged}' is merged already: call unmerge_adapter"):
                merge_adapter(self.model, name)
            return
        state, before = bits(self.model), output(self.model)
        silently_merge(self.model, name)
        assert_same_state(self.model, state)
        unmerge_adapter(self.model)
        assert_same_state(self.model, state)
        assert torch.equal(output(self.model), before)
        silently_merge(self.model, name)
        self.merged = name

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self):
        unmerge_adapter(self.model)
        self.merged = None

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(self.names))
        if name == self.merged:
            with pytest.raises(ValueError, match=f"'{name}' is merged into the base"):
                delete_adapter(self.model, name)
            return
        assert delete_adapter(self.model, name) is self.model
        self.names.remove(name)
        self.active.discard(name)

    @rule()
    def copy_and_load(self):
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(pickle.loads(pickle.dumps(self.model)).state_dict(), strict=True)
        assert torch.equal(output(other), output(self.model))
        self.model = other

    @invariant()
    def names_are_those_of_the_list(self):
        assert sorted(adapter_names(self.model)) == sorted(self.names)
        assert set(active_adapters(self.model)) == self.active | ({self.merged} - {None})

    @invariant()
    def the_output_is_the_base_and_the_active_updates(self):
        x = X
        for path, plain in self.plain.named_modules(remove_duplicate=False):
            layer = self.model.get_submodule(path)
            if isinstance(layer, LoRALinear):
                bank = layer.adapters
                active = [
                    bank.adapters_by_parameter(n)["weight"]
                    for n in bank.names
                    if n in self.active and n != bank.merged_name
                ]
                with torch.no_grad():
                    got, exact = layer(x), stored_weight(plain if bank.merged_name is None else bank.merged_copy[1])
                    magnitudes = exact.abs()
                    for adapter in active:
                        a, b = adapter.lora_a.double(), adapter.scaling * adapter.lora_b.double()
                        exact, magnitudes = exact + b @ a, magnitudes + b.abs() @ a.abs()
                    bias = torch.zeros(1) if plain.bias is None else plain.bias
                # Sums of an adapter follow each other; its scaling, and adding it, are one rounding each.
                ranks = [len(adapter.lora_a) for adapter in active]
                terms = x.shape[-1] + 1 + OF_4_BITS + max(ranks, default=0) + 2 * len(ranks)
                wide = x.double()
                # A kernel of 24-bit integers loses 4 u of the largest input times the weights: see assert_product.
                magnitudes = wide.abs() @ magnitudes.t() + bias.double().abs()
                magnitudes += 4 / terms * wide.abs().amax(-1, keepdim=True) * exact.abs().sum(-1)
                assert_sum(got, wide @ exact.t() + bias.double(), magnitudes, terms)
            if path:
                x = layer(x).detach()

    @invariant()
    def the_base_never_changes(self):
        now = self.model.state_dict()
        assert all(torch.equal(now[name], self.base[name]) for name in self.base)
        assert {name for name in now if ".adapters." not in name} == set(self.base)
        if not self.names:
            assert_same_state(self.model, self.base)
            assert torch.equal(output(self.model), output(self.plain))


TestLife = Life.TestCase
TestLife.settings = settings(stateful_step_count=12)


def test_a_shared_module_is_adapted_once_and_state_keys_name_the_adapter():
    model = make_adapted("french", base="dense")
    assert model[3] is model[4]
    assert "0.adapters.french.weight.lora_a" in model.state_dict()
    assert list(adapter_layers(model, "french")) == ["0", "2", "3"]
    assert adapter_layers(model, "french")["2"].technique == LoRA(2, alpha=3)


def test_convert_makes_an_adapter_named_default_and_others_join_it():
    model = convert(make_model(), LoRA(2), skip="0")
    assert adapter_names(model) == active_adapters(model) == ["default"]
    add_adapter(model, "other", LoRA(3))
    assert model[2].adapters.names == ("default", "other")
    assert model[0].adapters.names == ("other",)
    assert adapter_names(model) == ["other", "default"]  # in the order of the layers


def test_one_name_may_have_another_rank_in_other_layers():
    model = add_adapter(make_model(), "a", LoRA(2), where=lambda path, _: path == "0")
    add_adapter(model, "a", LoRA(5), skip="0")
    assert {path: adapter.rank for path, adapter in adapter_layers(model, "a").items()} == {"0": 2, "2": 5, "3": 5}


def test_patterns_give_layers_ranks_and_alphas_of_their_own():
    technique = LoRA(2, ranks={"0": 5, "4": 3}, alphas={"[02]": 7.0})
    expected = {"0": LoRA(5, 7.0), "2": LoRA(2, 7.0), "3": LoRA(3)}  # the layer at 3 is at 4, too
    for model in (convert(make_model(), technique), add_adapter(make_model(), "default", technique)):
        layers = adapter_layers(model, "default")
        assert {path: adapter.technique for path, adapter in layers.items()} == expected
        assert {path: adapter.lora_a.shape[0] for path, adapter in layers.items()} == {"0": 5, "2": 2, "3": 3}
        assert layers["0"].scaling == 7 / 5


@pytest.mark.parametrize("patterns", [{"ranks": {"*": 2, "1": 3}}, {"alphas": {"9": 3}}])
def test_a_pattern_that_matches_no_adapted_layer_is_an_error(patterns):
    """Also one that matches a module that takes no adapter: 1 is a ReLU."""
    (name, given), pattern = *patterns.items(), [*next(iter(patterns.values()))][-1]
    for model, change in (
        (make_model(), lambda model, technique: convert(model, technique)),
        (make_model(base="dense"), lambda model, technique: convert(model, FourBit(), technique)),
        (make_adapted("a"), lambda model, technique: add_adapter(model, "b", technique)),
    ):
        with refused(model, ValueError, f"{name}: pattern '{pattern}' matches no layer of Sequential"):
            change(model, LoRA(2, **{name: given}))


def test_b_learns_ratio_times_faster_and_all_that_trains_is_in_a_group():
    model = make_adapted("a", "b")
    model.append(nn.LayerNorm(12))
    for adapter in adapter_layers(model, "a").values():
        adapter.requires_grad_(False)
    deactivate(model)
    slow, fast = lowmem.adapter_parameter_groups(model, 8, lr=0.25)
    assert (slow["lr"], fast["lr"]) == (0.25, 2.0)
    layers = [*adapter_layers(model, "b").values()]
    assert [id(p) for p in fast["params"]] == [id(adapter.lora_b) for adapter in layers]
    others = [adapter.lora_a for adapter in layers] + [*model[-1].parameters()]
    assert {id(p) for p in slow["params"]} == {id(p) for p in others}
    assert lowmem.adapter_parameter_groups(model, lr=1)[1]["lr"] == 16


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "1", None])
def test_groups_need_positive_rates_and_an_adapter_that_trains(value):
    model = make_adapted("a")
    with pytest.raises(ValueError, match=f"ratio={value!r} must be a positive number"):
        lowmem.adapter_parameter_groups(model, value, lr=1e-3)
    with pytest.raises(ValueError, match=f"lr={value!r} must be a positive number"):
        lowmem.adapter_parameter_groups(model, lr=value)
    for frozen in (model.requires_grad_(False), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="has no adapter that trains: add_adapter"):
            lowmem.adapter_parameter_groups(frozen, lr=1e-3)


def test_the_root_itself_can_be_the_layer():
    linear = nn.Linear(16, 4)
    expected = linear(X)
    assert add_adapter(linear, "a", LoRA(2)) is linear
    assert isinstance(linear, LoRALinear)
    assert add_adapter(linear, "b", LoRA(2)) is linear
    assert delete_adapter(linear, "a") is delete_adapter(linear, "b") is linear
    assert type(linear) is nn.Linear
    assert torch.equal(linear(X), expected)


def test_updates_are_summed_in_the_order_of_adding_whatever_the_order_of_activating():
    model = make_adapted("a", "b", "c")
    expected = output(model)
    deactivate(model)
    assert active_adapters(model) == []
    for name in ("c", "a", "b"):
        activate(model, name)
    assert model[0].adapters.active == ("a", "b", "c")
    assert torch.equal(output(model), expected)


def test_only_active_adapters_that_require_it_get_a_gradient():
    model = make_adapted("a", "b", "c")
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b", "c"}
    for adapter in adapter_layers(model, "b").values():
        adapter.requires_grad_(False)
    deactivate(model, "c")
    add_adapter(model, "d", LoRA(2))  # which leaves b frozen and c inactive
    model(X).sum().backward()
    got = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"a", "d"}
    assert active_adapters(model) == ["a", "b", "d"]


def test_gradients_of_several_adapters_follow_the_equation():
    layer = make_adapted("a", "b", base="dense")[0].double()
    x = strategies.make_input((2,), 16, 0, torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == 4
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


@every_base
def test_merging_folds_as_merge_does_and_unmerging_gives_back_every_bit(base):
    model = make_adapted("a", "b", base=base)
    before, state, flags = output(model), bits(model), [p.requires_grad for p in model.parameters()]
    deactivate(model, "b")
    alone = output(model)
    folded = copy.deepcopy(model)
    activate(model, "b")
    silently_merge(model, "a")
    assert_same_state(model, state)
    deactivate(model, "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = output(merge(folded))
    assert torch.equal(output(model), expected)
    if base == "dense":
        torch.testing.assert_close(expected, alone)
    activate(model, "b")
    assert not torch.equal(output(model), expected)
    unmerge_adapter(model)
    assert torch.equal(output(model), before)
    assert_same_state(model, state)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_merging_over_a_4bit_base_says_the_error():
    with pytest.warns(
        UserWarning, match=r"quantized 3 adapted weights to 4 bits again.*at most .* \([023]\)"
    ) as caught:
        merge_adapter(make_adapted("a", base="4-bit"), "a")
    assert caught[0].filename == __file__


def test_a_merged_adapter_does_not_train_and_another_does():
    model = make_adapted("a", "b", base="dense")
    merge_adapter(model, "a")
    model(X).sum().backward()
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {"b"}


def test_loading_values_that_cannot_be_merged_ends_the_merge():
    model = make_adapted("a", base="half")
    state = {name: t.fill_(1e6) if "lora" in name else t for name, t in bits(model).items()}
    silently_merge(model, "a")
    with pytest.raises(ValueError, match="weight holds the magnitude"):
        model.load_state_dict(state)
    assert model[0].adapters.merged_copy is None


def test_merge_folds_the_active_adapters_and_drops_the_others():
    model = make_adapted("a", "b", "c", base="dense")
    deactivate(model, "b")
    merge_adapter(model, "a")
    expected = output(model)
    merge(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(output(model), expected)


def test_merge_with_an_adapter_in_some_layers_leaves_the_other_bases_bit_for_bit():
    model = make_adapted("a", base="4-bit")
    codes = model[0].weight_packed
    add_adapter(model, "b", LoRA(2), skip="0")
    fill(model, "b")
    deactivate(model, "a")
    with pytest.warns(UserWarning, match="quantized 2 adapted weights"):
        merge(model)
    assert model[0].weight_packed is codes


def test_merge_without_an_active_adapter_is_refused():
    model = make_adapted("a")
    deactivate(model)
    with refused(model, ValueError, "no adapter of Sequential is active: activate one, or delete them"):
        merge(model)


def test_hooks_stay_when_adapters_come_and_go():
    calls = []

    def note(what, *_):
        calls.append(what)

    model = nn.Sequential(nn.Linear(16, 4))
    model[0].register_forward_hook(partial(note, "before"))
    model[0].register_full_backward_hook(partial(note, "backward"))
    add_adapter(model, "a", LoRA(2))
    model[0].register_forward_hook(partial(note, "with it"))
    model(X)
    assert calls == ["before", "with it"]
    delete_adapter(model, "a")
    calls.clear()
    model(X.clone().requires_grad_()).sum().backward()
    assert calls == ["before", "with it", "backward"]


def test_the_mode_reaches_adapters_added_later():
    model = add_adapter(make_model().eval(), "a", LoRA(2, dropout=0.5))
    add_adapter(model, "b", LoRA(2, dropout=0.5))
    assert not any(module.training for module in model.modules())
    fill(model, "b")
    assert torch.equal(output(model), output(model))
    assert not torch.equal(output(model.train()), output(model))


@pytest.mark.compile
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="as in test_ops.py: not traced whole"
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_follows_every_switch(request):
    request.addfinalizer(torch.compiler.reset)  # torch counts compilations over all tests
    torch.compiler.reset()
    model = make_adapted("a", "b").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (
        lambda: None,
        lambda: deactivate(model, "a"),
        lambda: silently_merge(model, "a"),
        lambda: unmerge_adapter(model),
        lambda: delete_adapter(model, "b"),
    ):
        change()
        torch.testing.assert_close(output(compiled), output(model))


def test_wrong_arguments_of_adding_are_named_and_nothing_changes():
    model = convert(make_model(), LoRA(2), skip="0")
    names = (
        "",
        "a.b",
        ".",
        "active",
        "merged_name",
        "names",
        "adapters_by_parameter",
        "remove",
        "training",
        "_modules",
    )
    taken = "must not be empty, hold a dot, or be an attribute"
    for arguments, options, error, message in (
        *(((name, LoRA(2)), {}, ValueError, f"name='{name}' {taken}") for name in names),
        ((3, LoRA()), {}, TypeError, "name=3 must be a string"),
        (("a", Half()), {}, TypeError, r"technique=Half\(.*must be an instance of LoRA"),
        (("default", LoRA()), {}, ValueError, "2 has an adapter 'default' already: choose another name"),
        (("a", LoRA()), {"where": lambda *_: False}, ValueError, "nothing to convert: LoRA looks for"),
    ):
        with refused(model, error, message):
            add_adapter(model, *arguments, **options)
    with refused(model, ValueError, "it has LoRA already; add another with add_adapter"):
        convert(model, LoRA(2))


WITH_A_NAME = [activate, deactivate, delete_adapter, merge_adapter, adapter_layers]


@pytest.mark.parametrize("function", WITH_A_NAME)
def test_an_unknown_name_lists_those_that_there_are(function):
    model = make_adapted("a", "b")
    for name in ("c", None):
        with refused(model, ValueError, f"adapter={name!r} is unknown: Sequential has a, b"):
            function(model, name)
    with refused(model, ValueError, "no adapter of Sequential is merged: call merge_adapter"):
        unmerge_adapter(model)


@pytest.mark.parametrize("function", [*WITH_A_NAME, lambda model, _: unmerge_adapter(model)])
def test_a_model_without_adapters_says_how_to_get_one(function):
    with pytest.raises(ValueError, match="Sequential has no adapter: add_adapter"):
        function(make_model(), "a")
    with pytest.raises(TypeError, match="must be a torch.nn.Module, found dict"):
        function({}, "a")
    with pytest.raises(TypeError, match="must be a torch.nn.Module, found Tensor"):
        lowmem.save_adapter(torch.ones(3), "never-written")
    assert adapter_names(make_model()) == active_adapters(make_model()) == []


@pytest.mark.parametrize("change", ["add", "add to adapted", "delete", "load"])
def test_what_another_thread_changes_meanwhile_is_changed_in_every_layer(change, tmp_path):
    """While one thread adds an adapter and looks for layers, another calls a function, which waits."""
    model, groups, failed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), [], []
    if change != "add":
        convert(model, LoRA(2))
    if change == "load":
        save_adapter(model, tmp_path / "two.safetensors")
        delete_adapter(model, "default")

    def run():
        try:
            if change.startswith("add"):
                add_adapter(model, "two", LoRA(2))
            elif change == "load":
                load_adapter(model, tmp_path / "two.safetensors", "two")
            else:
                groups.extend(lowmem.adapter_parameter_groups(model, lr=1))
                delete_adapter(model, "default")
        except (ValueError, RuntimeError) as reason:
            failed.append(reason)

    other = threading.Thread(target=run)

    def where(path, module):
        if other.ident is None:
            other.start()
            other.join(0.3)  # it waits for this one; were it not to, it would be done long before
        return True

    add_adapter(model, "one", LoRA(2), where=where)
    other.join()
    assert not failed
    names = {"delete": ("one",), "add to adapted": ("default", "one", "two")}.get(change, ("one", "two"))
    assert [layer.adapters.names for layer in model] == [names] * 2
    assert [layer.adapters.active for layer in model] == [names] * 2
    assert [len(group["params"]) for group in groups] in ([], [4, 4])  # of both adapters in both layers


def test_a_forward_passes_over_an_adapter_that_was_deleted_meanwhile():
    model = make_adapted("a", "b", base="dense")
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    x, active = torch.randn(3, layer.in_features), layer.adapters.active
    lowmem.delete_adapter(model, "b")
    expected = layer(x)
    layer.adapters.active = active  # as a forward has read it that began before
    assert torch.equal(layer(x), expected)
