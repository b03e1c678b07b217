"""Find the CSV: a path, a URL (fetched, checked, cached) or generated data.

A source is written as the user writes it: a path to a zip or csv, an http(s) URL, or
`synthetic[:rows[:seed]]`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import lzma
import re
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from ingestion.errors import IngestionError, SourceUnreachableError

log = logging.getLogger(__name__)

CSV_NAME = "diabetic_data.csv"
"""Name of the table's file inside the publisher's zip."""

MAX_DOWNLOAD_BYTES = 4 << 30
MAX_ZIP_RATIO = 100
"""The publisher's CSV compresses about 6 times; a hundred times is a zip bomb."""

_TIMEOUT = (10, 60)  # seconds to connect, seconds between bytes
_ATTEMPTS = 5
_CHUNK = 1 << 18
_DAMAGE = (zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)


@dataclass(frozen=True, slots=True)
class Source:
    """A source as text, understood.

    Attributes:
        text: what the user wrote.
        kind: `url`, `file` or `synthetic`.
    """

    text: str
    kind: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Tell a URL from a path from a request for synthetic data.

        Raises:
            IngestionError: the text is empty, a URL without host or of another scheme than
                http(s), or asks for synthetic data of an impossible size.
        """
        text = text.strip()
        if not text:
            raise IngestionError(
                "DIABETES_SOURCE is empty; expected a path to a zip or csv, a URL, or synthetic"
            )
        if text.split(":", 1)[0] == "synthetic":
            _synthetic_arguments(text)
            return cls(text, "synthetic")
        if "://" in text:
            if not _is_web_address(text):
                raise IngestionError(f"{text}: expected http:// or https:// and a host")
            return cls(text, "url")
        return cls(text, "file")


def _is_web_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def obtain(source: Source, folder: Path, cache: Path, expected_sha256: str = "") -> Path:
    """Bring the source to a local zip or csv.

    Args:
        source: where the data is.
        folder: the run's temporary folder; generated data is written there.
        cache: downloads are kept here between runs.
        expected_sha256: of the CSV, as hex; a cached download that has it is not asked for again.

    Returns:
        Path of the local file: the user's own, the cached download or the generated one.

    Raises:
        IngestionError: the file is not there, or what came is not the data.
        SourceUnreachableError: the URL did not answer after all retries.
    """
    if source.kind == "url":
        return _download(source.text, cache, expected_sha256)
    if source.kind == "synthetic":
        from ingestion.synthetic import write_csv

        rows, seed = _synthetic_arguments(source.text)
        path = folder / "synthetic.csv"
        log.info("generating %s synthetic encounters (seed %s)", f"{rows:,}", seed)
        write_csv(path, rows=rows, seed=seed)
        return path
    path = Path(source.text).expanduser()
    if not path.is_file():
        raise IngestionError(
            f"{path}: no such file; set DIABETES_SOURCE to a zip or csv, a URL, or synthetic"
        )
    return path.resolve()


def _synthetic_arguments(text: str) -> tuple[int, int]:
    from ingestion.synthetic import DEFAULT_ROWS, DEFAULT_SEED, csv_blocks

    match = re.fullmatch(r"synthetic(?::(\d{1,9}))?(?::(\d{1,9}))?", text)
    if not match:
        raise IngestionError(f"{text}: expected synthetic, synthetic:ROWS or synthetic:ROWS:SEED")
    rows, seed = int(match[1] or DEFAULT_ROWS), int(match[2] or DEFAULT_SEED)
    try:
        csv_blocks(rows, seed)  # generates nothing yet, but checks what it is asked for
    except ValueError as error:
        raise IngestionError(f"{text}: {error}") from error
    return rows, seed


@contextmanager
def open_csv(path: Path) -> Iterator[IO[bytes]]:
    """Open the CSV in a zip or a plain file for streaming; nothing is unpacked to disk.

    Raises:
        IngestionError: an empty file, an HTML page, a broken or hostile zip, or a zip without
            the table; also while reading, when the zip turns out to be damaged.
    """
    if not path.is_file():
        raise IngestionError(f"{path}: no such file")
    with path.open("rb") as head:
        first = head.read(512)
    if not first:
        raise IngestionError(f"{path}: the file is empty; expected a zip or a CSV")
    if first.lstrip().startswith(b"<"):
        raise IngestionError(
            f"{path}: this is an HTML page, not the data (a login or error page?); "
            "open the source in a browser, or download the zip by hand and set DIABETES_SOURCE"
        )
    if not first.startswith(b"PK"):
        with path.open("rb") as plain:
            yield plain
        return
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_csv_member(path, archive)) as member:
            yield member
    except (*_DAMAGE, OSError) as error:
        # An offset out of the file is EINVAL, broken bzip2 an OSError without a number; any other
        # (a full disk) is the machine's.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise IngestionError(
            f"{path}: the zip is damaged or cut off ({error}); fetch it again"
        ) from error
    except (NotImplementedError, RuntimeError) as error:
        raise IngestionError(f"{path}: the zip can't be read: {error}") from error


def _csv_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    tables = [
        info
        for info in archive.infolist()
        if info.filename.lower().endswith(".csv") and not info.filename.startswith("__MACOSX/")
    ]
    named = [info for info in tables if PurePosixPath(info.filename).name == CSV_NAME]
    chosen = named or tables
    if len(chosen) != 1:
        names = ", ".join(info.filename for info in archive.infolist()[:5]) or "nothing"
        raise IngestionError(f"{path}: expected {CSV_NAME} in the zip, found {names}")
    info = chosen[0]
    if info.file_size > MAX_ZIP_RATIO * max(info.compress_size, 1):
        raise IngestionError(
            f"{path}: {info.filename} would unpack to {info.file_size:,} bytes, over "
            f"{MAX_ZIP_RATIO} times its size in the zip; refused as a zip bomb"
        )
    return info


def csv_sha256(path: Path) -> str:
    """SHA-256 (hex) of the CSV in a zip or plain file, streamed."""
    digest = hashlib.sha256()
    with open_csv(path) as csv:
        while block := csv.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _has_sha256(path: Path, expected: str) -> bool:
    try:
        return csv_sha256(path) == expected
    except IngestionError:
        return False


def check_sha256(path: Path, actual: str, expected: str) -> None:
    """Compare a CSV's SHA-256 with the expected one; an empty `expected` accepts any.

    Raises:
        IngestionError: they differ.
    """
    if expected and actual != expected:
        raise IngestionError(
            f"{path}: SHA-256 of the CSV is {actual}, expected {expected}; fetch it again, or set "
            "DIABETES_SOURCE_SHA256 to the new value if the publisher changed the data"
        )


def _session() -> requests.Session:
    session = requests.Session()
    # A refused connection and a busy server are tried again here; a transfer that breaks off in
    # the middle is resumed by `_download`.
    retry = Retry(
        total=3,
        backoff_factor=0.5,
        retry_after_max=30,  # seconds; a server may ask for hours
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods=("GET",),
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def _download(url: str, cache: Path, expected_sha256: str) -> Path:
    """Fetch a URL into the cache: resumed where it broke off, not fetched again if unchanged."""
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.+-]", "_", PurePosixPath(unquote(urlsplit(url).path)).name) or "download"
    target, part = folder / name, folder / f"{name}.part"
    if expected_sha256 and target.exists():
        if _has_sha256(target, expected_sha256):
            log.info("using the cached %s", target)
            return target
        _validator(target).unlink(missing_ok=True)  # "not modified" would bring it back
    failure = ""
    with _session() as session:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(2 ** (attempt - 2))
            try:
                if _fetch(session, url, target, part):
                    _accept(part, target, expected_sha256)
                return target
            except requests.RequestException as error:
                failure = type(error).__name__
                log.warning("%s: %s (attempt %d of %d)", url, failure, attempt + 1, _ATTEMPTS)
                if not part.exists():
                    break  # nothing came at all, and the session has tried to connect often enough
    if target.exists() and not expected_sha256:
        log.warning("%s can't be reached (%s); going on with the cached %s", url, failure, target)
        return target
    raise SourceUnreachableError(
        f"{url} can't be reached ({failure}); check the network, or set DIABETES_SOURCE to a "
        "local zip or csv, or to synthetic"
    )


def _validator(path: Path) -> Path:
    """Where the server's ETag (or date) of a download is kept."""
    return path.with_name(f"{path.name}.etag")


