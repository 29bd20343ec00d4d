"""Trainer, PEFT and accelerate on models that lowmem has stored, with tied ends."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed: tox -e transformers")

from transformers import Trainer, TrainingArguments, pipeline

import lowmem
from lowmem import FourBit, LoRA
from lowmem.finetuning.data_files import read_data_files
from lowmem.finetuning.packed_rows import ShuffledRowOrder
from lowmem.finetuning.preferences import PreferenceRows, encode_preference
from lowmem.finetuning.row_kinds import RowOptions
from lowmem.finetuning.text_examples import encode_rows
from lowmem.integrations.transformers import LowmemConfig, TextTokenizer
from tests.integrations.transformers.folders import IDS, assert_same, load, write
from tests.integrations.transformers.tokens import write_tokenizer

pytestmark = pytest.mark.filterwarnings(  # those of transformers and accelerate are not ours
    "default::FutureWarning", "default::DeprecationWarning", "default::UserWarning"
)
ROOT = Path(__file__).parents[3]
DATA = [
    {"input_ids": (torch.arange(16) * (i + 3)) % 258, "labels": (torch.arange(16) * (i + 3)) % 258} for i in range(16)
]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "dense")


def stored(folder):
    return load(folder, quantization_config=LowmemConfig(FourBit("nf4")))


def with_lowmem(folder):
    return lowmem.add_adapter(stored(folder), "tuned", LoRA(4))


def with_peft(folder):
    peft = pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(stored(folder), config)


def trainer(model, out, **more):
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **(
            {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
            | more
        ),
    )
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:4])


def logged(run, name):
    return [line[name] for line in run.state.log_history if name in line]


@pytest.mark.parametrize("adapt", [with_lowmem, with_peft])
def test_it_trains_and_goes_on_from_a_checkpoint(folder, tmp_path, adapt):
    """Steps after a checkpoint are those of the run that was not stopped; what lies in checkpoints loads again."""
    torch.manual_seed(0)
    model = adapt(folder)
    whole = trainer(model, tmp_path / "run", gradient_checkpointing=True)
    whole.train()
    assert len(logged(whole, "loss")) == 4
    assert len(logged(whole, "eval_loss")) == 2
    assert logged(whole, "eval_loss")[1] < logged(whole, "eval_loss")[0]
    torch.manual_seed(1)
    again = adapt(folder)
    resumed = trainer(again, tmp_path / "run", gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same(again, model)
    last = tmp_path / "run" / "checkpoint-4"
    if adapt is with_lowmem:
        assert_same(load(last), model)
        ends, _ = json.loads((last / "config.json").read_text())["quantization_config"]["layers"]
        assert ends["names"] == ["model.embed_tokens", "lm_head"]
        plain = trainer(adapt(folder), tmp_path / "plain", load_best_model_at_end=True)
        plain.train()
    else:
        peft = pytest.importorskip("peft")
        assert_same(peft.PeftModel.from_pretrained(stored(folder), last), model)


def test_adapters_of_peft_compute_and_load(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    torch.manual_seed(0)
    model = with_peft(folder).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    dense = peft.PeftModel(stored(folder).dequantize(), model.peft_config["default"]).eval()
    dense.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_" in name}, strict=False)
    # the same products in float32, of the same values: sums in another order
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(stored(folder), tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    own = stored(folder)  # transformers' own way to the same
    own.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(own(IDS).logits, model(IDS).logits)


def test_a_module_that_peft_trains_whole_is_left_dense(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])

    def adapted():
        torch.manual_seed(0)
        model = load(folder, quantization_config=LowmemConfig(FourBit("nf4"), skip="*down_proj"))
        return peft.get_peft_model(model, config)

    model, before = adapted(), adapted().state_dict()
    trainer(model, tmp_path / "run").train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len([name for name in changed if "down_proj.modules_to_save" in name]) == 2
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    last = tmp_path / "run" / "checkpoint-4"
    again = load(folder, quantization_config=LowmemConfig(FourBit("nf4"), skip="*down_proj"))
    assert_same(peft.PeftModel.from_pretrained(again, last), model)


@pytest.mark.parametrize("made", ["loaded", "converted"])
def test_a_stored_model_without_an_adapter_is_not_trained_unless_it_is_asked_for(folder, tmp_path, made):
    model = stored(folder) if made == "loaded" else lowmem.convert(load(folder), FourBit("nf4"))
    with pytest.raises(
        ValueError,
        match=r"5 dense parameters alone, as model\.layers\.0\.input_layernorm\.weight\."
        r".*add_adapter.*get_peft_model.*train_dense=T",
    ):
        trainer(model, tmp_path / "run")
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert trainer(frozen, tmp_path / "run").evaluate()["eval_loss"] > 0  # nothing would change
    with pytest.raises(ValueError, match="has no adapter"):
        trainer(frozen.train().apply(lambda m: m.weight.requires_grad_() if "Norm" in type(m).__name__ else m), "run")
    model.hf_quantizer.quantization_config.train_dense = True
    before = model.model.norm.weight.detach().clone()
    trainer(model, tmp_path / "run", max_steps=1, save_steps=1, eval_strategy="no").train()
    assert not torch.equal(model.model.norm.weight, before)
    trainer(load(tmp_path / "run" / "checkpoint-1"), tmp_path / "run")  # which the folder remembers
    trainer(lowmem.restore(stored(folder)), tmp_path / "run")
    trainer(load(folder, quantization_config=LowmemConfig(FourBit("nf4"), train_dense=True)), tmp_path / "run")


def test_a_pipeline_generates(folder, tmp_path):
    write_tokenizer(folder)
    stored(folder).save_pretrained(tmp_path / "small")
    write_tokenizer(tmp_path / "small")
    generate = pipeline("text-generation", model=str(tmp_path / "small"))
    (found,) = generate("ab", max_new_tokens=5, do_sample=False)
    assert found["generated_text"].startswith("ab")


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.integrations.transformers.test_training import trainer, with_lowmem
import torch.distributed as dist

torch.manual_seed(0)
model = with_lowmem(Path(sys.argv[2]))
run = trainer(model, sys.argv[3], max_steps=2)
run.train()
assert dist.get_world_size() == 2
for parameter in model.parameters():
    both = [torch.empty_like(parameter) for _ in range(2)]
    dist.all_gather(both, parameter.detach())
    assert torch.equal(*both)
open(f"{sys.argv[3]} of rank {dist.get_rank()}", "w").close()  # lines of two processes could mix
dist.destroy_process_group()  # its threads end before the interpreter does, which otherwise may abort
"""


