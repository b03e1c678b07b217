"""Stream a CSV through the contract: valid lines on to `COPY`, broken ones aside with a reason."""

from __future__ import annotations

import csv
import hashlib
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from ingestion.contract import HEADER, row_pattern, violations
from ingestion.errors import IngestionError

BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 16
"""A record of the publisher is under 300 bytes; longer than this, the file is something else."""

_SPOOL_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that breaks the contract: where it stands, why, and its text."""

    line_number: int
    reason: str
    record: str


class RowStream:
    """A binary CSV as a readable stream of checked lines, each led by its line number.

    It is the file that psycopg2's `copy_expert` reads from: `read` hands over the next block of
    about a megabyte, so memory does not grow with the file. Line numbers are those of the file
    (the header is line 1). After the last block, `rows`, `rejected`, `sha256` and `rejects()`
    describe the whole file; `failure` is what `read` raised, for callers that can't catch it.

    Args:
        binary: the CSV, opened in binary mode; quoted fields, LF and CRLF are understood.
        name: what to call the file in messages.

    Raises:
        IngestionError: on reading, for an empty file, a wrong header, an endless record or bytes
            that are not UTF-8.
    """

    def __init__(self, binary: IO[bytes], name: str) -> None:
        self.name = name
        self.rows = 0
        self.rejected = 0
        self.failure: BaseException | None = None
        self._digest = hashlib.sha256()
        self._binary = binary
        # Rejects are kept as a file, so that a file of nothing but rejects costs no memory.
        self._rejects = tempfile.SpooledTemporaryFile(  # noqa: SIM115 (lives as long as the stream)
            _SPOOL_BYTES, mode="w+", encoding="utf-8", newline=""
        )
        weakref.finalize(self, self._rejects.close)
        self._reject_writer = csv.writer(self._rejects)
        self._blocks = self._checked_blocks()

    @property
    def sha256(self) -> str:
        """SHA-256 of all bytes read so far, as hex."""
        return self._digest.hexdigest()

    def read(self, size: int = -1) -> bytes:
        """Return the next block of valid lines (`size` is ignored), or nothing at the end."""
        try:
            return next(self._blocks, b"")
        except BaseException as error:
            self.failure = error
            raise

    def drain(self) -> None:
        """Read to the end for the checks alone."""
        for _ in self._blocks:
            pass

    def rejects(self) -> Iterator[Reject]:
        """The rejected rows so far, in the order of the file."""
        self._rejects.seek(0)
        for line_number, reason, record in csv.reader(self._rejects):
            yield Reject(int(line_number), reason, record)
        self._rejects.seek(0, 2)

    def _checked_blocks(self) -> Iterator[bytes]:
        matches = row_pattern().fullmatch
        line_number = 0
        for block in self._line_blocks():
            if not line_number:
                self._check_header(block[0])
                line_number = 1
                block = block[1:]
            good = []
            for line in block:
                line_number += 1
                if matches(line):
                    good.append(b"%d,%b\n" % (line_number, line))
                elif line and (values := self._parse(line, line_number)):
                    good.append(f"{line_number},{','.join(values)}\n".encode("ascii"))
            self.rows += len(good)
            if good:
                yield b"".join(good)
        if not line_number:
            raise IngestionError(f"{self.name}: the file is empty; expected a CSV with a header")
        if not self.rows and not self.rejected:
            raise IngestionError(
                f"{self.name}: the file has a header but no rows; expected encounters below it"
            )

    def _line_blocks(self) -> Iterator[list[bytes]]:
        tail = b""
        seen = 0  # whole lines, for the message only
        while block := self._binary.read(BLOCK_BYTES):
            self._digest.update(block)
            lines = (tail + block).replace(b"\r\n", b"\n").split(b"\n")
            tail = lines.pop()
            if len(tail) > MAX_RECORD_BYTES:
                raise self._too_long(seen + len(lines) + 1)
            seen += len(lines)
            if lines:
                yield lines
        if tail:
            yield [tail.rstrip(b"\r")]

    def _check_header(self, first: bytes) -> None:
        if first.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in first:
            raise IngestionError(
                f"{self.name}: the file is UTF-16 or binary; expected UTF-8 text, convert it"
            )
        text = self._text(first.removeprefix(b"\xef\xbb\xbf"), 1)
        if "\r" in text:
            raise IngestionError(
                f"{self.name}, line 1: a carriage return within the line; expected lines that end "
                "in LF or CRLF, convert the file"
            )
        header = next(csv.reader([text]), [])
        if tuple(header) != HEADER:
            raise IngestionError(f"{self.name}, line 1: {_header_difference(header)}")

    def _parse(self, line: bytes, line_number: int) -> list[str]:
        """Fields of a line that the fast pattern refused: valid after unquoting, or rejected.

        No valid value holds a line break, so a record never goes on in the next line.
        """
        text = self._text(line, line_number)
        try:
            values = next(csv.reader([text], strict=True))
            reasons = violations(values)
        except csv.Error as error:
            reasons = [f"not readable as CSV: {error}"]
        if not reasons:
            return values
        self._reject(line_number, "; ".join(reasons[:5]), text)
        return []

    def _reject(self, line_number: int, reason: str, record: str) -> None:
        self.rejected += 1
        # PostgreSQL's text cannot hold a NUL; its printable picture tells the reader the same.
        self._reject_writer.writerow((line_number, reason, record.replace("\0", "\u2400")))

    def _text(self, line: bytes, line_number: int) -> str:
        if len(line) > MAX_RECORD_BYTES:
            raise self._too_long(line_number)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise IngestionError(
                f"{self.name}, line {line_number}: byte 0x{line[error.start]:02X} is not UTF-8 "
                "(Latin-1?); convert the file, for example with iconv -f latin1 -t utf-8"
            ) from error

    def _too_long(self, line_number: int) -> IngestionError:
        return IngestionError(
            f"{self.name}, line {line_number}: a record of more than {MAX_RECORD_BYTES:,} bytes; "
            "this is not the diabetes CSV"
        )


def _header_difference(header: list[str]) -> str:
    missing = [name for name in HEADER if name not in header]
    unknown = [name for name in header if name not in HEADER]
    parts = []
    if missing:
        parts.append(f"missing {_some(missing)}")
    if unknown:
        parts.append(f"unknown {_some(unknown)}")
    if not parts:
        parts.append("the columns are there, but repeated or in another order")
    return (
        f"wrong header: {'; '.join(parts)}. Expected the {len(HEADER)} columns of the "
        f"publisher's diabetic_data.csv, from {HEADER[0]} to {HEADER[-1]}"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
