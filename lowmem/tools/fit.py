"""``lowmem fit``: fine-tunes language models in folders on text, and variants and factories as classifiers."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from lowmem.finetuning.metrics import LOGS
from lowmem.finetuning.preferences import DEFAULT_BETA
from lowmem.finetuning.settings import DECAYS, OPTIMIZERS
from lowmem.io.filesystem import exclusive_write_lock
from lowmem.io.hub_names import MODEL_KINDS, HubName, is_hub_name
from lowmem.io.training_record import KEPT_BASE, RECORD_FILE
from lowmem.quant.formats import DEFAULT, DEFAULT_BLOCK_SIZE, EIGHT_BIT, FORMATS, IMPORTED
from lowmem.tools import fit_classifier, fit_language
from lowmem.tools.arguments import (
    THREADS_EPILOG,
    add_device_argument,
    add_for_llama_cpp_argument,
    option_string,
    parse_nonempty_path,
    parse_nonnegative_float,
    parse_nonnegative_int,
    parse_positive_float,
    parse_positive_int,
)
from lowmem.tools.fit_config import take_options_of_config
from lowmem.tools.fit_data import METHODS, add_data_arguments
from lowmem.tools.fit_job import check_options
from lowmem.tools.fit_samples import parse_samples
from lowmem.tools.fit_settings import DPO_LEARNING_RATE, HELD_OUT_FROM, HELD_OUT_SHARE, MOST_HELD_OUT, WARMUP_RATIO
from lowmem.tools.hub_arguments import add_revision_argument, fetch_model
from lowmem.tools.named_models import folder_or_gguf_or_none
from lowmem.variants import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = THREADS_EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the Hugging Face FOLDER, the name on the Hub or the GGUF file of a causal language model; or a "
        "classifier: VARIANT, module:factory, or module:factory@VARIANT",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="for a folder: a file of texts, prompts with completions or conversations (.jsonl, .json, .csv, .tsv, "
        ".parquet or .txt), a folder of them, or a data set of the Hub, OWNER/NAME or OWNER/NAME:SPLIT; several are "
        "mixed; for a classifier: FILE.npz with x (examples, ...) and y (classes from 0), synthetic, or digits from "
        "scikit-learn (default synthetic)",
    )
    parser.add_argument(
        "--epochs", type=parse_positive_int, metavar="N", help="default: 1 for a folder, 10 for a classifier"
    )
    parser.add_argument(
        "--batch-size",
        type=parse_positive_int,
        metavar="N",
        help="rows at a time (default: for a folder those of about 8 examples, at most 4, which --accumulate makes "
        "up for; 64 for a classifier)",
    )
    parser.add_argument(
        "--lr",
        "--learning-rate",
        type=parse_positive_float,
        help="learning rate (default: 0.001 for a classifier; for a folder by the rank, 0.0002 for 16, and "
        f"{DPO_LEARNING_RATE:g} with --method dpo)",
    )
    parser.add_argument(
        "--rank",
        "--lora-r",
        type=parse_positive_int,
        metavar="N",
        help="LoRA rank (default: 16 for a folder, or the variant's)",
    )
    parser.add_argument(
        "--seed",
        type=parse_nonnegative_int,
        metavar="N",
        help="seed of weights, split and batches (default 0)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the memory that training takes; train and write nothing"
    )
    parser.add_argument(
        "--save",
        "--output-dir",
        type=parse_nonempty_path,
        metavar="OUT",
        help="for a folder: write a folder with the adapter in PEFT's format, and training.json with the base and "
        "all settings; for a classifier: write the trained model, as lowmem.load reads it, and its head beside it as "
        "OUT.head.safetensors",
    )
    add_device_argument(parser, "device to train on; cuda is the first GPU, or with torchrun each process's own GPU")
    parser.set_defaults(device=None)
    parser.add_argument(
        "--config",
        type=parse_nonempty_path,
        metavar="FILE",
        help="take options that are not given from a YAML file, by their long names, or from the "
        f"{RECORD_FILE} of an earlier run",
    )
    parser.add_argument("--json", action="store_true", help="print JSON to stdout; progress goes to stderr")
    add_language_model_arguments(parser.add_argument_group("for folders only"))


def add_language_model_arguments(group: argparse._ActionsContainer) -> None:
    """Add the arguments that mean something for folders alone; without them, each is None or False."""
    group.add_argument(
        "--method",
        choices=METHODS,
        help="sft learns texts and answers; dpo learns preferences, of rows with prompt, chosen and rejected, "
        "against the model before the first step (default sft)",
    )
    group.add_argument(
        "--beta",
        type=parse_positive_float,
        metavar="X",
        help=f"for --method dpo: how strongly the model is held to the one before (default {DEFAULT_BETA:g})",
    )
    stored = group.add_mutually_exclusive_group()
    stored.add_argument(
        "--bits",
        type=parse_positive_float,
        metavar="B",
        help="store the base in this many bits per weight, such as 4.4, divided among layers by their loss",
    )
    stored.add_argument(
        "--format",
        choices=[*FORMATS, *IMPORTED, *EIGHT_BIT, "bfloat16", "float16", "dense"],
        help=f"format of the base while the adapter trains (default {DEFAULT} in blocks of "
        f"{DEFAULT_BLOCK_SIZE}; a quantized folder keeps its format)",
    )
    add_for_llama_cpp_argument(stored)
    group.add_argument(
        "--alpha", "--lora-alpha", type=parse_positive_float, metavar="X", help="LoRA's alpha (default: the rank)"
    )
    group.add_argument(
        "--dropout", type=parse_nonnegative_float, metavar="X", help="dropout of the adapter's input (default 0)"
    )
    group.add_argument(
        "--rslora",
        action="store_true",
        help="scale the adapter by alpha / sqrt(rank), and not by alpha / rank (rsLoRA)",
    )
    group.add_argument(
        "--target",
        nargs="+",
        metavar="NAME",
        help="adapt only layers of these names, such as q_proj v_proj, or paths or glob patterns of paths (default: "
        "all linear layers)",
    )
    group.add_argument(
        "--from",
        type=parse_nonempty_path,
        metavar="ADAPTER",
        help="continue from the values of an adapter, a folder or a file, in a run of its own",
    )
    add_revision_argument(group)
    group.add_argument(
        "--base-name",
        metavar="NAME",
        help="name of the base in the adapter's config, such as a name on the Hub (default: the folder's path)",
    )
    group.add_argument(
        "--keep-base",
        action="store_true",
        help=f"also write the base as it is stored for training, to OUT/{KEPT_BASE}, which generate, serve and "
        "export then open without storing it again",
    )
    group.add_argument(
        "--memory",
        choices=["fast", "lean", "plain"],
        help="mode of prepare_training: lean saves activations in 8 bits, plain prepares nothing (default fast)",
    )
    group.add_argument(
        "--anyway", action="store_true", help="train although the memory that is left does not suffice"
    )
    add_data_arguments(group)
    group.add_argument("--steps", type=parse_positive_int, metavar="N", help="number of updates, instead of --epochs")
    group.add_argument(
        "--accumulate",
        "--gradient-accumulation-steps",
        type=parse_positive_int,
        metavar="N",
        help="batches per update, each of --batch-size rows",
    )
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument("--warmup", type=parse_nonnegative_int, metavar="N", help="steps of rising learning rate")
    warmup.add_argument(
        "--warmup-ratio",
        type=parse_nonnegative_float,
        metavar="X",
        help=f"share of the steps with a rising learning rate (default {WARMUP_RATIO:g})",
    )
    group.add_argument("--decay", choices=list(DECAYS), help="decay of the learning rate (default cosine)")
    group.add_argument(
        "--clip", type=parse_nonnegative_float, metavar="X", help="clip gradients to this norm; 0: never (default 1)"
    )
    group.add_argument(
        "--weight-decay", type=parse_nonnegative_float, metavar="X", help="decoupled weight decay (default 0)"
    )
    group.add_argument(
        "--optimizer",
        choices=list(OPTIMIZERS),
        help="adamw8bit stores the moments of AdamW in 8 bits (default adamw)",
    )
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument(
        "--eval-data", type=parse_nonempty_path, metavar="FILE", help="held-out text, in a format that --data takes"
    )
    held_out.add_argument(
        "--eval-share",
        type=parse_nonnegative_float,
        metavar="X",
        help=f"hold out this share of --data, below 1; 0: none (default: from {HELD_OUT_FROM} examples on "
        f"{HELD_OUT_SHARE:g}, at most {MOST_HELD_OUT} examples)",
    )
    group.add_argument(
        "--eval-every", type=parse_positive_int, metavar="N", help="evaluate every N steps (default: only at the end)"
    )
    group.add_argument(
        "--patience",
        type=parse_positive_int,
        metavar="N",
        help="stop after N evaluations without improvement, and save the best adapter",
    )
    group.add_argument(
        "--compare-dense",
        action="store_true",
        help="measure the perplexity of the dense model, too, which then has to fit",
    )
    group.add_argument("--skip-dense", action="store_true", help="has no effect: only --compare-dense measures it")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the state in OUT.training, bit for bit; without a state, start",
    )
    group.add_argument(
        "--keep",
        type=parse_positive_int,
        metavar="N",
        help="keep the adapters of N moments between the first and the last step, as OUT/checkpoints/step-N, which "
        "generate opens",
    )
    group.add_argument(
        "--samples",
        type=parse_samples,
        metavar="N|FILE",
        help="write answers to the prompts of N held-out examples, or of those in FILE, into the model card: before "
        "the first step, at the moments of --keep or in the middle, and after the last step",
    )
    group.add_argument(
        "--save-every", type=parse_positive_int, metavar="N", help="steps between saved states (default 50)"
    )
    together = group.add_mutually_exclusive_group()
    together.add_argument(
        "--shard",
        action="store_true",
        help="with torchrun: each process has a part of the model (FSDP2)",
    )
    together.add_argument(
        "--replicate",
        action="store_true",
        help="with torchrun: each process has the whole model (DistributedDataParallel)",
    )
    group.add_argument(
        "--timeout",
        type=parse_positive_float,
        metavar="SECONDS",
        help="with torchrun: how long a process waits for the others; must exceed loading and saving (default 600)",
    )
    group.add_argument(
        "--metrics", type=parse_nonempty_path, metavar="FILE.jsonl", help="write a JSON line for each step"
    )
    group.add_argument(
        "--log",
        "--report-to",
        choices=list(LOGS),
        help="write the metrics of each step into OUT.log, in this tool's form",
    )
    group.add_argument(
        "--plot", type=parse_nonempty_path, metavar="FILE.png", help="plot the losses (needs matplotlib)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    arguments.configured_run = None if arguments.config is None else take_options_of_config(arguments, add_arguments)
    arguments.device = arguments.device or "cpu"
    if arguments.dry_run and arguments.device != "cpu":
        raise ValueError(f"--dry-run measures a step on the CPU: leave --device={arguments.device} out")
    base = folder_or_gguf_or_none(arguments.model)
    if base is not None or is_hub_name(arguments.model):
        check_options(arguments)
        model = HubName(arguments.model) if base is None else base
        # Examples are shown by the tokenizer alone
        base = fetch_model(model, arguments.revision, weights=arguments.show is None)
        return fit_language.run(arguments, base)
    if ":" not in arguments.model and arguments.model not in VARIANTS:
        raise ValueError(
            f"model={arguments.model!r} is neither an existing folder nor a variant ({', '.join(VARIANTS)}): name "
            f"{MODEL_KINDS}, or module:factory"
        )
    if arguments.configured_run is not None:
        raise ValueError(
            f"--config={arguments.config} has the settings of a language model, and model={arguments.model!r} is none"
        )
    for_folders = argparse.ArgumentParser()
    add_language_model_arguments(for_folders)
    for name, default in vars(for_folders.parse_args([])).items():
        if getattr(arguments, name) != default:
            raise ValueError(
                f"{option_string(name)} does not apply to model={arguments.model!r}, which is not the folder of a "
                "language model: leave it out"
            )
    if arguments.data is not None and len(arguments.data) > 1:
        raise ValueError(f"--data={arguments.data[1]} is a second one, and a classifier takes one: leave it out")
    arguments.data = arguments.data and arguments.data[0]
    for name, value in fit_classifier.DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    with nullcontext() if arguments.dry_run or arguments.save is None else exclusive_write_lock(arguments.save):
        return fit_classifier.run(arguments)
