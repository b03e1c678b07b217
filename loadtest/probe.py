"""One calm caller beside the load: what it is answered, and how soon all is well again."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bench.errors import BenchError
from bench.load import Client, percentile

_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Look:
    """One request.

    Attributes:
        at: when it was sent, seconds since the epoch.
        status: of its answer; 0: there was none.
        ms: until the answer was there.
    """

    at: float
    status: int
    ms: float


@contextmanager
def probing(port: int, wire: bytes) -> Iterator[list[Look]]:
    """Send the same request again and again, one at a time, while the block runs.

    Args:
        port: of the service.
        wire: the request.
    """
    looks: list[Look] = []
    done = threading.Event()

    def work() -> None:
        client: Client | None = None
        while not done.wait(_PAUSE):
            at, begin, status = time.time(), time.perf_counter(), 0
            try:
                client = client or Client(port)
                status = client.ask(wire).status
            except (OSError, BenchError):
                if client:
                    client.__exit__()
                client = None
            looks.append(Look(at, status, (time.perf_counter() - begin) * 1000))
        if client:
            with suppress(OSError):
                client.__exit__()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield looks
    finally:
        done.set()
        thread.join()


def recovery(looks: Sequence[Look], ended: float, most_p95_ms: float) -> float:
    """Seconds after the end of the load until nothing is refused or slow any more.

    Args:
        looks: of the probe.
        ended: when the load ended, seconds since the epoch.
        most_p95_ms: that a second's requests may take.

    Raises:
        BenchError: nothing was asked after the end.
    """
    seconds: dict[int, list[Look]] = {}
    for look in looks:
        if look.at >= ended:
            seconds.setdefault(math.floor(look.at - ended), []).append(look)
    if not seconds:
        raise BenchError("nothing was asked after the end of the load")
    bad = [
        second + 1.0
        for second, found in seconds.items()
        if any(look.status != 200 for look in found)
        or percentile([look.ms for look in found], 95) > most_p95_ms
    ]
    return max(bad, default=0.0)
