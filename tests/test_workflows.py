"""The workflows run what tox.ini has, and one check needs all of them."""

import configparser
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKFLOWS = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
TOX = configparser.ConfigParser(interpolation=None)
TOX.read(ROOT / "tox.ini")


def environments(label=""):
    """Return the names of tox's environments, or of those that carry a label."""
    sections = [name for name in TOX.sections() if name.startswith("testenv:")]
    labelled = [name for name in sections if not label or TOX[name].get("labels", "") == label]
    return {leg for name in labelled for leg in name.removeprefix("testenv:").strip("{}").split(",")}


def test_every_leg_of_the_matrix_runs_on_the_python_that_it_names():
    legs = re.findall(r'python: "3\.(\d+)"(?:, |\n +)leg: ([\w-]+)', WORKFLOWS["ci"])
    assert {leg for _, leg in legs} == environments("matrix")
    assert all(leg.startswith(f"py3{minor}-") for minor, leg in legs if leg != "lowest")
    assert {f"3.{minor}" for minor, leg in legs if leg == "lowest"} == {
        TOX["testenv:lowest"]["base_python"].removeprefix("python")
    }


def test_the_workflows_name_environments_of_tox():
    named = {name for text in WORKFLOWS.values() for name in re.findall(r"tox -e ([\w-]+)", text)}
    assert {"lint", "actions", "types", "wheels", "sdist", "bench", "gate", "docs", "minilm", "gpu"} <= named
    listed = re.findall(r" (?:what|others): \[([\w, ]+)\]", WORKFLOWS["nightly"])  # by a variable, as the legs are
    by_variable = {name for names in listed for name in names.split(", ")}
    assert {"zoo", "transformers", "formats", "faults", "mutants"} <= by_variable
    assert (named | by_variable) - environments() == set()


def test_tox_leaves_the_place_of_the_folder_that_contributing_makes():
    """Newer ones write a file .venv otherwise."""
    assert "python -m venv .venv" in (ROOT / "CONTRIBUTING.md").read_text()
    assert TOX["tox"]["venv_redirect"] == "false"


def test_every_baseline_of_memory_has_the_figures_of_the_same_benchmarks():
    paths = [path for path in (ROOT / "benchmarks/memory").glob("*.json") if not path.stem.startswith("resident")]
    names = {path.name: set(json.loads(path.read_text())["figures"]) for path in paths}
    assert len(names) >= 6
    assert {frozenset(own) for own in names.values()} == {frozenset(names["avx2-torch2.13.json"])}


def test_the_required_check_needs_every_job():
    jobs = re.findall(r"^  (\w+):$", WORKFLOWS["ci"].partition("\njobs:\n")[2], flags=re.MULTILINE)
    needs = re.search(r"needs: \[([\w, ]+)\]", WORKFLOWS["ci"])
    assert jobs
    assert needs
    assert sorted([*needs[1].split(", "), "required"]) == sorted(jobs)


def test_every_action_is_pinned_by_commit_and_says_its_version():
    uses = [line.strip() for text in WORKFLOWS.values() for line in text.splitlines() if "uses:" in line]
    assert uses
    assert [line for line in uses if not re.fullmatch(r"- uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_the_sanitizers_run_files_that_exist():
    script = (ROOT / ".ci/asan").read_text()
    (folder, names), *others = re.findall(r"(tests/[\w/]*)test_\{([\w,]+)\}\.py", script)
    assert not others
    missing = [name for name in names.split(",") if not (ROOT / folder / f"test_{name}.py").exists()]
    assert not missing, f".ci/asan names {missing} in {folder}"
