"""The stream hands on every valid line, sets every broken one aside, and knows where it stood."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path

import pytest

from ingestion import rows
from ingestion.contract import FIELDS, HEADER
from ingestion.errors import IngestionError
from ingestion.rows import MAX_RECORD_BYTES, RowStream
from ingestion.synthetic import csv_blocks

HEADER_LINE = ",".join(HEADER).encode("ascii")
LINES = b"".join(csv_blocks(40)).split(b"\r\n")[1:-1]
GOOD = LINES[0]


def stream_of(data: bytes) -> RowStream:
    return RowStream(io.BytesIO(data), "file.csv")


def read(stream: RowStream) -> bytes:
    return b"".join(iter(lambda: stream.read(8192), b""))


def numbered(lines: list[bytes], first: int = 2) -> bytes:
    return b"".join(b"%d,%b\n" % (first + at, line) for at, line in enumerate(lines))


def file_of(*lines: bytes) -> bytes:
    return b"\r\n".join((HEADER_LINE, *lines, b""))


def with_value(name: str, value: bytes, line: bytes = GOOD) -> bytes:
    values = line.split(b",")
    values[HEADER.index(name)] = value
    return b",".join(values)


def rejected(*lines: bytes) -> list[tuple[int, str, str]]:
    stream = stream_of(file_of(*lines))
    stream.drain()
    return [(reject.line_number, reject.reason, reject.record) for reject in stream.rejects()]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "not ended"])
def test_any_line_end_gives_the_same_lines(end: bytes, last: bool) -> None:
    stream = stream_of(end.join((HEADER_LINE, *LINES)) + end * last)
    assert read(stream) == numbered(LINES)
    assert (stream.rows, stream.rejected) == (len(LINES), 0)


def test_line_ends_may_be_mixed() -> None:
    data = HEADER_LINE + b"\n" + LINES[0] + b"\r\n" + LINES[1] + b"\n" + LINES[2] + b"\r"
    assert read(stream_of(data)) == numbered(LINES[:3])


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_block_borders_change_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    bad = [with_value("race", "Märchen".encode()), b"1,2", b"", b'"' + GOOD]
    data = b"\xef\xbb\xbf" + file_of(*LINES[:9], *bad, *LINES[9:])
    whole = stream_of(data)
    expected = read(whole), list(whole.rejects()), whole.rows, whole.rejected, whole.sha256
    monkeypatch.setattr(rows, "BLOCK_BYTES", size)
    cut = stream_of(data)
    assert (read(cut), list(cut.rejects()), cut.rows, cut.rejected, cut.sha256) == expected
    assert (cut.rows, cut.rejected) == (40, 3)


@pytest.mark.parametrize("size", [64, 1 << 20])
@pytest.mark.parametrize("length", [MAX_RECORD_BYTES + 1, 200_000])
def test_endless_record_is_no_row_wherever_a_block_ends(
    monkeypatch: pytest.MonkeyPatch, size: int, length: int
) -> None:
    monkeypatch.setattr(rows, "BLOCK_BYTES", size)
    stream = stream_of(file_of(GOOD, b"x" * length, GOOD))
    with pytest.raises(IngestionError, match=r"file.csv, line 3: a record of more than 65,536 by"):
        stream.drain()


def test_endless_record_is_not_read_to_its_end() -> None:
    class Endless(io.BytesIO):
        asked = 0

        def read(self, size: int | None = -1) -> bytes:
            assert size
            self.asked += size
            assert self.asked < 10 * rows.BLOCK_BYTES
            return b"x" * size

    with pytest.raises(IngestionError, match=r"file.csv, line 1: a record of more than 65,536 by"):
        RowStream(Endless(), "file.csv").drain()


def test_longest_record_is_rejected_with_its_whole_text() -> None:
    ((line, reason, record),) = rejected(b"x" * MAX_RECORD_BYTES)
    assert (line, reason, len(record)) == (2, "1 fields, expected 50", MAX_RECORD_BYTES)


def test_line_numbers_are_those_of_the_file() -> None:
    stream = stream_of(file_of(b"", LINES[0], b"broken", b"", LINES[1]))
    assert read(stream) == b"3,%b\n6,%b\n" % (LINES[0], LINES[1])
    assert [reject.line_number for reject in stream.rejects()] == [4]


def test_quoted_fields_are_accepted_and_handed_on_without_quotes() -> None:
    quoted = [b",".join(b'"%b"' % value for value in line.split(b",")) for line in LINES]
    header = b",".join(b'"%b"' % name.encode() for name in HEADER)
    stream = stream_of(b"\n".join((header, *quoted)))
    assert read(stream) == numbered(LINES)
    assert stream.rejected == 0


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (with_value("encounter_id", b"12a"), "encounter_id is '12a', expected a positive integer"),
        (with_value("patient_nbr", b""), "patient_nbr is empty, expected a positive integer"),
        (with_value("time_in_hospital", b"15"), "time_in_hospital is '15', expected an integer f"),
        (with_value("readmitted", b"<60"), "readmitted is '<60', expected one of NO, >30, <30"),
        (with_value("diag_1", b"25O"), "diag_1 is '25O', expected an ICD-9 code"),
        (GOOD + b",NO", "51 fields, expected 50"),
        (GOOD.rpartition(b",")[0], "49 fields, expected 50"),
        (b" ", "1 fields, expected 50"),
        (b"\r", "0 fields, expected 50"),
        (with_value("race", b'"Asian'), "not readable as CSV: unexpected end of data"),
        (with_value("race", b'"Asian"n'), "not readable as CSV: ',' expected after '\"'"),
        (with_value("race", b'"A,B"'), "race is 'A,B', expected one of Caucasian"),
        (GOOD + b"\r" + GOOD, "not readable as CSV: new-line character seen in unquoted field"),
        (with_value("race", b"Asi\0an"), r"race is 'Asi\x00an', expected one of Caucasian"),
        (with_value("race", "Märchen".encode()), "race is 'Märchen', expected one of Caucasian"),
        (with_value("num_procedures", "٣".encode()), "num_procedures is '٣', expected an integer"),
    ],
)
def test_broken_row_is_set_aside_with_line_reason_and_text(broken: bytes, reason: str) -> None:
    ((line, why, record),) = rejected(LINES[1], broken, LINES[2])
    assert line == 3
    assert why.startswith(reason)
    assert record == broken.decode().replace("\0", "\N{SYMBOL FOR NULL}")


def test_rows_around_a_broken_one_are_handed_on() -> None:
    stream = stream_of(file_of(LINES[1], b"broken", LINES[2]))
    assert read(stream) == b"2,%b\n4,%b\n" % (LINES[1], LINES[2])
    assert (stream.rows, stream.rejected) == (2, 1)


def test_reason_names_five_fields_at_most() -> None:
    ((_, reason, _),) = rejected(b",".join([b"bad"] * len(FIELDS)))
    assert [part.split(" ")[0] for part in reason.split("; ")] == list(HEADER[:5])


@pytest.mark.parametrize("blank", [b"\r\n", b"\n", b"\n\n\n"])
def test_blank_lines_are_no_rows(blank: bytes) -> None:
    stream = stream_of(file_of(GOOD) + blank)
    assert read(stream) == numbered([GOOD])
    assert stream.rejected == 0


def test_byte_order_mark_is_no_part_of_the_header() -> None:
    stream = stream_of(b"\xef\xbb\xbf" + file_of(GOOD))
    assert read(stream) == numbered([GOOD])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "file.csv: the file is empty; expected a CSV with a header"),
        (HEADER_LINE, "file.csv: the file has a header but no rows; expected encounters below it"),
        (HEADER_LINE + b"\r\n\r\n", "file.csv: the file has a header but no rows; expected enco"),
        (
            file_of(GOOD).decode().encode("utf-16"),
            "file.csv: the file is UTF-16 or binary; expected UTF",
        ),
        ("\ufeff".encode("utf-16-be"), "file.csv: the file is UTF-16 or binary; expected UTF"),
        (file_of(GOOD).decode().encode("utf-16-le"), "file.csv: the file is UTF-16 or binary"),
        (file_of(GOOD, b"caf\xe9"), "file.csv, line 3: byte 0xE9 is not UTF-8 (Latin-1?); conve"),
        (b"caf\xe9," + file_of(GOOD), "file.csv, line 1: byte 0xE9 is not UTF-8"),
        (b"\r\n" + file_of(GOOD), "file.csv, line 1: wrong header: missing 'encounter_id'"),
        (GOOD + b"\r\n", "file.csv, line 1: wrong header: missing 'encounter_id', 'patient_nbr'"),
        (
            file_of(GOOD).replace(b"race,", b""),
            "file.csv, line 1: wrong header: missing 'race'. Expected the 50 columns of the "
            "publisher's diabetic_data.csv, from encounter_id to readmitted",
        ),
        (file_of(GOOD).replace(b"race", b"Race"), "missing 'race'; unknown 'Race'. Expected the"),
        (file_of(GOOD).replace(b"race", b"r" * 99), f"unknown '{'r' * 40}'. Expected the 50"),
        (b"extra," + file_of(GOOD), "wrong header: unknown 'extra'. Expected the 50 columns"),
        (
            file_of(GOOD).replace(b"race,gender", b"gender,race"),
            "wrong header: the columns are there, but repeated or in another order. Expected",
        ),
        (HEADER_LINE + b"," + file_of(GOOD), "but repeated or in another order"),
        (HEADER_LINE + b"\r" + GOOD + b"\r", "file.csv, line 1: a carriage return within the li"),
        (b"x" * 200_000 + b"\n", "file.csv, line 1: a record of more than 65,536 bytes"),
    ],
)
def test_file_that_is_not_the_data_is_refused_with_its_place(data: bytes, message: str) -> None:
    stream = stream_of(data)
    with pytest.raises(IngestionError) as caught:
        read(stream)
    assert message in str(caught.value)
    assert stream.failure is caught.value


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_whatever_ends_a_read_is_kept_as_the_failure(error: BaseException) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise error

    stream = RowStream(Broken(), "file.csv")
    with pytest.raises(type(error)):
        stream.read()
    assert stream.failure is error


def test_sha256_is_that_of_the_bytes_of_the_file() -> None:
    data = b"\xef\xbb\xbf" + file_of(*LINES, b"broken", b"")
    stream = stream_of(data)
    assert stream.sha256 == hashlib.sha256().hexdigest()
    stream.drain()
    assert stream.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("spool", [100, 4 << 20], ids=["on disk", "in memory"])
def test_rejects_come_back_as_they_were_written(
    monkeypatch: pytest.MonkeyPatch, spool: int
) -> None:
    monkeypatch.setattr(rows, "_SPOOL_BYTES", spool)
    broken = [f'{at},"grün",a\rb,"",\N{GRINNING FACE}'.encode() for at in range(200)]
    stream = stream_of(file_of(*broken))
    stream.drain()
    assert [reject.record for reject in stream.rejects()] == [line.decode() for line in broken]
    assert [reject.line_number for reject in stream.rejects()] == list(range(2, 202))
    assert stream.rejected == 200


def test_rejects_can_be_looked_at_in_the_middle() -> None:
    stream = stream_of(file_of(*[b"broken"] * 5))
    stream.drain()
    next(stream.rejects())
    assert len(list(stream.rejects())) == 5


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(file_of(*LINES * 300))
    with path.open("rb") as file:
        stream = RowStream(file, path.name)
        largest = max(len(block) for block in iter(stream.read, b""))
    assert stream.rows == 12_000
    assert largest < 1.1 * rows.BLOCK_BYTES < path.stat().st_size


def test_handed_on_lines_are_plain_csv() -> None:
    parsed = list(csv.reader(io.StringIO(read(stream_of(file_of(*LINES))).decode("ascii"))))
    assert [values[1:] for values in parsed] == [line.decode().split(",") for line in LINES]
