"""llama.cpp itself, by the package llama-cpp-py-sync: logits of all positions, and tokens of a text; no sampler."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_QUIET: list[Any] = []
EXACT = {
    **{"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, "n_threads": 1, "n_threads_batch": 1},
    **{"type_k": 0, "type_v": 0, "flash_attn_type": 0},
}
"""Settings of a context that computes a float32 model in float32 throughout: keys and values are float32, too."""


class LlamaCpp:
    """A loaded file, and a context of it with llama.cpp's own settings, but for those that are given."""

    def __init__(self, path: Path, settings: Mapping[str, int]) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        if not _QUIET:  # for good: llama.cpp calls it as long as the process lives
            _QUIET.append(self.ffi.callback("ggml_log_callback", lambda level, text, data: None))
            self.lib.llama_log_set(_QUIET[0], self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if self.model == self.ffi.NULL:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.context = self._context(settings)

    def _context(self, settings: Mapping[str, int]) -> Any:
        given = self.lib.llama_context_default_params()
        for name, value in settings.items():
            setattr(given, name, value)
        return self.lib.llama_init_from_model(self.model, given)

    def set_up(self, settings: Mapping[str, int]) -> None:
        """Go on in a new context."""
        self.lib.llama_free(self.context)
        self.context = self._context(settings)

    def clear(self) -> None:
        """Forget all tokens."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, tokens: Sequence[int]) -> None:
        """Compute the next tokens of the first sequence."""
        given = self.ffi.new("llama_token[]", list(tokens))
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(given, len(tokens))) == 0

    def last_logits(self, row: int = -1) -> Tensor:
        """Return the logits that were computed last, float32 (vocabulary,); in a batch, those of a row."""
        nbytes = self.lib.llama_vocab_n_tokens(self.vocab) * 4
        values = self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, row), nbytes)
        return torch.frombuffer(bytearray(values), dtype=torch.float32)

    def adapt(self, path: Path, scale: float = 1.0) -> None:
        """Apply a LoRA file."""
        adapter = self.lib.llama_adapter_lora_init(self.model, str(path).encode())
        if adapter == self.ffi.NULL:
            raise ValueError(f"llama.cpp cannot load {path}")
        adapters = self.ffi.new("struct llama_adapter_lora *[]", [adapter])
        assert self.lib.llama_set_adapters_lora(self.context, adapters, 1, self.ffi.new("float[]", [scale])) == 0

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits behind each token, float32 (tokens, vocabulary).

        Tokens are computed one after the other: for several at a time, some processors have kernels that round
        activations in another way.
        """
        rows = []
        self.clear()
        for token in tokens:
            self.decode([token])
            rows.append(self.last_logits())
        return torch.stack(rows)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the tokens with ``count`` more, each the most likely one."""
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens

    def tokens(self, text: str, ends: bool = True, special: bool = True) -> list[int]:
        """Return the tokens of a text: with those at its ends, and with tokens that have a meaning read from it."""
        content = text.encode()
        room = len(content) + 16
        found = self.ffi.new(f"llama_token[{room}]")
        count = self.lib.llama_tokenize(self.vocab, content, len(content), found, room, ends, special)
        return [found[at] for at in range(count)]

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


@contextmanager
def llama_cpp(path: Path, settings: Mapping[str, int] = EXACT) -> Iterator[LlamaCpp]:
    """Load a file for the block."""
    loaded = LlamaCpp(path, settings)
    try:
        yield loaded
    finally:
        loaded.close()


def quantize_model(source: Path, target: Path, kind: int) -> None:
    """Write a file as llama.cpp's own quantizer does; ``kind`` is a number of ``llama_ftype``."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    settings = get_ffi().new("llama_model_quantize_params *", get_lib().llama_model_quantize_default_params())
    settings.ftype, settings.nthread = kind, 1
    assert get_lib().llama_model_quantize(str(source).encode(), str(target).encode(), settings) == 0
