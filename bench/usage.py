"""Run a command and say what it cost.

Wall time is that of the monotonic clock. CPU is user plus system time. Peak memory is the largest
resident set of the command's process; PostgreSQL's own memory is bounded by its configuration and
not part of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.errors import BenchError
from settings import PROJECT_ROOT


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command cost, from the fork to its end, and what it printed."""

    wall: float
    cpu: float
    peak_mib: float
    output: str


def run(command: Sequence[str], environment: Mapping[str, str], cwd: Path = PROJECT_ROOT) -> Usage:
    """Run a command to its end.

    It gets a process group of its own and does not outlive us, however we leave. Its peak can't
    come out smaller than our own memory was at the fork (some 70 MiB); `own_peak_mib` can.

    Raises:
        BenchError: it ended with another code than 0.
    """
    variables = {
        **os.environ,
        "PYTHONPATH": str(PROJECT_ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        **environment,
    }
    with tempfile.TemporaryFile("w+") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            # Not process.wait(): wait4 tells what this one process used, once it has ended.
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise BenchError(
            f"{' '.join(command)} failed with exit code {process.returncode}:\n{text[-3000:]}"
        )
    return Usage(wall, used.ru_utime + used.ru_stime, _mib_of_maxrss(used.ru_maxrss), text)


def own_peak_mib() -> float:
    """Largest resident set of this process since its program was started.

    Linux counts `ru_maxrss` from the fork, so there it would include the parent's memory.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return _mib_of_maxrss(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@contextmanager
def sampled(measure: Callable[[], float], seconds: float) -> Iterator[list[float]]:
    """Collect what `measure` says, again and again, while the block runs."""
    found: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(seconds):
            found.append(measure())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """CPU seconds that living processes and those children of theirs that have ended used."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # ended meanwhile; its parent has its time now
        total += times.user + times.system + times.children_user + times.children_system
    return total


def postgres_cpu_seconds(data: Path) -> float:
    """CPU seconds that a PostgreSQL server has used so far, all its processes together.

    That includes ended backends, whose time passes to the postmaster, and the server's own
    workers (checkpoints, WAL, vacuum), because the load of the job is what moves them.
    """
    postmaster = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
    return cpu_seconds([*postmaster.children(recursive=True), postmaster])


def _mib_of_maxrss(value: int) -> float:
    return value / (1 << 20 if sys.platform == "darwin" else 1 << 10)