def test_accelerate_launches_two_processes(folder, tmp_path):
    """Both train the same adapter, on batches of their own; the first one saves it.

    With ``--cpu`` alone, accelerate starts one process, or needs mpirun: ``--multi_gpu`` is torchrun, and
    ``use_cpu=True`` of the arguments makes it gloo.
    """
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(tmp_path / "train.py"), str(ROOT), str(folder), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("run of *")) == ["run of rank 0", "run of rank 1"]
    trained = load(tmp_path / "run" / "checkpoint-2")
    assert lowmem.adapter_names(trained) == ["tuned"]
    fresh = with_lowmem(folder).state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, fresh[name])}
    assert changed
    assert all(".adapters.tuned.weight.lora_" in name for name in changed)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(
    "more",
    [{}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}],
    ids=["plain", "accumulation", "smoothing"],
)
def test_a_prepared_model_learns_the_same(folder, tmp_path, monkeypatch, memory, more):
    """Rows have other numbers of labels, by which a Trainer divides the losses that it adds up."""
    monkeypatch.setattr("lowmem.training.activation_compression._LEAST", 64)  # tensors of this tiny model are small
    rows = [one | {"labels": one["labels"].masked_fill(torch.arange(16) < n, -100)} for n, one in enumerate(DATA)]
    curves = []
    for prepared in (False, True):
        torch.manual_seed(0)
        model = with_lowmem(folder)
        if prepared:
            lowmem.prepare_training(model, memory)
        run = trainer(model, tmp_path / "run", save_strategy="no", **more)
        run.train_dataset = rows
        run.train()
        curves.append(torch.tensor(logged(run, "loss") + logged(run, "eval_loss")))
    assert curves[0][5] < curves[0][4]  # of the evaluations
    torch.testing.assert_close(*curves, rtol=1e-4 if memory == "fast" else 0.02, atol=0)


def test_a_copy_of_a_lean_model_is_lean(folder):
    model = lowmem.prepare_training(lowmem.convert(load(folder), FourBit(), LoRA(2)), "lean")
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    assert lowmem.training_report(copied) == lowmem.training_report(model)
    assert type(lowmem.release_training(copied)) is type(lowmem.release_training(model))


PAIRS = [
    {"prompt": f"{n} and {n} is ", "chosen": f"{2 * n}", "rejected": f"{2 * n} or {n}, or so"} for n in range(5, 21)
]


@pytest.mark.parametrize("start", ["new", "trained"])
def test_preferences_train_as_dpo_trainer_trains_them(start, folder, tmp_path):
    """The same rows, order, base and adapter: losses, rewards and weights differ by rounding alone."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    peft = pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    write_tokenizer(folder)
    tokenizer, steps, batch = AutoTokenizer.from_pretrained(folder), 8, 4
    torch.manual_seed(0)
    model = stored(folder)
    lowmem.add_adapter(model, "tuned", LoRA(4), where=lambda path, _: path.endswith("_proj"))
    if start == "trained":
        with torch.no_grad():
            for adapter in lowmem.adapter_layers(model, "tuned").values():
                adapter.lora_b.normal_(std=0.05)
    lowmem.save_adapter(model, tmp_path / "start", format="peft")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    files = read_data_files(tmp_path / "pairs.jsonl")
    encoded = encode_rows(files, TextTokenizer(tokenizer), RowOptions(preferences=True), encode_preference)
    rows = PreferenceRows.of(model, encoded.texts(64, "pairs").examples, 64, 258)
    rows.beta = 0.2
    seen: list[lowmem.Step] = []
    settings = lowmem.FineTuning(steps=steps, batch_size=batch, lr=3e-3, decay="none", clip=1.0)
    lowmem.prepare_training(model)
    lowmem.finetune(model, rows, settings, watch=seen.append)

    order = ShuffledRowOrder(len(PAIRS), batch, 0, steps * batch)
    ordered = [PAIRS[index] for step in range(steps) for index in order.row_indices(step)]
    theirs = peft.PeftModel.from_pretrained(stored(folder), tmp_path / "start", is_trainable=True)
    arguments = DPOConfig(
        str(tmp_path / "trl"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        beta=0.2,
        bf16=False,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    run = DPOTrainer(theirs, args=arguments, train_dataset=Dataset.from_list(ordered), processing_class=tokenizer)
    run.train()
    # AdamW's first steps divide gradients by their own size, which enlarges rounding: 1e-3 of the largest figures
    for own, name in ((lambda step: step.loss, "loss"), (lambda step: step.metrics["margin"], "rewards/margins")):
        torch.testing.assert_close([own(step) for step in seen], logged(run, name), rtol=1e-3, atol=1e-3)
    # In the first step margins are 0 but for rounding
    assert [step.metrics["accuracy"] for step in seen[1:]] == logged(run, "rewards/accuracies")[1:]
    assert seen[-1].metrics["margin"] > 0.1
