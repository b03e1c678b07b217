"""A source is found, fetched once, checked before it is kept, and named when it is no use."""

from __future__ import annotations

import errno
import hashlib
import io
import random
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ingestion import source
from ingestion.contract import HEADER
from ingestion.errors import IngestionError, SourceUnreachableError
from ingestion.source import Source, csv_sha256, obtain, open_csv
from ingestion.synthetic import csv_blocks

CSV = b"".join(csv_blocks(2_000))
CSV_SHA256 = hashlib.sha256(CSV).hexdigest()
HTML = b"\r\n <!DOCTYPE html><html><body>Please log in</body></html>"


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            # With a fixed date: names of tests are made of it, the same in every process.
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


PUBLISHER_ZIP = zip_of(
    {
        "dataset_diabetes/": b"",
        "__MACOSX/._dataset_diabetes": b"\0\5\x16\7",
        "dataset_diabetes/IDs_mapping.csv": b"admission_type_id,description\r\n1,Emergency\r\n",
        "__MACOSX/dataset_diabetes/._IDs_mapping.csv": b"\0\5\x16\7",
        "dataset_diabetes/diabetic_data.csv": CSV,
        "__MACOSX/dataset_diabetes/._diabetic_data.csv": b"\0\5\x16\7",
    }
)
PLAIN_ZIP = zip_of({"diabetic_data.csv": CSV})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


def content(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    with open_csv(path) as csv:
        return csv.read()


# What the user writes


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("https://example.org/d.zip", "url"),
        ("HTTP://example.org", "url"),
        ("http://127.0.0.1:8000/a?b=c", "url"),
        ("http://[::1]:8000/d.csv", "url"),
        ("/data/diabetes.zip", "file"),
        ("diabetic_data.csv", "file"),
        ("~/d.csv", "file"),
        ("C:\\data\\d.csv", "file"),
        ("synthetic.csv", "file"),
        ("synthetic", "synthetic"),
        ("synthetic:10", "synthetic"),
        ("synthetic:10:7", "synthetic"),
        ("  synthetic:10\n", "synthetic"),
    ],
)
def test_source_is_understood(text: str, kind: str) -> None:
    assert Source.parse(text) == Source(text.strip(), kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "DIABETES_SOURCE is empty; expected a path"),
        (" \t", "DIABETES_SOURCE is empty; expected a path"),
        ("ftp://example.org/d.zip", "ftp://example.org/d.zip: expected http:// or https://"),
        ("file:///d.zip", "file:///d.zip: expected http:// or https:// and a host"),
        ("https://", "https://: expected http:// or https:// and a host"),
        ("https:///d.zip", "https:///d.zip: expected http:// or https:// and a host"),
        ("http://[bad/d.zip", "http://[bad/d.zip: expected http:// or https:// and a host"),
        ("synthetic:", "synthetic:: expected synthetic, synthetic:ROWS or synthetic:ROWS:SEED"),
        ("synthetic:many", "synthetic:many: expected synthetic, synthetic:ROWS or"),
        ("synthetic:-1", "synthetic:-1: expected synthetic, synthetic:ROWS or"),
        ("synthetic:1:2:3", "synthetic:1:2:3: expected synthetic, synthetic:ROWS or"),
        ("synthetic::3", "synthetic::3: expected synthetic, synthetic:ROWS or"),
        ("synthetic:0", "synthetic:0: rows must be from 1 to 100,000,000, got 0"),
        ("synthetic:999999999", "synthetic:999999999: rows must be from 1 to 100,000,000"),
    ],
)
def test_source_that_makes_no_sense_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(IngestionError) as caught:
        Source.parse(text)
    assert str(caught.value).startswith(message)


def test_file_is_used_where_it_lies(file: Path, tmp_path: Path) -> None:
    file.write_bytes(CSV)
    assert obtain(Source.parse(str(file)), tmp_path / "no", tmp_path / "no") == file.resolve()
    assert list(tmp_path.iterdir()) == [file]


def test_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(IngestionError, match=r"nowhere\.zip: no such file; set DIABETES_SOURCE to"):
        obtain(Source.parse(str(tmp_path / "nowhere.zip")), tmp_path, tmp_path)


def test_synthetic_source_is_generated_into_the_runs_folder(tmp_path: Path) -> None:
    path = obtain(Source.parse("synthetic:30:7"), tmp_path, tmp_path / "no")
    assert path.parent == tmp_path
    assert path.read_bytes() == b"".join(csv_blocks(30, 7))


