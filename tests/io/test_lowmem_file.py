"""A file of tensors comes back bit for bit, or is refused; no save ever loses the one before."""

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError

from lowmem.errors import FileError
from lowmem.io import lowmem_file
from lowmem.io.lowmem_file import (
    DIGEST,
    verify_and_map_file,
    write_plain_safetensors_atomically,
    write_stream_returning_digest,
    write_tensors_returning_digest,
)
from lowmem.io.safetensors_checkpoint import SafetensorsFile
from lowmem.io.safetensors_header import DTYPES, TensorSpec
from tests.profiled import ONE_THREAD
from tests.strategies import json_values, metadatas, names, tensors

LIBRARY_DTYPES = set(safetensors.torch._TYPES.values())


def bits(tensor):
    values = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return values.view(-1).view(torch.uint8).numpy().tobytes()


def same(left, right):
    return specs_of(left) == specs_of(right) and all(bits(left[name]) == bits(right[name]) for name in left)


def specs_of(tensors):
    return {name: TensorSpec.from_tensor(tensor) for name, tensor in tensors.items()}


@contextmanager
def a_file(content=None):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        if content is not None:
            path.write_bytes(content)
        yield path
        assert {p.name for p in Path(directory).iterdir()} <= {"file"}


def written(tensors, metadata):
    with a_file() as path:
        write_tensors_returning_digest(path, tensors, metadata)
        return path.read_bytes()


def sealed(content):
    """Return a file with the digest that its content has."""
    content = content[: DIGEST.start] + b"0" * 64 + content[DIGEST.stop :]
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def with_header(content, text):
    return sealed(len(text).to_bytes(8, "little") + text + data_of(content))


def header_of(content):
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def data_of(content):
    return content[8 + len(header_of(content)) :]


def refused(content, reason="cannot read"):
    """Check that a file of this content is refused as it is to be."""
    with a_file(content) as path, pytest.raises(FileError, match=reason) as caught:
        verify_and_map_file(path)
    assert str(caught.value).startswith(f"cannot read {str(path)!r}: ")
    assert len(str(caught.value)) < 1000


SMALL = {
    "codes": torch.arange(7, dtype=torch.uint8),
    "layer.scales": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    "layer.bias": torch.tensor([0.25, -1.0]),
    "empty": torch.zeros(3, 0),
    "step": torch.tensor(7),
}
FILE = written(SMALL, {"format": "nf4", "block_size": 64})


