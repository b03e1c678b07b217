"""One calm caller beside the load: what it is answered, and how soon all is well again."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bench.errors import BenchError
from bench.load import Client

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

    @property
    def until(self) -> float:
        """When its answer was there, or when it was given up."""
        return self.at + self.ms / 1000


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


def recovery(looks: Iterable[Look], ended: float, seconds: float, most_ms: float) -> float:
    """Seconds after the end of the load until nothing is refused or slow any more.

    A second is good if a good look falls into it and no bad one: who waits for an answer does not
    look meanwhile, so a look speaks for every second from its sending to its answer, also one that
    was sent while there was load.

    Args:
        looks: of the probe.
        ended: when the load ended, seconds since the epoch.
        seconds: after the end that were looked at; one without a look is not good.
        most_ms: that a look may take.
    """
    good: set[int] = set()
    bad: set[int] = set()
    for look in looks:
        if look.until >= ended:
            first, last = max(look.at - ended, 0.0), look.until - ended
            known = good if look.status == 200 and look.ms <= most_ms else bad
            known.update(range(math.floor(first), math.floor(last) + 1))
    bad.update(set(range(math.floor(seconds))) - good)
    return max((second + 1.0 for second in bad), default=0.0)
