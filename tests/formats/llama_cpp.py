"""llama.cpp itself, by the package llama-cpp-py-sync: logits of all positions, and tokens of a text; no sampler.

Keys and values are cached in float32, so that a float32 model is computed in float32 throughout. Tokens are computed
one after the other: for several at a time, some processors have kernels that round activations in another way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_QUIET: list[Any] = []


class LlamaCpp:
    """A loaded file."""

    def __init__(self, path: Path, context: int = 256) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        if not _QUIET:  # for good: llama.cpp calls it as long as the process lives
            _QUIET.append(self.ffi.callback("ggml_log_callback", lambda level, text, data: None))
            self.lib.llama_log_set(_QUIET[0], self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if self.model == self.ffi.NULL:
            raise ValueError(f"llama.cpp cannot load {path}")
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0  # float32
        settings.flash_attn_type = 0
        self.context = self.lib.llama_init_from_model(self.model, settings)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.adapters: list[Any] = []

    def adapt(self, path: Path, scale: float = 1.0) -> None:
        """Apply a LoRA file."""
        adapter = self.lib.llama_adapter_lora_init(self.model, str(path).encode())
        if adapter == self.ffi.NULL:
            raise ValueError(f"llama.cpp cannot load {path}")
        adapters = self.ffi.new("struct llama_adapter_lora *[]", [adapter])
        assert self.lib.llama_set_adapters_lora(self.context, adapters, 1, self.ffi.new("float[]", [scale])) == 0

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits behind each token, float32 (tokens, vocabulary)."""
        lib, rows = self.lib, []
        width = lib.llama_vocab_n_tokens(self.vocab)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        for token in tokens:
            batch = lib.llama_batch_get_one(self.ffi.new("llama_token[]", [token]), 1)
            assert lib.llama_decode(self.context, batch) == 0
            values = self.ffi.buffer(lib.llama_get_logits_ith(self.context, -1), width * 4)
            rows.append(torch.frombuffer(bytearray(values), dtype=torch.float32))
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
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """Load a file for the block."""
    loaded = LlamaCpp(path)
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
