"""Seeded changes of the files in a folder, and the memory and time within which a reader must read or refuse it."""

import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from io import BufferedReader, BytesIO
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.errors import FileError
from lowmem.io.formats.gguf import gguf_file as gguf
from lowmem.io.lowmem_file import DIGEST, MAGIC
from tests.io.formats.written import text, typed
from tests.selection import FULL, PROFILE

try:
    import resource
except ImportError:  # Windows
    resource = None

CASES = 2000 if PROFILE == "nightly" else 4
LARGE = (2**28, 2**62) if FULL else (2**28,)
MEMORY = 2**28  # bytes that a case may add to the process: files have a few KiB
SECONDS = 20  # of processor time that a case may take: one takes milliseconds

POWERS = (*(2**power for power in (20, 28, 31, 53, 62, 63, 64)), *(2**power - 1 for power in (31, 32, 63)))
EXTREMES = (0, -1, 1, 3, *POWERS, 10**400)
VALUES = (
    *EXTREMES,
    *(None, True, False, 0.5, -1.5, 1e308, "", "x", "a\x1b\u2028b", [], {}, [[1, 2]], [0.5], {"a": 1}),
)
FILLERS = (b"\xff", b"\0", b"\x7f")
DTYPES = {"U8": 1, "BOOL": 1, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F64": 8, "C64": 8, "F8_E4M3": 1}


class Reader(NamedTuple):
    """What writes whole files into a folder, what reads them, and what it raises beside FileError and OSError."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = ()


def fuzzed(test: Callable) -> Callable:
    """Give a test ``seed``: a few, and in the nightly profile thousands."""
    return settings(max_examples=CASES)(given(seed=st.integers(0, 2**32 - 1))(test))


def run(reader: Reader, name: str, root: Path, seed: int) -> None:
    """Read a folder that a reader can read, changed by a seed; one that is neither read nor refused stays there."""
    whole, folder = root / f"fuzzed {name}", root / f"fuzzed {name} {seed}"
    if not whole.exists():
        (root / f"new {name}").mkdir()
        reader.write(root / f"new {name}")
        assert not is_refused(reader, root / f"new {name}")
        (root / f"new {name}").rename(whole)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    change(folder, Random(seed))
    is_refused(reader, folder)
    shutil.rmtree(folder)


def run_large(reader: Reader, root: Path, pattern: str = "*") -> None:
    """Read what a reader can read with each number of its files' headers replaced, in the memory of a case."""
    root.mkdir()
    reader.write(root)
    for file in sorted(file for file in root.rglob(pattern) if file.is_file()):
        content = file.read_bytes()
        for large in LARGE:
            for made in with_a_large_number(content, large):
                file.unlink()  # tensors of the last one may still be mapped
                file.write_bytes(made)
                is_refused(reader, root)
        file.unlink()
        file.write_bytes(content)


def is_refused(reader: Reader, folder: Path) -> bool:
    """Read a folder; return whether it was refused, in a line."""
    try:
        with bounded():
            reader.read(folder)
    except (FileError, OSError, *reader.errors) as error:
        said = str(error)
        assert said.isprintable(), said
        assert len(said) < 1000, said
        assert "out of memory" not in said, said
        return True
    return False


@contextmanager
def bounded():
    """Let the block fail where it takes more memory or time than a small file may; Linux alone limits memory."""

    def stop(*_):
        raise AssertionError(f"it takes more than {SECONDS} s")

    if resource is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status")
    if status.exists():
        taken = int(status.read_text().partition("VmData:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY, before[1]))
    old = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def change(folder: Path, random: Random) -> None:
    """Change one or several files of a folder, each by its format or at any byte."""
    for _ in range(random.choice((1, 1, 2, 3))):
        file = random.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
        content = file.read_bytes()
        kinds = [changed_bytes]
        if content[:4] == gguf.MAGIC:
            kinds += [changed_gguf] * 3
        elif content[:1] in b"{[" and content:
            kinds += [changed_json] * 3
        elif content[8:9] == b"{":
            kinds += [changed_header, changed_tensors, changed_tensors, changed_metadata]
        try:
            content = random.choice(kinds)(content, random)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):  # an earlier change broke the format
            content = changed_bytes(content, random)
        file.write_bytes(content)


def with_a_large_number(content: bytes, large: int) -> Iterator[bytes]:
    """Yield a file with one of its header's numbers replaced by a large one, for each of them."""
    if content[:4] == gguf.MAGIC:
        places = _gguf_header(content).field_slices
        for name, place in places.items():
            at = place.start + 8 + len(name.encode())
            size = {4: 4, 5: 4, 10: 8, 11: 8}.get(content[at])
            if size:
                number = min(large, 2 ** (8 * size - 1) - 1).to_bytes(size, "little")
                yield content[: at + 4] + number + content[at + 4 + size :]
    elif content[:1] == b"{" and b"\n{" not in content:
        for made in _with_large(json.loads(content), large):
            yield json.dumps(made).encode()
    elif content[8:9] == b"{":
        header, data = _parsed(content)
        metadata = header.get("__metadata__", {})
        for made in _with_large(header, large):
            yield _written(made, data)
        for made in _with_large(json.loads(metadata["lowmem"]), large) if "lowmem" in metadata else ():
            raw = json.dumps(made, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            yield _written({**header, "__metadata__": {**metadata, "lowmem": raw}}, data)


def _with_large(value: Any, large: int) -> Iterator[Any]:
    """Yield a JSON value with one number in it replaced; those of places of tensors are left."""
    if type(value) in (int, float):
        yield large
    elif isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            for made in _with_large(value[key], large) if key != "data_offsets" else ():
                changed_one = copy(value)
                changed_one[key] = made
                yield changed_one


def changed_bytes(content: bytes, random: Random) -> bytes:
    """Flip bits, cut, insert, or write a number over what is there."""
    found = bytearray(content)
    at = random.randrange(len(found) + 1)
    match random.randrange(4):
        case 0:
            for _ in range(random.choice((1, 2, 8))):
                if found:
                    found[random.randrange(len(found))] ^= 1 << random.randrange(8)
        case 1:
            del found[at:]
        case 2:
            found[at:at] = random.randbytes(random.randrange(1, 40))
        case _:
            size = random.choice((1, 2, 4, 8))
            found[at : at + size] = (random.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(found)


def changed_json(content: bytes, random: Random) -> bytes:
    """Replace, remove, rename or repeat a member of a JSON document; of lines of JSON, of one line."""
    lines = content.splitlines() if content.count(b"\n{") else [content]
    number = random.randrange(len(lines))
    lines[number] = json.dumps(changed(json.loads(lines[number]), random)).encode()
    return b"\n".join(lines)


def changed(value: object, random: Random) -> object:
    """Return a value as JSON has it, with one member changed."""
    places = []

    def walk(holder):
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                walk(holder[key])

    if not isinstance(value, dict | list) or not value or random.random() < 0.02:
        return random.choice(VALUES)
    walk(value)
    holder, key = random.choice(places)
    how = random.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[random.choice(("", ".", "x", f".{key}", str(key).rpartition(".")[2]))] = holder.pop(key)
    elif how == 2 and isinstance(holder, dict):
        holder[random.choice(list(holder))] = holder[key]
    elif how == 3:
        holder[key] = [holder[key]] * random.choice((1, 2, 1000))
    else:
        holder[key] = random.choice(VALUES)
    return value


def _parsed(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _written(header: dict, data: bytes) -> bytes:
    """Return a safetensors file; one of lowmem's gets the digest that it needs."""
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    content = bytearray(len(raw).to_bytes(8, "little") + raw + data)
    if content[8:].startswith(MAGIC):
        content[DIGEST] = b"0" * 64
        content[DIGEST] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)


def changed_header(content: bytes, random: Random) -> bytes:
    """Change the header of a safetensors file, whose tensors then lie elsewhere."""
    header, data = _parsed(content)
    return _written(changed(header, random), data)


def changed_metadata(content: bytes, random: Random) -> bytes:
    """Change the metadata of a safetensors file, and of lowmem's the JSON in them."""
    header, data = _parsed(content)
    metadata = header["__metadata__"]
    if "lowmem" not in metadata:
        return _written({**header, "__metadata__": changed(metadata, random)}, data)
    record = changed(json.loads(metadata["lowmem"]), random)
    metadata["lowmem"] = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _written(header, data)


def changed_tensors(content: bytes, random: Random) -> bytes:
    """Rename, remove, copy, reshape or retype a tensor of a safetensors file, or write other values."""
    header, data = _parsed(content)
    metadata = header.pop("__metadata__", None)
    tensors = {name: [one["dtype"], one["shape"], data[slice(*one["data_offsets"])]] for name, one in header.items()}
    name = random.choice(sorted(tensors))
    dtype, shape, raw = tensors[name]
    last = name.rpartition(".")[2]
    match random.randrange(8):
        case 0:
            del tensors[name]
        case 7:  # the parts of a weight, all of them
            begin = random.choice(("", ".", "a..", "x."))
            tensors = {begin + key.rpartition(".")[2]: value for key, value in tensors.items()}
        case 1:
            tensors[random.choice(("", last, f".{last}", f"a..{last}", f"{name}.", f"x.{last}"))] = tensors.pop(name)
        case 2:
            tensors[f"b.{last}"] = tensors[name]
        case 3:
            other = random.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 4:
            count = len(raw) // DTYPES.get(dtype, 1)
            shapes = ([count], [count, 1], [1, *shape], [*shape, 1], shape[::-1], [*shape, *[1] * 70])
            tensors[name][1] = random.choice(shapes)
        case 5:
            to = random.choice(sorted(DTYPES))
            size = len(raw) // DTYPES[to] if random.random() < 0.7 else random.randrange(1 + len(raw) // DTYPES[to])
            sizes = [size] if len(shape) < 2 else [*shape[:-1], size // max(1, math.prod(shape[:-1]))]
            tensors[name] = [to, sizes, raw[: math.prod(sizes) * DTYPES[to]]]
        case _:
            tensors[name][2] = random.choice((random.randbytes(len(raw)), *(one * len(raw) for one in FILLERS)))
    placed, end, parts = {} if metadata is None else {"__metadata__": metadata}, 0, []
    power = {key: len(own) & -len(own) for key, (_, _, own) in tensors.items()}
    for key in sorted(tensors, key=lambda key: (-power[key], key)):  # as lowmem lays them out
        kind, sizes, own = tensors[key]
        placed[key] = {"dtype": kind, "shape": sizes, "data_offsets": [end, end + len(own)]}
        end += len(own)
        parts.append(own)
    return _written(placed, b"".join(parts))


FIELDS = [typed(value) for value in (*(one % 2**63 for one in EXTREMES), 0.5, "", "x", [], [1, 2], ["a"], True, -1)]
FIELDS += [b"\4\0\0\0" + (one % 2**32).to_bytes(4, "little") for one in EXTREMES]
"""Types and values of a key of GGUF."""


def changed_gguf(content: bytes, random: Random) -> bytes:
    """Replace, remove or repeat a key of a GGUF file, or a number of a tensor's entry."""
    header = _gguf_header(content)
    start = min(tensor.begin for tensor in header.tensors.values())
    entries = max(place.stop for place in header.field_slices.values())
    keys = [content[place] for place in header.field_slices.values()]
    end = entries
    for tensor in header.tensors.values():  # length and text of the name, dimensions, type and offset
        end += 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 12
    infos = bytearray(content[entries:end])
    number = random.randrange(len(keys))
    match random.randrange(4):
        case 0:
            del keys[number]
        case 1:
            at = random.randrange(max(1, len(infos) - 8))
            infos[at : at + 8] = (random.choice(EXTREMES) % 2**64).to_bytes(8, "little")
        case _:
            name = random.choice(list(header.field_slices))
            keys[number] = text(name) + random.choice(FIELDS)
    made = content[:16] + len(keys).to_bytes(8, "little") + b"".join(keys) + bytes(infos)
    return made + bytes(-len(made) % 32) + content[start:]


def _gguf_header(content: bytes) -> gguf.GGUFHeader:
    return gguf.read_gguf_header(Path("a.gguf"), BufferedReader(BytesIO(content)))