# What the file is


@pytest.mark.parametrize(
    "data",
    [
        CSV,
        PUBLISHER_ZIP,
        PLAIN_ZIP,
        zip_of({"other name.CSV": CSV, "readme.txt": b"read me"}),
        zip_of({"a/diabetic_data.csv": CSV, "b.csv": b"x"}, zipfile.ZIP_STORED),
        zip_of({"diabetic_data.csv": CSV}, zipfile.ZIP_BZIP2),
        zip_of({"diabetic_data.csv": CSV}, zipfile.ZIP_LZMA),
    ],
    ids=["csv", "publisher", "plain zip", "only csv", "stored", "bzip2", "lzma"],
)
def test_table_is_found_in_csv_and_zip(file: Path, data: bytes) -> None:
    assert content(file, data) == CSV
    assert csv_sha256(file) == CSV_SHA256


def flagged(data: bytes, local: int, central: int, value: int) -> bytes:
    """A zip of one member, with a field of its two headers set."""
    changed = bytearray(data)
    for magic, at in ((b"PK\3\4", local), (b"PK\1\2", central)):
        struct.pack_into("<H", changed, data.index(magic) + at, value)
    return bytes(changed)


def damaged(data: bytes) -> bytes:
    """The same bytes, but for one in the middle."""
    half = len(data) // 2
    return data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty; expected a zip or a CSV"),
        (HTML, "this is an HTML page, not the data"),
        (PUBLISHER_ZIP[: len(PUBLISHER_ZIP) // 2], "the zip is damaged or cut off (File is not a"),
        (PUBLISHER_ZIP[:-1], "the zip is damaged or cut off (File is not a zip file)"),
        (b"PK", "the zip is damaged or cut off (File is not a zip file)"),
        (
            damaged(zip_of({"diabetic_data.csv": CSV}, zipfile.ZIP_STORED)),
            "the zip is damaged or cut off (Bad CRC-32",
        ),
        (damaged(PLAIN_ZIP), "the zip is damaged or cut off ("),
        (zip_of({}), "expected diabetic_data.csv in the zip, found nothing"),
        (zip_of({"readme.txt": b"x"}), "expected diabetic_data.csv in the zip, found readme.txt"),
        (zip_of({"a.csv": CSV, "b.csv": CSV}), "expected diabetic_data.csv in the zip, found a.c"),
        (zip_of({"a/diabetic_data.csv": CSV, "b/diabetic_data.csv": CSV}), "found a/diabetic_data"),
        (zip_of({"__MACOSX/diabetic_data.csv": CSV}), "found __MACOSX/diabetic_data.csv"),
        (flagged(PLAIN_ZIP, 6, 8, 1), " is encrypted, password required for extraction"),
        (flagged(PLAIN_ZIP, 8, 10, 99), "the zip can't be read: That compression method is not"),
        (
            zip_of({"diabetic_data.csv": bytes(20_000_000)}),
            "diabetic_data.csv would unpack to 20,000,000 bytes, over 100 times its size in the "
            "zip; refused as a zip bomb",
        ),
    ],
)
def test_file_that_is_no_use_is_refused_by_name(file: Path, data: bytes, message: str) -> None:
    with pytest.raises(IngestionError) as caught:
        content(file, data)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_zip_bomb_that_lies_about_its_size_is_cut_at_the_lie(file: Path) -> None:
    data = bytearray(zip_of({"diabetic_data.csv": bytes(20_000_000)}))
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 24, 5_000)
    file.write_bytes(data)
    unpacked = 0
    with pytest.raises(IngestionError, match="damaged or cut off"), open_csv(file) as csv:  # noqa: PT012
        while block := csv.read(1_000):
            unpacked += len(block)
    assert unpacked <= 5_000


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damaged_zip_is_never_read_as_something_else(file: Path, method: int) -> None:
    draw = random.Random(method)  # noqa: S311
    data = b"".join(csv_blocks(100))
    whole = zip_of({"diabetic_data.csv": data, "IDs_mapping.csv": b"1,2"}, method)
    refused = 0
    for _ in range(300):
        broken = bytearray(whole)
        around = draw.choice([(2, len(whole)), (len(whole) - 250, len(whole)), (2, 60)])
        for _ in range(draw.choice([1, 2, 8])):
            broken[draw.randrange(*around)] = draw.randrange(256)
        try:
            assert content(file, bytes(broken)) in (data, b"1,2")
        except IngestionError:
            refused += 1
    assert refused > 150