def _read_validator(path: Path) -> str:
    tag = _validator(path)
    return tag.read_text() if path.exists() and tag.exists() else ""


def _fetch(session: requests.Session, url: str, target: Path, part: Path) -> bool:
    """Complete `part` from the URL; False where the server says that `target` is current."""
    headers = {"Accept-Encoding": "identity"}
    offset = 0
    if tag := _read_validator(part):
        offset = part.stat().st_size
        headers |= {"Range": f"bytes={offset}-", "If-Range": tag}
    elif tag := _read_validator(target):
        headers["If-None-Match" if '"' in tag else "If-Modified-Since"] = tag
    with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code == requests.codes.not_modified:
            return False
        if response.status_code == requests.codes.requested_range_not_satisfiable and part.exists():
            part.unlink()  # nothing goes on from it, for example because it is complete
            return _fetch(session, url, target, part)
        if 400 <= response.status_code < 500:
            raise SourceUnreachableError(
                f"{url} answered {response.status_code} {response.reason}; check the URL, or set "
                "DIABETES_SOURCE to a local zip or csv, or to synthetic"
            )
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        done = offset if resumed else 0
        total = done + int(response.headers.get("Content-Length") or 0)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        _validator(part).write_text(validator)
        last = time.monotonic()
        with part.open("ab" if resumed else "wb") as out:
            for chunk in response.iter_content(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                if done > MAX_DOWNLOAD_BYTES:
                    part.unlink()
                    raise IngestionError(f"{url}: more than {MAX_DOWNLOAD_BYTES:,} bytes; refused")
                if time.monotonic() - last > 2:
                    last = time.monotonic()
                    log.info("%s: %.1f of %.1f MB", url, done / 1e6, max(total, done) / 1e6)
    log.info("%s: fetched %.1f MB", url, done / 1e6)
    return True


def _accept(part: Path, target: Path, expected_sha256: str) -> None:
    """Make a finished download the cached file, if it is what it should be."""
    try:
        check_sha256(part, csv_sha256(part), expected_sha256)
    except IngestionError:
        part.unlink(missing_ok=True)
        raise
    part.replace(target)
    _validator(part).replace(_validator(target))
