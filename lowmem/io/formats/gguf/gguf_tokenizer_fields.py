"""The tokenizer's fields of GGUF, from the tokenizer.json of a Hugging Face folder.

llama.cpp has two kinds of BPE. "gpt2" works on bytes that are mapped to letters, after a regular expression has cut
the text; the expression is not in the file: ``tokenizer.ggml.pre`` names one that llama.cpp knows. "llama" is that of
SentencePiece: it merges the pair whose piece has the highest score. tokenizer.json has no scores; the rank of the
first merge that makes a piece orders them alike, since that is how its merges were made of the scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowmem.errors import file_error, short_repr
from lowmem.io.formats.gguf.gguf_file import GGUFValue
from lowmem.io.model_folder import read_json_object
from lowmem.io.safetensors_header import check_size_and_read_file

MAX_BYTES = 2**28  # of a tokenizer's file; one of 260,000 tokens takes 30 MB

# Types of tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_REMEDY = "take the fields of an existing GGUF file of the model with --like"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS = MappingProxyType(
    {
        (_LLAMA3, True): "llama-bpe",
        (_LLAMA3, False): "dbrx",
        (_QWEN2, False): "qwen2",
        (_TEKKEN, True): "tekken",
        (_GPT2, False): "gpt-2",
        ("digits", _GPT2, False): "smollm",
    }
)
"""What llama.cpp calls the expressions that cut a text, and whether a word that is a token is taken as it is."""


def tokenizer_and_chat_template_fields(
    folder: Path, config: Mapping[str, Any], embedding_rows: int
) -> dict[str, GGUFValue]:
    """Return the fields of the tokenizer in a folder of ``save_pretrained``, none where there is no tokenizer.

    Args:
        folder: of the model.
        config: of the model, which names the ends of a text where the tokenizer's own files do not.
        embedding_rows: of the embedding: as many tokens are written, the last ones as unused.

    Raises:
        FileError: a file is damaged, or a tokenizer that llama.cpp does not have, or that lowmem does not know.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        for old in ("tokenizer.model", "vocab.json", "tokenizer_config.json"):
            if (folder / old).exists():
                why = f"it has {old} and no tokenizer.json: save_pretrained of AutoTokenizer's tokenizer writes one"
                raise file_error(folder, f"{why}; or {_REMEDY}", "export the tokenizer of")
        return {}
    beside = folder / "tokenizer_config.json"
    settings = (
        read_json_object(beside, MAX_BYTES, "tokenizer", _parse_json_integers_as_text) if beside.is_file() else {}
    )
    try:
        fields = _GGUFTokenizerFieldsBuilder(
            read_json_object(path, MAX_BYTES, "tokenizer"), settings, config, embedding_rows
        ).checked_gguf_fields()
    except (KeyError, TypeError, AttributeError, IndexError) as reason:
        raise file_error(path, f"it is no tokenizer that lowmem knows ({reason!r}); {_REMEDY}", "export") from None
    except ValueError as reason:
        raise file_error(path, f"{reason}; {_REMEDY}", "export") from None
    jinja = folder / "chat_template.jinja"
    template = settings.get("chat_template") or (_read_utf8_text(jinja) if jinja.is_file() else None)
    if isinstance(template, list):
        named = [template_entry for template_entry in template if isinstance(template_entry, dict)]
        template = next(
            (template_entry.get("template") for template_entry in named if template_entry.get("name") == "default"),
            None,
        )
    return {**fields, "tokenizer.chat_template": template} if isinstance(template, str) and template else fields


def _read_utf8_text(path: Path) -> str:
    try:
        return check_size_and_read_file(path, MAX_BYTES, "tokenizer").decode()
    except UnicodeDecodeError:
        raise file_error(path, "it is no UTF-8; get it again") from None


def _parse_json_integers_as_text(text: bytes) -> Any:
    """Parse JSON whose numbers are not read: ``model_max_length`` is often one of 31 digits."""
    return json.loads(text, parse_int=str)


