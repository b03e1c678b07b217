"""A load is one step: all of it, or the table, the log and the rejects as they were."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import psycopg2
import pytest

from ingestion import load as load_module
from ingestion import rows
from ingestion.contract import COLUMNS, FIELDS, HEADER
from ingestion.errors import IngestionError
from ingestion.load import LoadReport, load, validate
from ingestion.rows import RowStream
from ingestion.synthetic import csv_blocks, write_csv
from settings import PROJECT_ROOT

ROWS = 2_000
LINES = b"".join(csv_blocks(ROWS)).split(b"\r\n")[1:-1]
REAL_LINES = [b"%d,%b" % (at, line.partition(b",")[2]) for at, line in enumerate(LINES, 1)]
FIRST_ID = int(LINES[0].partition(b",")[0])


class Database(Protocol):
    @property
    def dsn(self) -> str: ...

    @property
    def environment(self) -> dict[str, str]: ...

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]: ...


def csv_of(lines: list[bytes]) -> bytes:
    return b"\r\n".join((",".join(HEADER).encode("ascii"), *lines, b""))


def zip_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("diabetic_data.csv", data)
    return buffer.getvalue()


def corrected(line: bytes, name: str = "number_diagnoses", value: bytes = b"99") -> bytes:
    values = line.split(b",")
    values[HEADER.index(name)] = value
    return b",".join(values)


class Loader:
    """Loads what a test writes down, and sees what became of the database."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.path = folder / "file.csv"

    def __call__(
        self, lines: list[bytes], *, limit: float = 1.0, full_refresh: bool = False
    ) -> LoadReport:
        return self.file(csv_of(lines), limit=limit, full_refresh=full_refresh)

    def file(
        self, data: bytes, *, limit: float = 1.0, full_refresh: bool = False, sha256: str = ""
    ) -> LoadReport:
        self.path.write_bytes(data)
        return load(
            self.path,
            self.database.dsn,
            source="the test",
            run_id="run 1",
            reject_limit_percent=limit,
            expected_sha256=sha256,
            full_refresh=full_refresh,
        )

    def table(self) -> list[tuple[Any, ...]]:
        return self.database.rows("select * from raw_data.diabetes order by encounter_id")

    def count(self) -> int:
        ((count,),) = self.database.rows("select count(*) from raw_data.diabetes")
        return int(count)

    def rejects(self) -> list[tuple[Any, ...]]:
        return self.database.rows(
            "select line_number, reason, record from raw_data.diabetes_rejects order by 1"
        )

    def state(self) -> tuple[list[tuple[Any, ...]], ...]:
        """Everything in raw_data with the place of each row, and the names of the tables."""
        query = self.database.rows
        return (
            query("select tablename from pg_tables where schemaname = 'raw_data' order by 1"),
            query("select ctid::text, xmin::text, * from raw_data.diabetes order by encounter_id"),
            query("select ctid::text, xmin::text, * from raw_data.diabetes_rejects order by 1"),
            query("select * from raw_data.ingestion_log order by load_id"),
        )

    @contextmanager
    def changing_nothing(self) -> Iterator[None]:
        before = self.state()
        assert before[0] == [("diabetes",), ("diabetes_rejects",), ("ingestion_log",)]
        yield
        assert self.state() == before


@pytest.fixture
def loader(database: Database, tmp_path: Path) -> Loader:
    return Loader(database, tmp_path)


@pytest.fixture
def loaded(loader: Loader) -> Loader:
    """With the synthetic rows and one reject in the tables."""
    loader([*LINES, b"broken"])
    return loader


def expected_row(line: bytes, first_load: int, last_load: int) -> tuple[Any, ...]:
    values = line.decode("ascii").split(",")
    typed = [
        value if field.sql_type == "text" else int(value)
        for field, value in zip(FIELDS, values, strict=True)
    ]
    return (*typed, first_load, last_load)


def test_first_load_brings_every_value_as_written(loader: Loader) -> None:
    report = loader(LINES)
    assert loader.table() == [expected_row(line, 1, 1) for line in LINES]
    names = loader.database.rows(
        "select column_name from information_schema.columns where table_schema = 'raw_data'"
        " and table_name = 'diabetes' order by ordinal_position"
    )
    assert [name for (name,) in names] == [*COLUMNS, "first_load_id", "last_load_id"]
    assert report == LoadReport(
        load_id=1,
        source="the test",
        sha256=hashlib.sha256(csv_of(LINES)).hexdigest(),
        is_synthetic=True,
        rows_read=ROWS,
        rows_inserted=ROWS,
        rows_updated=0,
        rows_deleted=0,
        rows_unchanged=0,
        rows_rejected=0,
    )


