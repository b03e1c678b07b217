"""The benchmark's clients against a socket that answers as told."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.load import (
    Client,
    one_by_one,
    press,
    request,
    send_csv,
)
from bench.serving import (
    find_versions,
)
from settings import Settings
from tests.unit.test_bench_serving import WIRE


@contextmanager
def server(*answers: bytes) -> Iterator[int]:
    """Answers each request with the next of these; an empty one closes the connection."""
    turn = iter(answers)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while True:
                length = 0
                first = b""
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    first = first or line
                    if line.lower().startswith(b"content-length"):
                        length = int(line.split(b":")[1])
                if not first:
                    return
                self.rfile.read(length)
                answer = next(turn, WIRE)
                if not answer:
                    return
                self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield int(listening.server_address[1])
        finally:
            listening.shutdown()
            thread.join()


def test_requests_one_by_one_are_timed_without_the_warm_up() -> None:
    with server() as port:
        seconds = one_by_one(port, [request("/a", b"1"), request("/b", b"2")], 5, 3)
    assert len(seconds) == 5
    assert all(second > 0 for second in seconds)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 422 No\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_a_single_request_that_fails_is_an_error(answer: bytes) -> None:
    with server(answer) as port, pytest.raises(BenchError):
        one_by_one(port, [request("/", b"1")], 1, 0)


def test_a_connection_that_is_closed_before_the_answer_is_an_error() -> None:
    with server(b"") as port, Client(port) as client, pytest.raises(ConnectionResetError):
        client.ask(request("/", b"1"))


def test_under_load_failures_are_counted_and_the_clients_go_on() -> None:
    refused = b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\n\r\n"
    with server(refused, b"", WIRE, b"nonsense\r\n\r\n") as port:
        load = asyncio.run(press(port, [request("/", b"1")], clients=2, seconds=0.6))
    assert load.failures == 3
    assert len(load.seconds) > 3


def test_a_csv_is_sent_whole_and_a_chunked_answer_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"age\n" * 300_000)
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    with server(chunked, b"HTTP/1.1 422 No\r\nContent-Length: 2\r\n\r\nno", b"") as port:
        seconds, body = send_csv(port, "/batch", file)
        assert body == b"abcde"
        assert seconds > 0
        with pytest.raises(BenchError, match="422: no"):
            send_csv(port, "/batch", file)
        with pytest.raises(BenchError, match="broke off"):
            send_csv(port, "/batch", file)


def test_without_a_champion_there_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(BenchError, match="MLFLOW_TRACKING_URI is not set"):
        find_versions(Settings())
    missing = b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}'
    head = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(missing)
    with server(head + missing, head + missing) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(BenchError, match="no version of diabetes_readmission has the alias"):
            find_versions(Settings())
