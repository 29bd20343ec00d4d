"""The memory gates of one test session: what was measured, how it compares, and what is to be stored."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from lowmem.testing.baseline import Figures, Key, compare, difference_table, layout, read_figures, write_figures

__all__ = ["Judged", "MemoryGates", "belongs_to", "entry_name"]

_SEPARATOR = " | "


@dataclass(frozen=True)
class Judged:
    """The verdict of one gate.

    Attributes:
        name: of the gate: its test, and what the test calls it.
        file: of the baseline, as messages show it.
        figures: what was measured.
        verdict: "same", "changed", "unknown", "stored" or "updated".
    """

    name: str
    file: str
    figures: Figures
    verdict: str


@dataclass
class MemoryGates:
    """Judges figures against the files of a directory, and writes these when the session ends.

    Args:
        root: of the user's project; messages name files as they are seen from there.
        directory: of the baselines.
        mode: "compare" fails where figures differ or are missing, "store" stores the missing ones, "update" all.
    """

    root: Path
    directory: Path
    mode: str = "compare"
    rows: dict[str, Judged] = field(default_factory=dict)  # by name; of a test that is run again, the last ones
    pending: dict[Key, dict[str, Figures]] = field(default_factory=dict)  # what to store, by key
    stale: set[tuple[Key, str]] = field(default_factory=set)  # stored names that nothing measures, by key
    _stored: dict[Key, dict[str, Figures] | None] = field(default_factory=dict)  # None: there is no file

    def judge(self, name: str, test: str, key: Key, figures: Figures) -> str | None:
        """Compare the figures of a gate with the stored ones, or put them down to be stored.

        Args:
            name: of the gate.
            test: the node id of its test, for the command that stores the figures.
            key: where the figures hold.
            figures: what was measured.

        Returns:
            Why the gate fails, or None.

        Raises:
            FileError: the baseline is damaged, or of another version.
            OSError: it cannot be read.
        """
        path = key.path(self.directory)
        if key not in self._stored:
            self._stored[key] = read_figures(path, key) if path.exists() else None
        known = self._stored[key]
        stored = (known or {}).get(name)
        changes = [] if stored is None else compare(name, stored, figures)
        verdict = "unknown" if stored is None else "changed" if changes else "same"
        if (verdict, self.mode) in (("unknown", "store"), ("unknown", "update"), ("changed", "update")):
            self.pending.setdefault(key, {})[name] = figures
            verdict = {"unknown": "stored", "changed": "updated"}[verdict]
        elif name in self.pending.get(key, {}):
            del self.pending[key][name]  # a rerun of the test measured what is stored
        self.rows[name] = Judged(name, self._shown(path), figures, verdict)
        if verdict == "unknown":
            return self._unknown(name, test, key, known is not None, figures)
        if verdict == "changed":
            lines = [
                f"the memory of {name} is not what {self._shown(path)} holds",
                "",
                *difference_table(changes),
                "",
            ]
            if not figures["trainable_bytes"]:
                lines += ["Nothing in the model trains: its step is a forward alone.", ""]
            lines += ["If that is meant, store the new figures, and say why in the commit's message:"]
            return "\n".join([*lines, f"    {_command('update', test)}"])
        return None

    def _unknown(self, name: str, test: str, key: Key, has_file: bool, figures: Figures) -> str:
        path = self._shown(key.path(self.directory))
        where = f"backend {key.backend} and torch {key.torch}"
        if has_file:
            lines = [f"{path} holds no figures of {name}: it is new, or was renamed"]
        elif others := sorted(file.stem for file in self.directory.glob("*-torch*.json")):
            lines = [f"no figures are stored for {where}: there is no {path}, only {', '.join(others)}"]
        else:
            lines = [f"no figures are stored for {where}: there is no {path}"]
        lines += ["", *difference_table(compare(name, {}, figures)), "", "Store them, and commit the file:"]
        return "\n".join([*lines, f"    {_command('store', test)}"])

    def note_stale(self, collected: Collection[str], files: Collection[str], passed: Collection[str]) -> None:
        """Put down the stored gates that are no more.

        Args:
            collected: node ids of the tests of this session.
            files: those of which every test was collected.
            passed: node ids of the tests that ran to their end: what they did not measure, they do not measure.
        """
        for key, stored in self._stored.items():
            for name in (stored or {}).keys() - self.rows.keys():
                file = name.partition("::")[0]
                test = next((test for test in collected if belongs_to(name, test)), None)
                gone = file in files or not (self.root / file).exists()
                if test in passed or (test is None and gone):
                    self.stale.add((key, name))

    def write(self) -> list[str]:
        """Store what is pending, remove what is stale in mode "update", and return the files that were written.

        Raises:
            FileError, OSError: a file cannot be read or written; it is as it was.
        """
        self.stale = {(key, name) for key, name in self.stale if name not in self.rows}
        removed = self.stale if self.mode == "update" else set()
        written = []
        for key in dict.fromkeys([*(key for key, own in self.pending.items() if own), *(key for key, _ in removed)]):
            path = key.path(self.directory)
            figures = (read_figures(path, key) if path.exists() else {}) | self.pending.get(key, {})
            write_figures(path, key, {name: of for name, of in figures.items() if (key, name) not in removed})
            written.append(self._shown(path))
        return written

    def dump(self) -> dict[str, Any]:
        """Return what a worker of pytest-xdist hands over, as JSON holds it."""
        return {
            "rows": [asdict(row) for row in self.rows.values()],
            "pending": [[astuple(key), figures] for key, figures in self.pending.items()],
            "stale": [[astuple(key), name] for key, name in self.stale],
        }

    def merge(self, dumped: dict[str, Any]) -> None:
        """Take over what a worker handed over."""
        self.rows |= {row["name"]: Judged(**row) for row in dumped["rows"]}
        for key, figures in dumped["pending"]:
            self.pending.setdefault(Key(*key), {}).update(figures)
        self.stale |= {(Key(*key), name) for key, name in dumped["stale"]}

    def table(self) -> list[str]:
        """Lay out the verdicts, with the figures that are more than a category."""
        heading = ("verdict", "stored", "forward", "step", "gate")
        rows = [
            (row.verdict, *(f"{row.figures[f'{figure}_bytes']:,}" for figure in heading[1:4]), row.name)
            for row in sorted(self.rows.values(), key=lambda row: row.name)
        ]
        return layout([heading, *rows], left=(0, 4))

    def stale_lines(self) -> list[str]:
        """Say which stored gates nothing measures."""
        remedy = "removed" if self.mode == "update" else "remove it, or run with --lowmem-baseline=update"
        return [
            f"{self._shown(key.path(self.directory))} holds {name}, which no test measures: {remedy}"
            for key, name in sorted(self.stale, key=lambda entry: entry[1])
        ]

    def _shown(self, path: Path) -> str:
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


def entry_name(test: str, name: str) -> str:
    """Return under which name a gate of a test is stored."""
    return f"{test}{_SEPARATOR}{name}" if name else test


def belongs_to(entry: str, test: str) -> bool:
    """Return whether a stored name is of a test."""
    return entry == test or entry.startswith(test + _SEPARATOR)


def _command(mode: str, test: str) -> str:
    return f"pytest --lowmem-baseline={mode} {shlex.quote(test)}"