def test_log_says_what_the_report_says(loader: Loader) -> None:
    report = loader([*LINES, b"broken"])
    names = [*LoadReport.__slots__, "run_id"]
    ((*entry, in_order),) = loader.database.rows(
        f"select {', '.join(names)},"
        " started_at < finished_at and finished_at <= clock_timestamp()"
        " and started_at > clock_timestamp() - interval '1 minute' from raw_data.ingestion_log"
    )
    assert entry == [*(getattr(report, name) for name in LoadReport.__slots__), "run 1"]
    assert in_order is True


@pytest.mark.parametrize("pack", [csv_of, lambda lines: zip_of(csv_of(lines))], ids=["csv", "zip"])
def test_same_file_again_rewrites_no_row(
    loaded: Loader, pack: Callable[[list[bytes]], bytes]
) -> None:
    before = loaded.state()
    report = loaded.file(pack([*LINES, b"broken"]))
    assert (report.load_id, report.rows_unchanged, report.rows_rejected) == (2, ROWS, 1)
    assert report.rows_inserted == report.rows_updated == report.rows_deleted == 0
    after = loaded.state()
    assert after[:3] == before[:3]
    assert after[3][:1] == before[3]
    assert len(after[3]) == 2


def test_new_encounters_are_added_under_the_load_that_brought_them(loader: Loader) -> None:
    loader(LINES[:1_500])
    report = loader(LINES)
    assert (report.rows_inserted, report.rows_updated, report.rows_unchanged) == (500, 0, 1_500)
    assert loader.table() == [
        expected_row(line, load_id, load_id)
        for at, line in enumerate(LINES)
        for load_id in [1 if at < 1_500 else 2]
    ]


def test_smaller_file_removes_nothing(loaded: Loader) -> None:
    report = loaded(LINES[:10])
    assert (report.rows_unchanged, report.rows_deleted) == (10, 0)
    assert loaded.count() == ROWS


def test_corrected_encounters_alone_are_updated(loaded: Loader) -> None:
    before = loaded.state()[1]
    changed = {3: corrected(LINES[3]), 1_999: corrected(LINES[1_999], "diag_1", b"?")}
    lines = [changed.get(at, line) for at, line in enumerate(LINES)]
    report = loaded(lines)
    assert (report.rows_inserted, report.rows_updated) == (0, 2)
    assert report.rows_unchanged == ROWS - 2
    assert loaded.table() == [
        expected_row(line, 1, 2 if at in changed else 1) for at, line in enumerate(lines)
    ]
    rewritten = zip(before, loaded.state()[1], strict=True)
    assert [at for at, (old, new) in enumerate(rewritten) if old != new] == list(changed)


def test_correction_of_any_column_is_seen(loaded: Loader) -> None:
    lines = list(LINES)
    for at, field in enumerate(FIELDS[1:], 1):
        now = LINES[at].split(b",")[at].decode()
        others = field.values or ("7", "8")  # fits ids, counts and ICD-9 codes
        lines[at] = corrected(LINES[at], field.name, next(v for v in others if v != now).encode())
    assert loaded(lines).rows_updated == len(FIELDS) - 1
    assert [row[:-2] for row in loaded.table()] == [expected_row(line, 0, 0)[:-2] for line in lines]


def test_rejects_are_kept_with_line_reason_and_text_once(loader: Loader) -> None:
    nul = corrected(LINES[1], "race", b"A\0sian")
    lines = [*LINES[:5], nul, *LINES[5:], "zwölf,…".encode()]
    expected = [
        (7, r"race is 'A\x00sian', expected one of Caucasian, AfricanAmerican, ?, Hispanic, Other, "
            "Asian", nul.decode().replace("\0", "\N{SYMBOL FOR NULL}")),
        (2_003, "2 fields, expected 50", "zwölf,…"),
    ]  # fmt: skip
    for load_id in (1, 2):
        report = loader(lines)
        assert (report.load_id, report.rows_read, report.rows_rejected) == (load_id, 2_002, 2)
        assert loader.rejects() == expected
    assert loader.count() == ROWS


def test_rejects_of_another_file_are_added(loaded: Loader) -> None:
    loaded([*LINES, b"broken", b"too"])
    entries = "select line_number, first_load_id from raw_data.diabetes_rejects order by 2, 1"
    assert loaded.database.rows(entries) == [(2_002, 1), (2_002, 2), (2_003, 2)]


