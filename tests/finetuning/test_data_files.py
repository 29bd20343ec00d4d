"""Files, folders and data sets are read into rows, each with its place; what is damaged is named."""

import csv
import hashlib
import json
import shlex
import sys

import pytest

from lowmem import FileError
from lowmem.finetuning.data_files import Row, check_data_path, combined_digest, is_hub_data_set_name, read_data_files

ROWS = [{"prompt": 'a, "b"\nc', "completion": "ü"}, {"prompt": "d", "completion": ""}]


def read(path):
    (file,) = read_data_files(path)
    assert file.name == str(path)
    return file.rows


@pytest.mark.parametrize("suffix", ["csv", "tsv", "CSV"])
def test_tables_are_read_as_csv_writes_them_with_the_line_of_each_row(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if suffix == "tsv" else ",")
        table.writeheader()
        table.writerows(ROWS)
    assert read(path) == [Row("line 2", ROWS[0]), Row("line 4", ROWS[1])]
    assert read_data_files(path)[0].digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_cell_may_be_longer_than_the_limit_of_csv_which_stays(tmp_path):
    limit, cell = csv.field_size_limit(), "a" * 200_000
    (tmp_path / "a.csv").write_text(f"text\n{cell}\n")
    assert read(tmp_path / "a.csv") == [Row("line 2", {"text": cell})]
    assert csv.field_size_limit() == limit


def test_a_row_with_too_many_or_too_few_cells_is_a_mistake_of_that_row(tmp_path):
    (tmp_path / "a.csv").write_text("\na,b\n1,2\n1\n\n1,2,3\n3,4\n")
    whole = [Row("line 3", {"a": "1", "b": "2"}), Row("line 7", {"a": "3", "b": "4"})]
    assert read(tmp_path / "a.csv") == [
        whole[0],
        Row("line 4", mistake="it has 1 cells, and the first line has 2"),
        Row("line 6", mistake="it has 3 cells, and the first line has 2"),
        whole[1],
    ]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_list_of_objects_is_read_from_json(wrapped, tmp_path):
    items = [*ROWS, 3]
    (tmp_path / "a.json").write_text(json.dumps({"data": items} if wrapped else items))
    assert read(tmp_path / "a.json") == [Row(f"row {number}", item) for number, item in enumerate(items, 1)]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": "a"}\n"b"\n'), ("a.json", '[{"text": "a"}, "b"]')]
)
def test_a_text_without_a_key_is_a_mistake_of_its_row(name, content, tmp_path):
    """It may be half of an object, and a JSON text is no file of texts elsewhere."""
    (tmp_path / name).write_text(content)
    row, mistaken = read(tmp_path / name)
    assert row.content == {"text": "a"}
    assert mistaken.content is None
    assert mistaken.mistake == "'b' is a text without a key: write it as {\"text\": ...}"


def test_lines_are_counted_with_those_that_are_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{\n[1]\n')
    rows = read(tmp_path / "a.jsonl")
    assert [row.place for row in rows] == ["line 1", "line 3", "line 4"]
    assert rows[1].mistake == "'{' is no JSON object; a .jsonl file has one in each line, a .json a list"
    assert rows[2] == Row("line 4", [1])


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.txt", "a.jsonl", ".hidden.txt", "notes.md"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "folder").mkdir()
    files = read_data_files(tmp_path)
    assert [file.name for file in files] == [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    assert combined_digest(files) != combined_digest(files[::-1])
    assert combined_digest(files[:1]) == files[0].digest
    with pytest.raises(FileError, match=r"folder': it has no file whose name ends in \.txt, \.jsonl"):
        read_data_files(tmp_path / "folder")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", "{", "it is no JSON: JSONDecodeError.*a file with an object in each line is named .jsonl"),
        ("a.json", '{"rows": []}', r'it must be a list of objects, or {"data": \[...\]}'),
        ("a.json", "[]", "it is empty"),
        ("a.csv", "a,b\n", "it is empty"),
        ("a.csv", "question;answer\n1;2\n", "its first line is one column, 'question;answer': save it with commas"),
        ("a.tsv", "question,answer\n1,2\n", "its first line is one column, 'question,answer': save it with tabs"),
        ("a.csv", "a,b,a\n1,2,3\n", "its first line names a column twice: \\['a', 'b', 'a'\\]"),
        ("a.csv", 'a,b\n1,2\n1,"2\n', "line 3: unexpected end of data; write cells with quotes"),
        ("a.csv", 'a,b\n1,"2"3\n', "line 2: ',' expected after '\"'"),
        ("a.doc", "a", r"its name must end in \.txt, \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        ("a", "a", "its name must end in"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(name, content, why, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=f"^cannot read '.*{name}': .*{why}"):
        read_data_files(tmp_path / name)


def test_names_of_the_hub_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "here").mkdir()
    for name in ("me/qa", "me/qa:test", "me/qa:test:main", "a-b/c.d_e"):
        assert is_hub_data_set_name(name), name
    for name in ("me/here", "./qa", "~/qa", "/me/qa", "a/b/c", "qa", "me/qa.csv", "me/", "me/qa:", "../qa"):
        assert not is_hub_data_set_name(name), name
    for name in ("me/qa:a:b:c", "me/qa:train[:9]", "a/b.gguf", "a/b.PDF", "me/qa.things", "me/qa.xyz:test"):
        assert not is_hub_data_set_name(name), name
    for name in ("a/qa.things", "me/qa-1.5", "me/qa-2.5B"):
        assert is_hub_data_set_name(name), name


@pytest.mark.parametrize("name", ["data/qa.doc", "data/qa.things", "other/qa.docx", "data/qa"])
def test_the_kinds_of_files_are_named_for_a_file_that_is_missing_and_of_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    told = "there is no such file here, and files of its kind are not read: its name must end in "
    if name != "data/qa":
        with pytest.raises(
            FileError, match=rf"^cannot read '.*qa.*': {told}\.txt, \.jsonl, \.json, \.csv, \.tsv, \.parquet"
        ):
            check_data_path(name)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a")
    with pytest.raises(FileError, match=r"^cannot read '.*qa.*': its name must end in \.txt"):
        check_data_path(name)


def test_parquet_is_read_without_the_nulls_that_it_fills_in(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install '.[data]'")
    from pyarrow.parquet import write_table

    calls = [{"function": {"name": name, "arguments": {key: 1}}} for name, key in (("f", "x"), ("g", "y"))]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}], "text": None},
        {"messages": None, "text": "b"},
    ]
    path = tmp_path / "a.parquet"
    write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [Row("row 1", rows[0]), Row("row 2", rows[1])]
    assert read_data_files(path)[0].digest == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileError, match="a.parquet': it is no whole parquet file"):
        read_data_files(path)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("me/qa", "datasets")])
