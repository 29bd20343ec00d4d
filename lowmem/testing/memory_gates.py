"""The memory gates of a test session: compares figures with the baselines, and stores new ones."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from lowmem.testing.gate_verdicts import FigureComparison, GateVerdict
from lowmem.testing.memory_baseline import (
    BaselineKey,
    Figures,
    byte_count_text,
    comparison_rows,
    difference_table_lines,
    read_baseline_figures,
    stored_torch_versions_text,
    write_baseline_figures,
)
from lowmem.transforms.memory_plan import parse_byte_count
from lowmem.transforms.model_summary import aligned_table_lines

_SEPARATOR = " | "


@dataclass(frozen=True)
class GateFiguresAndVerdict:
    """The verdict of one gate: "same", "changed", "unknown", "stored", "updated", or "over" its ceiling.

    ``name`` is the node id of its test, and the gate's ``name=``, if any; ``stored`` are the figures of the baseline.
    """

    name: str
    file: str
    figures: Figures
    verdict: str
    stored: Figures | None = None
    over_ceiling: FigureComparison | None = None


@dataclass
class MemoryGateSession:
    """Compares figures with the baselines in a directory, and writes these when the session ends.

    Args:
        root: of the user's project; paths in messages are relative to it.
        directory: of the baselines.
        mode: "compare" fails where figures differ or are missing, "store" stores missing ones, "update" stores all.
    """

    root: Path
    directory: Path
    mode: str = "compare"
    rows: dict[str, GateFiguresAndVerdict] = field(
        default_factory=dict
    )  # by name; a rerun of a test replaces its rows
    pending: dict[BaselineKey, dict[str, Figures]] = field(default_factory=dict)  # figures to store, by key
    vanished: set[tuple[BaselineKey, str]] = field(default_factory=set)  # (key, name) of stored gates without a test
    _stored: dict[BaselineKey, dict[str, Figures] | Exception | None] = field(default_factory=dict)  # None: no file

    def judge_figures_and_explain_failure(
        self,
        gate_name: str,
        test_id: str,
        key: BaselineKey,
        figures: Figures,
        over_ceiling: FigureComparison | None = None,
    ) -> str | None:
        """Compare figures with the stored ones, or mark them to be stored; return why the gate fails, or None.

        The node id of its test is for the command that stores the figures. A baseline that is damaged is an error.
        Figures over their ceiling fail in every mode, and are not stored.
        """
        path = key.file_path(self.directory)
        known = self.read_figures_cached_or_none(key)
        stored = (known or {}).get(gate_name)
        changes = [row for row in comparison_rows(gate_name, stored or {}, figures) if row.verdict != "same"]
        verdict = "unknown" if stored is None else "changed" if changes else "same"
        if over_ceiling is not None:
            verdict = "over"
        if (verdict, self.mode) in (("unknown", "store"), ("unknown", "update"), ("changed", "update")):
            self.pending.setdefault(key, {})[gate_name] = figures
            verdict = {"unknown": "stored", "changed": "updated"}[verdict]
        elif gate_name in self.pending.get(key, {}):
            # A rerun of the test measured the stored figures
            del self.pending[key][gate_name]
        self.rows[gate_name] = GateFiguresAndVerdict(
            gate_name, self._path_relative_to_root(path), figures, verdict, stored, over_ceiling
        )
        if over_ceiling is not None:
            return "\n".join([over_ceiling.says, "", *difference_table_lines(changes)])
        if verdict not in ("unknown", "changed"):
            return None
        if verdict == "unknown":
            first, said = self._unknown_reason_and_remedy(gate_name, key, known)
        else:
            first = f"the memory of {gate_name} is not what {self._path_relative_to_root(path)} holds"
            said = ["If that is meant, store the new figures, and say why in the commit's message:"]
            if figures.get("trainable_bytes") == 0:
                said = ["Nothing in the model trains: its step is a forward alone.", "", *said]
        command = (
            f"    pytest --lowmem-baseline={'store' if verdict == 'unknown' else 'update'} {shlex.quote(test_id)}"
        )
        return "\n".join([first, "", *difference_table_lines(changes), "", *said, command])

    def read_figures_cached_or_none(self, key: BaselineKey) -> dict[str, Figures] | None:
        """Return the stored figures of a key, or None without a file, which is read for the first gate alone."""
        if key not in self._stored:
            path = key.file_path(self.directory)
            try:
                self._stored[key] = read_baseline_figures(path, key) if path.exists() else None
            except (ValueError, OSError) as error:
                self._stored[key] = error
        known = self._stored[key]
        if isinstance(known, Exception):
            raise known
        return known

    def _unknown_reason_and_remedy(
        self, gate_name: str, key: BaselineKey, stored_figures: dict[str, Figures] | None
    ) -> tuple[str, list[str]]:
        path = self._path_relative_to_root(key.file_path(self.directory))
        if stored_figures is not None:
            first = f"{path} holds no figures of {gate_name}: it is new, or was renamed"
            return first, ["Store them, and commit the file:"]
        first = f"no figures are stored for torch {key.torch} and backend {key.backend}"
        if not (available := stored_torch_versions_text(self.directory)):
            return f"{first}: there is no {path}", ["Store them, and commit the file:"]
        remedy = f"Run with one of these, or store new figures and commit {path}:"
        return f"{first}: {self._path_relative_to_root(self.directory)} holds those for {available}", [remedy]

    def record_vanished_gates(
        self, collected_tests: Collection[str], is_file_complete: Callable[[str], bool], passed_tests: Collection[str]
    ) -> None:
        """Add to ``vanished`` the stored gates that no test has any more.

        Args:
            collected_tests: node ids of the tests of this session, selected or not.
            is_file_complete: whether all tests of a file, by its name, are among them.
            passed_tests: node ids of the tests that ran to their end, and so called all of their gates.
        """
        for key, stored in self._stored.items():
            for name in (stored.keys() if isinstance(stored, dict) else set()) - self.rows.keys():
                test = next((test for test in collected_tests if is_gate_of_test(name, test)), None)
                if test in passed_tests or (test is None and is_file_complete(name.partition("::")[0])):
                    self.vanished.add((key, name))

    def write_pending_and_drop_vanished(self) -> list[str]:
        """Write pending figures, without vanished gates in mode "update", and return the written files.

        A file that is damaged, or cannot be written, is unchanged.
        """
        self.vanished = {(key, name) for key, name in self.vanished if name not in self.rows}
        removed = self.vanished if self.mode == "update" else set()
        written = []
        for key in dict.fromkeys(
            [*(key for key, pending_figures in self.pending.items() if pending_figures), *(key for key, _ in removed)]
        ):
            path = key.file_path(self.directory)
            figures = (read_baseline_figures(path, key) if path.exists() else {}) | self.pending.get(key, {})
            write_baseline_figures(
                path, key, {name: of for name, of in figures.items() if (key, name) not in removed}
            )
            written.append(self._path_relative_to_root(path))
        return written

    def serializable_state(self) -> dict[str, Any]:
        """Return the state of a pytest-xdist worker as JSON-serializable data."""
        return {
            "rows": [asdict(row) for row in self.rows.values()],
            "pending": [[astuple(key), figures] for key, figures in self.pending.items()],
            "vanished": [[astuple(key), name] for key, name in self.vanished],
        }

    def merge_worker_state(self, worker_state: dict[str, Any]) -> None:
        """Merge the ``serializable_state`` of a worker."""
        for row in worker_state["rows"]:
            over_ceiling = FigureComparison(**row["over_ceiling"]) if row["over_ceiling"] else None
            self.rows[row["name"]] = GateFiguresAndVerdict(**row | {"over_ceiling": over_ceiling})
        for key, figures in worker_state["pending"]:
            self.pending.setdefault(BaselineKey(*key), {}).update(figures)
        self.vanished |= {(BaselineKey(*key), name) for key, name in worker_state["vanished"]}

    def verdict_table_lines(self) -> list[str]:
        """Return the lines of a table of the verdicts, with stored, forward, step and peak bytes."""
        shown = ("stored", "forward", "step", "peak")
        figures = [name for name in shown if any(f"{name}_bytes" in row.figures for row in self.rows.values())]
        rows = [
            (row.verdict, *(byte_count_text(row.figures.get(f"{name}_bytes")) for name in figures), row.name)
            for row in sorted(self.rows.values(), key=lambda row: row.name)
        ]
        return aligned_table_lines([("verdict", *figures, "gate"), *rows], right_aligned=range(1, len(figures) + 1))

    def session_verdict(self, tests_passed: bool) -> GateVerdict:
        """Return the verdict of a session whose tests passed or not, with a row for each figure."""
        rows = self.missing_gate_rows()
        for gate in self.rows.values():
            stored = gate.figures if gate.verdict in ("stored", "updated") else gate.stored or {}
            rows += comparison_rows(gate.name, stored, gate.figures)
            rows += [gate.over_ceiling] if gate.over_ceiling else []
        files = ", ".join(sorted({gate.file for gate in self.rows.values()}))
        tests_passed = tests_passed and not self.missing_gate_rows()
        return GateVerdict("memory", tests_passed, files, "this run", {}, sorted(rows, key=lambda row: row.name))

    def missing_gate_rows(self) -> list[FigureComparison]:
        """Return a row for each stored gate without a test, which fails the session; none if these are removed."""
        lines = () if self.mode == "update" else self.vanished_messages_by_gate().items()
        return [FigureComparison(name, "", verdict="missing", says=line) for name, line in lines]

    def vanished_messages_by_gate(self) -> dict[str, str]:
        """Return a line for each stored gate without a test, by its name."""
        remedy = "bring its test back, or remove its figures: delete them there, or run with --lowmem-baseline=update"
        return {
            name: f"{self._path_relative_to_root(key.file_path(self.directory))} holds {name}, which no test "
            "measures: "
            f"{'removed' if self.mode == 'update' else remedy}"
            for key, name in sorted(self.vanished, key=lambda entry: entry[1])
        }

    def _path_relative_to_root(self, path: Path) -> str:
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


def parse_ceiling(at_most: str | int | None) -> int | None:
    """Return the bytes of a gate's ``at_most``, or None; a ValueError or TypeError says what a size looks like."""
    try:
        return None if at_most is None else parse_byte_count(at_most)
    except (TypeError, ValueError) as error:
        raise type(error)(f"at_most={error}") from None


def ceiling_excess(gate_name: str, at_most: str | int | None, total_bytes: int) -> FigureComparison | None:
    """Return the row of a gate that takes more than its ``at_most``, or None."""
    ceiling = parse_ceiling(at_most)
    if ceiling is None or total_bytes <= ceiling:
        return None
    says = (
        f"{gate_name} takes {byte_count_text(total_bytes)} bytes, and at_most={at_most!r} allows "
        f"{byte_count_text(ceiling)}: {byte_count_text(total_bytes - ceiling)} too many; make it smaller, or raise "
        "at_most"
    )
    return FigureComparison(gate_name, "at_most", ceiling, total_bytes, verdict="grew", says=says)


def stored_gate_name(test_id: str, gate_name: str) -> str:
    """Return the name under which a gate of a test is stored."""
    return f"{test_id}{_SEPARATOR}{gate_name}" if gate_name else test_id


def is_gate_of_test(stored_name: str, test_id: str) -> bool:
    """Whether a stored name belongs to a test."""
    return stored_name == test_id or stored_name.startswith(test_id + _SEPARATOR)