def test_later_line_of_a_repeated_encounter_is_rejected(loader: Loader) -> None:
    repeat = corrected(LINES[7])
    lines = [*LINES, repeat, LINES[7], b"broken"]
    for _ in range(2):
        report = loader(lines)
        assert (report.rows_read, report.rows_rejected) == (2_003, 3)
        reason = f"encounter_id {FIRST_ID + 7} stands already in line 9"
        assert loader.rejects() == [
            (2_002, reason, repeat.decode()),
            (2_003, reason, LINES[7].decode()),
            (2_004, "1 fields, expected 50", "broken"),
        ]
    assert loader.table()[7] == expected_row(LINES[7], 1, 1)


def test_line_that_is_broken_does_not_count_as_the_first(loader: Loader) -> None:
    broken = corrected(LINES[0], "race", b"Elf")
    report = loader([broken, *LINES])
    assert (report.rows_inserted, report.rows_rejected) == (ROWS, 1)


@pytest.mark.parametrize("bad", [b"broken", LINES[0]], ids=["broken", "repeated"])
def test_reject_limit_includes_its_edge(loader: Loader, bad: bytes) -> None:
    """20 of 2,000 rows are exactly 1 %, 21 are more."""
    report = loader([*LINES[:1_980], *[bad] * 20])
    assert (report.rows_read, report.rows_rejected) == (2_000, 20)
    with (
        loader.changing_nothing(),
        pytest.raises(IngestionError, match=r"21 of 2,000 rows \(1\.05%\) break the contract, mo"),
    ):
        loader([*LINES[:1_979], *[bad] * 21])


def test_too_many_rejects_change_nothing_and_name_five(loaded: Loader) -> None:
    lines = [*[b"broken"] * 3, *LINES, *[LINES[0]] * 30]
    with loaded.changing_nothing(), pytest.raises(IngestionError) as caught:
        loaded(lines)
    message = str(caught.value)
    repeated = f"encounter_id {FIRST_ID} stands already in line 5"
    assert "than the limit of 1 %; nothing was loaded. First of them: line 2: 1 fields" in message
    assert message.endswith(f"line 2005: {repeated} | line 2006: {repeated}")


def test_limit_of_zero_refuses_the_first_broken_row_and_no_other(loader: Loader) -> None:
    assert loader(LINES, limit=0).rows_rejected == 0
    with loader.changing_nothing(), pytest.raises(IngestionError, match="1 of 2,001 rows"):
        loader([*LINES, b"broken"], limit=0)


def test_limit_of_hundred_takes_what_is_left(loader: Loader) -> None:
    report = loader([*[b"broken"] * 50, LINES[0]], limit=100)
    assert (report.rows_inserted, report.rows_rejected) == (1, 50)


def in_the_middle(data: bytes, byte: int) -> bytes:
    at = len(data) * 3 // 4
    return data[:at] + bytes([byte]) + data[at + 1 :]


BIG = zip_of(csv_of(LINES))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BIG[: len(BIG) // 2], "damaged or cut off"),
        (in_the_middle(BIG, BIG[len(BIG) * 3 // 4] ^ 0xFF), "damaged or cut off"),
        (csv_of([*LINES[:-1], LINES[-1] + b"\xe9"]), "line 2001: byte 0xE9 is not UTF-8"),
        (csv_of([*LINES, b"x" * 70_000]), "line 2002: a record of more than 65,536 bytes"),
        (csv_of(LINES).replace(b"race", b"rice", 1), "line 1: wrong header"),
        (csv_of([]), "a header but no rows"),
        (b"", "the file is empty"),
        (b"<html>", "this is an HTML page"),
    ],
    ids=["cut", "damaged", "Latin-1 at the end", "endless", "header", "no rows", "empty", "page"],
)
def test_file_that_breaks_changes_nothing(
    loaded: Loader, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4_096)  # so that COPY has begun when it breaks
    with loaded.changing_nothing(), pytest.raises(IngestionError, match=message):
        loaded.file(data, full_refresh=True)
    assert loaded(LINES).rows_unchanged == ROWS


def test_sha256_has_to_be_the_expected_one(loader: Loader) -> None:
    data = csv_of(LINES)
    loader.file(data, sha256=hashlib.sha256(data).hexdigest())
    with loader.changing_nothing(), pytest.raises(IngestionError, match="expected 000000"):
        loader.file(csv_of(LINES[:9]), sha256="0" * 64, full_refresh=True)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (LINES, REAL_LINES, "file.csv holds real encounters, raw_data.diabetes synthetic ones"),
        (REAL_LINES, LINES, "file.csv holds synthetic encounters, raw_data.diabetes real ones"),
        (LINES, [*LINES, REAL_LINES[0]], "holds real and synthetic encounters"),
    ],
    ids=["real onto synthetic", "synthetic onto real", "both in one file"],
)
def test_real_and_synthetic_encounters_never_mix(
    loader: Loader, first: list[bytes], second: list[bytes], message: str
) -> None:
    loader(first)
    with loader.changing_nothing(), pytest.raises(IngestionError, match=message):
        loader(second)


