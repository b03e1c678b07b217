"""Every prediction to `inference.predictions`: through a spool on disk, by COPY, exactly once.

A prediction is appended to a file before it is answered, so that the death of the service loses
none. A thread closes the file every half second and copies whatever is closed into PostgreSQL, in
order; the name of each file is stored in the same transaction, so that a file whose deletion was
missed is not copied again. While the database is away the files stay; when they reach the bound,
the service stops to predict rather than to lose what it predicted.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
import psycopg2

from serving.errors import ServingError

FLUSH_SECONDS = 0.5
_RETRY_SECONDS = 2.0
_MEASURE_SECONDS = 2.0
_READY, _OPEN, _PART, _BROKEN = ".ready", ".open", ".part", ".broken"
_HASH_BYTES = 16

_TABLES = """
create schema if not exists inference;
create table if not exists inference.models (
    model_version text primary key,
    feature_sha256 text not null,
    feature_names text[] not null,
    first_served_at timestamptz not null default now()
);
create table if not exists inference.predictions (
    prediction_id uuid primary key,
    predicted_at timestamptz not null,
    model_version text not null,
    role text not null check (role in ('champion', 'challenger')),
    source text not null check (source in ('single', 'explain', 'batch', 'csv')),
    encounter_hash text,
    patient_hash text,
    probability double precision not null,
    features jsonb not null
);
create index if not exists predictions_by_time on inference.predictions using brin (predicted_at);
create table if not exists inference.copied_segments (
    segment text primary key,
    copied_at timestamptz not null default now()
);
create or replace view inference.prediction_features as
select p.prediction_id, p.predicted_at, p.model_version, p.role, f.feature,
    p.features ->> (f.place - 1)::integer as value
from inference.predictions as p
inner join inference.models as m on m.model_version = p.model_version
cross join unnest(m.feature_names) with ordinality as f (feature, place);
comment on table inference.predictions is
    'Every prediction that was answered, and what a challenger in the shadow said of it; '
    'identifiers are keyed hashes. features: values in the order of inference.models.feature_names';
"""

_COPY = (
    "copy inference.predictions (prediction_id, predicted_at, model_version, role, source, "
    "encounter_hash, patient_hash, probability, features) from stdin"
)

log = logging.getLogger(__name__)


class LogFullError(ServingError):
    """The spool has reached its bound; predictions can't be kept and so are not made."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is written of predictions that were made together.

    Attributes:
        ids: of the predictions.
        version: of the model.
        role: `champion`, or `challenger` in the shadow.
        source: `single`, `explain`, `batch` or `csv`.
        encounters, patients: identifiers as the caller gave them; None where it did not.
        probability: of each.
        rows: features of each.
    """

    ids: Sequence[str]
    version: str
    role: str
    source: str
    encounters: Sequence[Any]
    patients: Sequence[Any]
    probability: Sequence[float]
    rows: Sequence[Sequence[Any]]

    def lines(self, key: bytes) -> bytes:
        """In PostgreSQL's text format of COPY."""
        keyed = blake2b(key=key, digest_size=_HASH_BYTES)
        now = datetime.now(UTC).isoformat()
        made = f"{now}\t{self.version}\t{self.role}\t{self.source}"
        return b"".join(
            (
                f"{number}\t{made}\t{_hash(keyed, encounter)}\t{_hash(keyed, patient)}"
                f"\t{probability!r}\t"
            ).encode()
            + orjson.dumps(row).replace(b"\\", b"\\\\")
            + b"\n"
            for number, encounter, patient, probability, row in zip(
                self.ids,
                self.encounters,
                self.patients,
                self.probability,
                self.rows,
                strict=True,
            )
        )


def _hash(keyed: blake2b, identifier: Any) -> str:
    """Keyed BLAKE2b (RFC 7693): who has the key finds an encounter again, nobody else does."""
    if identifier in (None, "", "?"):
        return r"\N"
    digest = keyed.copy()
    digest.update(str(identifier).encode())
    return digest.hexdigest()


def write_segment(folder: Path, lines: bytes) -> None:
    """Put lines into the spool as a file of their own; for the processes that score batches.

    Raises:
        LogFullError: the disk is full.
    """
    name = f"{time.time_ns():020d}-{os.getpid()}"
    partial = folder / f"{name}{_PART}"
    try:
        partial.write_bytes(lines)
        partial.rename(folder / f"{name}{_READY}")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise LogFullError(_unwritable(error)) from error


