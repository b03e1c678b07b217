"""The unit lane starts no process and opens no connection; a test that does belongs elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

_FOREIGN = {
    "subprocess.Popen": "starts a process",
    "os.posix_spawn": "starts a process",
    "os.fork": "starts a process",
    "socket.connect": "opens a connection",
    "socket.bind": "opens a port",
}
_running: list[str] = []


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    # asyncio's socket pairs raise none of these events: they have no address.
    if event in _FOREIGN and _running:
        raise AssertionError(f"{_running[-1]} {_FOREIGN[event]} ({arguments[:2]}): not a unit test")


# Python keeps audit hooks for good, so there is one a process and it looks at what runs.
sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the test fail where it starts a process or opens a connection."""
    # libpq's connections are not Python's: nobody hears of them.
    assert "server_port" not in request.fixturenames, "a database: not a unit test"
    _running.append(request.node.nodeid)
    yield
    _running.pop()
