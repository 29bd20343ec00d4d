"""The guide to users' own gates: its files are whole, its actions are those of this repository, and ``tox -e guide``
fails where a step ends otherwise than the page says. That it ends so is what ``tox -e guide`` tries."""

import importlib.util
import re
from pathlib import Path

import pytest

from lowmem.testing.memory import stored_figures

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("guide", ROOT / ".ci" / "guide.py")
guide = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(guide)
PAGE = guide.GUIDE.read_text(encoding="utf8")
FILES = dict(guide.FILE.findall(PAGE))


def test_the_page_holds_the_files_of_a_project():
    assert FILES.keys() == {"my_model.py", "test_my_model.py", "requirements.txt", ".github/workflows/gate.yml"}
    lines = [line for line in FILES["test_my_model.py"].splitlines() if line]
    assert len(lines) <= 10


def test_the_figures_that_the_page_shows_are_those_of_its_model():
    own = {}
    exec(compile(FILES["my_model.py"], "my_model.py", "exec"), own)
    (shown,) = guide.SHOWN_FAILURE.findall(PAGE)
    rows = {
        cells[0]: cells[1:] for line in shown.splitlines() if (cells := line.split()) and cells[0].endswith("_bytes")
    }
    for width, column in ((2048, 0), (2049, 1)):
        figures = stored_figures(own["my_model"](width))
        for figure in ("float32_bytes", "stored_bytes", "trainable_bytes"):
            assert rows[figure][column] == f"{figures[figure]:,}"
    for before, after, difference in rows.values():
        assert int(after.replace(",", "")) - int(before.replace(",", "")) == int(difference.replace(",", ""))


def test_the_workflow_pins_the_actions_that_this_repository_uses_and_reads_only():
    workflow = FILES[".github/workflows/gate.yml"]
    used = set(re.findall(r"uses: (.*)", workflow))
    ours = set(re.findall(r"uses: (.*)", (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf8")))
    assert len(used) == 2
    assert used <= ours
    assert re.findall(r"^permissions: (.*)$", workflow, re.MULTILINE) == ["{}"]
    assert re.findall(r"^      (\w+: read)", workflow, re.MULTILINE) == ["contents: read"]
    assert "persist-credentials: false" in workflow


class Steps:
    """What the guide's commands print and end with, in their order."""

    def __init__(self, codes, shown):
        self.codes, self.seen = list(codes), []
        self.shown = shown

    def __call__(self, command, directory, check=False):
        self.seen.append(command[3:])
        code = self.codes.pop(0)
        return code, self.shown + "portable-torch2.13.json\n" if code else ""


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Return a function that follows the page, where steps end with these codes and a failure reads so."""
    (tmp_path / "my_model.py").write_text(FILES["my_model.py"])
    (shown,) = guide.SHOWN_FAILURE.findall(PAGE)

    def follow(codes, shown=shown):
        steps = Steps(codes, shown)
        monkeypatch.setattr(guide, "run", steps)
        return guide.follow(PAGE, tmp_path, Path("python")), steps

    return follow


def test_a_guide_passes_where_its_steps_end_and_read_as_it_says(follow, tmp_path, capsys):
    code, steps = follow([1, 0, 0, 1, 0, 0])
    assert code == 0
    compares = ["test_my_model.py"]
    updates = ["--lowmem-baseline=update", "test_my_model.py::test_my_model_stays_small"]
    assert steps.seen == [compares, ["--lowmem-baseline=store"], compares, compares, updates, compares]
    assert "width=2049" in (tmp_path / "my_model.py").read_text()
    for step in range(6):
        codes = [1, 0, 0, 1, 0, 0]
        codes[step] = 1 - codes[step]
        (tmp_path / "my_model.py").write_text(FILES["my_model.py"])
        assert follow(codes)[0] == 1
        assert "and the guide says" in capsys.readouterr().err
    (tmp_path / "my_model.py").write_text(FILES["my_model.py"])
    assert follow([1, 0, 0, 1, 0, 0], shown="another text\n")[0] == 1
    assert "something else than the guide shows" in capsys.readouterr().err