def test_full_disk_is_not_called_a_damaged_zip(file: Path) -> None:
    file.write_bytes(PLAIN_ZIP)
    with pytest.raises(OSError, match="No space left"), open_csv(file):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_file_that_went_away_is_named(file: Path) -> None:
    with pytest.raises(IngestionError, match="file: no such file"), open_csv(file):
        pass


# What the server does


class Publisher(ThreadingHTTPServer):
    """Serves `body` at every address; `plan` says what goes wrong with the next requests.

    A number is answered as that status; `cut` sends half of what it promised.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = PUBLISHER_ZIP
        self.tag: tuple[str, str] | None = ("ETag", '"1"')
        self.ranges = True
        self.lengths = True
        self.plan: list[int | str] = []
        self.asked: list[dict[str, str]] = []
        self.sent: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/static/diabetes+130%20us.zip"


def offset_of(asked: dict[str, str]) -> int:
    return int(asked.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))


class Handler(BaseHTTPRequestHandler):
    server: Publisher

    def do_GET(self) -> None:
        server, asked = self.server, dict(self.headers)
        server.asked.append(asked)
        action = server.plan.pop(0) if server.plan else ""
        same = server.tag and asked.get("If-Range") == server.tag[1]
        start = offset_of(asked) if same and server.ranges else 0
        current = asked.get("If-None-Match") or asked.get("If-Modified-Since")
        if isinstance(action, int):
            self.send_response(action)
            self.send_header("Retry-After", "86400")
            data = b"sorry"
        elif server.tag and current == server.tag[1]:
            self.send_response(304)
            data = b""
        elif start and start >= len(server.body):
            self.send_response(416)
            data = b""
        else:
            self.send_response(206 if start else 200)
            data = server.body[start:]
        if server.lengths:
            self.send_header("Content-Length", str(len(data)))
        if server.tag:
            self.send_header(*server.tag)
        if action == "cut":
            data = data[: len(data) // 2]
        server.sent.append(len(data))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(server: Publisher) -> Iterator[Publisher]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with serving(Publisher()) as server:
        yield server


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses asked for, by us and by urllib3, none of them taken."""
    taken: list[float] = []
    monkeypatch.setattr("ingestion.source.time.sleep", taken.append)
    return taken


@pytest.fixture(autouse=True)
def _near_server_and_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_CHUNK", 1_000)  # what came of a cut chunk is lost
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetch(server: Publisher, cache: Path, sha256: str = "") -> bytes:
    return obtain(Source.parse(server.url), cache / "no", cache, sha256).read_bytes()


