"""Background processes that outlive `make run` and that `make down` always finds.

Every process carries the mark `DIABETES_SERVICE=<name>@<state folder>` in its environment, and so
do its children. Finding by that mark instead of by pid files leaves no moment in which a process
runs that nobody knows of, and no recycled pid that would be stopped by mistake.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "DIABETES_SERVICE"


def start(
    name: str, command: Sequence[str], state: Path, environment: Mapping[str, str], log: Path
) -> None:
    """Start a command in the background, in a session of its own, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            # SPT_NOENV: Airflow renames its processes, which would overwrite their environment.
            env={**environment, MARK: f"{name}@{state}", "SPT_NOENV": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # It is to outlive us: tell Popen that there is nothing to wait for, or it would warn.
    process.returncode = 0
    _wait_for_mark(process.pid)


def _wait_for_mark(pid: int, timeout: float = 1.0) -> None:
    """Wait until `find` finds it: a program's environment shows a moment after it was started."""
    deadline = time.monotonic() + timeout
    with suppress(psutil.Error, OSError):  # ended meanwhile
        process = psutil.Process(pid)
        while MARK not in process.environ() and time.monotonic() < deadline:
            time.sleep(0.001)


def find(state: Path, *names: str) -> list[psutil.Process]:
    """Running processes (children included) of this state folder: all, or those of the names."""
    marks = [f"{name}@{state}" for name in names]
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
            if (
                mark.endswith(f"@{state}")
                and (not names or mark in marks)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or another user's
    return found


def environments(state: Path, name: str) -> list[dict[str, str]]:
    """Variables of the processes of this name, children included."""
    found = []
    for process in find(state, name):
        with suppress(psutil.Error, OSError):  # ended meanwhile
            found.append(process.environ())
    return found


def stop(state: Path, *names: str, timeout: float = 15.0) -> int:
    """End what `find` finds, by force in the end; return how many processes there were."""
    ended = 0
    # Repeated, because a process can start a child while its siblings are being ended.
    while processes := find(state, *names):
        ended += len(processes)
        for process in processes:
            _signal(process, force=False)
        _, alive = psutil.wait_procs(processes, timeout=timeout)
        for process in alive:
            _signal(process, force=True)
        psutil.wait_procs(alive, timeout=5)
    return ended


def _signal(process: psutil.Process, force: bool) -> None:
    try:
        if process.pid != os.getpid():
            process.kill() if force else process.terminate()
    except psutil.NoSuchProcess:
        pass


def free_port(preferred: int) -> int:
    """The preferred TCP port of the loopback address if nothing listens there, else a free one."""
    for port in (*range(preferred, preferred + 20), 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free TCP port on 127.0.0.1")