def test_file_of_both_kinds_is_refused_even_by_full_refresh(loaded: Loader) -> None:
    with loaded.changing_nothing(), pytest.raises(IngestionError, match="expected one kind"):
        loaded([LINES[0], REAL_LINES[0]], full_refresh=True)


def test_full_refresh_replaces_one_kind_by_the_other(loaded: Loader) -> None:
    report = loaded(REAL_LINES[:500], full_refresh=True)
    assert (report.rows_inserted, report.rows_deleted) == (500, ROWS)
    assert report.is_synthetic is False
    assert loaded.table() == [expected_row(line, 2, 2) for line in REAL_LINES[:500]]


def test_full_refresh_touches_only_what_differs(loaded: Loader) -> None:
    before = loaded.state()[1]
    report = loaded([corrected(LINES[0]), *LINES[1:1_990]], full_refresh=True)
    assert (report.rows_updated, report.rows_unchanged) == (1, 1_989)
    assert (report.rows_inserted, report.rows_deleted) == (0, 10)
    assert loaded.state()[1][1:] == before[1:1_990]


def test_readers_see_the_old_table_or_the_new_one_and_never_wait(loaded: Loader) -> None:
    seen: set[tuple[Any, ...]] = set()
    done = threading.Event()

    def look() -> None:
        with closing(psycopg2.connect(loaded.database.dsn)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute("set lock_timeout = '500ms'")
            while not done.is_set():
                cursor.execute("select count(*), min(last_load_id) from raw_data.diabetes")
                seen.update(cursor.fetchall())

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for lines in (REAL_LINES[:1_500], LINES, REAL_LINES[:1_500]):
            loaded(lines, full_refresh=True)
    finally:
        done.set()
        reader.join()
    assert {(1_500, 2), (2_000, 3)} <= seen <= {(2_000, 1), (1_500, 2), (2_000, 3), (1_500, 4)}


def test_second_load_at_a_time_is_refused_and_leaves_the_first_alone(loaded: Loader) -> None:
    with closing(psycopg2.connect(loaded.database.dsn)) as other:
        cursor = other.cursor()
        cursor.execute("select pg_advisory_lock(%s)", (load_module._LOCK,))
        cursor.execute("create table raw_data.diabetes_staging (line_number bigint)")
        other.commit()
        before = loaded.state()
        with pytest.raises(IngestionError, match="another load into raw_data"):
            loaded(LINES)
        assert loaded.state() == before


@pytest.mark.parametrize("lines", [LINES, [b"broken"]], ids=["good", "refused"])
def test_lock_is_free_as_soon_as_load_returns(
    loaded: Loader, monkeypatch: pytest.MonkeyPatch, lines: list[bytes]
) -> None:
    """A closed connection frees its locks too, but when the server has noticed."""
    kept: list[Any] = []

    def keep_open(connection: Any) -> nullcontext[Any]:
        kept.append(connection)
        return nullcontext(connection)

    monkeypatch.setattr(load_module, "closing", keep_open)
    try:
        with pytest.raises(IngestionError) if lines != LINES else nullcontext():
            loaded(lines)
        free = loaded.database.rows("select pg_try_advisory_lock(%s)", load_module._LOCK)
    finally:
        for connection in kept:
            connection.close()
    assert free == [(True,)]


def interrupted(monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None]) -> None:
    """Call `interrupt` while COPY is in the middle of the file."""

    class Interrupted(RowStream):
        def _checked_blocks(self) -> Iterator[bytes]:
            blocks = super()._checked_blocks()
            while self.rows < ROWS / 2:
                yield next(blocks)
            interrupt()
            yield from blocks

    monkeypatch.setattr(load_module, "RowStream", Interrupted)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4_096)


