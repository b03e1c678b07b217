"""The prediction log: what is spooled is kept, and comes into PostgreSQL exactly once."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import uuid_utils

from serving.errors import ServingError
from serving.prediction_log import Entry, LogFullError, PredictionLog, write_segment
from tests.served import wait_until
from tests.warehouse import Database

AWAY = "host=127.0.0.1 port=1 connect_timeout=1"
KEY = b"of a test"
LARGE = 1 << 30


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
