"""The memory gates of a test session: compares figures with the baselines, and stores new ones."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from lowmem.testing.baseline import (
    Figures,
    Key,
    compare,
    count_text,
    difference_table,
    read_figures,
    stored_keys,
    write_figures,
)
from lowmem.testing.verdicts import Row, Verdict
from lowmem.transforms.summary import aligned

_SEPARATOR = " | "


@dataclass(frozen=True)
class Judged:
    """The verdict of one gate: "same", "changed", "unknown", "stored" or "updated".

    ``name`` is the node id of its test, and the gate's ``name=``, if any; ``stored`` are the figures of the baseline.
    """

    name: str
    file: str
    figures: Figures
    verdict: str
    stored: Figures | None = None


@dataclass
class MemoryGates:
    """Compares figures with the baselines in a directory, and writes these when the session ends.

    Args:
        root: of the user's project; paths in messages are relative to it.
        directory: of the baselines.
        mode: "compare" fails where figures differ or are missing, "store" stores missing ones, "update" stores all.
    """

    root: Path
    directory: Path
    mode: str = "compare"
    rows: dict[str, Judged] = field(default_factory=dict)  # by name; a rerun of a test replaces its rows
    pending: dict[Key, dict[str, Figures]] = field(default_factory=dict)  # figures to store, by key
    vanished: set[tuple[Key, str]] = field(default_factory=set)  # (key, name) of stored gates without a test
    _stored: dict[Key, dict[str, Figures] | Exception | None] = field(default_factory=dict)  # None: no file

    def judge(self, name: str, test: str, key: Key, figures: Figures) -> str | None:
        """Compare figures with the stored ones, or mark them to be stored; return why the gate fails, or None.

        The node id of its test is for the command that stores the figures. A baseline that is damaged is an error.
        """
        path = key.path(self.directory)
        known = self.read(key)
        stored = (known or {}).get(name)
        changes = [row for row in compare(name, stored or {}, figures) if row.verdict != "same"]
        verdict = "unknown" if stored is None else "changed" if changes else "same"
        if (verdict, self.mode) in (("unknown", "store"), ("unknown", "update"), ("changed", "update")):
            self.pending.setdefault(key, {})[name] = figures
            verdict = {"unknown": "stored", "changed": "updated"}[verdict]
        elif name in self.pending.get(key, {}):
            del self.pending[key][name]  # a rerun of the test measured the stored figures
        self.rows[name] = Judged(name, self._shown(path), figures, verdict, stored)
        if verdict not in ("unknown", "changed"):
            return None
        if verdict == "unknown":
            first, said = self._why_unknown(name, key, known)
        else:
            first = f"the memory of {name} is not what {self._shown(path)} holds"
            said = ["If that is meant, store the new figures, and say why in the commit's message:"]
            if figures.get("trainable_bytes") == 0:
                said = ["Nothing in the model trains: its step is a forward alone.", "", *said]
        command = f"    pytest --lowmem-baseline={'store' if verdict == 'unknown' else 'update'} {shlex.quote(test)}"
        return "\n".join([first, "", *difference_table(changes), "", *said, command])

    def read(self, key: Key) -> dict[str, Figures] | None:
        """Return the stored figures of a key, or None without a file, which is read for the first gate alone."""
        if key not in self._stored:
            path = key.path(self.directory)
            try:
                self._stored[key] = read_figures(path, key) if path.exists() else None
            except (ValueError, OSError) as error:
                self._stored[key] = error
        known = self._stored[key]
        if isinstance(known, Exception):
            raise known
        return known

    def _why_unknown(self, name: str, key: Key, known: dict[str, Figures] | None) -> tuple[str, list[str]]:
        path = self._shown(key.path(self.directory))
        if known is not None:
            first = f"{path} holds no figures of {name}: it is new, or was renamed"
            return first, ["Store them, and commit the file:"]
        first = f"no figures are stored for torch {key.torch} and backend {key.backend}"
        if not (others := stored_keys(self.directory)):
            return f"{first}: there is no {path}", ["Store them, and commit the file:"]
        remedy = f"Run with one of these, or store new figures and commit {path}:"
        return f"{first}: {self._shown(self.directory)} holds those for {others}", [remedy]

    def note_vanished(
        self, collected: Collection[str], is_complete: Callable[[str], bool], passed: Collection[str]
    ) -> None:
        """Add to ``vanished`` the stored gates that no test has any more.

        Args:
            collected: node ids of the tests of this session, selected or not.
            is_complete: whether all tests of a file, by its name, are among them.
            passed: node ids of the tests that ran to their end, and so called all of their gates.
        """
        for key, stored in self._stored.items():
            for name in (stored.keys() if isinstance(stored, dict) else set()) - self.rows.keys():
                test = next((test for test in collected if belongs_to(name, test)), None)
                if test in passed or (test is None and is_complete(name.partition("::")[0])):
                    self.vanished.add((key, name))

    def write(self) -> list[str]:
        """Write pending figures, without vanished gates in mode "update", and return the written files.

        A file that is damaged, or cannot be written, is unchanged.
        """
        self.vanished = {(key, name) for key, name in self.vanished if name not in self.rows}
        removed = self.vanished if self.mode == "update" else set()
        written = []
        for key in dict.fromkeys([*(key for key, own in self.pending.items() if own), *(key for key, _ in removed)]):
            path = key.path(self.directory)
            figures = (read_figures(path, key) if path.exists() else {}) | self.pending.get(key, {})
            write_figures(path, key, {name: of for name, of in figures.items() if (key, name) not in removed})
            written.append(self._shown(path))
        return written

    def dump(self) -> dict[str, Any]:
        """Return the state of a pytest-xdist worker as JSON-serializable data."""
        return {
            "rows": [asdict(row) for row in self.rows.values()],
            "pending": [[astuple(key), figures] for key, figures in self.pending.items()],
            "vanished": [[astuple(key), name] for key, name in self.vanished],
        }

    def merge(self, dumped: dict[str, Any]) -> None:
        """Merge the ``dump`` of a worker."""
        self.rows |= {row["name"]: Judged(**row) for row in dumped["rows"]}
        for key, figures in dumped["pending"]:
            self.pending.setdefault(Key(*key), {}).update(figures)
        self.vanished |= {(Key(*key), name) for key, name in dumped["vanished"]}

    def table(self) -> list[str]:
        """Return the lines of a table of the verdicts, with stored, forward, step and peak bytes."""
        shown = ("stored", "forward", "step", "peak")
        figures = [name for name in shown if any(f"{name}_bytes" in row.figures for row in self.rows.values())]
        rows = [
            (row.verdict, *(count_text(row.figures.get(f"{name}_bytes")) for name in figures), row.name)
            for row in sorted(self.rows.values(), key=lambda row: row.name)
        ]
        return aligned([("verdict", *figures, "gate"), *rows], right=range(1, len(figures) + 1))

    def verdict(self, passed: bool) -> Verdict:
        """Return the verdict of a session whose tests passed or not, with a row for each figure."""
        rows = self.missing()
        for gate in self.rows.values():
            stored = gate.figures if gate.verdict in ("stored", "updated") else gate.stored or {}
            rows += compare(gate.name, stored, gate.figures)
        files = ", ".join(sorted({gate.file for gate in self.rows.values()}))
        passed = passed and not self.missing()
        return Verdict("memory", passed, files, "this run", {}, sorted(rows, key=lambda row: row.name))

    def missing(self) -> list[Row]:
        """Return a row for each stored gate without a test, which fails the session; none if these are removed."""
        lines = () if self.mode == "update" else self.vanished_lines().items()
        return [Row(name, "", verdict="missing", says=line) for name, line in lines]

    def vanished_lines(self) -> dict[str, str]:
        """Return a line for each stored gate without a test, by its name."""
        remedy = "bring its test back, or remove its figures: delete them there, or run with --lowmem-baseline=update"
        return {
            name: f"{self._shown(key.path(self.directory))} holds {name}, which no test measures: "
            f"{'removed' if self.mode == 'update' else remedy}"
            for key, name in sorted(self.vanished, key=lambda entry: entry[1])
        }

    def _shown(self, path: Path) -> str:
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


def entry_name(test: str, name: str) -> str:
    """Return the name under which a gate of a test is stored."""
    return f"{test}{_SEPARATOR}{name}" if name else test


def belongs_to(entry: str, test: str) -> bool:
    """Whether a stored name belongs to a test."""
    return entry == test or entry.startswith(test + _SEPARATOR)
