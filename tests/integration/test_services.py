"""Background processes and the embedded PostgreSQL."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from services import processes
from services.postgres import Postgres, PostgresError
from services.state import Secrets, write_shell_environment
from settings import PROJECT_ROOT
from tests.warehouse import Database

FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN) if 'stubborn' in sys.argv else None
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
time.sleep(600)
"""


@pytest.fixture
def state(reachable_tmp: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = reachable_tmp / f"state-{request.node.name}"
    folder.mkdir()
    yield folder
    processes.stop(folder, timeout=1)


def wait_for(count: int, state: Path) -> None:
    deadline = time.monotonic() + 10
    while len(processes.find(state)) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes.find(state)) == count


@pytest.mark.parametrize("temper", ["meek", "stubborn"])
def test_stop_ends_a_process_and_the_children_it_left(state: Path, temper: str) -> None:
    command = [sys.executable, "-c", FAMILY, temper]
    processes.start("family", command, state, dict(os.environ), state / "log")
    wait_for(2, state)
    # The parent dies first: its child, in a session of its own, must still be found.
    os.kill(min(process.pid for process in processes.find(state, "family")), signal.SIGKILL)
    wait_for(1, state)
    assert processes.stop(state, timeout=1) == 1
    assert processes.find(state) == []


def test_stop_leaves_other_state_folders_alone(state: Path, reachable_tmp: Path) -> None:
    other = reachable_tmp / "another"
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes.start("mine", sleeper, state, dict(os.environ), state / "log")
    processes.start("theirs", sleeper, other, dict(os.environ), state / "log")
    try:
        assert processes.stop(state) == 1
        assert len(processes.find(other)) == 1
    finally:
        processes.stop(other)


def test_busy_port_gives_the_next_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert processes.free_port(port) not in (0, port)


def test_secrets_are_generated_once_and_private(state: Path) -> None:
    first = Secrets(state)
    assert Secrets(state) == first
    assert len(set(first.values())) == len(first)
    assert all(len(secret) >= 20 for secret in first.values())
    assert (state / "secrets.json").stat().st_mode & 0o077 == 0


def test_shell_environment_survives_quotes(state: Path) -> None:
    file = state / "env.sh"
    write_shell_environment(file, {"PATH": "/here:/there", "WORD": "it's $HOME"})
    shell = f'. {file}; printf "%s|%s" "$WORD" "${{PATH%%:*}}"'
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert said == "it's $HOME|/here"


def test_postgres_starts_stops_and_keeps_its_data(state: Path) -> None:
    server = Postgres(state)
    port = server.start(56100, "superuser-password")
    try:
        server.ensure_databases(port, "superuser-password", {"diabetes": "owner's password"})
        login = {"host": "127.0.0.1", "user": "diabetes", "dbname": "diabetes"}
        with closing(psycopg2.connect(**login, port=port, password="owner's password")) as data:
            data.cursor().execute("create table kept (number integer)")
            data.commit()
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            psycopg2.connect(**login, port=port, password="wrong")
        assert server.start(56100, "superuser-password") == port
        assert server.stop()
        assert not server.stop()
        port = server.start(56100, "superuser-password")
        with closing(psycopg2.connect(**login, port=port, password="owner's password")) as data:
            data.cursor().execute("select number from kept")
    finally:
        server.stop()


def test_postgres_takes_the_next_port_when_its_own_is_busy(state: Path, server_port: int) -> None:
    server = Postgres(state)
    try:
        assert server.start(server_port, "superuser-password") != server_port
    finally:
        server.stop()


def test_postgres_says_why_it_does_not_start(state: Path) -> None:
    server = Postgres(state)
    server.start(56100, "superuser-password")
    server.stop()
    with (server.data / "postgresql.conf").open("a") as configuration:
        configuration.write("shared_buffers = nonsense\n")
    with pytest.raises(PostgresError, match="nonsense"):
        server.start(56100, "superuser-password")


def test_interrupted_initdb_is_done_again(state: Path) -> None:
    half = state / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    server = Postgres(state)
    try:
        assert server.start(56100, "superuser-password")
    finally:
        server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to run PostgreSQL as someone else")
def test_root_with_a_private_home(state: Path) -> None:
    home = state / "home"
    home.mkdir(mode=0o700)
    server = Postgres(home / "project" / ".run")
    try:
        assert server.start(56100, "superuser-password")
        assert home.stat().st_mode & 0o777 == 0o700
    finally:
        server.stop()
        subprocess.run(["rm", "-rf", str(server.data.parent)], check=True)


def test_query_of_a_killed_client_ends(database: Database) -> None:
    code = f"""import psycopg2
psycopg2.connect({database.dsn!r}).cursor().execute('select pg_sleep(300)')"""
    client = subprocess.Popen([sys.executable, "-c", code])
    running = "select 1 from pg_stat_activity where query = 'select pg_sleep(300)'"

    def wait_until(there: bool) -> None:
        deadline = time.monotonic() + 20
        while bool(database.rows(running)) is not there and time.monotonic() < deadline:
            time.sleep(0.1)
        assert bool(database.rows(running)) is there

    wait_until(True)
    client.kill()
    client.wait()
    wait_until(False)


def test_down_without_anything_running(state: Path) -> None:
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-m", "services", "down"],
            cwd=PROJECT_ROOT,
            env={**os.environ, "DIABETES_STATE_DIR": str(state)},
            check=True,
        )
