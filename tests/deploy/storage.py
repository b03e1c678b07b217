"""A real S3 storage (SeaweedFS from a wheel) for the tests of jobs, backups and the trio."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

ACCESS_KEY = "adminuser"
SECRET_KEY = "only-for-tests-of-storage"
WEED = Path(sys.executable).with_name("weed")
# Each of them listens for gRPC too, ten thousand higher.
_WEED_PORTS = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")


@dataclass(frozen=True, slots=True)
class Storage:
    """One S3 storage on the loopback address."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What our jobs find it by."""
        return {
            "MLFLOW_S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )


def weed_ports() -> dict[str, int]:
    """Free ports for `weed mini`, by the names of its flags.

    All below those that the system gives to outgoing connections (32768 and more), which would
    be taken again before weed gets there.
    """
    found: dict[str, int] = {}
    start = 11000 + os.getpid() % 500 * 20
    with ExitStack() as held:
        for port in range(start, start + 500):
            try:
                for number in (port, port + 10000):
                    probe = held.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", number))
            except OSError:
                continue
            found[_WEED_PORTS[len(found)]] = port
            if len(found) == len(_WEED_PORTS):
                return found
    raise OSError("no free TCP ports on 127.0.0.1")


@contextmanager
def process(
    command: list[str], environment: Mapping[str, str], log: Path, grace: float = 30
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block: by SIGTERM, by force after the grace period."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(grace)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def wait_for(
    running: subprocess.Popen[bytes], up: Callable[[], object], log: Path, timeout: float = 90
) -> None:
    """Return when it is up; fail with its log where it ends or the time is over."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert running.poll() is None, f"ended with {running.returncode}:\n{log.read_text()}"
        with suppress(requests.RequestException):
            if up():
                return
        time.sleep(0.1)
    raise AssertionError(f"not up after {timeout} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """An S3 storage without buckets that lives as long as the session."""
    folder = tmp_path_factory.mktemp("storage")
    ports = weed_ports()
    url = f"http://127.0.0.1:{ports['s3.port']}"
    command = [
        str(WEED),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-webdav=false",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    made = Storage(url)
    log = folder / "weed.log"
    with process(command, {**os.environ, **made.environment}, log) as running:
        wait_for(running, lambda: _knows_its_login(made), log)
        yield made


def _knows_its_login(storage: Storage) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        storage.client.list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True
