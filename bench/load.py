"""Clients that cost less than what they ask: HTTP/1.1 on raw sockets, one or many at once.

`python -m bench.load` is the load: keep-alive clients on uvloop, in a process of their own, so that
neither their memory nor the benchmark's is in each other's way.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from itertools import cycle, islice
from pathlib import Path

from bench.errors import BenchError

HOST = "127.0.0.1"
MARKER = b'"probability"'
"""What the body of every answer that is one holds, ours as MLflow's."""

_CHUNK = 1 << 16
_TIMEOUT = 30.0
BATCH_TIMEOUT = 600.0
_RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, whole."""

    status: int
    body: bytes


class Parser:
    """Puts responses together, however the network has cut them; one is awaited at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._status = 0
        self._length = -1

    def feed(self, data: bytes) -> Answer | None:
        """Take what came; the answer once it is whole.

        Raises:
            BenchError: it is no HTTP, does not say how long it is, or is longer than it says.
        """
        self._buffer += data
        if self._length < 0 and not self._read_head():
            return None
        if len(self._buffer) < self._length:
            return None
        if len(self._buffer) > self._length:
            raise BenchError("more was answered than was asked")
        answer = Answer(self._status, bytes(self._buffer))
        self._buffer.clear()
        self._length = -1
        return answer

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in lines)
        }
        words = first.split(None, 2)
        length = headers.get(b"content-length", b"")
        if not first.startswith(b"HTTP/1.") or len(words) < 2 or not length.isdigit():
            said = first.decode(errors="replace")[:80]
            raise BenchError(f"no answer with a status and a length: {said}")
        self._status, self._length = int(words[1]), int(length)
        del self._buffer[: end + 4]
        return True


def request(path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
    """A request as it goes over the wire: a POST, or a GET where there is no body."""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: {HOST}\r\n"
    if body:
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


class Client:
    """One connection that is kept.

    Args:
        port: on the loopback address.
        timeout: seconds without a byte after which it gives up.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, port: int, timeout: float = _TIMEOUT) -> None:
        self._socket = socket.create_connection((HOST, port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = Parser()

    def __enter__(self) -> Client:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._socket.close()

    def ask(self, wire: bytes) -> Answer:
        """Send a request and wait for all of its answer.

        Raises:
            OSError: the connection broke or nothing came.
            BenchError: what came is no answer.
        """
        self._socket.sendall(wire)
        while True:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("the server closed the connection before it answered")
            if answer := self._parser.feed(data):
                return answer


def get(port: int, path: str) -> bytes:
    """The body of a page.

    Raises:
        OSError: nobody answers.
        BenchError: with another status than 200.
    """
    with Client(port) as client:
        return accept(client.ask(request(path)))


def accept(answer: Answer) -> bytes:
    """The body of an answer.

    Raises:
        BenchError: it has another status than 200.
    """
    if answer.status != 200:
        said = answer.body.decode(errors="replace")[:500]
        raise BenchError(f"the server answered {answer.status}: {said}")
    return answer.body


def one_by_one(port: int, requests: Sequence[bytes], count: int, warm_up: int) -> list[float]:
    """Seconds of each of `count` requests over one connection, after some that don't count.

    Raises:
        OSError, BenchError: one of them failed.
    """
    seconds = []
    with Client(port) as client:
        for wire in islice(cycle(requests), warm_up):
            accept(client.ask(wire))
        # A pause of the client's own collector would look like one of the service.
        gc.collect()
        gc.disable()
        try:
            for wire in islice(cycle(requests), count):
                begin = time.perf_counter()
                answer = client.ask(wire)
                seconds.append(time.perf_counter() - begin)
                if MARKER not in accept(answer):
                    raise BenchError(f"an answer without a probability: {answer.body[:200]!r}")
        finally:
            gc.enable()
    return seconds


def send_csv(port: int, path: str, csv: Path) -> tuple[float, bytes]:
    """Post a CSV while reading what comes back, as curl does.

    Returns:
        Seconds from the connection to the last byte of the answer, and the answer.

    Raises:
        BenchError: the answer is an error, or broke off.
    """
    broken: list[OSError] = []
    begin = time.perf_counter()
    with socket.create_connection((HOST, port), BATCH_TIMEOUT) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: text/csv\r\n"
            f"Content-Length: {csv.stat().st_size}\r\nConnection: close\r\n\r\n"
        )

        def send() -> None:
            try:
                connection.sendall(head.encode())
                with csv.open("rb") as file:
                    connection.sendfile(file)
            except OSError as error:
                broken.append(error)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        response = HTTPResponse(connection, method="POST")
        try:
            response.begin()
            body = response.read()
        except (OSError, HTTPException) as error:
            raise BenchError(f"the answer to the CSV broke off: {error!r}") from error
        finally:
            # Ends a sender that nobody listens to any more, and the answer's own descriptor.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sender.join()
            response.close()
        seconds = time.perf_counter() - begin
    accept(Answer(response.status, body))
    if broken:
        raise BenchError(f"the CSV could not be sent whole: {broken[0]}")
    return seconds, body


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many per cent do not exceed (nearest rank).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


@dataclass(slots=True)
class Load:
    """What the clients saw, all together.

    Attributes:
        seconds: of each request that succeeded.
        failures: requests that did not: another status, no probability, a broken connection, or
            nothing for half a minute.
    """

    seconds: list[float] = field(default_factory=list)
    failures: int = 0

    def summary(self, wall: float) -> dict[str, float]:
        """Rate and percentiles in ms; `wall` is the whole time."""
        if not self.seconds:
            raise BenchError(f"no request succeeded under load, {self.failures} failed")
        return {
            "requests": len(self.seconds),
            "failures": self.failures,
            "per_second": len(self.seconds) / wall,
            **{f"p{p}": 1000 * percentile(self.seconds, p) for p in (50, 95, 99)},
        }


async def _client(port: int, requests: Sequence[bytes], until: float, load: Load) -> None:
    turn = cycle(requests)
    while time.perf_counter() < until:
        writer = None
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
            parser = Parser()
            while (begin := time.perf_counter()) < until:
                async with asyncio.timeout(_TIMEOUT):
                    writer.write(next(turn))
                    answer = None
                    while answer is None:
                        data = await reader.read(_CHUNK)
                        if not data:
                            raise ConnectionResetError
                        answer = parser.feed(data)
                if answer.status == 200 and MARKER in answer.body:
                    load.seconds.append(time.perf_counter() - begin)
                else:
                    load.failures += 1
        except (OSError, BenchError):
            load.failures += 1
            await asyncio.sleep(_RETRY_SECONDS)
        finally:
            if writer is not None:
                writer.close()


async def press(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Let so many clients ask for so long, each as soon as it has its answer."""
    load = Load()
    until = time.perf_counter() + seconds
    shifted = (
        [*requests[place % len(requests) :], *requests[: place % len(requests)]]
        for place in range(clients)
    )
    await asyncio.gather(*(_client(port, mine, until, load) for mine in shifted))
    return load


def main() -> int:
    """Press, and print the summary as JSON."""
    import uvloop

    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--path", required=True, help="of the URL")
    parser.add_argument("--bodies", type=Path, required=True, help="a JSON body a line")
    chosen = parser.parse_args()
    requests = [request(chosen.path, body) for body in chosen.bodies.read_bytes().splitlines()]
    gc.freeze()  # what is here stays; the collector need not look at it again and again
    begin = time.perf_counter()
    load = uvloop.run(press(chosen.port, requests, chosen.clients, chosen.seconds))
    wall = time.perf_counter() - begin
    try:
        print(json.dumps(load.summary(wall)))
    except BenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
