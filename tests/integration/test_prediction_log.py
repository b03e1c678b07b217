"""The prediction log and a real PostgreSQL: each prediction arrives exactly once."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from serving import prediction_log
from serving.prediction_log import LogFullError, PredictionLog, write_segment
from tests.served import wait_until
from tests.unit.test_serving_prediction_log import (
    KEY,
    LARGE,
    entry,
    hashed,
    ids,
    opened,
    ready,
)
from tests.warehouse import Database

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
