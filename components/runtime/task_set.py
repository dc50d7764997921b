"""The task set on disk: what synthesis writes and every later stage reads.

`tasks.parquet`, `long_tasks.parquet`, `demonstrations.parquet` and `documents.parquet` have one row per record (columns
id, split, template, record; the record is the JSON of its contract type). `vocabulary.json` lists the words of the
environments, sorted, without the chat format's special words. `battery.json` says which checks removed what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import BaseModel, ValidationError

from components.runtime.contracts import Demonstration, Document, TaskRecord, digest
from components.runtime.errors import InputError

TASKS, LONG_TASKS = "tasks.parquet", "long_tasks.parquet"
DEMONSTRATIONS, DOCUMENTS = "demonstrations.parquet", "documents.parquet"
VOCABULARY, BATTERY = "vocabulary.json", "battery.json"
SPLITS = ("train", "validation", "test")
_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "split", "template", "record")])
_ROWS_PER_GROUP = 1000

Record = TypeVar("Record", bound=BaseModel)


def write_task_set(
    directory: Path,
    *,
    tasks: Sequence[TaskRecord],
    long_tasks: Sequence[TaskRecord],
    demonstrations: Sequence[Demonstration],
    documents: Sequence[Document],
    vocabulary: Iterable[str],
    battery: dict[str, Any],
) -> None:
    """Write all files of a task set into `directory`; equal arguments give equal bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    for file, group in ((TASKS, tasks), (LONG_TASKS, long_tasks)):
        _write(directory / file, ((task.id, task.split, task.template, task) for task in group))
    _write(
        directory / DEMONSTRATIONS,
        ((digest(demo.model_dump(mode="json")), demo.split, demo.template, demo) for demo in demonstrations),
    )
    _write(directory / DOCUMENTS, ((document.id, document.split, "", document) for document in documents))
    (directory / VOCABULARY).write_text(json.dumps(sorted(set(vocabulary)), indent=0) + "\n")
    (directory / BATTERY).write_text(json.dumps(battery, indent=1, allow_nan=False) + "\n")


def _write(path: Path, rows: Iterable[tuple[str, str, str, BaseModel]]) -> None:
    columns: dict[str, list[str]] = {name: [] for name in _SCHEMA.names}
    for identity, split, template, record in rows:
        for name, value in zip(_SCHEMA.names, (identity, split, template, record.model_dump_json()), strict=True):
            columns[name].append(value)
    table = pa.table(columns, schema=_SCHEMA)
    parquet.write_table(table, path, compression="zstd", row_group_size=_ROWS_PER_GROUP)


def read_tasks(directory: Path, split: str) -> list[TaskRecord]:
    """Tasks of a split: train, validation or test. Raises InputError when the file is missing, damaged or empty."""
    return _read(directory / TASKS, split, TaskRecord)


def read_long_tasks(directory: Path, split: str = "test") -> list[TaskRecord]:
    """Tasks whose solutions exceed the training length; there are none but for evaluation."""
    return _read(directory / LONG_TASKS, split, TaskRecord, may_be_empty=True)


def read_demonstrations(directory: Path, split: str) -> list[Demonstration]:
    """Demonstrations of a split: train or validation. Raises InputError as `read_tasks` does."""
    return _read(directory / DEMONSTRATIONS, split, Demonstration)


def read_documents(directory: Path, split: str) -> list[Document]:
    """Documents of a split: train, validation or test. Raises InputError as `read_tasks` does."""
    return _read(directory / DOCUMENTS, split, Document)


def read_vocabulary(directory: Path) -> list[str]:
    """The environments' words, sorted. Raises InputError when the file is missing or no list of words."""
    words = _read_json(directory / VOCABULARY)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise InputError(f"{directory / VOCABULARY} is not a list of words; run synthesis again")
    return words


def read_battery(directory: Path) -> dict[str, Any]:
    """What the validation battery checked and removed."""
    return _read_json(directory / BATTERY)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: {path.parent} is no task set; run synthesis") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run synthesis again") from error


def _read(path: Path, split: str, kind: type[Record], may_be_empty: bool = False) -> list[Record]:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    try:
        # ParquetFile, not read_table: the latter would take folder names like `split=x` on the way for columns
        with parquet.ParquetFile(path) as file:
            rows = file.read(columns=["split", "record"]).to_pylist()
        records = [kind.model_validate_json(row["record"]) for row in rows if row["split"] == split]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: {path.parent} is no task set; run synthesis") from error
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); run synthesis again") from error
    except ValidationError as error:
        raise InputError(f"{path} holds a record that is no {kind.__name__}: {error}; run synthesis again") from error
    if not records and not may_be_empty:
        raise InputError(f"{path} has no record in the split {split}; run synthesis with a size above 0 for it")
    return records
