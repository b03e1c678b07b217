"""What the publisher's file is known to hold stands in the table, every value untouched."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import psycopg2
import pytest

from ingestion.contract import COLUMNS, HEADER
from ingestion.load import load, validate
from ingestion.source import open_csv
from settings import PUBLISHER_CSV_SHA256

SHA256 = "0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97"
ROWS = 101_766
PATIENTS = 71_518
READMITTED = {"NO": 54_864, ">30": 35_545, "<30": 11_357}
MISSING = {
    "weight": 98_569,
    "medical_specialty": 49_949,
    "payer_code": 40_256,
    "race": 2_273,
    "diag_3": 1_423,
    "diag_2": 358,
    "diag_1": 21,
}
NOT_MEASURED = {"a1cresult": 84_748, "max_glu_serum": 96_420}


class Database(Protocol):
    @property
    def dsn(self) -> str: ...

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]: ...


def records(path: Path) -> Iterator[list[str]]:
    """The file's rows, read by the csv module alone."""
    with open_csv(path) as binary, io.TextIOWrapper(binary, "ascii", newline="") as text:
        yield from csv.reader(text)


def counts(database: Database, value: str) -> dict[str, int]:
    """How often each column holds a value; columns without it are left out."""
    sums = ", ".join(f"count(*) filter (where {column}::text = %s)" for column in COLUMNS)
    (row,) = database.rows(f"select {sums} from raw_data.diabetes", *[value] * len(COLUMNS))
    return {column: count for column, count in zip(COLUMNS, row, strict=True) if count}


def test_real_file_is_the_known_one_and_holds_the_contract(real_zip: Path) -> None:
    report = validate(real_zip, reject_limit_percent=0, expected_sha256=SHA256)
    assert (report.rows_read, report.rows_rejected, report.first_rejects) == (ROWS, 0, ())
    assert report.sha256 == PUBLISHER_CSV_SHA256 == SHA256
    assert tuple(next(records(real_zip))) == HEADER


def test_table_holds_the_real_file_value_for_value(database: Database, real_zip: Path) -> None:
    report = load(
        real_zip,
        database.dsn,
        source=str(real_zip),
        run_id="test",
        reject_limit_percent=0,
        expected_sha256=SHA256,
    )
    assert (report.rows_read, report.rows_inserted, report.rows_rejected) == (ROWS, ROWS, 0)
    assert report.is_synthetic is False
    assert database.rows("select * from raw_data.diabetes_rejects") == []

    ((rows, patients, lowest, highest),) = database.rows(
        "select count(*), count(distinct patient_nbr), min(encounter_id), max(encounter_id)"
        " from raw_data.diabetes"
    )
    assert (rows, patients, lowest, highest) == (ROWS, PATIENTS, 12_522, 443_867_222)
    outcomes = database.rows("select readmitted, count(*) from raw_data.diabetes group by 1")
    assert dict(outcomes) == READMITTED
    assert counts(database, "?") == MISSING
    assert counts(database, "None") == NOT_MEASURED
    assert counts(database, "Unknown/Invalid") == {"gender": 3}
    for column in ("examide", "citoglipton"):
        assert counts(database, "No")[column] == ROWS

    assert dump_of_table(database) == dump_of_file(real_zip)

    again = load(
        real_zip, database.dsn, source="again", run_id="test", reject_limit_percent=0,
    )  # fmt: skip
    assert again.rows_unchanged == ROWS


def dump_of_table(database: Database) -> str:
    """SHA-256 of all rows as CSV without quotes, ordered by encounter."""
    digest = hashlib.sha256()

    class Sink(io.RawIOBase):
        def write(self, data: Any) -> int:
            digest.update(data)
            return len(data)

    with closing(psycopg2.connect(database.dsn)) as connection, connection.cursor() as cursor:
        cursor.copy_expert(
            f"copy (select {', '.join(COLUMNS)} from raw_data.diabetes order by encounter_id)"
            " to stdout with (format csv)",
            Sink(),
        )
    return digest.hexdigest()


def dump_of_file(path: Path) -> str:
    rows = islice(records(path), 1, None)
    lines = sorted((int(row[0]), ",".join(row)) for row in rows)
    return hashlib.sha256("".join(f"{line}\n" for _, line in lines).encode()).hexdigest()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_real_rows_are_accepted_with_any_line_end(real_zip: Path, tmp_path: Path, end: str) -> None:
    path = tmp_path / "head.csv"
    lines = [",".join(row) for row in islice(records(real_zip), 500)]
    path.write_bytes(end.join(lines).encode("ascii"))
    assert validate(path, reject_limit_percent=0).rows_read == 499
