"""Releases: which tags may become one, their notes, and the commands that install lowmem."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from lowmem.version import IS_PUBLISHED, __version__, install_command

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


def test_a_tag_is_released_when_version_date_and_names_are_right(tree, capsys):
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
