"""The files that the benchmark measures with: the real one as plain CSV, cut and repeated."""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from ingestion.contract import SYNTHETIC_ID_FLOOR
from ingestion.errors import SourceUnreachableError
from ingestion.source import Source, obtain, open_csv
from settings import PROJECT_ROOT, PUBLISHER_CSV_SHA256, PUBLISHER_URL, Settings

SHARED_ZIP = PROJECT_ROOT.parent / "shared" / "data" / "diabetes_130us.zip"

ID_STEP = 450_000_000
"""What each repetition adds to both ids; the publisher's end at 443,867,222."""

MAX_COPIES = SYNTHETIC_ID_FLOOR // ID_STEP
"""More repetitions of the real file would reach the ids that mark generated data."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BaseFile:
    """The file at 1x, as plain CSV.

    `origin` says in words what the data are, for the reader of the results.
    """

    path: Path
    rows: int
    size: int
    sha256: str
    is_synthetic: bool
    origin: str


def base_file(chosen: Settings, folder: Path, quick_rows: int = 0) -> BaseFile:
    """Bring the data to plain CSV in `folder`.

    The source is DIABETES_SOURCE, else the zip in `../shared/data`, else the publisher's URL
    (downloaded once into the platform's cache), else generated data of the same size.

    Args:
        chosen: the settings.
        folder: where the CSV goes.
        quick_rows: generate so many rows and look for no file.

    Raises:
        IngestionError: DIABETES_SOURCE can't be used.
    """
    text = f"synthetic:{quick_rows}" if quick_rows else chosen.source
    if text == PUBLISHER_URL and SHARED_ZIP.is_file():
        text = str(SHARED_ZIP)
    cache, expected = chosen.cache_dir, chosen.expected_sha256(text)
    try:
        found = obtain(Source.parse(text), folder, cache, expected)
    except SourceUnreachableError as error:
        if text != PUBLISHER_URL:
            raise
        log.warning("%s. Going on with SYNTHETIC data of the same size.", error)
        found = obtain(Source.parse("synthetic"), folder, cache)
    path = folder / "1x.csv"
    with open_csv(found) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    with path.open("rb") as lines:
        sha256 = hashlib.file_digest(lines, "sha256").hexdigest()
        lines.seek(0)
        rows = sum(1 for _ in lines) - 1
        lines.seek(0)
        next(lines)
        first_id = int(next(lines).split(b",", 1)[0])
    is_synthetic = first_id >= SYNTHETIC_ID_FLOOR
    if is_synthetic:
        origin = "SYNTHETIC, from our own generator, not the publisher's file"
    elif sha256 == PUBLISHER_CSV_SHA256:
        origin = "the publisher's file"
    else:
        origin = "a file that is not the publisher's"
    return BaseFile(path, rows, path.stat().st_size, sha256, is_synthetic, origin)


def write_rows(base: BaseFile, target: Path, rows: int) -> None:
    """Write a CSV of so many rows: the beginning of the base file, or the base file repeated.

    Each repetition has encounters and patients of its own: both ids are shifted.

    Raises:
        BenchError: more than `MAX_COPIES` repetitions are asked for, or the file quotes its ids.
    """
    copies = -(-rows // base.rows)
    if copies > MAX_COPIES:
        raise BenchError(f"{rows:,} rows need {copies} repetitions, more than {MAX_COPIES}")
    left = rows
    with base.path.open("rb") as source, target.open("wb") as out:
        header = next(source)
        body = source.tell()
        out.write(header)
        for copy in range(copies):
            shift = copy * ID_STEP
            source.seek(body)
            for line in source:
                if not left:
                    break
                left -= 1
                encounter, patient, rest = line.split(b",", 2)
                try:
                    ids = (int(encounter) + shift, int(patient) + shift)
                except ValueError as error:
                    raise BenchError(f"{base.path.name}: an id is no plain number") from error
                out.write(b"%d,%d,%b\r\n" % (*ids, rest.rstrip(b"\r\n")))
