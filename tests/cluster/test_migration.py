"""The Job that brings MLflow's database to the image's version, on a real PostgreSQL."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from psycopg2.extensions import parse_dsn

from settings import PROJECT_ROOT
from tests.warehouse import Database

OLDER = """
import sys, sqlalchemy
from alembic import command
from alembic.script import ScriptDirectory
from mlflow.store.db import utils

uri = sys.argv[1]
engine = sqlalchemy.create_engine(uri)
utils.InitialBase.metadata.create_all(engine)
config = utils._get_alembic_config(uri)
(head,) = ScriptDirectory.from_config(config).get_heads()
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, f"{head}-1")
"""
HEADS = "select version_num from alembic_version union select version_num from alembic_version_auth"


def uri(database: Database) -> str:
    login = parse_dsn(database.dsn)
    return (
        f"postgresql+psycopg2://{login['user']}:{login['password']}"
        f"@{login['host']}:{login['port']}/{login['dbname']}"
    )


def migrated(database: Database) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "infra.jobs.migrate", "--timeout=5"],
        cwd=PROJECT_ROOT,
        env={"PATH": "", "MLFLOW_BACKEND_STORE_URI": uri(database)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_migration_of_an_empty_then_a_current_database(database: Database) -> None:
    done = migrated(database)
    assert done.returncode == 0, done.stderr
    heads = sorted(str(head) for (head,) in database.rows(HEADS))
    assert len(heads) == 2
    assert "MLflow's tables migrated: none -> " in done.stdout
    assert all(head in done.stdout for head in heads)
    database.rows("insert into experiments (name, lifecycle_stage) values ('kept', 'active')")
    again = migrated(database)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout.splitlines()[-1]
    assert database.rows("select name from experiments") == [("kept",)]
    assert sorted(str(head) for (head,) in database.rows(HEADS)) == heads


def test_migration_of_an_older_database_keeps_its_rows(database: Database) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", OLDER, uri(database)], check=True)
    ((older,),) = database.rows("select version_num from alembic_version")
    database.rows("insert into experiments (name, lifecycle_stage) values ('kept', 'active')")
    done = migrated(database)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"migrated: {older} -> \w+, \w+$", done.stdout.strip())
    assert database.rows("select name from experiments") == [("kept",)]
    assert database.rows("select version_num from alembic_version") != [(older,)]


def test_migration_refuses_the_tables_of_a_newer_mlflow(database: Database) -> None:
    assert migrated(database).returncode == 0
    database.rows("update alembic_version set version_num = 'ffffffffffff'")
    done = migrated(database)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"error: the tables are of a newer MLflow than this image's .*", last)
    assert "ffffffffffff" in last
    assert database.rows("select version_num from alembic_version") == [("ffffffffffff",)]


def test_migration_with_a_wrong_password_is_one_message(database: Database) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        wrong = re.sub(r":[^:@/]+@", ":wrong@", uri(database))
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", wrong)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "infra.jobs.migrate"],
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "error: PostgreSQL refuses the login of MLFLOW_BACKEND_STORE_URI" in done.stderr
    assert "Traceback" not in done.stderr
