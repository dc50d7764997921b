"""MLflow's database as text, whole and at one moment: rows of every table, a JSON object a line.

The text knows no database, so that what was written from SQLite can be read into PostgreSQL, which carries runs over.
The schema is not in it: MLflow makes that itself, and a copy is read only into the same version of it (`alembic`).
"""

from __future__ import annotations

import base64
import gzip
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa

from components.runtime.errors import InputError, without_password
from components.runtime.registry import mlflow_client

TELLING = ("runs", "registered_models", "logged_models", "trace_info")  # tables of what people made
BATCH = 1000


def connected(uri: str) -> sa.Engine:
    """An engine for MLflow's database, its schema made if it was empty. Raises InputError when it cannot be used."""
    if not uri.startswith(("sqlite:///", "postgresql")):
        raise InputError(f"the database {without_password(uri)} is neither sqlite:///FILE nor postgresql://...")
    mlflow_client(uri)
    return sa.create_engine(uri)


def write_database(uri: str, path: Path) -> dict[str, int]:
    """Write all rows to `path` (gzip), as they were at one moment. Returns the number of rows by table."""
    counts: dict[str, int] = {}
    with _one_moment(uri) as connection, gzip.open(path, "wt", encoding="utf-8") as file:
        there = tables(connection)
        file.write(json.dumps({"schema": schema(connection, there)}) + "\n")
        for table in there.values():
            counts[table.name] = 0
            file.write(json.dumps({"table": table.name}) + "\n")
            for row in connection.execution_options(stream_results=True).execute(table.select()).mappings():
                file.write(json.dumps({"row": {name: _text(value) for name, value in row.items()}}) + "\n")
                counts[table.name] += 1
    return counts


@contextmanager
def _one_moment(uri: str) -> Iterator[sa.Connection]:
    """A connection that sees the database as it is now, whatever is written meanwhile."""
    engine = connected(uri)
    try:
        if engine.dialect.name == "postgresql":
            with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
                yield connection
            return
        # A long read of SQLite would keep MLflow from writing, so it is copied first: that takes as long as its file.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy.db"
            with closing(sqlite3.connect(engine.url.database or "")) as from_, closing(sqlite3.connect(copy)) as to:
                from_.backup(to)
            copied = sa.create_engine(f"sqlite:///{copy}")
            with copied.connect() as connection:
                yield connection
            copied.dispose()
    finally:
        engine.dispose()


def read_database(path: Path, uri: str) -> dict[str, int]:
    """Fill the database with the rows of `path`, all or none. Returns the number of rows by table.

    Raises InputError when somebody made something in that database already, or its schema is of another version.
    """
    engine = connected(uri)
    counts: dict[str, int] = {}
    with engine.begin() as connection, gzip.open(path, "rt", encoding="utf-8") as file:
        there = tables(connection)
        check_unused(connection, there)
        written, found = json.loads(next(file))["schema"], schema(connection, there)
        if written != found:
            raise InputError(
                f"the backup is of the schema {written}, this MLflow makes {found}; restore with the MLflow that the "
                "backup names, then `mlflow db upgrade`"
            )
        for table in reversed(there.values()):
            connection.execute(table.delete())
        for name, rows in _batches(file):
            counts[name] = counts.get(name, 0) + len(rows)
            if rows:
                connection.execute(there[name].insert(), rows)
        if engine.dialect.name == "postgresql":
            _continue_sequences(connection, there)
    engine.dispose()
    return counts


def tables(connection: sa.Connection) -> dict[str, sa.Table]:
    """All tables by name, those that others refer to first."""
    metadata = sa.MetaData()
    metadata.reflect(connection)
    for table in metadata.sorted_tables:
        for column in table.columns:
            if isinstance(column.type, sa.JSON):
                column.type.none_as_null = True  # else nothing would come back as the JSON text "null"
    return {table.name: table for table in metadata.sorted_tables}


def check_unused(connection: sa.Connection, there: dict[str, sa.Table]) -> None:
    """Raises InputError when somebody made something in this database."""
    for name in TELLING:
        if name in there and connection.execute(sa.select(sa.func.count()).select_from(there[name])).scalar():
            address = connection.engine.url.render_as_string(hide_password=True)
            raise InputError(f"the database {address} is in use (its table {name} has rows); restore into an empty one")


def schema(connection: sa.Connection, there: dict[str, sa.Table]) -> str:
    """The version of MLflow's schema, as its migrations (Alembic) name it."""
    table = there["alembic_version"]
    return ", ".join(connection.execute(sa.select(table.c["version_num"])).scalars())


def _batches(file: IO[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each table, some at a time; a table without rows once."""
    name, rows = "", list[dict[str, Any]]()
    for line in file:
        found = json.loads(line)
        if "table" in found or len(rows) == BATCH:
            if name:
                yield name, rows
            rows = []
        if "table" in found:
            name = found["table"]
        else:
            rows.append({key: _value(value) for key, value in found["row"].items()})
    if name:
        yield name, rows


def _continue_sequences(connection: sa.Connection, there: dict[str, sa.Table]) -> None:
    """A column that PostgreSQL counts by itself goes on after the largest number that was read."""
    for table in there.values():
        for column in table.primary_key.columns:
            quoted = connection.dialect.identifier_preparer.quote(table.name)
            sequence = connection.execute(
                sa.text("SELECT pg_get_serial_sequence(:table, :column)"), {"table": quoted, "column": column.name}
            ).scalar()
            if sequence:
                largest = connection.execute(sa.select(sa.func.max(column))).scalar()
                connection.execute(
                    sa.text("SELECT setval(:sequence, :value, :called)"),
                    {"sequence": sequence, "value": largest or 1, "called": largest is not None},
                )


def _text(value: Any) -> Any:
    if isinstance(value, bytes | memoryview):
        return {"bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, datetime):
        return {"time": value.isoformat()}
    if isinstance(value, date):
        return {"date": value.isoformat()}
    if isinstance(value, dict | list):
        return {"json": value}
    return value


def _value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "time":
        return datetime.fromisoformat(content)
    return date.fromisoformat(content) if kind == "date" else content
