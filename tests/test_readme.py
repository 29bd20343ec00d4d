"""The README's code runs, its tables are what the commands print, and the commands it names exist."""

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.results import read_run
from lowmem import backend, build, measure
from lowmem.__main__ import main
from tests.compiled import on_threads

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
LOWMEM = [line for line in COMMANDS if line.startswith("lowmem ")]
TOX = [line for line in COMMANDS if line.startswith("tox ")]
PYTEST = [line for line in COMMANDS if line.startswith("pytest ")]
SET_UP = ["pip install . && lowmem stats", "pip install tox && tox"]
TABLES = re.findall(r"<!-- lowmem (.*?) -->\n(.*?)<!-- end -->", README, re.DOTALL)


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_every_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_code_that_reads_a_file_by_its_description_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/format.md", "exec"), {"__name__": "format"})
    assert text.count("<64 hexadecimal digits>") == 1


@pytest.mark.parametrize("line", [line for line in LOWMEM if line.removeprefix("lowmem ") not in dict(TABLES)])
def test_every_lowmem_command_runs(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0


def test_every_other_command_is_one_that_the_project_defines():
    assert sorted(COMMANDS) == sorted([*LOWMEM, *TOX, *PYTEST, *SET_UP])
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    for line in TOX:
        name = shlex.split(line)[2]
        assert f"testenv:{name}" in tox or re.fullmatch(r"py3\d+-torch(24|29|213)", name)
    for line in PYTEST:
        assert (ROOT / shlex.split(line)[1]).is_dir()
    assert SET_UP[1] in (ROOT / ".ci" / "run").read_text()


def numbers(cell):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", cell)]


@pytest.mark.parametrize(("command", "table"), TABLES)
def test_every_table_is_what_its_command_prints(command, table, capsys):
    """To the digit, but for the last: sums are rounded in another order by other processors."""
    if command.startswith("stats") and backend().startswith("reference"):
        pytest.skip("the memory figures are those of the compiled kernel, and this machine compiled none")
    with on_threads(2):  # each has scratch of its own
        assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out.splitlines()
    written = table.splitlines()
    assert len(printed) == len(written)
    assert printed[:2] == written[:2]
    for got, wanted in zip(printed[2:], written[2:], strict=True):
        assert re.sub(r"[\d.e-]+", "", got) == re.sub(r"[\d.e-]+", "", wanted)
        for one, other in zip(got.split("|"), wanted.split("|"), strict=True):
            assert numbers(one) == pytest.approx(numbers(other), rel=0.02, abs=1e-4)


@pytest.mark.parametrize(
    ("row", "variant"),
    [
        ("Half precision", "half_precision"),
        ("4-bit", "low_precision_nf4"),
        ("LoRA on half precision", "lora"),
        ("QLoRA", "qlora_nf4"),
    ],
)
def test_the_first_table_has_the_measured_bytes(row, variant):
    line = next(line for line in README.splitlines() if line.startswith(f"| {row} |"))
    assert f"| {measure.theoretical_bytes(build(variant)) / 2**20:.2f} MiB |" in line


def test_every_file_and_folder_it_names_exists():
    section = README.partition("## Where things are")[2]
    for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        folder = Path()
        for name in re.findall(r"`(.*?)`", row):
            path = Path(name) if "/" in name else folder / name
            folder = path.parent
            assert (ROOT / path).exists(), path


def test_the_speed_table_is_that_of_the_stored_run():
    run = json.loads((ROOT / "benchmarks" / "baselines" / "0001_baseline.json").read_text())
    results, _ = read_run(run)
    ratios = {name.partition("::")[2]: result.ratio for name, result in results.items()}
    lines = []
    titles = {"": "", "_in_bfloat16": ", bfloat16", "_in_int8": ", 8-bit integers"}
    for test, title in ((f"test_inference{what}", title) for what, title in titles.items()):
        for variant in dict.fromkeys(re.findall(rf"{test}\[(\w+)-batch1\]", " ".join(ratios))):
            cells = [1 / ratios[f"{test}[{variant}-batch{batch}]"] for batch in (1, 8, 32, 128, 512)]
            if variant != "bignet":
                lines.append(f"| {variant}{title} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    written = README.partition("| Times as fast |")[2].partition("\n\n")[0].splitlines()[2:]
    assert written == lines