class PredictionLog:
    """The spool and the thread that empties it.

    Args:
        folder: of the spool; one service has it for itself.
        dsn: connection string (libpq) of the data database.
        key: of the identifiers' hashes, 64 bytes at most.
        limit: bytes of the spool from which it is full.
        on_copied: called with the rows and seconds of each file that was copied.

    Raises:
        ServingError: another service uses the folder.
    """

    def __init__(
        self,
        folder: Path,
        dsn: str,
        key: bytes,
        limit: int,
        on_copied: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self.folder = folder
        self.key = key
        self._dsn = dsn
        self._limit = limit
        self._on_copied = on_copied
        folder.mkdir(parents=True, exist_ok=True)
        self._owned = self._own()
        self._lock = threading.Lock()
        self._describing = threading.Lock()
        self._numbers = itertools.count()
        self._file: int | None = None
        self._name = ""
        self._size = 0
        self._waiting = 0
        self._connection: psycopg2.extensions.connection | None = None
        self._models: dict[str, tuple[str, list[str]]] = {}
        self._described: set[str] = set()
        self._done: list[str] = []
        self.connected = False
        self._recover()
        self._measure()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prediction-log", daemon=True)

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def describe(self, version: str, feature_sha256: str, names: Iterable[str]) -> None:
        """Tell what the features of a version are called; kept on disk until it is stored."""
        known = self.folder / "models.json"
        with self._describing:  # champion and challenger come in threads of their own
            models = {**self._models, version: (feature_sha256, list(names))}
            partial = known.with_suffix(".part")
            partial.write_text(json.dumps(models))
            partial.replace(known)
            self._models = models

    @property
    def pending_bytes(self) -> int:
        """Bytes in the spool."""
        return self._waiting + self._size

    @property
    def waiting_files(self) -> int:
        """Closed files in the spool."""
        return self._count(_READY)

    @property
    def broken_files(self) -> int:
        """Files that were put aside as unreadable, by this service or one before it."""
        return self._count(_BROKEN)

    def _count(self, suffix: str) -> int:
        return sum(1 for _ in self.folder.glob(f"*{suffix}"))

    def check(self) -> None:
        """See whether there is room.

        Raises:
            LogFullError: there is not.
        """
        if self.pending_bytes >= self._limit:
            raise LogFullError(
                f"{self.pending_bytes >> 20} MiB of predictions wait for the database, the bound "
                "of the prediction log; nothing is predicted until it answers again"
            )

    def append(self, entry: Entry) -> None:
        """Keep predictions; when it returns, the death of this process does not lose them.

        Raises:
            LogFullError: the disk is full.
        """
        lines = entry.lines(self.key)
        with self._lock:
            try:
                if self._file is None:
                    self._name = f"{time.time_ns():020d}-{os.getpid()}-{next(self._numbers)}"
                    path = self.folder / f"{self._name}{_OPEN}"
                    self._file = os.open(
                        path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600
                    )
                    self._size = 0
                written = os.write(self._file, lines)
                if written < len(lines):
                    raise OSError(errno.ENOSPC, "the disk is full")
            except OSError as error:
                if self._file is not None:
                    # Half a line would make the whole file unreadable.
                    os.ftruncate(self._file, self._size)
                raise LogFullError(_unwritable(error)) from error
            self._size += len(lines)

    def close(self, timeout: float = 10) -> None:
        """Stop, after one more try to copy what there is; what can't be copied stays on disk."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._rotate()
        self._disconnect()
        os.close(self._owned)

    def _own(self) -> int:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise ServingError(
                f"another prediction API uses {self.folder}; stop it, or set DIABETES_STATE_DIR"
            ) from None
        return descriptor

    def _recover(self) -> None:
        """What a service that died left: its open file up to the last whole line."""
        known = self.folder / "models.json"
        if known.exists():
            self._models = json.loads(known.read_text())
        for path in self.folder.glob(f"*{_PART}"):
            path.unlink()  # of a batch that nobody got an answer to
        for path in self.folder.glob(f"*{_OPEN}"):
            whole = path.read_bytes().rpartition(b"\n")
            if whole[2]:
                path.write_bytes(whole[0] + whole[1])
            path.rename(path.with_suffix(_READY))

    def _measure(self) -> None:
        self._waiting = sum(_size(path) for path in self.folder.glob(f"*{_READY}"))

    def _rotate(self) -> None:
        with self._lock:
            if self._file is None:
                return
            os.close(self._file)
            self._file = None
            (self.folder / f"{self._name}{_OPEN}").rename(self.folder / f"{self._name}{_READY}")
            self._waiting += self._size
            self._size = 0

    def _work(self) -> None:
        wait, away = FLUSH_SECONDS, False
        while True:
            last = self._stopping.wait(wait)
            wait = FLUSH_SECONDS
            try:
                self._rotate()
                self._copy_all()
                away = False
            except psycopg2.OperationalError as error:
                if not away:
                    log.warning("prediction log: the database is away: %s", _one_line(error))
                away = True
                self._disconnect()
                wait = _RETRY_SECONDS
            except Exception:
                log.exception("prediction log: going on")
                self._disconnect()
                wait = _RETRY_SECONDS
            self._measure()
            if last:
                return

    def _copy_all(self) -> None:
        ready = sorted(self.folder.glob(f"*{_READY}"))
        if not ready and self.connected:
            return
        connection = self._connect()
        measured = time.monotonic()
        for path in ready:
            # After an outage there are many, and each that is copied makes room. To measure after
            # each would take longer than to copy: it goes over all that are left.
            if time.monotonic() - measured >= _MEASURE_SECONDS:
                self._measure()
                measured = time.monotonic()
            begin = time.monotonic()
            try:
                rows = self._copy(connection, path)
            except (psycopg2.DataError, psycopg2.IntegrityError) as error:
                connection.rollback()
                log.error("prediction log: %s is unreadable, put aside: %s", path.name, error)
                path.rename(path.with_suffix(_BROKEN))
                continue
            path.unlink()
            self._done.append(path.stem)
            seconds = time.monotonic() - begin
            self._on_copied(rows, seconds)
            # Most of the time is theirs who wait for an answer; the log can, while there is room.
            if self.pending_bytes < self._limit / 2:
                self._stopping.wait(3 * seconds)

    def _copy(self, connection: psycopg2.extensions.connection, path: Path) -> int:
        """Copy one file and its name in one transaction; 0 where it was copied before."""
        with connection, connection.cursor() as cursor:
            # Names whose files are gone can't come again.
            cursor.execute(
                "delete from inference.copied_segments where segment = any(%s)", (self._done,)
            )
            models = self._models  # another can come meanwhile
            for version in models.keys() - self._described:
                cursor.execute(
                    "insert into inference.models (model_version, feature_sha256, feature_names) "
                    "values (%s, %s, %s) on conflict do nothing",
                    (version, *models[version]),
                )
            cursor.execute(
                "insert into inference.copied_segments (segment) values (%s) "
                "on conflict do nothing",
                (path.stem,),
            )
            rows = 0
            if cursor.rowcount:
                with path.open("rb") as lines:
                    cursor.copy_expert(_COPY, lines)
                rows = cursor.rowcount
        self._described |= models.keys()
        self._done.clear()
        return rows

    def _connect(self) -> psycopg2.extensions.connection:
        if self._connection is None:
            connection = psycopg2.connect(self._dsn, connect_timeout=5)
            with connection, connection.cursor() as cursor:
                # Two services that start at once must not both create.
                cursor.execute("select pg_advisory_xact_lock(131)")
                cursor.execute("select to_regclass('inference.predictions') is not null")
                (there,) = cursor.fetchone() or (False,)
                if not there:
                    cursor.execute(_TABLES)
            self._connection = connection
            self._described.clear()
            if not self.connected:
                log.info("prediction log: writing to inference.predictions")
            self.connected = True
        return self._connection

    def _disconnect(self) -> None:
        self.connected = False
        if self._connection is not None:
            with closing(self._connection):
                self._connection = None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # copied meanwhile


def _unwritable(error: OSError) -> str:
    # Without the path, which is no matter of a caller's.
    return f"the prediction log can't be written: {error.strerror}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
