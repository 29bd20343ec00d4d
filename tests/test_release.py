"""Releases: which tags may become one, their notes, and the commands that install lowmem."""

import importlib.util
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from lowmem.version import ADDRESS, IS_PUBLISHED, __version__, install_command

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)

INSTALLS = re.compile(r"pip install\s+(?:-\S+ )*'?(\.|lowmem)(?=\[|'|\s|$)", flags=re.MULTILINE)
TAG = f"v{__version__}"


@pytest.fixture
def tree(tmp_path):
    """The files that a release changes."""
    for path in [*release.documents(ROOT), ROOT / "CHANGELOG.md", ROOT / "lowmem/version.py"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(re.sub(rf"(## \[{__version__}\] - ).*", r"\1unreleased", changes.read_text()))
    version = tmp_path / "lowmem/version.py"
    version.write_text(version.read_text().replace("IS_PUBLISHED = True", "IS_PUBLISHED = False"))
    return tmp_path


@pytest.fixture
def addressed(tree):
    """The files of a release whose project has an address."""
    version = tree / "lowmem/version.py"
    version.write_text(re.sub('ADDRESS = ".*"', 'ADDRESS = "https://example.org/lowmem"', version.read_text()))
    return tree


def named(root: Path) -> set[str]:
    """Return what the documentation's commands install."""
    return {name for path in release.documents(root) for name in INSTALLS.findall(path.read_text(encoding="utf8"))}


def test_documentation_and_errors_name_what_can_be_installed_today():
    assert named(ROOT) == {"lowmem" if IS_PUBLISHED else "."}
    assert install_command("plot") in {"pip install '.[plot]'", "pip install 'lowmem[plot]'"}
    sources = [*(ROOT / "lowmem").rglob("*.py"), ROOT / "pytest_lowmem.py"]
    assert not [path for path in sources if re.search(r"pip install '(lowmem|\.)\[", path.read_text(encoding="utf8"))]


def test_one_command_turns_all_of_them_into_the_published_name(tree):
    release.publish(tree)
    assert named(tree) == {"lowmem"}
    assert release.is_published(tree)
    # However a command is broken into lines or quoted, no extra of a checkout is left.
    assert not [path for path in release.documents(tree) if ".[" in path.read_text(encoding="utf8")]


def test_a_tag_is_released_when_version_date_and_names_are_right(addressed, capsys):
    tree = addressed
    assert release.main(["check", TAG], tree) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    release.publish(tree)
    changes = tree / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("unreleased", "2027-01-31"))
    assert release.main(["check", TAG], tree) == 0
    assert release.main(["check", "v9.9.9"], tree) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"tag 'v9.9.9' is not {TAG}, the version in lowmem/version.py",
        "CHANGELOG.md has no section of v9.9.9",
    ]


def test_the_notes_are_the_versions_own_section(tree, capsys):
    with (tree / "CHANGELOG.md").open("a") as file:
        file.write("\n## [0.0.1] - 2026-01-01\n\n- The first prototype.\n")
    assert release.main(["notes", TAG], tree) == 0
    notes = capsys.readouterr().out
    assert notes.startswith("### Added")
    assert "prototype" not in notes
    assert release.main(["notes", "v9.9.9"], tree) == 1


def wheel(folder: Path, text: str) -> Path:
    """Write a wheel with a description."""
    path = folder / "lowmem-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lowmem-0.1.0.dist-info/METADATA", f"Metadata-Version: 2.4\nName: lowmem\n\n{text}")
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a](docs/kernels.md)", "docs/kernels.md leads nowhere on the package index"),
        ('<img src="docs/images/memory-light.svg">', "docs/images/memory-light.svg leads nowhere"),
        ('<source srcset="docs/images/memory-dark.svg">', "docs/images/memory-dark.svg leads nowhere"),
        ("[a](https://example.org/lowmem/blob/v0.0.9/README.md)", f"README.md is no file of {TAG}"),
        (f"[a](https://example.org/lowmem/blob/{TAG}/docs/gone.md#a)", f"gone.md#a is no file of {TAG}"),
        ("no link at all", "has a description without links"),
        (f"[a](https://example.org/lowmem/blob/{TAG}/README.md#two-commands) [b](https://pytorch.org/) [c](#a)", ""),
    ],
)
def test_links_of_a_built_description_lead_somewhere_on_the_package_index(text, reason, addressed, tmp_path):
    found = release.dead_links(addressed, TAG, wheel(tmp_path, text))
    assert len(found) == bool(reason)
    assert reason in "".join(found)


def test_nothing_is_released_before_the_address_is_known(addressed):
    assert not [reason for reason in release.problems(addressed, TAG) if "ADDRESS" in reason]
    version = addressed / "lowmem/version.py"
    version.write_text(version.read_text().replace("https://example.org/lowmem", ""))
    (reason,) = (reason for reason in release.problems(addressed, TAG) if "ADDRESS" in reason)
    assert reason.startswith("ADDRESS in lowmem/version.py is empty")
    assert re.fullmatch(r"(https://\S+[^/])?", ADDRESS)


def test_a_commit_is_released_after_ci_has_succeeded(tmp_path, capsys):
    run = {"conclusion": "success", "status": "completed", "url": "https://example.org/1"}
    red = {**run, "conclusion": "failure"}
    unfinished = {**run, "conclusion": "", "status": "in_progress"}
    for runs, says in (
        ([run, red], "CI is green"),
        ([red, run], "not green for this commit (failure): https://example.org/1"),
        ([unfinished, run], "not green for this commit (in_progress)"),
        ([], "CI has not run on main for this commit"),
    ):
        (tmp_path / "ci.json").write_text(json.dumps(runs))
        assert release.main(["green", str(tmp_path / "ci.json")]) == (says != "CI is green")
        assert says in capsys.readouterr().out
