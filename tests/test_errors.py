"""An error of any origin is one line without control characters or C++ text."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import lowmem
from lowmem.errors import (
    LIMIT,
    FileError,
    command_error_message,
    error_type_and_first_line,
    file_error,
    model_build_failure_reason,
    printable_line,
    short_repr,
    truncated_error_line,
    unwritable_file_error,
    value_errors_as_file_errors,
)
from lowmem.quant.formats import get_format

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
    line = truncated_error_line(f"lowmem: {text}")
    assert line.isprintable()
    assert line.startswith("lowmem: ")
    assert len(line) <= LIMIT < 300
    assert len(truncated_error_line(text, 100)) <= LIMIT - 100


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 10_000), "ValueError: " + "x" * 46 + "..." + "x" * 59),
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
        (ValueError("not valid:\n  size must be 1\n  more"), "ValueError: not valid: size must be 1"),
        (UnreadableError(), "UnreadableError: its text cannot be shown: KeyError"),
        (ExitsError(), "ExitsError: its text cannot be shown: SystemExit"),
    ],
)
def test_what_was_raised_is_told_by_its_type_and_first_line(error, text):
    assert error_type_and_first_line(error) == text


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
    assert command_error_message(error) == text


@given(st.text(st.characters()), st.integers(10, 300))
@example("\x1b[2J" * 10**6, 200)
def test_printable_text_is_one_short_line_without_control_characters(text, limit):
    shown = printable_line(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    assert printable_line(shown, limit) == shown
    if text.isprintable() and len(text) <= limit:
        assert shown == text


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@example([["x" * 10**6] * 9] * 9)
def test_a_value_in_an_error_is_one_short_line(value):
    assert short_repr(value).isprintable()
    assert len(short_repr(value)) <= 200
    assert len(short_repr("x" * 10**6)) <= 100
    assert short_repr("\x1b[2J") == "'\\x1b[2J'"


@given(st.text(st.characters()))
def test_the_error_that_refuses_a_file_is_one_short_line(reason):
    error = file_error(Path("a\nb"), reason, "load")
    assert isinstance(error, FileError)
    assert str(error).startswith(r"cannot load 'a\nb': ")
    assert str(error).isprintable()
    assert len(str(error)) < 600


@given(st.text(st.characters()))
def test_the_error_of_a_failed_write_is_one_short_line_with_the_remedy_of_its_cause(said):
    for number, remedy in ((errno.ENOSPC, "make room on its disk"), (errno.EACCES, "choose a directory that can")):
        error = unwritable_file_error(
            "out", unwritable_file_error("out/a\nb", OSError(number, said))
        )  # first named by whoever wrote it
        assert str(error).startswith("cannot write 'out': ")
        assert f"; {remedy}" in str(error)
        assert str(error).isprintable()
        assert len(str(error)) < 600
    assert str(unwritable_file_error("a\nb", OSError())).startswith(r"cannot write 'a\nb': ")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("Größe_重み_🗝 [red]", "Größe_重み_🗝 [red]"),
        ("\x1b[2Ja\nb\r\t\0\x7f\x9b", r"\x1b[2Ja\nb\r\t\x00\x7f\x9b"),
        ("\u202egnp\u2066\u200f\ufeff", r"\u202egnp\u2066\u200f\ufeff"),
        ("\u2028\x85\ud800\U000e0041", r"\u2028\x85\ud800\U000e0041"),
        ("a" * 150 + "b" * 150, "a" * 98 + "..." + "b" * 99),
    ],
)
def test_only_what_a_terminal_may_obey_or_hide_is_escaped(text, shown):
    assert printable_line(text) == shown


def test_an_error_of_another_library_names_its_kind_and_one_of_lowmem_is_as_it_was():
    for call, told in (
        (lambda: int("x"), "transformers cannot build this model (ValueError: invalid literal for int"),
        (lambda: 1 // 0, "transformers cannot build this model (ZeroDivisionError: "),
        (lambda: get_format("nf5"), "format='nf5'"),
    ):
        with pytest.raises(Exception) as failed:  # noqa: PT011
            call()
        assert told in model_build_failure_reason(failed.value)


def test_a_value_error_of_a_block_names_the_file_and_other_errors_are_left():
    with (
        pytest.raises(FileError, match=r"^cannot load 'a': of b: why$"),
        value_errors_as_file_errors("a", "load", "of b: "),
    ):
        raise ValueError("why")
    for error in (FileError("mine"), TypeError("other"), OSError("system")):
        with pytest.raises(type(error)) as caught, value_errors_as_file_errors("a"):
            raise error
        assert caught.value is error


VALUE = 0.123456789
HOSTILE = {
    "tensor": torch.full((5000,), VALUE),
    "tensors": [torch.full((2, 3), VALUE)] * 20,
    "mapping": {"input": torch.full((2, 3), VALUE)},
    "parameter": nn.Parameter(torch.full((2, 3), VALUE)),
    "array": np.full(5000, VALUE),
    "module": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
    "stored": lowmem.quantize(torch.full((2, 64), VALUE)),
    "example": lowmem.Example(torch.full((3,), 123456789), torch.full((3,), 123456789)),
    "text": "q" * 5000,
}


def test_a_value_is_shown_short_and_tensors_by_their_shape():
    assert short_repr(HOSTILE["tensor"]) == "Tensor of shape (5000,), torch.float32"
    assert (
        short_repr(HOSTILE["tensors"][:2])
        == "[Tensor of shape (2, 3), torch.float32, Tensor of shape (2, 3), torch.float32]"
    )
    assert short_repr(HOSTILE["parameter"]) == "Parameter of shape (2, 3), torch.float32"
    assert short_repr(HOSTILE["array"]) == "ndarray of shape (5000,), float64"
    assert short_repr(HOSTILE["module"]) == "Sequential"
    assert short_repr(HOSTILE["stored"]) == "QuantizedTensor of shape (2, 64)"
    assert short_repr(HOSTILE["example"]).startswith(
        "Example(ids=Tensor of shape (3,), torch.int64, targets=Tensor of"
    )
    assert short_repr(lowmem.FourBit("nf4", 32)).startswith("FourBit(format='nf4', block_size=32, scales=None")
    assert short_repr(lowmem.Budget(4.5, inputs=[torch.zeros(2)])).startswith("Budget(bits=4.5")
    assert short_repr(torch.float16) == "torch.float16"
    assert short_repr(torch.nn.Linear) == "<class 'torch.nn.modules.linear.Linear'>"
    assert short_repr((1, None, "a")) == "(1, None, 'a')"


def dense():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def adapted():
    return lowmem.add_adapter(dense(), "first", lowmem.LoRA(2))


CALLS = {  # argument that gets the value -> the call
    "technique": [
        lambda value: lowmem.convert(dense(), value),
        lambda value: lowmem.convert(dense(), lowmem.FourBit(), value),
        lambda value: lowmem.calibrate(dense(), value, [torch.randn(4, 64)]),  # in the order of convert
        lambda value: lowmem.calibrate(dense(), [torch.randn(4, 64)], value),
        lambda value: lowmem.add_adapter(dense(), "first", value),
        lambda value: lowmem.plan(dense, value, batch=torch.randn(4, 64)),
    ],
    "where": [
        lambda value: lowmem.convert(dense(), lowmem.FourBit(), where=value),
        lambda value: lowmem.calibrate(dense(), [torch.randn(4, 64)], where=value),
        lambda value: lowmem.add_adapter(dense(), "first", lowmem.LoRA(2), where=value),
        lambda value: lowmem.plan(dense, lowmem.FourBit(), batch=torch.randn(4, 64), where=value),
    ],
    "skip": [
        lambda value: lowmem.convert(dense(), lowmem.FourBit(), skip=value),
        lambda value: lowmem.calibrate(dense(), [torch.randn(4, 64)], skip=value),
        lambda value: lowmem.add_adapter(dense(), "first", lowmem.LoRA(2), skip=value),
        lambda value: lowmem.plan(dense, lowmem.FourBit(), batch=torch.randn(4, 64), skip=value),
    ],
    "parameters": [lambda value: lowmem.convert(dense(), lowmem.FourBit(), parameters=value)],
    "blocks": [lambda value: lowmem.calibrate(dense(), [torch.randn(4, 64)], blocks=value)],
    "damping": [lambda value: lowmem.calibrate(dense(), [torch.randn(4, 64)], damping=value)],
    "at_most": [
        lambda value: lowmem.convert(dense(), lowmem.FourBit(), at_most=value),
        lambda value: lowmem.merge(adapted(), at_most=value),
    ],
    "name": [lambda value: lowmem.add_adapter(dense(), value, lowmem.LoRA(2))],
    "adapter": [
        lambda value: lowmem.activate(adapted(), value),
        lambda value: lowmem.delete_adapter(adapted(), value),
    ],
    "to": [lambda value: lowmem.merge(adapted(), value)],
    "dtype": [
        lambda value: lowmem.Half(value),
        lambda value: lowmem.LoRA(dtype=value),
        lambda value: lowmem.restore(adapted(), dtype=value),
        lambda value: lowmem.export("source", "out.gguf", dtype=value),
    ],
    "format": [
        lambda value: lowmem.EightBit(format=value),
        lambda value: lowmem.quantize(torch.ones(2, 64), value),
        lambda value: lowmem.save_adapter(adapted(), "path", format=value),
        lambda value: lowmem.export("source", "out", format=value),
    ],
    "block_size": [lambda value: lowmem.FourBit(block_size=value)],
    "scales": [
        lambda value: lowmem.FourBit(scales=value),
        lambda value: lowmem.FourBit(scales=value, offsets=True),
        lambda value: lowmem.EightBit(scales=value),
    ],
    "search": [
        lambda value: lowmem.FourBit(search=value),
        lambda value: lowmem.quantize(torch.ones(2, 64), search=value),
    ],
    "offsets": [lambda value: lowmem.FourBit(offsets=value)],
    "embeddings": [lambda value: lowmem.FourBit(embeddings=value)],
    "compute_dtype": [lambda value: lowmem.FourBit(compute_dtype=value)],
    "rank": [lambda value: lowmem.LoRA(value)],
    "alpha": [lambda value: lowmem.LoRA(alpha=value)],
    "init": [lambda value: lowmem.LoRA(init=value)],
    "ranks": [lambda value: lowmem.LoRA(ranks=value)],
    "bits": [lambda value: lowmem.Budget(value), lambda value: lowmem.CachedStates(value)],
    "memory": [lambda value: lowmem.prepare_training(dense(), value)],
    "chunk": [lambda value: lowmem.prepare_training(dense(), chunk=value)],
    "variant": [lambda value: lowmem.build(value)],
}


def test_batches_and_technique_in_the_other_order_are_told():
    order = r"^batches=FourBit\(.*\) is a technique: the order is calibrate\(model, batches, technique\)$"
    with pytest.raises(TypeError, match=order):
        lowmem.calibrate(dense(), lowmem.FourBit(), [torch.randn(4, 64)])


@pytest.mark.parametrize("argument", CALLS)
def test_an_error_about_an_argument_names_it_and_never_prints_a_tensor(argument):
    for call in CALLS[argument]:
        for kind, value in HOSTILE.items():
            if (argument, kind) in (("parameters", "module"), ("name", "text")):
                continue  # which are valid
            with pytest.raises((TypeError, ValueError)) as raised:
                call(value)
            told = str(raised.value)
            assert not any(part in told for part in ("0.123", "123456789", "tensor(", "array(", "(0): Linear")), told
            assert len(told) < 600, told
            if (argument, kind) != ("where", "module"):  # which is called, and raises an error of its own
                assert argument.removesuffix("s") in told, (kind, told)
