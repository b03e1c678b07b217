"""The benchmark's own PostgreSQL: one server in the temporary folder, fresh databases."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import sql

from bench.usage import postgres_cpu_seconds
from services.postgres import Postgres

_USER = "postgres"
_PREFERRED_PORT = 57432


class Server:
    """A running server.

    Args:
        postgres: the embedded server.
        port: where it listens.
        password: of its superuser, as whom everything here connects.
    """

    def __init__(self, postgres: Postgres, port: int, password: str) -> None:
        self._postgres = postgres
        self._port = port
        self._password = password

    def environment(self, database: str) -> dict[str, str]:
        """Variables with which our packages, dbt and libpq use a database of this server."""
        return {
            "DIABETES_DB_HOST": "127.0.0.1",
            "DIABETES_DB_PORT": str(self._port),
            "DIABETES_DB_USER": _USER,
            "DIABETES_DB_PASSWORD": self._password,
            "DIABETES_DB_NAME": database,
            "PGPASSWORD": self._password,
        }

    def sqlalchemy_url(self, database: str) -> str:
        """URL of a database, without the password, which PGPASSWORD holds."""
        return f"postgresql+psycopg2://{_USER}@127.0.0.1:{self._port}/{database}"

    def fresh(self, database: str) -> None:
        """Make the database anew, empty."""
        self.drop(database)
        with closing(self._connect("postgres")) as connection:
            connection.cursor().execute(
                sql.SQL("create database {}").format(sql.Identifier(database))
            )

    def drop(self, database: str) -> None:
        """Remove the database if it is there, and its files with it."""
        with closing(self._connect("postgres")) as connection:
            connection.cursor().execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(database))
            )

    def settle(self) -> None:
        """Write out what earlier jobs left in memory, so that the next one does not pay for it."""
        with closing(self._connect("postgres")) as connection:
            connection.cursor().execute("checkpoint")
        self.settle_backends()

    @staticmethod
    def settle_backends() -> None:
        """Wait until backends that are about to end have handed their CPU time on."""
        time.sleep(0.2)

    def cpu_seconds(self) -> float:
        """CPU seconds of all the server's processes so far."""
        return postgres_cpu_seconds(self._postgres.data)

    def rows(self, database: str, query: str) -> list[tuple[Any, ...]]:
        """Rows of one query."""
        with closing(self._connect(database)) as connection:
            cursor = connection.cursor()
            cursor.execute(query)
            return cursor.fetchall()

    def _connect(self, database: str) -> psycopg2.extensions.connection:
        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self._port,
            user=_USER,
            password=self._password,
            dbname=database,
            application_name="bench",
        )
        connection.autocommit = True
        return connection


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Start a server below `folder`; on leaving stop it and remove its files."""
    postgres = Postgres(folder / "server")
    password = secrets.token_urlsafe(18)
    try:
        yield Server(postgres, postgres.start(_PREFERRED_PORT, password), password)
    finally:
        stop_and_remove(postgres)


def stop_and_remove(postgres: Postgres) -> None:
    """Stop a server and remove its files, which as root may lie outside of its state folder."""
    postgres.stop()
    shutil.rmtree(postgres.data.parent, ignore_errors=True)
