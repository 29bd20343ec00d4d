"""``lowmem fit`` of variants and factories: trains them with a float32 linear head on their output."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from rich.progress import MofNCompleteColumn, TimeRemainingColumn
from torch import Tensor, nn

from lowmem import measure
from lowmem.finetuning.settings import LARGEST_LR
from lowmem.finetuning.training_state import forked_rng
from lowmem.io.checkpoint import specs_metadata_and_tensors
from lowmem.io.filesystem import check_outside_inputs, check_writable, write_atomically
from lowmem.io.lowmem_file import write_stream_returning_digest
from lowmem.tools.arguments import select_local_rank_device
from lowmem.tools.fit_classifier_data import TrainTestSplit, load_train_test_split
from lowmem.tools.named_models import (
    build_or_load_named_model,
    call_and_check_tensor,
    exceptions_as_value_error,
    factory_and_techniques,
    plan_or_raise_value_error,
)
from lowmem.tools.output import mib_text, print_json, print_memory_plan, print_saved_path_to_stderr, progress_display
from lowmem.transforms.memory_plan import (
    Plan,
    convert_on_meta_and_count_bytes,
    fake_args_and_kwargs,
    make_fake_and_measure_run,
    permanently_on_fake_tensors,
    plan_from_figures,
)
from lowmem.version import __version__

DEFAULTS = {"data": "synthetic", "epochs": 10, "batch_size": 64, "lr": 1e-3, "seed": 0}


class Classifier(nn.Module):
    """Any model with a float32 linear head on its flattened output."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (examples, classes)."""
        logits: Tensor = self.head(self.body(x).flatten(1).float())
        return logits


@dataclass
class ClassifierResult:
    """The result of a run."""

    variant: str
    epochs: int
    losses: list[float]  # the mean of each epoch
    train_accuracy: float  # of the batches of the last epoch, each before its step
    test_accuracy: float
    peak_bytes: int  # of the first training step beyond model and input, optimizer included
    seconds_per_step: float


def run(arguments: argparse.Namespace) -> int:
    """Run the command, for arguments whose defaults are set."""
    device = select_local_rank_device(arguments.device)
    if arguments.save is not None and not arguments.dry_run:
        check_outside_inputs(arguments.save, {"--data": Path(arguments.data)}, "--save")
        # Before the training, not after it
        check_writable(arguments.save)
        check_writable(head_file_path(arguments.save))
    data = load_train_test_split(arguments.data, arguments.seed)
    name = arguments.model
    if ":" not in name:  # BigNet takes (examples, features)
        data = TrainTestSplit(
            data.train_x.flatten(1), data.train_y, data.test_x.flatten(1), data.test_y, data.classes
        )
    if arguments.dry_run:
        planned = lambda: plan_classifier_training(name, data, rank=arguments.rank, batch_size=arguments.batch_size)  # noqa: E731
        memory_plan = plan_or_raise_value_error(name, planned, is_user_input=True)
        if arguments.json:
            print_json({"variant": name} | memory_plan.as_json())
        else:
            print_memory_plan(name, memory_plan)
        return 0
    data = data.to(device)
    body = build_or_load_named_model(name, seed=arguments.seed, rank=arguments.rank)
    # Where models are made
    if device.type != "cpu":
        with exceptions_as_value_error(f"model={name!r} cannot be moved to {device}"):
            body = body.to(device)
    with torch.no_grad(), forked_rng(device):
        torch.manual_seed(arguments.seed)
        features = _flattened_output_features(name, body, data.train_x[:2])
        model = Classifier(body, features, data.classes)
        model.head.to(device)
    if arguments.save is not None:
        with exceptions_as_value_error(f"model={name!r} has a state that cannot be saved; leave out --save"):
            # Before the training, not after it
            specs_metadata_and_tensors(body)
    with forked_rng(device):
        # For dropout
        torch.manual_seed(arguments.seed)
        result = train_classifier(
            model,
            data,
            variant=name,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            seed=arguments.seed,
            print_epoch_line=lambda line: print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True),
        )
    if arguments.save is not None:
        options = ("model", "data", "epochs", "batch_size", "lr", "rank", "seed", "device")
        origin = {"version": __version__, **{option: getattr(arguments, option) for option in options}}
        with exceptions_as_value_error(f"model={name!r} has a state that can no longer be saved; leave out --save"):
            content = specs_metadata_and_tensors(model.body)
        # A single entry: safetensors writes several in an order that differs from run to run.
        head = safetensors.torch.save(dict(model.head.state_dict()), {"lowmem": json.dumps(origin)})
        write_atomically(head_file_path(arguments.save), head)
        write_stream_returning_digest(arguments.save, *content)
        print_saved_path_to_stderr(arguments.save)
    if arguments.json:
        print_json(asdict(result))
    else:
        print(f"peak memory of a step: {mib_text(result.peak_bytes)} MiB beyond the model and its input")
        print(f"time of a step: {result.seconds_per_step:.3f} s")
    return 0


