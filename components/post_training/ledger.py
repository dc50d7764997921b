"""The ledger of prompt groups: each is issued, finished, and then trained or dropped, exactly once.

A file of JSON lines that is only appended to. Each record names the hash of the one before, so that a changed, missing
or reordered line is found; the last record of a run that ended in order counts them all, so that a cut tail is found.

| event | fields |
|---|---|
| issued | group, task, family, version (of the learner's weights at that time) |
| again | group, version (of the weights at that time); it was under way when an earlier try was stopped |
| finished | group, versions (lowest and highest of its sampled tokens) |
| trained | group, step, version (of the weights that learned from it), staleness (version - lowest of its tokens) |
| dropped | group, reason |
| closed | counts |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.runtime.contracts import digest

START = "0" * 64


class LedgerError(ValueError):
    """The ledger is damaged, or a group was lost, trained twice, or trained and dropped."""


class Ledger:
    """Writes the ledger of one run. `path` None keeps records in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._stream = path.open("x", buffering=1) if path else None
        self._previous = START
        self._open: set[int] = set()
        self._lost: set[int] = set()  # of an earlier try, and not issued again yet
        self.records: list[dict[str, Any]] = []

    def _write(self, event: str, **fields: Any) -> None:
        record = {"event": event, **fields, "previous": self._previous}
        self._previous = record["hash"] = digest(record)
        self.records.append(record)
        if self._stream:
            self._stream.write(json.dumps(record) + "\n")

    def go_on(self, records: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Begin with the `records` of an earlier try. Returns the groups that were under way in it, with their tasks.

        They stay open: each has to be issued again, or is dropped when the ledger is closed.
        """
        assert not self.records
        for record in records:
            self.records.append(dict(record))
            if self._stream:
                self._stream.write(json.dumps(record) + "\n")
            if record["event"] in ("issued", "again", "finished"):
                self._open.add(record["group"])
            else:
                self._open.discard(record["group"])
            self._previous = record["hash"]
        tasks = {record["group"]: record["task"] for record in records if record["event"] == "issued"}
        self._lost = set(self._open)
        return {group: tasks[group] for group in sorted(self._lost)}

    def issued(self, group: int, task: str, family: str, version: int) -> None:
        """A group is to be played; one that was under way in an earlier try is to be played again."""
        if group in self._lost:
            self._lost.discard(group)
            self._write("again", group=group, version=version)
            return
        self._open.add(group)
        self._write("issued", group=group, task=task, family=family, version=version)

    def finished(self, group: int, versions: tuple[int, int]) -> None:
        self._write("finished", group=group, versions=list(versions))

    def trained(self, group: int, step: int, version: int, staleness: int) -> None:
        self._open.discard(group)
        self._write("trained", group=group, step=step, version=version, staleness=staleness)

    def dropped(self, group: int, reason: str) -> None:
        self._open.discard(group)
        self._write("dropped", group=group, reason=reason)

    def close(self, reason: str) -> dict[str, Any]:
        """Drop what is still open for `reason`, write the counts, and return them with the last hash."""
        for group in sorted(self._open):
            self.dropped(group, reason)
        counts = ledger_counts(self.records)
        self._write("closed", counts=counts)
        if self._stream:
            self._stream.close()
            self._stream = None
        return {**counts, "hash": self._previous}


def ledger_counts(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many groups were issued, finished, trained, dropped, and dropped for each reason (up to its colon)."""
    counts: Counter[str] = Counter({"issued": 0, "finished": 0, "trained": 0, "dropped": 0})
    for record in records:
        counts[record["event"]] += 1
        if record["event"] == "dropped":
            counts[f"dropped_{record['reason'].split(':')[0].replace(' ', '_')}"] += 1
    return {name: counts[name] for name in sorted(counts)}


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The records of a ledger file. Raises LedgerError for a line that is no JSON object."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise LedgerError(f"{path}, line {number}: {error}") from error
        if not isinstance(record, dict):
            raise LedgerError(f"{path}, line {number} is no JSON object")
        records.append(record)
    return records


def check_ledger(records: Sequence[Mapping[str, Any]], *, ended: bool = True) -> dict[str, int]:
    """Check the chain and every group's way; returns the counts.

    ended: the run ended in order, so that the ledger must be closed and every group trained or dropped. Without it
    (the run was killed) groups may still be open. Raises LedgerError that names the first thing that is wrong.
    """
    previous = START
    state: dict[int, str] = {}
    under_way = {"issued", "again", "finished"}
    before = {
        **{"issued": {""}, "again": under_way, "finished": {"issued", "again"}},
        **{"trained": {"finished"}, "dropped": under_way},
    }
    body: list[Mapping[str, Any]] = []
    for number, record in enumerate(records, start=1):
        kept = {name: value for name, value in record.items() if name != "hash"}
        if record.get("previous") != previous or record.get("hash") != digest(kept):
            raise LedgerError(f"record {number} does not continue the chain: the ledger was changed or is incomplete")
        previous = record["hash"]
        event = record["event"]
        if event == "closed":
            if number != len(records):
                raise LedgerError(f"record {number} closes the ledger, and {len(records) - number} follow")
            if record["counts"] != ledger_counts(body):
                raise LedgerError("the counts of the last record are not those of the ledger")
            continue
        if event not in before:
            raise LedgerError(f"record {number} has the unknown event {event!r}")
        group, now = record["group"], state.get(record["group"], "")
        if now not in before[event]:
            raise LedgerError(f"record {number}: group {group} is {event} after it was {now or 'never issued'}")
        state[group] = event
        body.append(record)
    if ended:
        lost = sorted(group for group, event in state.items() if event not in ("trained", "dropped"))
        if lost:
            raise LedgerError(f"{len(lost)} groups were neither trained nor dropped, the first is {lost[0]}")
        if not records or records[-1]["event"] != "closed":
            raise LedgerError("the ledger is not closed: its end is missing")
    return ledger_counts(body)
