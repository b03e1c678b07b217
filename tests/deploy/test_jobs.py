"""The cluster's jobs on a real PostgreSQL and a real S3 storage."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from botocore.exceptions import ClientError
from psycopg2.extensions import parse_dsn

from infra.jobs import (
    backup,
    common,
    init_storage,
    migrate,
    mlflow_users,
    restore,
    smoke_test,
    watchers,
)
from infra.jobs.sets import MANIFEST, PREFIX, Sets, key
from services import databases
from settings import PROJECT_ROOT
from tests.deploy.storage import Storage
from tests.warehouse import Database

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """A job in this process: its exit code, standard output and standard error."""

    def main(job: Callable[[list[str]], int], *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = job(list(arguments))
        return code, *capfd.readouterr()

    return main


@pytest.fixture
def buckets(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Names of this test's buckets, which do not exist yet, and the storage's environment."""
    names = tuple(f"{kind}-{time.time_ns()}" for kind in ("mlflow", "backups"))
    for name, value in {
        **storage.environment,
        "MLFLOW_BUCKET": names[0],
        "BACKUP_BUCKET": names[1],
    }.items():
        monkeypatch.setenv(name, value)
    return names[0], names[1]


@pytest.fixture
def roles(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], dict[str, str]]]:
    """Names of this test's roles with their passwords, and the superuser's environment."""
    stem = database.name
    login = parse_dsn(database.dsn)
    for name, value in {
        "PGHOST": login["host"],
        "PGPORT": login["port"],
        "PGUSER": login["user"],
        "PGPASSWORD": login["password"],
    }.items():
        monkeypatch.setenv(name, value)
    names = tuple(f"{stem}_{owner}" for owner in init_storage.DATABASES)
    watching = tuple(f"{stem}_{owner}" for owner in ("monitoring", "reader"))
    monkeypatch.setattr(init_storage, "DATABASES", names)
    monkeypatch.setattr(watchers, "DATA", f"{stem}_{watchers.DATA}")
    monkeypatch.setattr(databases, "MONITOR", watching[0])
    monkeypatch.setattr(watchers, "READER", watching[1])
    monkeypatch.setenv("MONITORING_PASSWORD", "of monitoring: %/@?'")
    monkeypatch.setenv("READER_PASSWORD", "of reader: %/@?'")

    def passwords() -> dict[str, str]:
        for name in names:
            monkeypatch.setenv(f"{name.upper()}_PASSWORD", f"of {name}: %/@?'")
        return {name: f"of {name}: %/@?'" for name in names}

    yield passwords
    with closing(psycopg2.connect(database.dsn)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        for name in names:
            cursor.execute(f"drop database if exists {name} with (force)")
            cursor.execute(f"drop role if exists {name}")
        for name in watching:
            cursor.execute(f"drop role if exists {name}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_storage_is_made_once_and_then_only_looked_at(
    run: Run, buckets: tuple[str, str], roles: Callable[[], dict[str, str]], storage: Storage
) -> None:
    passwords = roles()
    code, said, error = run(init_storage.main)
    assert (code, error) == (0, "")
    assert all(name in said for name in (*buckets, *passwords))
    assert all(name in said for name in (databases.MONITOR, f"rights of role {watchers.READER}"))
    for name, password in passwords.items():
        login = {"user": name, "dbname": name, "password": password}
        with closing(psycopg2.connect(**login)) as connection, connection:
            connection.cursor().execute("create table kept (number integer)")
    storage.client.put_object(Bucket=buckets[0], Key="kept", Body=b"kept")

    assert run(init_storage.main) == (0, "all there, nothing to do\n", "")
    assert storage.client.get_object(Bucket=buckets[0], Key="kept")["Body"].read() == b"kept"


def test_changed_password_is_set_and_the_data_stay(
    run: Run,
    buckets: tuple[str, str],
    roles: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, password = next(iter(roles().items()))
    assert run(init_storage.main)[0] == 0
    with closing(psycopg2.connect(user=name, dbname=name, password=password)) as owner, owner:
        owner.cursor().execute("create table kept (number integer)")
    monkeypatch.setenv(f"{name.upper()}_PASSWORD", "another")
    assert run(init_storage.main) == (0, f"made or mended: role and database {name}\n", "")
    with closing(psycopg2.connect(user=name, dbname=name, password="another")) as owner:
        owner.cursor().execute("select number from kept")


def test_managed_services_where_all_is_there_need_no_rights(
    run: Run,
    buckets: tuple[str, str],
    roles: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passwords = roles()
    assert run(init_storage.main)[0] == 0
    # The login of one of the owners: no superuser, may create neither role nor database.
    name, password = next(iter(passwords.items()))
    monkeypatch.setenv("PGUSER", name)
    monkeypatch.setenv("PGPASSWORD", password)
    assert run(init_storage.main) == (0, "all there, nothing to do\n", "")
    monkeypatch.setenv(f"{name.upper()}_PASSWORD", "another")
    code, said, error = run(init_storage.main)
    assert (code, said) == (1, "")
    assert re.fullmatch(rf"error: .*\({name}\), and this login may not make them: .*\n", error)


def test_managed_administrator_who_is_no_superuser_can_make_all(
    run: Run,
    database: Database,
    buckets: tuple[str, str],
    roles: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passwords = roles()
    admin = f"{database.name}_admin"
    database.rows(f"create role {admin} login createrole createdb password 'admin'")
    database.rows(f"grant pg_monitor to {admin} with admin option")
    monkeypatch.setenv("PGUSER", admin)
    monkeypatch.setenv("PGPASSWORD", "admin")
    try:
        code, said, error = run(init_storage.main)
        assert (code, error) == (0, "")
        assert all(name in said for name in passwords)
        for name in passwords:
            owners = database.rows(
                "select pg_get_userbyid(datdba) from pg_database where datname = %s", name
            )
            assert owners == [(name,)]
    finally:
        monitor = databases.MONITOR
        database.rows(f"revoke pg_monitor from {monitor} granted by {admin}")
        database.rows(f"revoke {monitor} from {admin}")
        database.rows(f"revoke {watchers.READER} from {admin}")
        database.rows(f"revoke pg_monitor from {admin}")
        for name in passwords:
            database.rows(f"revoke {name} from {admin} granted by {admin}")
            database.rows(f"revoke {name} from {admin}")
        database.rows(f"drop role {admin}")


def test_administrator_without_pg_monitor_is_told_what_to_make_by_hand(
    run: Run,
    database: Database,
    buckets: tuple[str, str],
    roles: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passwords = roles()
    assert run(init_storage.main)[0] == 0
    name, password = next(iter(passwords.items()))
    monkeypatch.setenv("PGUSER", name)
    monkeypatch.setenv("PGPASSWORD", password)
    database.rows(f"revoke pg_monitor from {databases.MONITOR}")
    code, said, error = run(init_storage.main)
    assert (code, said, error.count("\n")) == (1, "", 1)
    assert re.match(rf"error: role {databases.MONITOR} is missing, .* and pg_monitor$", error)
    database.rows(f"grant pg_monitor to {databases.MONITOR}")
    monkeypatch.setenv("READER_PASSWORD", "another")
    code, said, error = run(init_storage.main)
    assert (code, said, error.count("\n")) == (1, "", 1)
    assert re.match(rf"error: role {watchers.READER} is missing, .* and nothing else$", error)


def test_exporters_look_and_do_no_more(
    run: Run,
    buckets: tuple[str, str],
    roles: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passwords = roles()
    assert run(init_storage.main)[0] == 0
    data = watchers.DATA

    def rows(user: str, password: str, query: str, dbname: str = data) -> list[tuple[Any, ...]]:
        login = {"user": user, "password": password, "dbname": dbname}
        with closing(psycopg2.connect(**login)) as connection, connection:
            cursor = connection.cursor()
            cursor.execute(query)
            return list(cursor.fetchall()) if cursor.description else []

    reader = (watchers.READER, "of reader: %/@?'")
    monitor = (databases.MONITOR, "of monitoring: %/@?'")
    # Made after the rights were given, as all of the platform's tables are.
    made = (
        "create schema {0}; create table {0}.rows as select 1 as n; "
        "create view {0}.v as table {0}.rows"
    )
    rows(data, passwords[data], made.format("later"))
    assert rows(*reader, "select * from later.rows, later.v") == [(1, 1)]
    for refused in (
        "insert into later.rows values (2)",
        "drop table later.rows",
        "create table later.mine (n integer)",
        "create schema mine",
        "create table public.mine (n integer)",
    ):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            rows(*reader, refused)
    for name in set(passwords) - {data}:
        rows(name, passwords[name], "create schema own; create table own.secret (n integer)", name)
        for watching in (reader, monitor):
            with pytest.raises(psycopg2.errors.InsufficientPrivilege):
                rows(*watching, "select * from own.secret", name)
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        rows(*monitor, "select * from later.rows")
    # What others ask is told to pg_monitor only.
    query = "select count(*) from pg_stat_activity where query = '<insufficient privilege>'"
    assert rows(*monitor, query) == [(0,)]
    assert rows(*monitor, "select count(*) > 0 from pg_ls_waldir()") == [(True,)]

    # As in a database that is older than the role, or was restored from such a backup.
    for what in ("usage on schemas", "select on tables"):
        rows(
            data, passwords[data], f"alter default privileges revoke {what} from {watchers.READER}"
        )
    rows(data, passwords[data], made.format('"old ""one"'))
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        rows(*reader, 'select * from "old ""one".v')
    said = f"made or mended: rights of role {watchers.READER}\n"
    assert run(init_storage.main) == (0, said, "")
    assert rows(*reader, 'select * from "old ""one".v') == [(1,)]
    rows(data, passwords[data], made.format("latest"))
    assert rows(*reader, "select * from latest.v") == [(1,)]
    assert run(init_storage.main) == (0, "all there, nothing to do\n", "")

    for variable, role in (("READER", watchers.READER), ("MONITORING", databases.MONITOR)):
        monkeypatch.setenv(f"{variable}_PASSWORD", "another")
        assert run(init_storage.main) == (0, f"made or mended: role {role}\n", "")
        assert rows(role, "another", "select 1") == [(1,)]


def test_services_that_stay_away_are_waited_for_no_longer_than_allowed(
    run: Run,
    buckets: tuple[str, str],
    roles: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roles()
    monkeypatch.setenv("PGPORT", str(free_port()))
    began = time.monotonic()
    code, said, error = run(init_storage.main, "--timeout=1")
    assert (code, said) == (1, "")
    assert re.fullmatch(r"error: PostgreSQL is not up after 1 s: .*refused.*\n", error)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    code, said, error = run(init_storage.main, "--timeout=1")
    assert (code, said) == (1, "")
    assert re.fullmatch(r"error: S3 storage is not up after 1 s: .*\n", error)
    assert time.monotonic() - began < 20


def test_service_that_comes_up_late_is_waited_for() -> None:
    answers: list[object] = [common.NotReadyError("not yet"), common.NotReadyError("not yet"), 42]

    def attempt() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert common.wait_for("it", attempt, timeout=30) == 42


def test_wrong_logins_are_said_at_once(
    run: Run,
    buckets: tuple[str, str],
    roles: Callable[[], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roles()
    began = time.monotonic()
    monkeypatch.setenv("PGPASSWORD", "wrong")
    code, _, error = run(init_storage.main)
    assert code == 1
    assert re.fullmatch(r"error: PGUSER and PGPASSWORD have to be .*authentication.*\n", error)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, _, error = run(init_storage.main)
    assert code == 1
    assert f"refuses access to bucket {buckets[0]} (HTTP 403): AWS_ACCESS_KEY_ID" in error
    assert error.count("\n") == 1
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("job", "arguments", "missing"),
    [
        (init_storage.main, (), "MLFLOW_BUCKET"),
        (migrate.main, (), "MLFLOW_BACKEND_STORE_URI"),
        (mlflow_users.main, (), "SERVING_PASSWORD"),
        (backup.main, ("list",), "BACKUP_BUCKET"),
        (restore.main, ("fetch", "--folder=."), "BACKUP_BUCKET"),
        (smoke_test.main, (), "MLFLOW_TRACKING_URI"),
    ],
)
def test_missing_variable_is_named(
    run: Run,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    job: Callable[[list[str]], int],
    arguments: tuple[str, ...],
    missing: str,
) -> None:
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(missing, "")
    code, said, error = run(job, *arguments)
    assert (code, said) == (1, "")
    assert error == f"error: {missing} is not set: the pod's Secret or ConfigMap has to give it\n"


@pytest.mark.parametrize("name", ["init_storage", "migrate", "mlflow_users", "smoke_test"])
def test_every_job_runs_as_a_module_and_explains_itself(name: str) -> None:
    def job(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"infra.jobs.{name}", *arguments],
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    assert "usage: python -m infra.jobs" in job("--help").stdout
    assert job("--nonsense").returncode == 2


# --- backups -------------------------------------------------------------------------------


@pytest.fixture
def sets(storage: Storage, buckets: tuple[str, str]) -> Sets:
    """An empty bucket for backups."""
    storage.client.create_bucket(Bucket=buckets[1])
    return Sets(storage.client, buckets[1])


@pytest.fixture
def dumps(tmp_path: Path) -> Path:
    folder = tmp_path / "dumps"
    folder.mkdir()
    for name in ("mlflow", "diabetes"):
        (folder / f"{name}.dump").write_bytes(b"PGDMP" + name.encode() * 1000)
    return folder


def stamp(age: timedelta) -> str:
    return (datetime.now(UTC) - age).strftime("%Y%m%dT%H%M%SZ")


def put(sets: Sets, when: str, *, whole: bool = True) -> None:
    names = ["mlflow.dump", MANIFEST] if whole else ["mlflow.dump"]
    for name in names:
        body = json.dumps({"files": {}}).encode()
        sets._client.put_object(Bucket=sets.bucket, Key=key(when, name), Body=body)


def test_backup_comes_back_byte_for_byte(run: Run, sets: Sets, dumps: Path, tmp_path: Path) -> None:
    code, said, error = run(backup.main, "upload", f"--folder={dumps}")
    assert (code, error) == (0, "")
    (made,) = sets.whole()
    assert said.startswith(f"backup {made}: diabetes, mlflow (")
    assert "1 kept, 0 deleted" in said
    assert sorted(sets.keys()[made]) == ["diabetes.dump", MANIFEST, "mlflow.dump"]

    for number, wanted in enumerate(("latest", made)):
        target = tmp_path / str(number)
        target.mkdir()
        code, said, error = run(restore.main, "fetch", f"--folder={target}", f"--backup={wanted}")
        assert (code, said, error) == (0, f"backup {made} is whole: diabetes, mlflow\n", "")
        for dump in dumps.iterdir():
            assert (target / dump.name).read_bytes() == dump.read_bytes()

    target = tmp_path / "one"
    target.mkdir()
    assert run(restore.main, "fetch", f"--folder={target}", "--database=mlflow")[0] == 0
    assert [file.name for file in target.iterdir()] == ["mlflow.dump"]


def test_list_names_the_backups_the_newest_first(run: Run, sets: Sets, dumps: Path) -> None:
    assert run(backup.main, "list") == (0, f"no backup in bucket {sets.bucket}\n", "")
    put(sets, stamp(timedelta(days=2)))
    put(sets, stamp(timedelta(days=1)), whole=False)
    assert run(backup.main, "upload", f"--folder={dumps}")[0] == 0
    lines = run(backup.main, "list")[1].splitlines()
    assert [line[:16] for line in lines] == sets.whole()[::-1]
    assert len(lines) == 2
    assert lines[0].endswith("14,010 bytes  diabetes, mlflow")


@pytest.mark.parametrize("damage", ["other byte", "cut short", "gone"])
def test_damaged_dump_is_refused_and_nothing_is_left(
    run: Run, sets: Sets, dumps: Path, tmp_path: Path, storage: Storage, damage: str
) -> None:
    assert run(backup.main, "upload", f"--folder={dumps}")[0] == 0
    (made,) = sets.whole()
    # The second in the order of fetching: the first one, which is sound, must go too.
    place = {"Bucket": sets.bucket, "Key": key(made, "mlflow.dump")}
    content = bytearray((dumps / "mlflow.dump").read_bytes())
    if damage == "gone":
        storage.client.delete_object(**place)
    else:
        content[50] ^= 1
        body = bytes(content) if damage == "other byte" else bytes(content[:-1])
        storage.client.put_object(**place, Body=body)
    target = tmp_path / "target"
    target.mkdir()
    code, said, error = run(restore.main, "fetch", f"--folder={target}")
    assert (code, said) == (1, "")
    assert error.count("\n") == 1
    assert f"{made}/mlflow.dump is damaged: expected 6,005 bytes with SHA-256 " in error
    assert list(target.iterdir()) == []


def test_damaged_manifest_is_one_clear_message(
    run: Run, sets: Sets, storage: Storage, tmp_path: Path
) -> None:
    when = stamp(timedelta(days=1))
    storage.client.put_object(Bucket=sets.bucket, Key=key(when, MANIFEST), Body=b"{")
    code, _, error = run(restore.main, "fetch", f"--folder={tmp_path}")
    assert code == 1
    assert re.fullmatch(rf"error: .*{when}/{MANIFEST} is damaged .*: choose another.*\n", error)


def test_unknown_backup_or_database_is_answered_with_what_there_is(
    run: Run, sets: Sets, dumps: Path, tmp_path: Path
) -> None:
    fetch = (restore.main, "fetch", f"--folder={tmp_path}")
    code, _, error = run(*fetch)
    assert code == 1
    assert "has no backup" in error
    older = stamp(timedelta(days=3))
    put(sets, older)
    assert run(backup.main, "upload", f"--folder={dumps}")[0] == 0
    code, _, error = run(*fetch, "--backup=20200101T000000Z")
    newest = sets.whole()[-1]
    said = f"error: there is no backup 20200101T000000Z; there are {newest}, {older}\n"
    assert (code, error) == (1, said)
    code, _, error = run(*fetch, "--database=airflow", "--database=mlflow")
    assert (code, error) == (
        1,
        f"error: backup {newest} has no airflow; it has diabetes, mlflow\n",
    )


def test_rotation_keeps_the_newest_whole_sets(run: Run, sets: Sets, dumps: Path) -> None:
    days = [stamp(timedelta(days=age)) for age in range(20, 0, -1)]
    for day in days:
        put(sets, day)
    abandoned, underway = stamp(timedelta(days=2, hours=1)), stamp(timedelta(minutes=5))
    put(sets, abandoned, whole=False)
    put(sets, underway, whole=False)
    code, said, _ = run(backup.main, "upload", f"--folder={dumps}", "--keep=14")
    assert code == 0
    assert "14 kept, 8 deleted" in said
    assert sets.whole()[:-1] == days[-13:]
    # What another upload may still be at stays; what one has left behind is gone, every file.
    assert sorted(sets.keys()) == sorted([*sets.whole(), underway])


def test_failed_upload_is_no_backup_and_deletes_none(
    run: Run, sets: Sets, dumps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [stamp(timedelta(days=age)) for age in range(20, 0, -1)]
    for day in days:
        put(sets, day)
    real = common.storage()

    class Breaking:
        """The storage, which ends in the middle of the second dump."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def upload_file(self, file: str, bucket: str, place: str) -> None:
            if place.endswith("mlflow.dump"):
                problem = {"Error": {"Code": "InternalError", "Message": "disk full"}}
                raise ClientError(problem, "PutObject")
            real.upload_file(file, bucket, place)

    monkeypatch.setattr(backup, "storage", Breaking)
    code, said, error = run(backup.main, "upload", f"--folder={dumps}")
    assert (code, said) == (1, "")
    assert "disk full" in error
    assert error.count("\n") == 1
    assert sets.whole() == days
    assert len(sets.keys()) == 21  # what was uploaded lies there and counts as nothing


def test_what_is_no_dump_is_not_uploaded(run: Run, sets: Sets, tmp_path: Path) -> None:
    code, _, error = run(backup.main, "upload", f"--folder={tmp_path}")
    assert (code, error.split(":")[0:2]) == (1, ["error", f" {tmp_path} has no *.dump"])
    (tmp_path / "mlflow.dump").write_bytes(b"")
    code, _, error = run(backup.main, "upload", f"--folder={tmp_path}")
    assert code == 1
    assert "mlflow.dump is no dump of pg_dump --format=custom; nothing is uploaded" in error
    assert sets.keys() == {}


def test_foreign_objects_in_the_bucket_are_left_alone(
    run: Run, sets: Sets, dumps: Path, storage: Storage
) -> None:
    foreign = [f"{PREFIX}notes.txt", f"{PREFIX}2020/mlflow.dump", "other/20200101T000000Z/x"]
    for name in foreign:
        storage.client.put_object(Bucket=sets.bucket, Key=name, Body=b"mine")
    assert run(backup.main, "upload", f"--folder={dumps}", "--keep=1")[0] == 0
    found = storage.client.list_objects_v2(Bucket=sets.bucket)["Contents"]
    assert set(foreign) <= {item["Key"] for item in found}


def test_keep_has_to_be_one_or_more(dumps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        backup.main(["upload", f"--folder={dumps}", "--keep=0"])
    assert ended.value.code == 2
    assert "expected 1 or more" in capsys.readouterr().err


# --- MLflow's tables ------------------------------------------------------------------------