@given(st.dictionaries(names, tensors(), max_size=5), metadatas)
@example({}, {})
@example({"conjugate": (1j * torch.ones(2)).conj(), "negative": (1j * torch.ones(1)).conj().imag}, {})
@example(
    {
        "a": torch.ones(2, 2, dtype=torch.int16)[:, :1].T[:, :0],
        "b": torch.ones(4)[::4],
        "c": torch.ones(3).expand(2, 3),
    },
    {},
)
@example({"": torch.zeros(()), "a\x00b": torch.empty(0, 5, dtype=torch.float8_e5m2), "ключ🗝": torch.ones(2)}, {})
def test_what_is_written_comes_back_bit_for_bit(tensors, metadata):
    with a_file() as path:
        write_tensors_returning_digest(path, tensors, metadata)
        content = path.read_bytes()
        file = verify_and_map_file(path)
        assert same(file.tensors, tensors)
        assert file.metadata == metadata
        with SafetensorsFile(path) as checkpoint:
            assert same({name: checkpoint.read_tensor(name) for name in checkpoint.specs}, tensors)
        if all(tensor.dtype in LIBRARY_DTYPES for tensor in tensors.values()):
            assert same(safetensors.torch.load_file(path), tensors)
        write_tensors_returning_digest(path, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
        assert path.read_bytes() == content
        assert same(file.tensors, tensors)


def test_the_bytes_are_those_of_the_format():
    lowmem = json.dumps('{"block_size":64,"format":"nf4","version":2}')
    text = (
        f'{{"__metadata__":{{"sha256":"{"0" * 64}","lowmem":{lowmem}}},'
        '"layer.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        '"step":{"dtype":"I64","shape":[],"data_offsets":[8,16]},'
        '"layer.scales":{"dtype":"BF16","shape":[2,1],"data_offsets":[16,20]},'
        '"codes":{"dtype":"U8","shape":[7],"data_offsets":[20,27]},'
        '"empty":{"dtype":"F32","shape":[3,0],"data_offsets":[27,27]}}'
    )
    text += " " * (-(8 + len(text)) % 64)
    data = b"\0\0\x80\x3e\0\0\x80\xbf\7\0\0\0\0\0\0\0\xc0\x3f\0\xc0\0\1\2\3\4\5\6"
    assert sealed(FILE) == FILE == sealed(len(text).to_bytes(8, "little") + text.encode() + data)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_are_views_of_the_file_whose_changes_stay_here(tmp_path, dtype):
    values = torch.ones(4, dtype=torch.uint8).view(-1).repeat(16).view(dtype)
    write_tensors_returning_digest(tmp_path / "file", {"a": values, "b": torch.ones(3, dtype=torch.uint8)}, {})
    content = (tmp_path / "file").read_bytes()
    tensor = verify_and_map_file(tmp_path / "file").tensors["a"]
    assert tensor.data_ptr() % dtype.itemsize == 0
    assert tensor.untyped_storage().nbytes() == 64
    assert str(tmp_path / "file") in Path("/proc/self/maps").read_text() or sys.platform != "linux"
    tensor.view(torch.uint8).zero_()
    assert (tmp_path / "file").read_bytes() == content
    assert bits(verify_and_map_file(tmp_path / "file").tensors["a"]) == bits(values)
    assert bits(copy.deepcopy(tensor)) == b"\0" * 64


def test_a_file_that_is_cut_after_it_was_verified_is_refused(tmp_path, monkeypatch):
    path, digest = tmp_path / "file", lowmem_file._sha256_with_zeroed_digest
    sizes = [0, 8, len(FILE) - 1]

    def cut(file):
        try:
            return digest(file)
        finally:
            os.truncate(path, sizes.pop())

    monkeypatch.setattr(lowmem_file, "_sha256_with_zeroed_digest", cut)
    while sizes:
        path.write_bytes(FILE)
        with pytest.raises(FileError, match="cannot read .*: it was cut while it was read; get it again"):
            verify_and_map_file(path)


# What is refused.


def test_a_file_in_which_any_bit_changed_or_that_was_cut_anywhere_is_refused():
    reason = "damaged|lowmem did not write|it is empty"
    with a_file(FILE) as path, open(path, "r+b", buffering=0) as file:
        for place in range(8 * len(FILE)):
            byte = FILE[place // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place // 8)
            with pytest.raises(FileError, match=reason):
                verify_and_map_file(path)
            os.pwrite(file.fileno(), bytes([byte]), place // 8)
        for size in reversed(range(len(FILE))):
            file.truncate(size)
            with pytest.raises(FileError, match=reason):
                verify_and_map_file(path)


def accepted_as_canonical(content):
    """Check that a file with a valid digest is refused, or is exactly what lowmem writes for what it holds."""
    with a_file(content) as path:
        try:
            file = verify_and_map_file(path)
        except FileError as error:
            assert str(path) in str(error)  # noqa: PT017  either is fine
        else:
            assert written(file.tensors, file.metadata) == content
        try:
            with SafetensorsFile(path) as checkpoint:
                found = {name: checkpoint.read_tensor(name) for name in checkpoint.specs}
        except FileError as error:
            assert str(path) in str(error)  # noqa: PT017
            return
        try:
            assert same(safetensors.torch.load_file(path), found)
        except SafetensorError as error:  # a dtype that this version of it doesn't know
            assert "dtype" in str(error) or "variant" in str(error)  # noqa: PT017


def paths_in(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_in(child, (*path, key))


HEADER = json.loads(header_of(FILE))
values = st.one_of(
    st.sampled_from([0, 1, -1, 8, 16, 20, 27, 28, 2**31, 2**63, 2**64, 2**200, 8.0, 1e300, True, None, "F32", "U8"]),
    st.sampled_from(["I64", "BF16", "F4", "", [], [0], [27], [7, 1], [0, 27], [20, 27], [2**40, 2**40, 0], {}]),
    st.integers(1, 5000).map(lambda depth: json.loads("[" * min(depth, 400) + "]" * min(depth, 400))),
    json_values,
)


changes = st.tuples(st.sampled_from(list(paths_in(HEADER))), values | st.just("delete"))


@given(st.lists(changes, min_size=1, max_size=3))
def test_a_header_that_someone_changed_is_refused_or_means_what_it_says(changes):
    header = copy.deepcopy(HEADER)
    for path, value in changes:
        if not path:
            header = copy.deepcopy(value)
            continue
        parent = header
        try:
            for key in path[:-1]:
                parent = parent[key]
            if value == "delete":
                del parent[path[-1]]
            else:
                parent[path[-1]] = copy.deepcopy(value)
        except (TypeError, LookupError):
            continue  # an earlier change removed it
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    accepted_as_canonical(with_header(FILE, text + b" " * (-(8 + len(text)) % 64)))


def changed_header(old, new):
    text = header_of(FILE).rstrip()
    assert old in text
    text = text.replace(old, new, 1)
    return with_header(FILE, text + b" " * (-(8 + len(text)) % 64))


@pytest.mark.parametrize(("content", "reason"), [
        (changed_header(b"[0,8]", b"[0,9]"), "'layer.bias' has 9 bytes, and its shape takes 8; get it again"),
        (changed_header(b'"step"', b'"codes"'), "the JSON has a name twice|metadata is not lowmem's"),
        (changed_header(b'"shape":[7]', b'"shape": [7]'), "not laid out as lowmem does it"),
        (sealed(FILE + b"\0"), "the tensors take 27 bytes, and 28 are there"),
        (changed_header(b'version\\":2', b'version\\":3'),
         r"newer lowmem \(format version 3; this one reads 2\); upgrade lowmem"),
        (changed_header(b'version\\":2', b'version\\":1'),
         r"older lowmem \(format version 1; this one reads 2\); get it again, or make it again with this lowmem"),
        (changed_header(b'version\\":2', b'version\\":0'), "its format version is 0; get it again"),
        (changed_header(b'version\\":2', b'version\\":true'), "its format version is True; get it again"),
        (changed_header(b"version", b"vers"), "its metadata is not lowmem's; get it again"),
        (changed_header(b'"lowmem":"{', b'"lowmem":"['), "its metadata is not lowmem's; get it again"),
        (changed_header(b'"lowmem":"', b'"lowmem":1,"low":"'), "its metadata is not lowmem's; get it again"),
        (changed_header(b':64,', b":1e999,"), "its metadata is not lowmem's; get it again"),
        (changed_header(b':64,', b":" + b"[" * 10**5 + b","), "its metadata is not lowmem's; get it again"),
        (changed_header(b'"lowmem":"', b'"a":"b","lowmem":"'), "not laid out as lowmem does it; write it again"),
        (changed_header(b'"step":', b'"' + b"x" * 10**6 + b'":1,"step":'), r"tensor 'xxx.*\.\.\..*xxx' is 1"),
    ])  # fmt: skip
def test_a_bad_file_with_a_valid_digest_says_what_is_bad(content, reason):
    refused(content, reason)


def torch_saved(**options):
    with a_file() as path:
        torch.save({"a": torch.ones(3)}, path, **options)
        return path.read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PLAIN = safetensors.torch.save({"a": torch.ones(3)}, {"format": "pt"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty; get it again"),
        ((len(FILE) - 7).to_bytes(8, "little") + FILE[8:], "its header takes .* bytes, and it ends after .*; get it"),
        (b"\0", "it is no safetensors file, or is damaged; name a safetensors file"),
        (b"{" * 100, "it is no safetensors file, or is damaged"),
        (b"\x08" + b"\0" * 7 + b"{" * 8, "it is damaged or no safetensors file: the JSON is broken"),
        (b"\x40\x42\x0f" + b"\0" * 5 + b'{"a":' * 200000, "nested too deeply"),
        (
            pickle.dumps({"a": 1}),
            "it is a pickle or an old torch.save file: lowmem reads safetensors only",
        ),
        (
            torch_saved(),
            "a torch.save file or another zip: lowmem reads safetensors only, and executed nothing",
        ),
        (torch_saved(_use_new_zipfile_serialization=False), "it is a pickle or an old torch.save file"),
        (b"GGUF\3\0\0\0" + b"\0" * 50, "it is a GGUF file: .* take the model's safetensors files"),
        (LFS, "it is a Git LFS pointer: .* fetch the file it stands for with git lfs pull"),
        (PLAIN, "a safetensors file that lowmem did not write; convert it with lowmem quantize"),
        (PLAIN[:-1], "damaged or no safetensors file: the tensors take 12 bytes, and 11 are there"),
        (safetensors.torch.save(SMALL, {"lowmem": "{}"}), "its digest is misplaced; get it again"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # bytes of a pickle differ between processes
)
def test_a_file_of_another_kind_is_told(content, reason):
    refused(content, reason)
    if content != PLAIN and b'"lowmem"' not in content:
        with a_file(content) as path, pytest.raises(FileError, match="cannot read"), SafetensorsFile(path):
            pass


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refused(pickle.dumps(Bomb(), protocol))
    refused(torch_saved())
    assert list(tmp_path.iterdir()) == []


# Writing.


@given(st.permutations(list(SMALL)))
def test_tensors_may_come_in_any_order(order):
    with a_file() as path:
        write_stream_returning_digest(
            path, specs_of(SMALL), {"format": "nf4", "block_size": 64}, ((name, SMALL[name]) for name in order)
        )
        assert path.read_bytes() == FILE


def test_no_tensor_is_held_when_the_next_is_asked_for(tmp_path):
    gone = []

    def make():
        for name in SMALL:
            tensor = SMALL[name].clone()
            gone.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            assert gone[-1]() is None

    write_stream_returning_digest(tmp_path / "file", specs_of(SMALL), {}, make())
    assert len(gone) == len(SMALL)


@pytest.mark.parametrize(
    ("come", "reason"),
    [
        ([("a", torch.ones(2)), ("c", torch.ones(2))], "tensor 'c' is not in the specs"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "tensor 'a' came twice"),
        ([("a", torch.ones(2)), ("b", torch.ones(1, 2))], r"'b' is .*shape=\(1, 2\)\), and the specs say .*\(2,\)"),
        ([("a", torch.ones(2, dtype=torch.int32))], "tensor 'a' is .*int32.*, and the specs say .*float32"),
        ([("a", torch.ones(2))], "1 tensors did not come, the first of them 'b'"),
        ([], "2 tensors did not come, the first of them 'a'"),
        ([("a", torch.ones(2, device="meta"))], "tensor 'a' is no dense tensor with values; convert it or leave"),
        ([("a", torch.ones(2).to_sparse())], "tensor 'a' is no dense tensor"),
        ([("a", [1.0, 1.0])], "tensor 'a' is no dense tensor"),
        (
            [("a", torch.ones(1, dtype=torch.complex128))],
            "tensor 'a': dtype=torch.complex128 cannot be stored",
        ),
    ],
)
def test_what_the_specs_do_not_say_is_refused_and_nothing_is_left(tmp_path, come, reason):
    with pytest.raises(ValueError, match=reason):
        write_stream_returning_digest(tmp_path / "file", specs_of({"a": torch.ones(2), "b": torch.ones(2)}), {}, come)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"version": 1}, "metadata has a 'version', which the container sets; choose another name"),
        ({"a": (1, 2)}, "changes in JSON; use lists for tuples, and text for all names"),
        ({"a": {1: 2}}, "changes in JSON"),
        ({"a": float("nan")}, "cannot be stored as JSON"),
        ({"a": torch.ones(1)}, "cannot be stored as JSON"),
        ({"a": 10**30}, "cannot be stored as JSON: the JSON has a number of 31 digits"),
        ({"a": "\ud800"}, "cannot be stored as JSON"),
        ({1: 1, "a": 1}, "cannot be stored as JSON"),
    ],
)
def test_metadata_that_json_does_not_keep_is_refused(tmp_path, metadata, reason):
    with pytest.raises(ValueError, match=reason):
        write_tensors_returning_digest(tmp_path / "file", SMALL, metadata)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_an_error_before_the_first_tensor_is_asked_for(tmp_path):
    def make():
        raise AssertionError
        yield

    for path in (tmp_path, tmp_path / "missing" / "file", Path(os.devnull)):
        with pytest.raises(OSError, match=f"cannot write '{path}': "):
            write_stream_returning_digest(path, specs_of(SMALL), {}, make())


MEMORY = """
import sys, torch
from pathlib import Path
from lowmem.errors import FileError
from lowmem.io.lowmem_file import verify_and_map_file, write_stream_returning_digest
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.safetensors_checkpoint import SafetensorsFile

path = Path(sys.argv[1])
MIB = 2**20
COUNT = 32

def peak():  # MiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

def make():
    for number in range(COUNT):
        yield str(number), torch.full((8 * MIB,), number, dtype=torch.uint8)

start = peak()
for length in (16 * MIB, 16 * MIB + 1, 2**32, 2**63, 2**64 - 1):
    for size in (100, 2**33):  # the larger one is sparse
        path.write_bytes(length.to_bytes(8, "little") + b'{"__metadata__":{"sha256":"')
        with open(path, "ab") as file:
            file.truncate(size)
        for function in (verify_and_map_file, lambda path: SafetensorsFile(path).__enter__()):
            if length > 16 * MIB or size < 16 * MIB:
                try:
                    function(path)
                    raise SystemExit(f"{length} was accepted")
                except FileError:
                    pass
path.unlink()
print(peak() - start)
specs = {str(number): TensorSpec(torch.uint8, (8 * MIB,)) for number in range(COUNT)}
write_stream_returning_digest(path, specs, {}, make())
print(peak() - start)
with SafetensorsFile(path) as checkpoint:
    assert all((checkpoint.read_tensor(name) == int(name)).all() for name in checkpoint.specs)
print(peak() - start)
file = verify_and_map_file(path)
print(peak() - start)
assert (file.tensors["31"][::4096] == 31).all()
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_stays_small_whatever_a_file_says_and_however_large_it_is(tmp_path):
    script = [sys.executable, "-c", MEMORY, tmp_path / "file"]
    shown = subprocess.run(script, capture_output=True, text=True, check=True, env=ONE_THREAD).stdout
    lying, writing, reading, verifying = map(float, shown.split())
    assert lying < 16
    assert max(writing, reading, verifying) < 64


@pytest.mark.parametrize("place", [-1, -200, -600])
def test_the_digest_is_of_every_block(tmp_path, monkeypatch, place):
    monkeypatch.setattr(lowmem_file, "BLOCK", 64)
    path = tmp_path / "file"
    write_tensors_returning_digest(path, {"x": torch.arange(200.0)}, {})
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="it is damaged"):
        verify_and_map_file(path)


@given(st.dictionaries(names, tensors().filter(lambda t: t.dtype in LIBRARY_DTYPES), max_size=4))
def test_a_plain_file_is_what_safetensors_reads_and_depends_on_the_tensors_alone(content):
    files = set()
    for order in (1, -1):
        with a_file() as path:
            write_plain_safetensors_atomically(
                path, dict([*specs_of(content).items()][::order]), [*content.items()][::order]
            )
            files.add(path.read_bytes())
            assert same(safetensors.torch.load_file(path), content)
            with safetensors.safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
    assert len(files) == 1