def test_without_its_package_a_file_is_refused_with_the_command_for_it(name, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name}'.* needs .*{package}: pip install '\.\[data\]'"):
        read_data_files(name)


def test_a_data_set_of_the_hub_is_read_by_its_split_and_config(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install '.[data]'")
    asked = []

    def load_dataset(name, config, *, split, download_config):
        asked.append((name, config, split, download_config.max_retries))
        if name != "me/qa":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "n": None}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    for name in ("me/qa", "me/qa:test", "me/qa:test:main"):
        (file,) = read_data_files(name)
        assert file.rows == [Row("row 1", {"prompt": "a", "completion": "b", "n": None})]
    assert asked == [("me/qa", None, "train", 1), ("me/qa", None, "test", 1), ("me/qa", "main", "test", 1)]
    with pytest.raises(FileError, match="^cannot read 'a/qa': there is no such file or folder here.*reach 'a/qa'"):
        read_data_files("a/qa")


@pytest.fixture
def unreachable_hub(tmp_path, monkeypatch):
    """A Hub that no server answers for, and empty caches; returns the cache of data sets."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install '.[data]'")
    from tests.integrations.transformers.hub import Hub, use_hub

    monkeypatch.chdir(tmp_path)
    # The port of the discard service, which does not run here
    use_hub(monkeypatch, Hub("http://127.0.0.1:9"), tmp_path / "home")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to ask again"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("name", "call"), [("me/qa", "'me/qa'"), ("me/qa:test:main", "'me/qa', 'main'")])
def test_a_hub_that_is_not_reached_is_one_line_at_once_with_the_command(name, call, unreachable_hub):
    with pytest.raises(FileError) as caught:
        read_data_files(name)
    told, command = str(caught.value).split("; `", 1)
    assert told.startswith(
        f"cannot read '{name}': there is no such file or folder here, the cache '{unreachable_hub}' lacks it, and "
        "http://127.0.0.1:9 cannot be reached (ConnectError: "
    )
    words = shlex.split(command.removesuffix("` fetches it"))
    assert words == ["python", "-c", f"from datasets import load_dataset; load_dataset({call})"]
    assert "\n" not in str(caught.value)


def test_a_data_set_in_the_cache_is_taken_where_the_hub_is_not_reached(unreachable_hub):
    from datasets import Dataset, config

    folder = unreachable_hub / "me___qa" / "default" / "0.0.0" / "1f"
    Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(folder)
    (folder / "data-00000-of-00001.arrow").rename(folder / "qa-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "qa", "version": "0.0.0"}
    info |= {"splits": {"train": {"name": "train", "num_examples": 1, "num_bytes": 1, "dataset_name": "qa"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (file,) = read_data_files("me/qa")
    assert file.rows == [Row("row 1", {"prompt": "a", "completion": "b"})]
    with pytest.raises(FileError, match="^cannot read 'me/qa:test': .* cannot be loaded: .*test"):
        read_data_files("me/qa:test")
    assert config.HF_HUB_OFFLINE is False


def test_of_errors_of_a_data_set_those_of_the_library_are_turned_alone(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install '.[data]'")
    from datasets.exceptions import DatasetGenerationError

    def load_dataset(*arguments, **options):
        raise error from cause

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    wrapped = DatasetGenerationError("An error occurred while generating the dataset")
    for error, cause in (
        (MemoryError("m"), None), (KeyboardInterrupt("k"), None), (KeyError("a"), None), (wrapped, MemoryError("m"))
    ):  # fmt: skip
        expected = error if cause is None else cause
        with pytest.raises(type(expected), match=str(expected)) as caught:
            read_data_files("me/qa")
        assert caught.value is expected
    for error, cause in (
        (ValueError("Unknown split"), None), (OSError("No space left"), None), (RuntimeError("scripts"), None),
        (wrapped, ValueError("line 3 is no JSON")),
    ):  # fmt: skip
        with pytest.raises(FileError, match=f"^cannot read 'me/qa': .*{cause or error}"):
            read_data_files("me/qa")
