"""The prediction log: what is spooled is kept, and comes into PostgreSQL exactly once."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import uuid_utils

from serving import prediction_log
from serving.errors import ServingError
from serving.prediction_log import Entry, LogFullError, PredictionLog, write_segment
from tests.conftest import Database
from tests.served import wait_until

AWAY = "host=127.0.0.1 port=1 connect_timeout=1"
KEY = b"of a test"
LARGE = 1 << 30


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_log, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(prediction_log, "_RETRY_SECONDS", 0.05)


@contextmanager
def opened(
    folder: Path, dsn: str = AWAY, *, limit: int = LARGE, start: bool = True
) -> Iterator[PredictionLog]:
    made = PredictionLog(folder, dsn, KEY, limit)
    if start:
        made.start()
    try:
        yield made
    finally:
        made.close()


def die(log: PredictionLog) -> None:
    """What is left of a service that was killed: files as they are, no lock."""
    os.close(log._owned)
    if log._file is not None:
        os.close(log._file)


def entry(count: int = 1, **changed: Any) -> Entry:
    fields: dict[str, Any] = {
        "ids": [str(uuid_utils.uuid7()) for _ in range(count)],
        "version": "3",
        "role": "champion",
        "source": "single",
        "encounters": [9_000_000_000 + row for row in range(count)],
        "patients": [77_000_000 + row for row in range(count)],
        "probability": [0.1 + row / 1000 for row in range(count)],
        "rows": [("Caucasian", row, 0.5, None) for row in range(count)],
    }
    return Entry(**(fields | changed))


def hashed(identifier: object) -> str:
    return blake2b(str(identifier).encode(), key=KEY, digest_size=16).hexdigest()


def ready(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ready"))


def ids(database: Database) -> list[str]:
    found = database.rows("select prediction_id::text from inference.predictions order by ctid")
    return [str(row[0]) for row in found]


def test_a_line_holds_what_was_predicted() -> None:
    odd = 'tab\t, "quoted", back\\slash, new\nline'
    made = entry(2, rows=[(odd, 1, None), ("b", 2, 0.25)], patients=[None, 5])
    first, second = made.lines(KEY).decode().splitlines()
    number, at, version, role, source, encounter, patient, probability, features = first.split("\t")
    assert (number, version, role, source) == (made.ids[0], "3", "champion", "single")
    assert at.endswith("+00:00")
    assert encounter == hashed(9_000_000_000)
    assert patient == r"\N"
    assert float(probability) == 0.1
    assert json.loads(features.replace("\\\\", "\\")) == [odd, 1, None]
    assert second.split("\t")[6] == hashed(5)


@pytest.mark.parametrize("identifier", [None, "", "?"])
def test_who_is_not_named_has_no_hash(identifier: Any) -> None:
    line = entry(encounters=[identifier], patients=[identifier]).lines(KEY).decode()
    assert line.split("\t")[5:7] == [r"\N", r"\N"]


def test_an_identifier_has_one_hash_however_it_came_and_another_with_another_key() -> None:
    said = {
        entry(encounters=[value]).lines(key).split(b"\t")[5]
        for value, key in ((5, KEY), ("5", KEY), (5, b"another"))
    }
    assert said == {hashed(5).encode(), entry(encounters=[5]).lines(b"another").split(b"\t")[5]}
    assert len(said) == 2


def test_appended_lines_are_on_disk_at_once_and_hold_no_identifier(tmp_path: Path) -> None:
    with opened(tmp_path, start=False) as log:
        made = [entry(2), entry(1, encounters=["123456789"])]
        for each in made:
            log.append(each)
        (file,) = tmp_path.glob("*.open")
        assert file.stat().st_mode & 0o077 == 0
        content = file.read_text()
        assert log.pending_bytes == len(content)
    assert [line.split("\t")[0] for line in content.splitlines()] == [
        *made[0].ids,
        *made[1].ids,
    ]
    for identifier in ("9000000000", "77000000", "123456789"):
        assert identifier not in content
    assert hashed("123456789") in content


def test_without_a_database_files_are_closed_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as log:
        for number in range(1, 4):
            log.append(entry())
            wait_until(lambda number=number: len(ready(tmp_path)) == number)  # type: ignore[misc]
        assert not log.connected
        assert [*tmp_path.glob("*.open")] == []
        wait_until(lambda: log.pending_bytes == sum(f.stat().st_size for f in ready(tmp_path)))
    assert len(ready(tmp_path)) == 3
    assert caplog.text.count("the database is away") == 1


def test_what_a_dead_service_left_is_recovered_to_its_last_whole_line(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path, AWAY, KEY, LARGE)
    kept = entry(3)
    log.append(kept)
    (file,) = tmp_path.glob("*.open")
    whole = file.read_bytes()
    die(log)
    with file.open("ab") as half:
        half.write(entry().lines(KEY)[:-20])
    (tmp_path / "00000000000000000001-1.part").write_bytes(b"of a batch without an answer")
    with opened(tmp_path, start=False) as again:
        assert [*tmp_path.glob("*.open"), *tmp_path.glob("*.part")] == []
        (recovered,) = ready(tmp_path)
        assert recovered.read_bytes() == whole
        assert again.pending_bytes == len(whole)


@pytest.mark.parametrize("content", [b"", b"not one whole line"])
def test_a_file_without_a_whole_line_is_recovered_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "00000000000000000001-1-0.open").write_bytes(content)
    with opened(tmp_path, start=False) as log:
        assert log.pending_bytes == 0
        assert [file.read_bytes() for file in ready(tmp_path)] == [b""]


def test_a_full_spool_refuses_until_there_is_room(tmp_path: Path) -> None:
    size = len(entry().lines(KEY))
    with opened(tmp_path, limit=3 * size) as log:
        for _ in range(3):
            log.check()
            log.append(entry())
        with pytest.raises(LogFullError, match="wait for the database"):
            log.check()
        # Also once the file is closed, and with what batches wrote.
        wait_until(lambda: ready(tmp_path))
        with pytest.raises(LogFullError):
            log.check()
        for file in ready(tmp_path):
            file.unlink()
        wait_until(lambda: log.pending_bytes == 0)
        log.check()
        write_segment(tmp_path, entry(4).lines(KEY))
        wait_until(lambda: log.pending_bytes >= 3 * size)
        with pytest.raises(LogFullError):
            log.check()


@pytest.mark.parametrize("written", [10, -1])
def test_half_a_line_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    real = os.write

    def full(descriptor: int, lines: bytes) -> int:
        if written < 0:
            real(descriptor, lines[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, lines[:written])

    with opened(tmp_path, start=False) as log:
        log.append(entry())
        (file,) = tmp_path.glob("*.open")
        before = file.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LogFullError, match=r"written: (the disk is full|No space)"):
            log.append(entry())
        assert file.read_bytes() == before
        assert log.pending_bytes == len(before)
        monkeypatch.setattr(os, "write", real)
        after = entry()
        log.append(after)
        assert file.read_bytes().splitlines()[1].startswith(after.ids[0].encode())


def test_a_folder_that_has_gone_is_a_log_that_is_full(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    with opened(spool, start=False) as log:
        spool.rename(tmp_path / "elsewhere")
        with pytest.raises(LogFullError, match="can't be written: No such file") as caught:
            log.append(entry())
        assert str(tmp_path) not in str(caught.value)
        with pytest.raises(LogFullError, match="can't be written: No such file"):
            write_segment(spool, entry().lines(KEY))
        (tmp_path / "elsewhere").rename(spool)
        log.append(entry())


def test_a_segment_that_does_not_fit_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, lines: bytes) -> int:
        with path.open("wb") as file:
            file.write(lines[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LogFullError, match="No space"):
        write_segment(tmp_path, entry().lines(KEY))
    assert [*tmp_path.iterdir()] == []


def test_a_second_service_is_told_who_is_there(tmp_path: Path) -> None:
    with (
        opened(tmp_path),
        pytest.raises(ServingError, match=r"^another prediction API uses .*DIABETES_STATE_DIR"),
    ):
        PredictionLog(tmp_path, AWAY, KEY, LARGE)
    with opened(tmp_path):
        pass


def test_names_of_features_survive_and_come_from_several_threads(tmp_path: Path) -> None:
    with opened(tmp_path, start=False) as log:
        threads = [
            threading.Thread(target=log.describe, args=(str(number), "a" * 64, ["x", "y"]))
            for number in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(log._models) == {str(number) for number in range(20)}
    with opened(tmp_path, start=False) as again:
        assert set(again._models) == {str(number) for number in range(20)}


# with PostgreSQL


def test_what_was_spooled_is_in_the_table_in_order(database: Database, tmp_path: Path) -> None:
    counted: list[int] = []
    log = PredictionLog(
        tmp_path, database.dsn, KEY, LARGE, lambda rows, seconds: counted.append(rows)
    )
    log.describe("3", "f" * 64, ["race", "visits", "age", "gone"])
    odd = 'tab\t, "quoted", back\\slash, new\nline, \\N, ü'
    made = [entry(3, rows=[(odd, row, 0.5, None) for row in range(3)]), entry(2, source="csv")]
    write_segment(tmp_path, made[1].lines(KEY))
    log.append(made[0])
    log.start()
    wait_until(lambda: not ready(tmp_path) and len(counted) == 2)
    log.close()
    assert ids(database) == [*made[1].ids, *made[0].ids]
    assert sum(counted) == 5
    columns = database.rows(
        "select column_name, data_type from information_schema.columns where table_schema = "
        "'inference' and table_name = 'predictions' order by ordinal_position"
    )
    assert columns == [
        ("prediction_id", "uuid"),
        ("predicted_at", "timestamp with time zone"),
        ("model_version", "text"),
        ("role", "text"),
        ("source", "text"),
        ("encounter_hash", "text"),
        ("patient_hash", "text"),
        ("probability", "double precision"),
        ("features", "jsonb"),
    ]
    (row,) = database.rows(
        "select model_version, role, source, encounter_hash, patient_hash, probability, features,"
        " abs(extract(epoch from now() - predicted_at)) < 60 from inference.predictions"
        " where prediction_id = %s",
        made[0].ids[1],
    )
    assert row == (
        "3",
        "champion",
        "single",
        hashed(9_000_000_001),
        hashed(77_000_001),
        0.101,
        [odd, 1, 0.5, None],
        True,
    )
    view = database.rows(
        "select feature, value from inference.prediction_features where prediction_id = %s",
        made[0].ids[1],
    )
    assert view == [("race", odd), ("visits", "1"), ("age", "0.5"), ("gone", None)]
    (model,) = database.rows("select model_version, feature_sha256 from inference.models")
    assert model == ("3", "f" * 64)


def test_a_file_whose_deletion_was_missed_is_not_copied_again(
    database: Database, tmp_path: Path
) -> None:
    made = entry(5)
    write_segment(tmp_path, made.lines(KEY))
    (file,) = ready(tmp_path)
    content = file.read_bytes()
    with opened(tmp_path, database.dsn):
        wait_until(lambda: not ready(tmp_path))
    assert ids(database) == list(made.ids)
    # As if the service had died between the commit and the deletion.
    file.write_bytes(content)
    with opened(tmp_path, database.dsn) as again:
        wait_until(lambda: not ready(tmp_path))
        assert again.broken_files == 0
        later = entry(2)
        again.append(later)
        wait_until(lambda: len(ids(database)) == 7)
    assert ids(database) == [*made.ids, *later.ids]
    assert [*tmp_path.glob("*.broken")] == []


def test_names_of_copied_files_are_forgotten_when_the_files_are_gone(
    database: Database, tmp_path: Path
) -> None:
    with opened(tmp_path, database.dsn) as log:
        for number in range(1, 6):
            log.append(entry())
            wait_until(lambda number=number: database_rows(database) == number)  # type: ignore[misc]
            wait_until(lambda: not ready(tmp_path))
    assert database.rows("select count(*) from inference.copied_segments") == [(1,)]


def database_rows(database: Database) -> int:
    if database.rows("select to_regclass('inference.predictions')") == [(None,)]:
        return 0
    return len(ids(database))


def test_an_unreadable_file_is_put_aside_and_the_others_go_on(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [entry(2), entry(2)]
    bad = {
        "half a line": good[0].lines(KEY)[:-30] + b"\n",
        "no role": entry(role="nobody").lines(KEY),
        "no number": entry(ids=["no uuid"]).lines(KEY),
        "no UTF-8": b"\xff\xff\n",
    }
    write_segment(tmp_path, good[0].lines(KEY))
    for lines in bad.values():
        write_segment(tmp_path, lines)
    write_segment(tmp_path, good[1].lines(KEY))
    with opened(tmp_path, database.dsn) as log:
        wait_until(lambda: not ready(tmp_path))
        assert log.broken_files == len(bad)
    with opened(tmp_path, database.dsn) as again:
        assert again.broken_files == len(bad)  # they are still there to be looked at
    assert ids(database) == [*good[0].ids, *good[1].ids]
    contents = [file.read_bytes() for file in sorted(tmp_path.glob("*.broken"))]
    assert contents == [*bad.values()]
    assert caplog.text.count("is unreadable, put aside") == len(bad)


def test_a_database_that_comes_back_gets_all_of_it(database: Database, tmp_path: Path) -> None:
    with opened(tmp_path) as away:
        first = entry(3)
        away.append(first)
        wait_until(lambda: ready(tmp_path))
    with opened(tmp_path, database.dsn) as log:
        wait_until(lambda: not ready(tmp_path))
        assert log.connected
        # Its connection is cut: the next is made, and nothing is lost or twice.
        database.rows(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        second = entry(2)
        log.append(second)
        wait_until(lambda: len(ids(database)) == 5)
    assert ids(database) == [*first.ids, *second.ids]


def test_there_is_room_again_before_all_of_an_outage_is_copied(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_log, "_MEASURE_SECONDS", 0.0)
    made = [entry() for _ in range(6)]
    for each in made:
        write_segment(tmp_path, each.lines(KEY))
    size = len(made[0].lines(KEY))
    left: list[int] = []

    def look(rows: int, seconds: float) -> None:
        with suppress(LogFullError):
            log.check()
            left.append(len(ready(tmp_path)))

    log = PredictionLog(tmp_path, database.dsn, KEY, 4 * size, look)
    with pytest.raises(LogFullError):
        log.check()
    log.start()
    wait_until(lambda: not ready(tmp_path))
    log.close()
    assert left == [2, 1, 0]  # measured before the file that was just copied
    assert ids(database) == [each.ids[0] for each in made]


def test_tables_that_were_dropped_are_made_again(database: Database, tmp_path: Path) -> None:
    with opened(tmp_path, database.dsn) as log:
        log.append(entry())
        wait_until(lambda: database_rows(database) == 1)
        database.rows("drop schema inference cascade")
        kept = entry()
        log.append(kept)
        wait_until(lambda: database_rows(database) == 1)
        assert log.broken_files == 0
    assert ids(database) == list(kept.ids)


def test_two_services_that_start_at_once_make_one_set_of_tables(
    database: Database, tmp_path: Path
) -> None:
    folders = [tmp_path / str(number) for number in range(4)]
    logs = [PredictionLog(folder, database.dsn, KEY, LARGE) for folder in folders]
    for log in logs:
        log.append(entry())
        log.start()
    try:
        wait_until(lambda: not any(ready(folder) or [*folder.glob("*.open")] for folder in folders))
    finally:
        for log in logs:
            log.close()
    assert len(ids(database)) == 4


def test_what_is_spooled_last_is_copied_before_the_end(database: Database, tmp_path: Path) -> None:
    with opened(tmp_path, database.dsn) as log:
        wait_until(lambda: log.connected)
        begin = time.monotonic()
        made = entry(1_000)
        log.append(made)
    assert time.monotonic() - begin < 10
    assert ids(database) == list(made.ids)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