class _GGUFTokenizerFieldsBuilder:
    """The content of tokenizer.json."""

    def __init__(
        self, content: dict[str, Any], settings: dict[str, Any], config: Mapping[str, Any], embedding_rows: int
    ) -> None:
        self.content, self.settings, self.config = content, settings, config
        self.model: dict[str, Any] = content["model"]
        self.added: list[dict[str, Any]] = content.get("added_tokens") or []
        self.tokens, self.unused = self._checked_tokens_and_unused_rows(embedding_rows)

    def _checked_tokens_and_unused_rows(self, embedding_rows: int) -> tuple[list[str], set[int]]:
        """Return the token of each row of the embedding, and the unused rows, whose tokens get names of their own."""
        vocab = self.model["vocab"]
        if not isinstance(vocab, dict):
            raise ValueError(f"its model is {short_repr(self.model.get('type'))}, and no BPE")
        by_id = {number: token for token, number in vocab.items()}
        by_id |= {added_token["id"]: added_token["content"] for added_token in self.added}
        least, most = min(by_id), max(by_id)
        if least < 0 or most >= embedding_rows or not all(type(number) is int for number in by_id):
            raise ValueError(f"it has a token {short_repr(most)}, and the model has {embedding_rows}")
        tokens = [by_id.get(number, f"[PAD{number}]") for number in range(embedding_rows)]
        if len(set(tokens)) != embedding_rows:
            raise ValueError("it has two tokens of one text")
        return tokens, set(range(embedding_rows)) - by_id.keys()

    def checked_gguf_fields(self) -> dict[str, GGUFValue]:
        if self.model.get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {short_repr(self.model['type'])}, and no BPE")
        if self.model.get("dropout"):
            raise ValueError(f"dropout={short_repr(self.model['dropout'])} of its merges is not what llama.cpp has")
        model_fields = (
            self._sentencepiece_bpe_fields() if self.model.get("byte_fallback") else self._byte_level_bpe_fields()
        )
        return {**model_fields, **self._special_token_ids_and_add_flags()}

    def _token_types(self) -> list[int]:
        special = {
            added_token["id"]: CONTROL if added_token.get("special") else USER_DEFINED for added_token in self.added
        }
        unknown = self.model.get("unk_token")
        types = []
        for number, token in enumerate(self.tokens):
            kind = UNUSED if number in self.unused else special.get(number, NORMAL)
            if self.model.get("byte_fallback"):
                kind = BYTE if _BYTE.fullmatch(token) else UNKNOWN if token == unknown else kind
            types.append(kind)
        return types

    def _checked_merge_pairs(self) -> list[tuple[str, str]]:
        merges = self.model["merges"]
        pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
        if not all(len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str) for pair in pairs):
            raise ValueError("its merges are no pairs of texts")
        return pairs  # type: ignore[return-value]

    def _byte_level_bpe_fields(self) -> dict[str, GGUFValue]:
        """The fields of a BPE of bytes."""
        normalizer = self.content.get("normalizer")
        pre = PRE_TOKENIZERS.get((*self._pre_tokenizer_patterns(), bool(self.model.get("ignore_merges"))))
        if pre is None:
            raise ValueError(
                "lowmem does not know what llama.cpp calls its pre_tokenizer "
                f"{short_repr(self._pre_tokenizer_patterns())}"
            )
        if normalizer is not None and (pre, normalizer.get("type")) != ("qwen2", "NFC"):
            raise ValueError(f"its normalizer {short_repr(normalizer)} is not what llama.cpp has")
        merges = self._checked_merge_pairs()
        if any(" " in part for pair in merges for part in pair):
            raise ValueError("its merges have spaces in them")
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self._token_types(),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        }

    def _pre_tokenizer_patterns(self) -> tuple[str, ...]:
        """Return how the text is cut: regular expressions, or "digits" for each digit on its own."""
        steps = self.content["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        cuts: list[str] = []
        for step in steps:
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
                cuts.append(step["pattern"]["Regex"])
            elif step["type"] == "Digits" and step["individual_digits"]:
                cuts.append("digits")
            elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
                cuts += [_GPT2] if step.get("use_regex", True) else []
            else:
                cuts.append(short_repr(step))
        if steps[-1]["type"] != "ByteLevel":
            raise ValueError("its pre_tokenizer maps no bytes")
        return tuple(cuts)

    def _sentencepiece_bpe_fields(self) -> dict[str, GGUFValue]:
        """The fields of a BPE of SentencePiece."""
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(self._checked_merge_pairs()):
            ranks.setdefault("".join(pair), rank)
        last = float(len(ranks))
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.scores": [-float(ranks.get(token, last)) for token in self.tokens],
            "tokenizer.ggml.token_type": self._token_types(),
            "tokenizer.ggml.add_space_prefix": self._has_space_prefix_or_raise(),
        }

    def _has_space_prefix_or_raise(self) -> bool:
        """Whether a space comes before each text."""
        normalizer, step = self.content.get("normalizer"), self.content.get("pre_tokenizer")
        if step is not None and step["type"] == "Split" and step["pattern"] == {"String": " "} and normalizer:
            step = None  # of Gemma: the normalizer leaves no space to split at
        steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
        kinds = [normalizer_step["type"] for normalizer_step in steps]
        if step is None and kinds in (["Prepend", "Replace"], ["Replace"]) and steps[-1]["content"] == _SPACE:
            return bool(kinds[0] == "Prepend")
        if normalizer is None and step is not None and step["type"] == "Metaspace" and step["replacement"] == _SPACE:
            if step.get("split", True):
                raise ValueError("its pre_tokenizer splits words, which SentencePiece does not")
            return bool(step.get("prepend_scheme", "always") != "never")
        raise ValueError(
            f"lowmem does not know its normalizer {short_repr(normalizer)} and pre_tokenizer {short_repr(step)}"
        )

    def _special_token_ids_and_add_flags(self) -> dict[str, GGUFValue]:
        """The fields of the tokens at the ends of a text, and of others with a meaning."""
        ids = {token: number for number, token in enumerate(self.tokens)}
        fields: dict[str, GGUFValue] = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = self._special_token_text_or_none(name)
            number = ids.get(token) if isinstance(token, str) else self.config.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if type(number) is int and 0 <= number < len(self.tokens):
                fields[f"tokenizer.ggml.{key}_token_id"] = number
        first, last = self._add_bos_and_add_eos_flags()
        return {**fields, "tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}

    def _special_token_text_or_none(self, role: str) -> str | None:
        """Return the text of a token with a meaning, such as "bos", where the tokenizer's settings have it."""
        token = self.settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def _add_bos_and_add_eos_flags(self) -> tuple[bool, bool]:
        """Return whether the tokenizer puts a token before, and one behind, each text."""
        step = self.content.get("post_processor")
        steps = [] if step is None else step.get("processors", [step])
        for processor in steps:
            if processor["type"] == "TemplateProcessing":
                added = [
                    part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in processor["single"]
                ]
                bos, eos = (self._special_token_text_or_none(name) for name in ("bos", "eos"))
                for first, last in product((False, True), repeat=2):
                    known = None not in (bos, eos)[1 - first : 1 + last]
                    if known and added == [bos] * first + [None] + [eos] * last:
                        return first, last
                raise ValueError(f"its post_processor adds {short_repr(added)} to a text, which are not its ends")
            if processor["type"] != "ByteLevel":
                raise ValueError(f"its post_processor {short_repr(processor['type'])} is not what llama.cpp has")
        return False, False


_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
