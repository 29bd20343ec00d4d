"""An error of any origin is one line without control characters or C++ text."""

import pytest
import torch

from lowmem.errors import LIMIT, describe, one_line, reason

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "40000 bytes. Error code 12 (Cannot allocate memory)\nException raised from alloc_cpu at /x.cpp:1\nframe #0: x"
)
REMEDY = "; free memory, or take a smaller model, batch, shape or file"


class UnreadableError(Exception):
    def __str__(self):
        raise KeyError("no text")


class ExitsError(Exception):
    def __str__(self):
        raise SystemExit(3)


@pytest.mark.parametrize(
    "text", ["a\nb\r\tc", "\x1b[31mred\x1b[0m", "\u202egpj.exe", "x" * 10_000, "\ud800", "a\x00b"]
)
def test_a_line_is_one_printable_line_of_bounded_length(text):
    line = one_line(f"lowmem: {text}")
    assert line.isprintable()
    assert line.startswith("lowmem: ")
    assert len(line) <= LIMIT < 300
    assert len(one_line(text, 100)) <= LIMIT - 100


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError"),
        (SystemExit(3), "SystemExit: 3"),
        (MemoryError("Unable to allocate 7 TiB"), "out of memory"),
        (RuntimeError(ALLOCATOR), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to"),
            "OutOfMemoryError: CUDA out of memory. Tried to",
        ),
        (TypeError("bad size\nException raised from f at /x.cpp:1"), "TypeError: bad size"),
        (RuntimeError("[enforce fail at x.cpp:3] . negative size"), "RuntimeError: . negative size"),
        (UnreadableError(), "UnreadableError: its text cannot be shown: KeyError"),
        (ExitsError(), "ExitsError: its text cannot be shown: SystemExit"),
    ],
)
def test_what_was_raised_is_told_by_its_type_and_first_line(error, text):
    assert describe(error) == text


def test_a_long_text_leaves_room_for_what_comes_after_it():
    told = describe(ValueError("x" * 10_000))
    assert len(told) == 120
    assert told.startswith("ValueError: xxx")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("batch=0: take more"), "batch=0: take more"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("Symlink loop from 'x'"), "RuntimeError: Symlink loop from 'x'"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (MemoryError(), "out of memory" + REMEDY),
        (RuntimeError(ALLOCATOR), "out of memory" + REMEDY),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory." + REMEDY),
        (ValueError(f"layer: {ALLOCATOR}"), "layer: out of memory"),
        (ValueError("layer: bad\nException raised from f"), "layer: bad"),
    ],
)
def test_bad_input_is_told_in_its_own_words_and_what_torch_raises_by_its_type(error, text):
    assert reason(error) == text