def cached(cache: Path) -> list[bytes]:
    """What lies in the cache, but for the notes about it."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".etag"]
    return [path.read_bytes() for path in files]


def test_download_is_kept_under_the_name_of_the_url(publisher: Publisher, cache: Path) -> None:
    path = obtain(Source.parse(publisher.url), cache / "no", cache)
    assert path.name == "diabetes+130_us.zip"
    assert path.read_bytes() == PUBLISHER_ZIP
    assert cached(cache) == [PUBLISHER_ZIP]


def test_files_of_one_name_from_two_urls_do_not_meet(publisher: Publisher, cache: Path) -> None:
    paths = {
        obtain(Source.parse(f"{publisher.url}{query}"), cache, cache) for query in ("?a", "?b")
    }
    assert len(paths) == 2


@pytest.mark.parametrize(
    ("tag", "question"),
    [
        (("ETag", '"1"'), "If-None-Match"),
        (("ETag", 'W/"1"'), "If-None-Match"),
        (("Last-Modified", "Fri, 16 May 2014 00:33:00 GMT"), "If-Modified-Since"),
    ],
)
def test_unchanged_file_is_not_fetched_again(
    publisher: Publisher, cache: Path, tag: tuple[str, str], question: str
) -> None:
    publisher.tag = tag
    assert fetch(publisher, cache) == fetch(publisher, cache) == PUBLISHER_ZIP
    assert [asked.get(question) for asked in publisher.asked] == [None, tag[1]]
    assert publisher.sent == [len(PUBLISHER_ZIP), 0]


def test_changed_file_replaces_the_cached_one(publisher: Publisher, cache: Path) -> None:
    fetch(publisher, cache)
    publisher.body, publisher.tag = PLAIN_ZIP, ("ETag", '"2"')
    assert fetch(publisher, cache) == PLAIN_ZIP
    assert cached(cache) == [PLAIN_ZIP]


def test_file_without_a_tag_is_fetched_again(publisher: Publisher, cache: Path) -> None:
    publisher.tag = None
    assert fetch(publisher, cache) == fetch(publisher, cache) == PUBLISHER_ZIP
    assert publisher.sent == [len(PUBLISHER_ZIP)] * 2


def test_cut_transfer_goes_on_where_it_broke(
    publisher: Publisher, cache: Path, naps: list[float]
) -> None:
    publisher.plan = ["cut", "cut"]
    assert fetch(publisher, cache, CSV_SHA256) == PUBLISHER_ZIP
    offsets = [offset_of(asked) for asked in publisher.asked]
    assert offsets == sorted(set(offsets))
    assert publisher.sent[0] - 1_000 < offsets[1] <= publisher.sent[0] < len(PUBLISHER_ZIP)
    assert publisher.sent[-1] == len(PUBLISHER_ZIP) - offsets[-1]
    assert [asked.get("If-Range") for asked in publisher.asked] == [None, '"1"', '"1"']
    assert naps == [0.5, 1]


def test_transfer_goes_on_in_a_later_run(
    publisher: Publisher, cache: Path, naps: list[float]
) -> None:
    publisher.plan = ["cut"] * 5
    with pytest.raises(SourceUnreachableError, match=r"can't be reached \(ChunkedEncodingError\)"):
        fetch(publisher, cache)
    assert sum(naps) < 10
    assert fetch(publisher, cache) == PUBLISHER_ZIP
    assert offset_of(publisher.asked[-1]) > 0.9 * len(PUBLISHER_ZIP)
    assert publisher.sent[-1] < 0.1 * len(PUBLISHER_ZIP)


@pytest.mark.usefixtures("naps")
def test_server_that_knows_no_ranges_is_asked_for_all(publisher: Publisher, cache: Path) -> None:
    publisher.ranges, publisher.plan = False, ["cut"]
    assert fetch(publisher, cache) == PUBLISHER_ZIP
    assert "Range" in publisher.asked[1]
    assert publisher.sent[1] == len(PUBLISHER_ZIP)


@pytest.mark.usefixtures("naps")
def test_halves_of_two_files_are_never_joined(publisher: Publisher, cache: Path) -> None:
    publisher.plan = ["cut"] * 5
    with pytest.raises(SourceUnreachableError):
        fetch(publisher, cache)
    publisher.body, publisher.tag = PLAIN_ZIP, ("ETag", '"2"')
    assert fetch(publisher, cache) == PLAIN_ZIP
    assert publisher.asked[-1]["If-Range"] == '"1"'


@pytest.mark.usefixtures("naps")
def test_cut_transfer_without_a_tag_begins_anew(publisher: Publisher, cache: Path) -> None:
    publisher.tag, publisher.plan = None, ["cut"]
    assert fetch(publisher, cache) == PUBLISHER_ZIP
    assert "Range" not in publisher.asked[1]


def test_complete_part_of_a_killed_run_is_no_obstacle(
    publisher: Publisher, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        killed.setattr(source, "_accept", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        fetch(publisher, cache)
    assert fetch(publisher, cache) == PUBLISHER_ZIP
    assert cached(cache) == [PUBLISHER_ZIP]


def test_cut_that_the_server_does_not_announce_is_refused(
    publisher: Publisher, cache: Path
) -> None:
    publisher.lengths, publisher.plan = False, ["cut"]
    with pytest.raises(IngestionError, match="damaged or cut off"):
        fetch(publisher, cache)
    assert cached(cache) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410, 416])
def test_address_that_the_server_refuses_is_named_at_once(
    publisher: Publisher, cache: Path, naps: list[float], status: int
) -> None:
    publisher.plan = [status] * 9
    with pytest.raises(SourceUnreachableError) as caught:
        fetch(publisher, cache)
    assert str(caught.value).startswith(f"{publisher.url} answered {status} ")
    assert "check the URL, or set DIABETES_SOURCE to" in str(caught.value)
    assert len(publisher.asked) == 1
    assert naps == []
    assert cached(cache) == []


def test_busy_server_is_asked_again_and_not_when_it_pleases(
    publisher: Publisher, cache: Path, naps: list[float]
) -> None:
    publisher.plan = [500, 503, 429]
    assert fetch(publisher, cache) == PUBLISHER_ZIP
    assert len(publisher.asked) == 4
    assert sum(naps) <= 3 * 30


def test_server_that_stays_broken_is_given_up(
    publisher: Publisher, cache: Path, naps: list[float]
) -> None:
    publisher.plan = [502] * 99
    with pytest.raises(SourceUnreachableError, match=r"can't be reached \(HTTPError\); check the"):
        fetch(publisher, cache)
    assert len(publisher.asked) == 4
    assert sum(naps) <= 3 * 30


def test_refused_connection_is_told_soon(cache: Path, naps: list[float]) -> None:
    with closing(socket.socket()) as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, but never listening: refused, and no one's
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/d.zip"
        started = time.monotonic()
        with pytest.raises(SourceUnreachableError) as caught:
            obtain(Source.parse(url), cache, cache)
    assert time.monotonic() - started < 5
    assert sum(naps) < 10
    assert str(caught.value) == (
        f"{url} can't be reached (ConnectionError); check the network, or set DIABETES_SOURCE to "
        "a local zip or csv, or to synthetic"
    )


def unreachable(cache: Path) -> Publisher:
    """A server that was asked once and is gone."""
    with serving(Publisher()) as server:
        assert fetch(server, cache) == PUBLISHER_ZIP
    return server


@pytest.mark.usefixtures("naps")
def test_cached_copy_serves_while_the_server_is_away(cache: Path) -> None:
    assert fetch(unreachable(cache), cache) == PUBLISHER_ZIP


@pytest.mark.usefixtures("naps")
def test_cached_copy_of_another_sha256_never_serves(cache: Path) -> None:
    server = unreachable(cache)
    with pytest.raises(SourceUnreachableError, match="can't be reached"):
        fetch(server, cache, "0" * 64)


@pytest.mark.usefixtures("naps")
def test_cached_copy_of_the_expected_sha256_needs_no_server(cache: Path) -> None:
    server = unreachable(cache)
    assert fetch(server, cache, CSV_SHA256) == PUBLISHER_ZIP
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (HTML, "this is an HTML page, not the data"),
        (b"", "the file is empty"),
        (PLAIN_ZIP[:-9], "the zip is damaged or cut off"),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["cached before", "new"])
def test_what_is_not_the_data_is_never_kept(
    publisher: Publisher, cache: Path, body: bytes, message: str, before: bool
) -> None:
    if before:
        fetch(publisher, cache)
    publisher.body, publisher.tag = body, ("ETag", '"2"')
    with pytest.raises(IngestionError, match=message):
        fetch(publisher, cache)
    assert cached(cache) == [PUBLISHER_ZIP] * before


@pytest.mark.parametrize("before", [True, False], ids=["cached before", "new"])
def test_wrong_sha256_is_refused_and_not_kept(
    publisher: Publisher, cache: Path, before: bool
) -> None:
    if before:
        fetch(publisher, cache)
    with pytest.raises(IngestionError, match=f"SHA-256 of the CSV is {CSV_SHA256}, expected 000"):
        fetch(publisher, cache, "0" * 64)
    assert "If-None-Match" not in publisher.asked[-1]
    assert cached(cache) == [PUBLISHER_ZIP] * before


def test_damaged_cached_copy_is_fetched_again(publisher: Publisher, cache: Path) -> None:
    path = obtain(Source.parse(publisher.url), cache, cache)
    path.write_bytes(PUBLISHER_ZIP[:1_000])
    assert fetch(publisher, cache, CSV_SHA256) == PUBLISHER_ZIP


def test_endless_download_is_stopped_and_not_kept(
    publisher: Publisher, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MAX_DOWNLOAD_BYTES", 10_000)
    with pytest.raises(IngestionError, match="more than 10,000 bytes; refused"):
        fetch(publisher, cache)
    assert cached(cache) == []


def test_plain_csv_can_be_downloaded_too(publisher: Publisher, cache: Path) -> None:
    publisher.body = CSV
    assert fetch(publisher, cache, CSV_SHA256).startswith(HEADER[0].encode())
