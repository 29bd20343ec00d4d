"""The pages' code runs, their tables are what the commands print, and what they name and link to exists.

The pages are the README, CONTRIBUTING and all of ``docs/``; what is in guides runs in ``tests/test_guides.py``.
"""

import configparser
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import lowmem
from lowmem import backend, build, measure
from lowmem.__main__ import main
from tests.compiled import on_threads

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TECHNIQUES = ROOT / "docs" / "guides" / "techniques.md"
RESULTS = ROOT / "docs" / "guides" / "results-and-quality.md"
FORMAT = ROOT / "docs" / "format.md"
FOUR_BITS = ROOT / "docs" / "four-bits.md"  # tests/test_four_bits.py
GATES = "docs/guides/gate-your-own-model.md"  # the files of a project: tests/test_guide.py
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf8") for page in PAGES}
BLOCKS = [
    (name, language, code)
    for name, text in TEXTS.items()
    if name != GATES
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
]
PYTHON = [
    pytest.param(name, code, id=f"{name}-{number}")
    for number, (name, language, code) in enumerate(BLOCKS)
    if language == "python" and not name.startswith("docs/guides/") and ROOT / name not in (FORMAT, FOUR_BITS)
]
COMMANDS = [
    line
    for name, language, code in BLOCKS
    for line in (code.splitlines() if language == "bash" else ())
    if not (name.startswith("docs/guides/") and line.startswith(("lowmem ", "hf ")))
]
TOX = [line for line in COMMANDS if line.startswith("tox ")]
PYTEST = [line for line in COMMANDS if line.startswith("pytest ")]
SET_UP = ["pip install . && lowmem stats", "pip install tox && tox"]
# tests/tools/test_hub_arguments.py runs them
ON_YOUR_DATA = [line for line in COMMANDS if line.startswith(("lowmem fit ", "lowmem generate ", "lowmem export "))]
TABLES = [
    table
    for text in TEXTS.values()
    for table in re.findall(r"<!-- lowmem (.*?) -->\n(.*?)<!-- end -->", text, re.DOTALL)
]


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_every_python_block_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "page"})


def test_the_code_that_reads_a_file_by_its_description_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = FORMAT.read_text(encoding="utf8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/format.md", "exec"), {"__name__": "format"})
    assert text.count("<64 hexadecimal digits>") == 1


def test_every_other_command_is_one_that_the_project_defines():
    assert set(COMMANDS) == {*TOX, *PYTEST, *SET_UP, *ON_YOUR_DATA}
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    for line in TOX:
        name = shlex.split(line)[2]
        assert f"testenv:{name}" in tox or re.fullmatch(r"py3\d+-torch(24|29|213)", name)
    for line in PYTEST:
        assert (ROOT / shlex.split(line)[1]).is_dir()
    assert SET_UP[1] in (ROOT / ".ci" / "run").read_text()


def test_the_readme_has_the_two_commands_and_one_picture():
    text = README.read_text(encoding="utf8")
    assert [line for line in text.splitlines() if line in SET_UP] == SET_UP
    assert text.count("<picture>") == 1
    assert len(text.splitlines()) <= 150


def numbers(cell):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", cell)]


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("row", "variant"),
    [
        ("Half precision", "half_precision"),
        ("8-bit", "eight_bit"),
        ("4-bit", "four_bit"),
        ("LoRA on half precision", "lora"),
        ("QLoRA", "qlora_4bit"),
        ("LoRA on 8-bit", "qlora_8bit"),
    ],
)
def test_the_table_of_techniques_has_the_measured_bytes(row, variant):
    lines = TECHNIQUES.read_text(encoding="utf8").splitlines()
    line = next(line for line in lines if line.startswith(f"| {row} |"))
    assert f"| {measure.theoretical_bytes(build(variant)) / 2**20:.2f} MiB |" in line