def test_killed_connection_changes_nothing_and_the_next_load_works(
    loaded: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        loaded.database.rows(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )

    with monkeypatch.context() as broken, loaded.changing_nothing():
        interrupted(broken, kill)
        with pytest.raises(psycopg2.OperationalError):
            loaded(REAL_LINES, full_refresh=True)
    assert loaded(LINES).rows_unchanged == ROWS


def test_interrupt_by_the_user_stays_one_and_changes_nothing(
    loaded: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press() -> None:
        raise KeyboardInterrupt

    interrupted(monkeypatch, press)
    with loaded.changing_nothing(), pytest.raises(KeyboardInterrupt):
        loaded(REAL_LINES, full_refresh=True)


def test_until_the_commit_readers_see_the_old_rows_and_a_failure_changes_nothing(
    loaded: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = load_module._publish

    def breaks(*arguments: Any) -> LoadReport:
        publish(*arguments)
        look = "set lock_timeout = '1s'; select count(*), max(last_load_id) from raw_data.diabetes"
        assert loaded.database.rows(look) == [(ROWS, 1)]
        raise RuntimeError("power cut")

    with monkeypatch.context() as broken, loaded.changing_nothing():
        broken.setattr(load_module, "_publish", breaks)
        with pytest.raises(RuntimeError, match="power cut"):
            loaded(REAL_LINES, full_refresh=True)


def test_staging_table_of_a_killed_load_is_no_obstacle(loaded: Loader) -> None:
    loaded.database.rows("create table raw_data.diabetes_staging (left_over text)")
    assert loaded(LINES).rows_unchanged == ROWS
    assert ("diabetes_staging",) not in loaded.state()[0]


def test_database_that_is_away_is_an_operational_error(tmp_path: Path) -> None:
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        load(
            tmp_path / "never looked at",
            "host=127.0.0.1 port=1 dbname=x user=x",
            source="x",
            run_id="x",
            reject_limit_percent=1,
        )


@pytest.mark.parametrize("lines", [LINES, [*LINES, b"broken"]])
def test_validate_finds_what_load_finds(loader: Loader, lines: list[bytes]) -> None:
    loaded = loader(lines)
    found = validate(loader.path, reject_limit_percent=1, expected_sha256=loaded.sha256)
    assert found.path == str(loader.path)
    assert (found.rows_read, found.rows_rejected, found.sha256) == (
        loaded.rows_read,
        loaded.rows_rejected,
        loaded.sha256,
    )
    assert list(found.first_rejects) == [f"line {at}: {why}" for at, why, _ in loader.rejects()]


def test_validate_applies_limit_and_sha256(loader: Loader) -> None:
    loader.path.write_bytes(csv_of([LINES[0], b"broken"]))
    with pytest.raises(IngestionError, match=r"1 of 2 rows \(50\.00%\) break the contract"):
        validate(loader.path, reject_limit_percent=49)
    with pytest.raises(IngestionError, match="expected abc"):
        validate(loader.path, reject_limit_percent=50, expected_sha256="abc")


# Starts the loads from a small process of its own: Linux counts to a child's peak what its parent
# held when it forked, and pytest holds much.
MEASURE = """
import resource, subprocess, sys
for path in sys.argv[1:]:
    command = [sys.executable, "-m", "ingestion", "load", "--full-refresh", "--source", path]
    subprocess.run([*command, "--reject-limit-percent", "100"], check=True, capture_output=True)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.parametrize("full_refresh", [False, True])
def test_file_without_one_valid_row_loads_nothing(loaded: Loader, full_refresh: bool) -> None:
    before = loaded.table()
    with pytest.raises(IngestionError, match="not one row"):
        loaded([b"broken"], limit=100, full_refresh=full_refresh)
    assert loaded.table() == before


@pytest.mark.parametrize("kind", ["distinct", "repeated", "broken"])
def test_memory_does_not_grow_with_the_rows(database: Database, tmp_path: Path, kind: str) -> None:
    small, large = tmp_path / "small.csv", tmp_path / "large.csv"
    write_csv(small, rows=1_000)
    if kind == "distinct":
        write_csv(large, rows=300_000)
    elif kind == "repeated":
        large.write_bytes(csv_of(LINES * 40))
    else:
        large.write_bytes(csv_of([LINES[0], *(line + b",x" for line in LINES * 20)]))
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        env={**os.environ, **database.environment},
        cwd=PROJECT_ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    unit = 1 if sys.platform == "darwin" else 1_024
    base, peak = (int(line) * unit / 2**20 for line in measured.stdout.split())
    assert peak < 200
    assert peak - base < 16
