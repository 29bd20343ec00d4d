"""``lowmem generate``: lets a language model continue a text or answer in a chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from lowmem.finetuning.metrics import process_peak_bytes_or_none
from lowmem.inference.prepare_inference import prepare_inference
from lowmem.io.hub_names import displayed_model_name
from lowmem.io.remote_code import has_trust_remote_code_in_text
from lowmem.io.training_record import RECORD_FILE
from lowmem.tools.arguments import (
    THREADS_EPILOG,
    add_device_argument,
    option_string,
    parse_nonnegative_float,
    parse_nonnegative_int,
    parse_positive_int,
    select_local_rank_device,
)
from lowmem.tools.chat_arguments import (
    NO_TEMPLATE,
    add_chat_arguments,
    apply_chat_arguments,
    read_recorded_chat_settings,
)
from lowmem.tools.command_exit import INTERRUPTED
from lowmem.tools.compute_argument import add_compute_argument, print_compute_cost, set_compute_dtype
from lowmem.tools.hub_arguments import add_revision_argument, fetch_base, fetch_model, parse_model_path
from lowmem.tools.output import progress_display, tokens_per_second_text, warnings_printed_as_notes

if TYPE_CHECKING:
    from lowmem.integrations.transformers.text_generation import TokenTimingStreamer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = THREADS_EPILOG
    parser.add_argument(
        "model",
        type=parse_model_path,
        metavar="MODEL",
        help="a folder of a model or an adapter, or the name of one on the Hub; a GGUF file, or an adapter's file",
    )
    add_revision_argument(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text to continue (default: standard input)")
    what.add_argument(
        "--chat", action="store_true", help="answer each line of standard input, by the tokenizer's chat template"
    )
    parser.add_argument(
        "--base", type=parse_model_path, metavar="MODEL", help="the base of an adapter (default: what it names)"
    )
    parser.add_argument("--adapter", metavar="NAME", help="the adapter to use, of a model with several")
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="for --chat: answer each line as the first of a conversation (default: all lines are of one)",
    )
    add_chat_arguments(
        parser.add_argument_group("of --chat; default: as the adapter was trained"),
        "a chat template in place of the tokenizer's",
    )
    parser.add_argument(
        "--dense-base",
        action="store_true",
        help="leave an adapter's dense base dense (default: store it as lowmem fit stored it for training)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=parse_positive_int,
        default=256,
        metavar="N",
        help="the most tokens of a text (default 256)",
    )
    parser.add_argument(
        "--temperature",
        type=parse_nonnegative_float,
        metavar="T",
        help="of sampling; 0 takes the likeliest token (default: the model's)",
    )
    parser.add_argument(
        "--top-p", type=_parse_probability, metavar="P", help="sample of the likeliest tokens with this probability"
    )
    parser.add_argument(
        "--cache-bits", type=int, choices=[8], metavar="8", help="keep keys and values of earlier tokens in 8 bits"
    )
    add_compute_argument(parser)
    parser.add_argument("--seed", type=parse_nonnegative_int, default=0, metavar="N", help="of sampling (default 0)")
    add_device_argument(parser, "where the model runs")


def _parse_probability(text: str) -> float:
    value = parse_nonnegative_float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    device = select_local_rank_device(arguments.device)
    if arguments.prompt is None and not arguments.chat and sys.stdin.isatty():
        raise ValueError("there is no prompt: give --prompt TEXT or --chat, or write it to standard input")
    from lowmem.integrations.transformers.model_facts import delayed_transformers_log
    from lowmem.integrations.transformers.text_generation import end_token_ids, open_model_and_tokenizer

    for name in ("no_history", "system", "chat_template", "template_kwargs"):
        if getattr(arguments, name) not in (None, False) and not arguments.chat:
            raise ValueError(f"{option_string(name)} applies to --chat: add it, or leave the option out")
    if arguments.chat_template == NO_TEMPLATE:
        raise ValueError(f"--chat-template={NO_TEMPLATE}: --chat needs a template: give --prompt in its place")
    arguments.model = fetch_model(arguments.model, arguments.revision)
    shown_name = f"open {displayed_model_name(arguments.model)}"
    base = None if arguments.base is None else fetch_model(arguments.base, argument="--base")
    recorded = read_recorded_chat_settings(arguments.model, RECORD_FILE)
    with (
        delayed_transformers_log(),
        warnings_printed_as_notes(),
        progress_display(shown_name, MofNCompleteColumn, TimeRemainingColumn) as update,
    ):
        model, tokenizer = open_model_and_tokenizer(
            arguments.model,
            base,
            arguments.adapter,
            dense_base=arguments.dense_base,
            fetch_base=fetch_base,
            progress=lambda done, total: update(completed=done, total=total),
        )
        chat = apply_chat_arguments(arguments, tokenizer, recorded)
        ends = end_token_ids(model.generation_config, tokenizer, arguments.chat, chat.template_kwargs)
    if arguments.compute is not None:
        set_compute_dtype(model, arguments.compute)
        print_compute_cost("generate", arguments.compute)
    prepare_inference(model.to(device))
    if arguments.cache_bits is not None:
        from lowmem.integrations.transformers import ATTENTION

        model.set_attn_implementation(ATTENTION)
    generator = _TextGenerator(model, tokenizer, ends, arguments, chat.template_kwargs)
    torch.manual_seed(arguments.seed)
    code = 0
    try:
        if arguments.chat:
            _answer_stdin_lines(generator, chat.system, not arguments.no_history)
        else:
            prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
            generator.stream_continuation(tokenizer(prompt, return_tensors="pt"))
    except KeyboardInterrupt:
        print(flush=True)
        code = INTERRUPTED
    generator.print_speed_and_memory()
    return code


def _answer_stdin_lines(generator: _TextGenerator, system: str | None, remembers: bool) -> None:
    """Answer each line of standard input until it ends; ``remembers``: as turns of one conversation."""
    messages = first_messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            messages = [*messages, {"role": "user", "content": line.strip()}]
            answer = {"role": "assistant", "content": generator.stream_chat_reply(messages)}
            generator.print_speed_and_memory()
            messages = [*messages, answer] if remembers else first_messages


class _TextGenerator:
    """Generates texts, and measures how fast."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        end_token_ids: Any,
        arguments: argparse.Namespace,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self._template_kwargs = template_kwargs
        self._model, self._tokenizer, self._speed = model, tokenizer, ""
        self._options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "eos_token_id": end_token_ids}
        if arguments.temperature == 0:
            self._options["do_sample"] = False
        elif arguments.temperature is not None or arguments.top_p is not None:
            sampling_options = {"temperature": arguments.temperature, "top_p": arguments.top_p}
            self._options |= {"do_sample": True} | {
                name: item for name, item in sampling_options.items() if item is not None
            }
        self._name = arguments.model
        self._cache_bits = arguments.cache_bits
        if tokenizer.pad_token_id is None:
            self._options["pad_token_id"] = end_token_ids[0] if end_token_ids else None

    def stream_chat_reply(self, messages: list[dict[str, str]]) -> str:
        """Write the answer to the messages of a chat, and return it."""
        from lowmem.integrations.transformers.text_tokenizer import TextTokenizer

        text_tokenizer = TextTokenizer(self._tokenizer, self._template_kwargs)
        text = text_tokenizer.chat_template_text(messages, add_generation_prompt=True)
        return self.stream_continuation(self._tokenizer(text, add_special_tokens=False, return_tensors="pt"))

    def stream_continuation(self, inputs: Any) -> str:
        """Write the text that follows the inputs, and return it."""
        from lowmem.integrations.transformers.text_generation import TokenTimingStreamer

        if self._cache_bits is not None:
            from lowmem.integrations.transformers import KeyValueCache

            self._options["cache"] = KeyValueCache(self._model, self._cache_bits)
        tensors = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        length = tensors["input_ids"].shape[1]
        if not length:
            raise ValueError("the prompt has no tokens: write a text to continue")
        streamer = TokenTimingStreamer(self._tokenizer)
        try:
            generated = self._model.generate(**tensors, **self._options, streamer=streamer)
        except ValueError as error:
            if has_trust_remote_code_in_text(error):  # of ways to search that transformers has moved to the Hub
                why = "how it searches is code of the Hub, and none was run: remove it, as penalty_alpha"
                raise ValueError(f"generation_config.json of {str(self._name)!r}: {why}") from error
            raise
        finally:
            self._speed = _speed_text(length, streamer)
        text: str = self._tokenizer.decode(generated[0, length:], skip_special_tokens=True)
        return text

    def print_speed_and_memory(self) -> None:
        """Print how fast the last text was, once, and what the process took; nothing if no token was written."""
        if self._speed:
            peak = process_peak_bytes_or_none(self._model.device)
            memory = "" if peak is None else f"; peak memory {peak / 2**20:.0f} MiB"
            print(f"{self._speed}{memory}", file=sys.stderr)
        self._speed = ""


def _speed_text(prompt_tokens: int, streamer: TokenTimingStreamer) -> str:
    """Return the speed of the prompt's computation and, apart, that of writing; "" if no token was written."""
    if streamer.prompt_seconds is None:
        return ""
    prompt = f"prompt of {_token_count_text(prompt_tokens)} and first new token"
    text = f"{prompt} {_seconds_and_speed_text(prompt_tokens, streamer.prompt_seconds)}"
    if not streamer.later_count:
        return text
    later = _seconds_and_speed_text(streamer.later_count, streamer.later_seconds())
    return f"{text}, {_token_count_text(streamer.later_count, 'more ')} written {later}"


def _token_count_text(count: int, adjective: str = "") -> str:
    return f"{count} {adjective}token{'s' * (count != 1)}"


def _seconds_and_speed_text(token_count: int, seconds: float) -> str:
    speed = tokens_per_second_text(token_count / max(seconds, 1e-9))
    return f"in {seconds:.2f} s ({speed} tokens a second)"
