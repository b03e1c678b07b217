"""A database that ingestion and dbt fill, for the tests; dbt runs in this process.

Starting dbt and parsing the project take longer than most builds here: the project is parsed once
a process. What is about dbt's command itself starts the command (tests/e2e).
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from ingestion.load import load
from ingestion.synthetic import write_csv
from settings import PROJECT_ROOT

PASSWORD = "only-for-tests"
PROJECT = PROJECT_ROOT / "dbt_diabetes"
SPLITS = ("diabetes_train", "diabetes_validation", "diabetes_test", "diabetes_excluded")


@dataclass(frozen=True, slots=True)
class Database:
    """A database, and who asks it: on the session's server its superuser."""

    port: int
    name: str
    password: str = PASSWORD
    user: str = "postgres"

    @property
    def dsn(self) -> str:
        return str(
            make_dsn(
                host="127.0.0.1",
                port=self.port,
                user=self.user,
                password=self.password,
                dbname=self.name,
            )
        )

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which our packages and dbt use this database."""
        return {
            "DIABETES_DB_HOST": "127.0.0.1",
            "DIABETES_DB_PORT": str(self.port),
            "DIABETES_DB_USER": self.user,
            "DIABETES_DB_PASSWORD": self.password,
            "DIABETES_DB_NAME": self.name,
        }

    def rows(self, query: str, *arguments: object) -> list[tuple[object, ...]]:
        """Run one query in a transaction of its own and return its rows."""
        with closing(psycopg2.connect(self.dsn)) as connection, connection:
            cursor = connection.cursor()
            cursor.execute(query, arguments or None)
            return cursor.fetchall() if cursor.description else []


@contextmanager
def new_database(
    port: int, name: str, template: str = "template1", password: str = PASSWORD
) -> Iterator[Database]:
    """An empty database, or a copy of one that nobody is connected to; dropped at the end."""
    with closing(psycopg2.connect(Database(port, "postgres", password).dsn)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(f"create database {name} template {template}")
        try:
            yield Database(port, name, password)
        finally:
            cursor.execute(f"drop database {name} with (force)")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command of dbt ended."""

    returncode: int
    stdout: str


class Dbt:
    """dbt on one database, with its own target folder."""

    def __init__(self, database: Database, target: Path) -> None:
        self.database = database
        self.target = target

    def __call__(self, *arguments: str, batch_size: int = 15_000) -> Ended:
        variables = ("--vars", json.dumps({"batch_size": batch_size}))
        return _invoke(self.database, self.target, *arguments, *variables)

    def build(self, *arguments: str, batch_size: int = 15_000) -> None:
        done = self(
            "build", "--exclude-resource-type", "unit_test", *arguments, batch_size=batch_size
        )
        assert done.returncode == 0, done.stdout

    def broken_nodes(self) -> set[str]:
        """Names of the nodes that failed in the last command."""
        results = json.loads((self.target / "run_results.json").read_text())["results"]
        failed = [one["unique_id"] for one in results if one["status"] in ("fail", "error")]
        return {unique_id.split(".")[2] for unique_id in failed}

    def published(self) -> list[tuple[object, ...]]:
        """Every table of clean_data as one hash."""
        return [
            row
            for table in (*SPLITS, "batch_info", "clip_report")
            for row in self.database.rows(
                f"select '{table}', md5(string_agg(cast(t as text), '' order by cast(t as text)))"
                f" from clean_data.{table} as t"
            )
        ]


def _invoke(database: Database, target: Path, *arguments: str) -> Ended:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(said):
        for name, value in database.environment.items():
            monkeypatch.setenv(name, value)
        done = _dbt(_manifest_for(database), target, *arguments)
    if done.exception:
        said.write(str(done.exception))
    return Ended(0 if done.success else 1, said.getvalue())


def _manifest_for(database: Database) -> Any:
    """The project as dbt parses it with this database: its name is all that differs."""
    from dbt.contracts.graph.manifest import Manifest

    manifest = Manifest.from_msgpack(_parsed())
    for node in (*manifest.nodes.values(), *manifest.sources.values()):
        if relation := getattr(node, "relation_name", None):
            node.relation_name = relation.replace(f'"{node.database}"', f'"{database.name}"', 1)
        node.database = database.name
    return manifest


@cache
def _parsed() -> bytes:
    """The project, parsed once; parsing needs no database."""
    with TemporaryDirectory() as target:
        done = _dbt(None, Path(target), "parse")
    assert done.success, done.exception
    return bytes(done.result.to_msgpack())


def _dbt(manifest: Any, target: Path, *arguments: str) -> Any:
    from dbt.cli.main import dbtRunner

    folders = {"project-dir": PROJECT, "profiles-dir": PROJECT, "target-path": target}
    placed = [f"--{name}={folder}" for name, folder in folders.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dbt's own
        return dbtRunner(manifest).invoke(
            ["--quiet", "--log-path", str(target), *arguments, *placed]
        )


def ingest(database: Database, path: Path, **options: Any) -> None:
    """Load a file."""
    load(path, database.dsn, source=str(path), run_id="test", reject_limit_percent=1, **options)


def ingest_synthetic(database: Database, folder: Path, rows: int) -> None:
    """Load so many synthetic encounters."""
    path = folder / f"{rows}.csv"
    write_csv(path, rows=rows)
    ingest(database, path)
