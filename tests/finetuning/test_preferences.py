"""Pairs are cut and counted together, their loss is that of the definition, and a run goes on to the byte."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import lowmem
from lowmem import FineTuning, finetune
from lowmem.finetuning.data_files import read_data_files
from lowmem.finetuning.packed_rows import ShuffledRowOrder
from lowmem.finetuning.preferences import (
    PreferencePair,
    PreferenceRows,
    encode_preference,
    evaluate_preferences,
)
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.row_kinds import RowOptions
from lowmem.finetuning.text_examples import IGNORED, encode_rows
from lowmem.finetuning.training_state import States, named_trainable_parameters
from tests.finetuning.language import VOCABULARY, Characters, language, rows, texts

ALONE = TrainingProcessGroup()
SETTINGS = FineTuning(steps=6, batch_size=2, accumulate=2, lr=1e-2, eval_every=2, save_every=1)
LINES = [
    {"prompt": f"{n} and {n} is ", "chosen": f"{2 * n}", "rejected": f"{2 * n}, or {n}, or so"} for n in range(5, 17)
]


def encoded(tmp_path, lines):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return encode_rows(read_data_files(path), Characters(), RowOptions(preferences=True), encode_preference)


def pairs(tmp_path, lines=tuple(LINES), length=48):
    return encoded(tmp_path, lines).texts(length, "pairs")


def preference_rows(model, tmp_path, lines=tuple(LINES), beta=0.1):
    data = PreferenceRows.of(model, pairs(tmp_path, lines).examples, 48, VOCABULARY)
    data.beta = beta
    return data


def with_random_adapter(model, std=0.1):
    """B starts at zero, where a policy is its base."""
    torch.manual_seed(7)
    with torch.no_grad():
        for adapter in lowmem.adapter_layers(model, "default").values():
            adapter.lora_b.normal_(std=std)
    return model


def plain_log_probabilities(model, pair):
    """Those of the answers of a pair, of whole logits, one sequence at a time."""
    values = []
    for sequence in pair.sequences.values():
        logits = model(sequence.ids.long()[None])[0].float()
        values.append(
            -functional.cross_entropy(logits, sequence.targets.long(), ignore_index=IGNORED, reduction="sum")
        )
    return torch.stack(values)


def test_a_pair_has_both_sequences_and_learns_their_answers(tmp_path):
    found = pairs(tmp_path, [{"prompt": "abc", "chosen": "de", "rejected": "fghi"}])
    (pair,) = found.examples
    letters = Characters()
    chosen, rejected = pair.sequences.values()
    assert chosen.ids.tolist() == [*letters.encode("abc", True), *letters.encode("de", False), letters.end]
    assert rejected.ids.tolist() == [*letters.encode("abc", True), *letters.encode("fghi", False), letters.end]
    assert [int((one.targets != IGNORED).sum()) for one in (chosen, rejected)] == [3, 5]
    assert (pair.counted, found.ends, found.kinds) == (8, (9,), {"preferences as plain text": 1})


def test_each_sequence_has_the_length_and_pairs_without_a_difference_are_left_out(tmp_path):
    lines = [
        {"prompt": "abc", "chosen": "d", "rejected": "efghijkl"},
        {"prompt": "abcdefghij", "chosen": "d", "rejected": "e"},
        {"prompt": "abc", "chosen": "same and more", "rejected": "same and less"},
    ]
    found = pairs(tmp_path, lines, 8)
    assert [[len(one.ids) for one in pair.sequences.values()] for pair in found.examples] == [[6, 8]]
    assert (found.cut, found.dropped, found.places) == (3, 2, ("line 1",))
    assert encoded(tmp_path, lines[:1]).default_length(quantile=1.0, step=1) == 13


def test_equal_answers_are_a_mistake_of_their_row(tmp_path):
    lines = [{"prompt": "abc", "chosen": "d", "rejected": "e"}, {"prompt": "abc", "chosen": "sam", "rejected": "sam"}]
    found = encoded(tmp_path, lines)
    assert found.mistakes == [("line 2", "chosen and rejected are one answer, 'sam': correct one of them")]
    assert [row.place for row in found.rows] == ["line 1"]


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("memory", [None, "fast"])
def test_the_loss_is_that_of_the_definition(memory, beta, tmp_path):
    """The policy is another model than the reference: its adapter has changed since."""
    model = with_random_adapter(language())
    data = preference_rows(model, tmp_path, beta=beta)
    reference = copy.deepcopy(model)
    if memory is not None:
        lowmem.prepare_training(model, memory, chunk=4)
    data.reference = data.training_log_probabilities(model, 3)
    policy = with_random_adapter(copy.deepcopy(reference), 0.3)
    with torch.no_grad():
        for name, parameter in named_trainable_parameters(model).items():
            parameter.copy_(named_trainable_parameters(policy)[name])
    model.train()
    batch = data.batch([0, 3, 5])
    loss, metrics = batch.summed_loss_and_metrics(model(**batch.inputs))
    loss.backward()
    found = pairs(tmp_path).examples
    margins = []
    for number in (0, 3, 5):
        with torch.no_grad():
            before = plain_log_probabilities(reference, found[number])
        chosen, rejected = plain_log_probabilities(policy, found[number]) - before
        margins.append(beta * (chosen - rejected))
    margins = torch.stack(margins)
    expected = -functional.logsigmoid(margins).sum()
    expected.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=1e-4, atol=1e-5)
    assert metrics["accuracy"] == int((margins > 0).sum())
    assert metrics["margin"] == pytest.approx(float(margins.detach().sum()), rel=1e-3, abs=1e-4)
    for name, parameter in named_trainable_parameters(model).items():
        torch.testing.assert_close(
            parameter.grad, named_trainable_parameters(policy)[name].grad, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_reference_is_the_policy_before_the_first_step_without_dropout(dropout, tmp_path):
    """Not its base: the adapter of ``--from`` belongs to the reference."""
    model = with_random_adapter(language(dropout=dropout))
    before = copy.deepcopy(model).eval()
    data, held_out = preference_rows(model, tmp_path), preference_rows(model, tmp_path, LINES[:3])
    finetune(model, data, replace(SETTINGS, steps=2), held_out=held_out)
    with torch.no_grad():
        expected = torch.stack([plain_log_probabilities(before, pair) for pair in pairs(tmp_path).examples], 1)
    torch.testing.assert_close(data.reference.float(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(held_out.reference.float(), expected[:, :3], rtol=1e-5, atol=1e-4)


def test_a_policy_that_is_the_reference_prefers_neither(tmp_path):
    model = with_random_adapter(language(dropout=0.5))
    data = preference_rows(model, tmp_path)
    data.reference = data.log_probabilities(model, ALONE)
    assert evaluate_preferences(model, data, ALONE) == {
        "loss": pytest.approx(0.6931472),
        "accuracy": 0.5,
        "margin": 0.0,
    }


def test_training_prefers_what_is_chosen_and_tells_its_metrics(tmp_path):
    model, seen = language(technique=lowmem.FourBit("nf4")), []
    lowmem.prepare_training(model)
    data, held_out = preference_rows(model, tmp_path, LINES[:9]), preference_rows(model, tmp_path, LINES[9:])
    outcome = finetune(model, data, SETTINGS, held_out=held_out, watch=seen.append)
    assert outcome.losses[0] == pytest.approx(0.6931472, abs=1e-4)
    assert outcome.losses[-1] < outcome.losses[0]
    assert [step for step, _ in outcome.evaluations] == [2, 4, 6] == [*outcome.held_out_metrics]
    last = evaluate_preferences(model, held_out, ALONE)
    assert outcome.held_out_metrics[6] == last
    assert outcome.evaluations[-1] == (6, last["loss"])
    assert (last["accuracy"], last["margin"] > 0) == (1.0, True)
    assert [step.perplexity for step in seen] == [None] * 6
    assert seen[-1].metrics["held_out_margin"] == last["margin"]
    assert seen[-2].metrics["held_out_loss"] is None
    order = ShuffledRowOrder(9, 4, 0, 24).row_indices(5)
    assert 0 <= seen[-1].metrics["accuracy"] * len(order) <= len(order)
    assert seen[-1].metrics.keys() == seen[-2].metrics.keys()


class StopError(Exception):
    """Ends a run between two steps."""


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_goes_on_with_the_same_bytes_by_the_reference_of_its_start(dropout, tmp_path):
    def make():
        model = with_random_adapter(language(dropout=dropout))
        return model, preference_rows(model, tmp_path), preference_rows(model, tmp_path, LINES[:3])

    model, data, held_out = make()
    whole = finetune(model, data, SETTINGS, held_out=held_out)

    def stop(step):
        if step.number == 4:
            raise StopError

    states = States(tmp_path / "states", {})
    first, first_data, first_held_out = make()
    with pytest.raises(StopError):
        finetune(first, first_data, SETTINGS, held_out=first_held_out, states=states, watch=stop)
    again, again_data, again_held_out = make()
    resumed = finetune(again, again_data, SETTINGS, held_out=again_held_out, states=States(tmp_path / "states", {}))
    assert torch.equal(again_data.reference, data.reference)
    assert torch.equal(again_held_out.reference, held_out.reference)
    assert resumed == whole
    for name, parameter in named_trainable_parameters(model).items():
        assert torch.equal(parameter, named_trainable_parameters(again)[name]), name


def test_the_state_of_other_pairs_is_refused(tmp_path):
    model = language()
    states = States(tmp_path / "states", {})

    def stop(step):
        if step.number == 2:
            raise StopError

    with pytest.raises(StopError):
        finetune(model, preference_rows(model, tmp_path), SETTINGS, held_out=None, states=states, watch=stop)
    other = language()
    with pytest.raises(ValueError, match="the state after step 1 is no state of this run"):
        finetune(other, preference_rows(other, tmp_path, LINES[:5]), SETTINGS, states=states)


def test_a_process_whose_part_of_a_step_is_empty_has_gradients_of_zero(tmp_path):
    model = with_random_adapter(language())
    lowmem.prepare_training(model.train())
    batch = preference_rows(model, tmp_path).batch([])
    loss, metrics = batch.summed_loss_and_metrics(model(**batch.inputs))
    loss.backward()
    assert (float(loss.detach()), metrics) == (0.0, {"accuracy": 0.0, "margin": 0.0})
    assert all(not parameter.grad.any() for parameter in named_trainable_parameters(model).values())


def test_texts_are_not_evaluated_beside_pairs(tmp_path):
    model = language()
    text = rows(model, texts(tmp_path))
    with pytest.raises(TypeError, match="rows and held_out must both be PreferenceRows, or neither"):
        finetune(model, preference_rows(model, tmp_path), SETTINGS, held_out=text)


def test_a_model_whose_layers_mix_experts_adds_their_balance(tmp_path):
    class Balanced(type(language())):
        router_aux_loss_coef = 0.25

        def forward(self, *args, **named):
            logits = super().forward(*args, **named)
            return {"logits": logits, "aux_loss": logits.square().mean()}

    torch.manual_seed(0)
    model = lowmem.add_adapter(Balanced(), "default", lowmem.LoRA(4))
    data, seen = preference_rows(model, tmp_path), []
    finetune(model, data, replace(SETTINGS, steps=1, batch_size=4, accumulate=1, eval_every=None), watch=seen.append)
    torch.manual_seed(0)
    plain = lowmem.add_adapter(Balanced(), "default", lowmem.LoRA(4))
    batch = data.batch(ShuffledRowOrder(12, 4, 0, 4).row_indices(0))
    balance = float(plain(**batch.inputs)["aux_loss"].detach())
    assert seen[0].loss == pytest.approx(0.6931472 + 0.25 * balance, rel=1e-5)


def test_pairs_are_examples_that_are_split_and_compared(tmp_path):
    found = pairs(tmp_path)
    train, held_out = found.split(0.25, seed=0)
    assert (len(train.examples), len(held_out.examples)) == (9, 3)
    assert all(isinstance(pair, PreferencePair) for pair in held_out.examples)
    assert held_out.places_in(train) == []
    assert held_out.places_in(found) == list(held_out.places)