def plan_classifier_training(model_name: str, data: TrainTestSplit, *, rank: int | None, batch_size: int) -> Plan:
    """Return the memory that ``fit`` takes for the model called ``model_name``, whose weights are not allocated."""
    factory, techniques = factory_and_techniques(model_name, rank)
    body = convert_on_meta_and_count_bytes(factory, techniques)
    x, y = data.train_x[:batch_size], data.train_y[:batch_size]
    with permanently_on_fake_tensors(body.model):
        inputs, _ = fake_args_and_kwargs(x[:2])
        features = _flattened_output_features(model_name, body.model, *inputs)
    with torch.device("meta"):
        model = Classifier(body.model, features, data.classes)
    head = measure.theoretical_bytes(model.head)
    whole = replace(
        body, model=model, dense=body.dense + head, load=body.load + head, conversion=body.conversion + head
    )
    loss = lambda logits: nn.functional.cross_entropy(logits, y)  # noqa: E731
    return plan_from_figures(whole, "adamw", make_fake_and_measure_run(whole.model, x, "adamw", loss))


def _flattened_output_features(model_name: str, body: nn.Module, x: Tensor) -> int:
    """Return the number of values in a model's output for one example."""
    output = call_and_check_tensor(model_name, "fit", lambda: body.eval()(x), is_user_input=True)
    if output.dim() < 2 or len(output) != len(x) or output.numel() == 0 or output.is_complex():
        raise ValueError(
            f"model={model_name!r} returns {output.dtype} of shape {tuple(output.shape)} for {len(x)} examples; "
            "fit takes models that return real numbers (examples, features, ...)"
        )
    return output[0].numel()


def head_file_path(model_path: Path) -> Path:
    """Return the file of the head that belongs to the file of a model."""
    return model_path.with_name(f"{model_path.stem}.head{model_path.suffix}")


def train_classifier(
    model: Classifier,
    data: TrainTestSplit,
    *,
    variant: str,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    print_epoch_line: Callable[[str], None],
) -> ClassifierResult:
    """Train with AdamW and cross entropy; call ``print_epoch_line`` with a line for each epoch.

    Raises:
        ValueError: ``lr`` is too large for float32, the loss or a weight is no longer finite, or the model fails.
    """
    if lr > LARGEST_LR:
        raise ValueError(
            f"--lr={lr:g} is above {LARGEST_LR:.1e}, where AdamW's first step overflows float32: lower it"
        )
    failed = f"model={variant!r} cannot be trained on this data"
    with exceptions_as_value_error(failed):
        finite = _finite_tensor_names(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    generator = torch.Generator("cpu").manual_seed(seed)
    examples = len(data.train_x)
    result = ClassifierResult(variant, epochs, [], 0.0, 0.0, 0, 0.0)
    seconds: list[float] = []

    def train_step_loss_and_correct(x: Tensor, y: Tensor) -> tuple[float, int]:
        optimizer.zero_grad(set_to_none=True)
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return loss.item(), int((logits.argmax(1) == y).sum())

    steps = epochs * math.ceil(examples / batch_size)
    with progress_display(variant, MofNCompleteColumn, "steps", TimeRemainingColumn, total=steps) as update:
        for epoch in range(1, epochs + 1):
            model.train()
            outcomes: list[tuple[float, int]] = []
            batches = torch.randperm(examples, generator=generator, dtype=torch.int64, device="cpu").split(batch_size)
            for rows in batches:
                x, y = data.train_x[rows], data.train_y[rows]
                started = time.perf_counter()
                memory = nullcontext() if seconds else measure.PeakMemory()
                with exceptions_as_value_error(failed), memory:
                    outcomes.append(train_step_loss_and_correct(x, y))
                if isinstance(memory, measure.PeakMemory):
                    result.peak_bytes = memory.peak
                seconds.append(time.perf_counter() - started)
                if not math.isfinite(outcomes[-1][0]):
                    raise ValueError(f"the loss is {outcomes[-1][0]} in epoch {epoch}: lower --lr={lr:g}")
                update(advance=1)
            result.losses.append(
                sum(loss * len(rows) for (loss, _), rows in zip(outcomes, batches, strict=True)) / examples
            )
            result.train_accuracy = sum(correct for _, correct in outcomes) / examples
            # After the last step no loss shows it
            if lost := finite - _finite_tensor_names(model):
                raise ValueError(f"{min(lost)!r} is no longer finite in epoch {epoch}: lower --lr={lr:g}")
            with exceptions_as_value_error(failed):
                result.test_accuracy = accuracy(model, data.test_x, data.test_y, batch_size)
            print_epoch_line(
                f"epoch {epoch}/{epochs}  loss {result.losses[-1]:.4f}  "
                f"train accuracy {result.train_accuracy:.1%}  test accuracy {result.test_accuracy:.1%}"
            )
    # The first step is slower, since its memory is tracked
    timed = seconds[1:] or seconds
    result.seconds_per_step = sum(timed) / len(timed)
    return result


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    """Return the fraction of examples whose class has the largest logit."""
    model.eval()
    with torch.no_grad():
        batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return sum(int((model(part).argmax(1) == label).sum()) for part, label in batches) / len(y)


def _finite_tensor_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers whose values are all finite (a mask may hold infinities)."""
    state = (*model.named_parameters(), *model.named_buffers())
    return {
        name
        for name, value in state
        if (value.is_floating_point() or value.is_complex()) and bool(value.isfinite().all())
    }