def test_the_speed_table_is_that_of_the_stored_run():
    run = json.loads((ROOT / "benchmarks" / "baselines" / "0001_baseline.json").read_text())
    ratios = {
        bench["name"]: bench["stats"]["min"] / bench["extra_info"]["reference_seconds"]
        for bench in run["benchmarks"]
        if "reference_seconds" in bench["extra_info"]
    }
    lines = []
    titles = {"": "", "_in_bfloat16": ", bfloat16", "_in_int8": ", 8-bit integers"}
    for test, title in ((f"test_inference{what}", title) for what, title in titles.items()):
        for variant in dict.fromkeys(re.findall(rf"{test}\[(\w+)-batch1\]", " ".join(ratios))):
            cells = [1 / ratios[f"{test}[{variant}-batch{batch}]"] for batch in (1, 8, 32, 128, 512)]
            if variant != "bignet":
                lines.append(f"| {variant}{title} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    text = RESULTS.read_text(encoding="utf8")
    written = text.partition("| Times as fast |")[2].partition("\n\n")[0].splitlines()[2:]
    assert written == lines


def test_the_table_of_a_step_s_memory_is_the_stored_one():
    newest = max((ROOT / "benchmarks" / "memory").glob("avx2-torch*.json"))
    figures = json.loads(newest.read_text())["figures"]
    rows = {"plain-adamw": "AdamW", "lean-adamw": '"lean", AdamW'}
    rows |= {"plain-adamw8bit": "`AdamW8bit`", "lean-adamw8bit": '"lean", `AdamW8bit`'}
    parts = "weights", "adapters", "gradients", "optimizer", "activations", "scratch"
    for case, name in rows.items():
        stored = figures[f"benchmarks/test_training.py::test_training_memory[{case}]"]
        cells = " | ".join(f"{stored[f'{part}_bytes'] / 2**20:.2f}" for part in parts)
        assert f"| {name} | {cells} |" in TEXTS["docs/guides/will-it-fit.md"]


def test_every_public_name_stands_in_one_page_of_the_api():
    pages = "".join(text for name, text in TEXTS.items() if name.startswith("docs/api/"))
    documented = re.findall(
        r"^\.\. (?:auto(?:class|exception|function)|py:data):: lowmem\.(\w+)$", pages, re.MULTILINE
    )
    assert sorted(documented) == sorted(lowmem.__all__)


@pytest.fixture
def on_the_site(monkeypatch):
    """Return what gives the text of each page of docs/, and what hooks of the site make of it, by name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    site = runpy.run_path(str(ROOT / "docs" / "conf.py"))

    def pages(*hooks):
        for text in (text for name, text in TEXTS.items() if name.startswith("docs/")):
            source = [text]
            for hook in hooks:
                site[hook](None, "page", source)
            yield text, source[0]

    return pages


def test_the_site_shows_every_picture_in_both_themes(on_the_site):
    pictures = 0
    for _, shown in on_the_site("show_readme", "show_both_themes"):
        assert "\n<picture>" not in shown
        assert shown.count(":class: only-light\n") == shown.count(":class: only-dark\n")
        pictures += shown.count(":class: only-dark\n")
    assert pictures == 4  # memory, speed, training, and the README's


def test_the_index_has_the_readme_up_to_its_links(on_the_site):
    index = next(shown for text, shown in on_the_site("show_readme") if "{readme}" in text)
    assert TEXTS["README.md"].partition("\n## Where")[0].count("\n## ") == index.count("\n## ")
    targets = [one or other for one, other in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", index)]
    for target in targets:
        assert target.startswith("https:") or (ROOT / "docs" / target.partition("#")[0]).exists(), target


def test_links_to_the_front_page_lead_to_the_index_on_the_site(on_the_site):
    links = 0
    for _, shown in on_the_site("lead_to_the_index"):
        links += shown.count("](../index.md#")
        assert "README.md#" not in shown
    assert links == 2


def without_code(text):
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_to_a_page_and_heading_that_exist(name):
    text = without_code(TEXTS[name])
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in (one or other for one, other in targets):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text(encoding="utf8")), target
