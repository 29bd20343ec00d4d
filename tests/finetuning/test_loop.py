"""The steps: their gradients are those of the whole batch, they learn, and what is not finite stops them."""

import errno
import os
import types
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import lowmem
from lowmem import FineTuning, finetune
from lowmem.finetuning.calling_convention import logits_from_output
from lowmem.finetuning.evaluation import perplexity
from lowmem.finetuning.packed_rows import ShuffledRowOrder, rank_batches
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.text_examples import IGNORED
from lowmem.finetuning.training_state import SavedState, States, named_trainable_parameters
from tests.finetuning.language import Language, language, rows, texts

SETTINGS = FineTuning(steps=12, batch_size=2, lr=1e-2, eval_every=4, save_every=2)


def weights(model):
    return {name: one.detach().clone() for name, one in named_trainable_parameters(model).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("memory", [None, "fast", "lean"])
def test_training_lowers_the_perplexity_and_keeps_the_base(memory, tmp_path):
    model = language(technique=lowmem.FourBit("nf4"))
    found = rows(model, texts(tmp_path))
    before = perplexity(model, found)
    frozen = {name: one.clone() for name, one in model.named_parameters() if not one.requires_grad}
    if memory is not None:
        lowmem.prepare_training(model, memory)
    seen = []
    outcome = finetune(model, found, replace(SETTINGS, steps=40), held_out=found, watch=seen.append)
    assert outcome.evaluations[-1] == (40, perplexity(model, found))
    assert outcome.evaluations[-1][1] < before / 3
    assert [step for step, _ in outcome.evaluations] == [*range(4, 41, 4)]
    assert [step.loss for step in seen] == outcome.losses
    assert [step.number for step in seen if step.perplexity is not None] == [*range(4, 41, 4)]
    assert (outcome.step, outcome.stopped) == (40, False)
    assert seen[0].lr == 1e-2 > seen[20].lr > seen[-1].lr > 0
    assert seen[0].tokens == sum(
        found.batch([one]).tokens for one in ShuffledRowOrder(len(found), 2, 0, 80).row_indices(0)
    )
    assert all(torch.equal(one, dict(model.named_parameters())[name]) for name, one in frozen.items())


class Balanced(Language):
    """As models of transformers return what balances the load of their experts."""

    router_aux_loss_coef = 0.25

    def forward(self, *args, **named):
        logits = super().forward(*args, **named)
        return {"logits": logits, "aux_loss": logits.square().mean()}


class Noting(TrainingProcessGroup):
    """Notes the gradients of the steps, which it scales to nothing."""

    def __init__(self):
        self.found = []

    def clip_grad_norm(self, parameters, max_norm):
        parameters = list(parameters)
        self.found.append([one.grad.clone() for one in parameters])
        return super().clip_grad_norm(parameters, 1e-30)


def with_random_adapter(model):
    """B starts at zero, where A has no gradient."""
    with torch.no_grad():
        for adapter in lowmem.adapter_layers(model, "default").values():
            adapter.lora_b.normal_()
    return model


def uneven_rows(model, tmp_path):
    """Ten rows that differ in the number of tokens that count."""
    lines = [f'{{"prompt": "{"a" * n}", "completion": "{"b" * (13 - n)}"}}' for n in range(1, 11)]
    data = rows(model, texts(tmp_path, "\n".join(lines), 16, "lines.jsonl"), 16)
    assert len(set(data.counted.tolist())) > 4
    return data


@pytest.mark.parametrize(("batch_size", "accumulate"), [(7, 1), (2, 4), (1, 7)])
def test_an_accumulated_gradient_is_that_of_the_whole_batch(batch_size, accumulate, tmp_path):
    """The mean is over tokens, not over batches."""
    model, ranks = with_random_adapter(language()), Noting()
    data = uneven_rows(model, tmp_path)
    finetune(model, data, FineTuning(steps=1, batch_size=batch_size, accumulate=accumulate), ranks=ranks)
    same_model, count = with_random_adapter(language()), batch_size * accumulate
    batch = data.batch(ShuffledRowOrder(10, count, 0, count).row_indices(0))
    logits = logits_from_output(same_model(**batch.inputs)).flatten(0, 1)
    functional.cross_entropy(logits, batch.targets.flatten()).backward()
    expected = [one.grad for one in named_trainable_parameters(same_model).values()]
    torch.testing.assert_close(ranks.found[0], expected, rtol=1e-4, atol=1e-6)


def test_the_balance_of_a_mixture_counts_as_the_tokens_of_its_batch(tmp_path):
    torch.manual_seed(0)
    model, ranks = lowmem.add_adapter(Balanced(), "default", lowmem.LoRA(4)), Noting()
    data = uneven_rows(model, tmp_path)
    parts = [data.batch(one) for one in rank_batches(ShuffledRowOrder(10, 8, 0, 8).row_indices(0), 2, 0, 1)]
    counts = [int(one.targets.ne(IGNORED).sum()) for one in parts]
    assert len(set(counts)) > 1
    mean = 0
    for one, count in zip(parts, counts, strict=True):
        out = model(**one.inputs)
        loss = functional.cross_entropy(out["logits"].flatten(0, 1), one.targets.flatten())
        mean = mean + (loss + 0.25 * out["aux_loss"]) * (count / sum(counts))
    mean.backward()
    expected = [one.grad.clone() for one in named_trainable_parameters(model).values()]
    outcome = finetune(model, data, FineTuning(steps=1, batch_size=2, accumulate=4), ranks=ranks)
    assert outcome.losses == [pytest.approx(mean.item(), rel=1e-5)]
    torch.testing.assert_close(ranks.found[0], expected, rtol=1e-4, atol=1e-6)


class StopError(Exception):
    pass


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(tmp_path):
    """Dropout, warm-up, decay, the best adapter and the order of rows come back; the states differ in nothing."""
    settings = replace(SETTINGS, warmup=3, patience=3, accumulate=2)

    def run(folder, until=None):
        model = language(technique=lowmem.FourBit("nf4"), dropout=0.3)
        found = rows(model, texts(tmp_path))

        def watch(step):
            if step.number == until:
                raise StopError

        states = States(folder, {})
        try:
            return finetune(model, found, settings, held_out=found, states=states, watch=watch), weights(model)
        except StopError:
            return None

    expected = run(tmp_path / "whole")
    for until in (1, 4, 5, 11):
        assert run(tmp_path / "parts", until) is None
    outcome, found = run(tmp_path / "parts")
    assert outcome == expected[0]
    assert same(found, expected[1])
    assert [one.read_bytes() for one in sorted((tmp_path / "parts").iterdir())] == [
        one.read_bytes() for one in sorted((tmp_path / "whole").iterdir())
    ]


def test_the_seed_decides_and_the_global_generator_stays(tmp_path):
    def run(seed):
        model = language(dropout=0.3)
        data, state = rows(model, texts(tmp_path)), torch.get_rng_state()
        finetune(model, data, replace(SETTINGS, seed=seed, steps=3))
        assert torch.equal(torch.get_rng_state(), state)
        return weights(model)

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def test_patience_stops_and_keeps_the_best(tmp_path, monkeypatch):
    """A step's time is that of its gradient and its update, here a second each: a clock goes on when it is read."""
    model, clock, seen = language(), [0], []

    def read():
        clock[0] += 1
        return clock[0]

    def evaluate_slowly(*_):
        clock[0] += 0 if model.training else 100

    class Slow(States):
        def save(self, saved):
            clock[0] += 100
            super().save(saved)

    found = rows(model, texts(tmp_path))
    other = rows(model, texts(tmp_path, "zyxwv" * 30, name="other.txt"))
    settings = replace(SETTINGS, steps=60, eval_every=2, patience=2, lr=3e-2)
    states, hook = Slow(tmp_path / "states", {}), model.register_forward_pre_hook(evaluate_slowly)
    with monkeypatch.context() as patch:
        patch.setitem(finetune.__globals__, "time", types.SimpleNamespace(perf_counter=read))
        outcome = finetune(model, found, settings, held_out=other, states=states, watch=seen.append)
    hook.remove()
    assert clock[0] > 100 * len(outcome.evaluations)
    assert {one.seconds for one in seen} == {2}
    step, least = outcome.best
    assert outcome.stopped
    assert outcome.step == step
    assert [number for number, _ in outcome.evaluations] == [*range(2, step + 5, 2)]
    assert perplexity(model, other) == least
    with pytest.raises(ValueError, match="patience=2 needs held_out"):
        finetune(model, found, settings)


class Breaks(Language):
    """Returns what is not finite in some calls in training."""

    calls, broken, tokens_of_calls = 0, (), []

    def forward(self, *args, **named):
        logits = super().forward(*args, **named)
        self.calls += self.training
        self.tokens_of_calls.append(named["input_ids"])
        return logits * torch.nan if self.calls in self.broken else logits


class Noted(States):
    """Notes after which steps a state was saved."""

    def __init__(self, folder):
        super().__init__(folder, {})
        self.seen = []

    def save(self, saved):
        super().save(saved)
        self.seen.append(saved.step)


def breaking(folder, broken, **settings):
    """Run until a call of the model is broken; return the error, the states, and the weights after each step."""
    torch.manual_seed(0)
    model = lowmem.add_adapter(Breaks(), "default", lowmem.LoRA(2))
    found, states, seen = rows(model, texts(folder)), Noted(folder / "states"), []
    model.calls, model.broken, model.tokens_of_calls = 0, broken, []
    settings = replace(SETTINGS, eval_every=None, **settings)
    with pytest.raises(ValueError, match="in step") as error:
        finetune(model, found, settings, states=states, watch=lambda step: seen.append(weights(model)))
    if seen:
        assert same(weights(model), seen[-1])  # the step that failed changed nothing
        *_, before, _, again = model.tokens_of_calls
        assert torch.equal(again, before)
    model.broken = ()
    again = States(states.folder, {})
    if states.seen:
        assert same(again.newest().tensors_with_prefix("parameters"), seen[states.seen[-1] - 1])
        assert len(finetune(model, found, settings, states=again).losses) == settings.steps
    return str(error.value), states.seen


@pytest.mark.parametrize(
    ("tensors", "record"),
    [
        ({"random.cpu": torch.zeros(3, dtype=torch.uint8)}, {}),
        ({"losses": None}, {}),
        ({"optimizer.nobody.step": torch.zeros(())}, {}),
        ({}, {"optimizer": {"nobody.step": 1}}),
        ({}, {"optimizer": [1]}),
        ({}, {"evaluations": None}),
        ({}, {"evaluations": [3]}),
        ({"losses": torch.zeros(7, dtype=torch.float64)}, {}),
    ],
    ids=["random", "losses", "optimizer tensor", "number", "optimizer list", "evaluations", "evaluation", "step"],
)
def test_a_crafted_state_with_a_right_digest_is_refused(tmp_path, tensors, record):
    model, found, states = language(), rows(language(), texts(tmp_path)), States(tmp_path / "states", {})
    finetune(model, found, replace(SETTINGS, steps=3), states=states)
    good = states.newest()
    changed = {name: one for name, one in {**good.tensors, **tensors}.items() if one is not None}
    States(tmp_path / "crafted", {}).save(SavedState(good.step, changed, {**good.record, **record}))
    with pytest.raises(ValueError, match=f"the state after step {good.step} is no state of this run"):
        finetune(language(), found, replace(SETTINGS, steps=3), states=States(tmp_path / "crafted", {}))


@pytest.mark.parametrize(
    ("broken", "save_every", "said", "expected"),
    [
        ({8}, 50, "in step 8: lower lr=0.01; the last good state, after step 7, is kept", [1, 2, 4, 7]),
        (range(8, 99), 3, "in step 8: lower lr=0.01; the last good state, after step 6, is kept", [1, 2, 3, 6]),
        (range(3, 99), 50, "in step 3: lower lr=0.01; the last good state, after step 1, is kept", [1]),
        (range(1, 99), 50, "in step 1: lower lr=0.01; no state was saved before", []),
    ],
    ids=["once", "stays", "early", "first"],
)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(broken, save_every, said, expected, tmp_path):
    """The state before the step is good if the rows of the step before have a finite loss with it."""
    told, saved = breaking(tmp_path, broken, save_every=save_every)
    assert f"the loss is nan {said}" in told
    assert saved == expected  # below save_every, more and more rarely


class NoNorm(TrainingProcessGroup):
    """The gradient of one step is infinite."""

    calls = 0

    def clip_grad_norm(self, parameters, max_norm):
        self.calls += 1
        return float("inf") if self.calls == 4 else super().clip_grad_norm(parameters, max_norm)


def test_a_gradient_that_is_not_finite_leaves_the_state_before_it(tmp_path, monkeypatch):
    """The loss of its step was finite."""
    model = language()
    found, states = rows(model, texts(tmp_path)), Noted(tmp_path / "states")
    settings = replace(SETTINGS, save_every=50, eval_every=None)
    with pytest.raises(ValueError, match="the norm of the gradient is inf in step 4: .* after step 3, is kept"):
        finetune(model, found, settings, states=states, ranks=NoNorm())
    assert states.seen == [1, 2, 3]
    full = Noted(tmp_path / "full")

    def fill(step):
        if step.number == 3:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            monkeypatch.setattr(full, "save", lambda saved: (_ for _ in ()).throw(error))

    with pytest.raises(ValueError, match=r"step 4: .* after step 2, is kept in .*; a later one: .*No space left"):
        finetune(language(), found, settings, states=full, ranks=NoNorm(), watch=fill)
    assert States(full.folder, {}).newest().step == 2


class Blind(Language):
    """Predicts nothing where it is evaluated, from when that is asked for."""

    blind = False

    def forward(self, *args, **named):
        logits = super().forward(*args, **named)
        return logits * torch.nan if self.blind and not self.training else logits


def test_a_perplexity_that_is_not_a_number_stops_and_names_the_step(tmp_path):
    torch.manual_seed(0)
    model = lowmem.add_adapter(Blind(), "default", lowmem.LoRA(2))
    found, states = rows(model, texts(tmp_path)), States(tmp_path / "states", {})
    model.blind = True
    told = "the perplexity of the held-out text is nan after step 4: lower lr=0.01; the last good state, after step 2"
    with pytest.raises(ValueError, match=told):
        finetune(model, found, SETTINGS, held_out=found, states=states)


def test_weights_that_a_step_makes_infinite_stop_it(tmp_path):
    model = language()
    decays = replace(SETTINGS, lr=1e36, weight_decay=1e4, steps=1)  # parameters times -1e40
    with pytest.raises(ValueError, match=r"lora_a' is no longer finite after step 1: lower lr=1e\+36$"):
        finetune(model, rows(model, texts(tmp_path)), decays)
    states = States(tmp_path / "s", {})
    rises = replace(SETTINGS, lr=1e30, eval_every=None)
    model = language()
    with pytest.raises(ValueError, match=r"is (nan|inf) in step \d+: lower lr=1e\+30; no state was saved before"):
        finetune(model, rows(model, texts(tmp_path)), rises, states=states)
    assert not (tmp_path / "s").exists()


def test_a_model_without_what_trains_and_fewer_rows_than_processes_are_refused(tmp_path):
    model = Language().requires_grad_(False)
    with pytest.raises(ValueError, match="Language has no parameter that trains"):
        finetune(model, rows(model, texts(tmp_path)), SETTINGS)
    model, ranks = language(), TrainingProcessGroup()
    found = rows(model, texts(tmp_path))
    ranks.world = len(found)  # a row for each is enough
    assert finetune(model, found, replace(SETTINGS, steps=1), ranks=ranks).step == 1
    ranks.world += 1
    why = f"^{len(found) + 1} processes cannot share {len(found)} rows of text: start fewer, or take more text$"
    with pytest.raises(ValueError, match=why):
        finetune(model, found, SETTINGS, ranks=ranks)


def test_moments_of_8_bits_train_and_a_run_with_them_goes_on_with_the_same_bytes(tmp_path):
    settings = replace(SETTINGS, steps=30, optimizer="adamw8bit", weight_decay=0.1)
    data = texts(tmp_path)

    def seeded():
        torch.manual_seed(0)
        return Language()  # whose positions are more numbers than AdamW8bit keeps in float32

    trained = {}
    for name, changes in (("whole", {}), ("adamw", {"optimizer": "adamw"}), ("no decay", {"weight_decay": 0.0})):
        model = seeded()
        finetune(model, rows(model, data), replace(settings, **changes))
        trained[name] = weights(model)
    assert not same(trained["whole"], trained["adamw"])
    assert not same(trained["whole"], trained["no decay"])

    def stop(step):
        if step.number == 9:
            raise KeyboardInterrupt

    model, states = seeded(), States(tmp_path / "states", {})
    with pytest.raises(KeyboardInterrupt):
        finetune(model, rows(model, data), settings, states=states, watch=stop)
    saved = States(tmp_path / "states", {}).newest()
    assert any(value.dtype == torch.uint8 for name, value in saved.tensors.items() if name.startswith("optimizer."))
    model, seen = seeded(), []
    finetune(model, rows(model, data), settings, states=States(tmp_path / "states", {}), watch=seen.append)
    assert seen[0].number == 9
    assert same(weights(model), trained["whole"])
