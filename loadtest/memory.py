"""Memory of a service during a soak: what it takes after the first minute has to be all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import psutil

from bench.usage import sampled
from services import processes
from services.web import API
from settings import Settings

MOST_GROWTH = 0.05
_SAMPLE_SECONDS = 5.0
_HERE = ("127.0.0.1", "localhost")

Sample = tuple[float, float]
"""Second and MiB."""


def pss(found: Iterable[psutil.Process]) -> float:
    """Proportional set of processes together, in MiB; resident set where the system knows none."""
    total = 0
    for process in found:
        with suppress(psutil.Error):  # it may end meanwhile
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
    return total / (1 << 20)


def of_platform(chosen: Settings, url: str) -> Callable[[], float] | None:
    """What looks at the memory of the API of `make run`, where that is what the URL names."""
    address = urlsplit(url)
    known = processes.environments(chosen.state_dir, API.name)
    if address.hostname not in _HERE or str(address.port) not in {
        variables.get(API.port_variable) for variables in known
    }:
        return None
    return lambda: pss(processes.find(chosen.state_dir, API.name))


@contextmanager
def watching(look: Callable[[], float], seconds: float) -> Iterator[list[Sample]]:
    """Collect what `look` says while the block, a soak of so many seconds, runs."""
    samples: list[Sample] = []
    begin = time.monotonic()

    def sample() -> float:
        mib = look()
        samples.append((time.monotonic() - begin, mib))
        return mib

    with sampled(sample, min(_SAMPLE_SECONDS, _minute(seconds) / 6)):
        yield samples


def growth(samples: Sequence[Sample], seconds: float) -> tuple[float, float]:
    """Memory after the first minute, and in the last one; of a short soak after a tenth of it.

    Each is the median of half a minute or more: a single look catches whatever is being copied to
    the log at that moment.

    Args:
        samples: of the soak.
        seconds: that it took.
    """
    minute = _minute(seconds)
    first = [mib for second, mib in samples if minute <= second < 1.5 * minute]
    last = [mib for second, mib in samples if seconds - minute <= second <= seconds]
    return statistics.median(first), statistics.median(last)


def _minute(seconds: float) -> float:
    return min(60.0, seconds / 10)
