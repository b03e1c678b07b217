"""The scripts as an operator runs them: real kubectl, the tests' cluster, stubs for the rest."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import PROJECT_ROOT
from tests.deploy.apiserver import Cluster, Key, Server
from tests.deploy.manifests import KUBECTL

NAMESPACE = "diabetes-mlops"
STUBS = Path(__file__).with_name("stubs")
_NOT_OURS = {"kubectl", "docker", "helm", "microk8s", "python3"}


@dataclass(frozen=True, slots=True)
class Run:
    """How a run of a script ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err

    def fine(self) -> Run:
        assert self.code == 0, self.said
        return self

    def failed(self, *words: str, code: int = 1) -> Run:
        """It ended with this code, and its last line, one clear message, has these words."""
        assert self.code == code, self.said
        last = self.err.strip().splitlines()[-1]
        missing = [word for word in words if word not in last]
        assert not missing, f"{missing} not in the last line of:\n{self.said}"
        return self


@dataclass(frozen=True, slots=True)
class Desk:
    """A copy of the project, tools and a cluster, in a folder of their own.

    Attributes:
        root: the copy, so that a test may change a manifest.
        tools: the only folder of PATH.
        state: what the stubs remember.
    """

    server: Server
    folder: Path

    @classmethod
    def laid_out(cls, server: Server, folder: Path) -> Desk:
        desk = cls(server, folder)
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        for name in filter(None, names):
            if (PROJECT_ROOT / name).is_file():
                (desk.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT_ROOT / name, desk.root / name)
        desk.tools.mkdir()
        for tool in Path("/usr/bin").iterdir():
            if tool.name not in _NOT_OURS:
                (desk.tools / tool.name).symlink_to(tool)
        (desk.tools / "python3").symlink_to(sys.executable)
        for name in ("docker", "helm", "kubectl", "microk8s"):
            (desk.tools / name).symlink_to(STUBS / name)
        desk.state.mkdir()
        server.write_kubeconfig(desk.folder / "kubeconfig", "microk8s", "other")
        return desk

    @property
    def root(self) -> Path:
        return self.folder / "project"

    @property
    def tools(self) -> Path:
        return self.folder / "tools"

    @property
    def state(self) -> Path:
        return self.folder / "stubs"

    @property
    def cluster(self) -> Cluster:
        return self.server.cluster

    @property
    def calls(self) -> list[list[str]]:
        """How the stubs were called, since the desk was last cleared."""
        path = self.state / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def command_lines(self) -> str:
        """What anybody could read of kubectl in the list of processes."""
        return (self.state / "command-lines").read_text()

    def environment(self, **more: str) -> dict[str, str]:
        plain = {
            "HOME": str(self.folder),
            "KUBECONFIG": str(self.folder / "kubeconfig"),
            "PATH": str(self.tools),
            "STUB_STATE": str(self.state),
            "STUB_KUBECTL": str(KUBECTL),
            # kubectl is too soon over to collect garbage.
            "GOGC": "off",
            "DEPLOY_TIMEOUT": "20",
            "DEPLOY_REQUEST_TIMEOUT": "10",
            "LC_ALL": "C.UTF-8",
        }
        return {**plain, **more}

    def start(self, script: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
        """Begin a run in a session of its own, as a terminal would."""
        return subprocess.Popen(
            [self.root / "scripts" / script, *arguments],
            cwd=self.folder,
            env=self.environment(**more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, typed: str = "", **more: str) -> Run:
        """A whole run; what is typed goes to its standard input."""
        with self.start(script, *arguments, **more) as process:
            return ended(process, typed)

    def deploy(self, *arguments: str, **more: str) -> Run:
        return self.run("deploy.sh", *arguments, **more)

    def save(self) -> Saved:
        """Cluster and stubs as they are now."""
        remembered = {path.name: path.read_bytes() for path in self.state.iterdir()}
        return Saved(self.cluster.save(), remembered)

    def load(self, saved: Saved) -> None:
        """Cluster and stubs as they were, with an empty journal."""
        self.clear()
        self.cluster.load(saved.objects)
        for name, content in saved.remembered.items():
            if name not in ("calls", "command-lines"):
                (self.state / name).write_bytes(content)

    def clear(self) -> None:
        """A new cluster, and stubs that remember nothing."""
        self.cluster.reset()
        for path in self.state.iterdir():
            path.unlink()

    def secrets(self) -> dict[str, dict[str, str]]:
        """Every Secret of ours, decoded."""
        return {
            found["metadata"]["name"]: {
                key: base64.b64decode(text).decode() for key, text in found["data"].items()
            }
            for found in self.cluster.list("secrets", NAMESPACE)
            if found["type"] == "Opaque"
        }

    def changes(self) -> list[str]:
        """Requests that changed something, as "verb kind/name"."""
        return [
            f"{seen.verb} {seen.resource}/{seen.name}"
            for seen in self.cluster.journal
            if seen.changed
        ]

    @contextmanager
    def edited(self, path: str, old: str, new: str) -> Iterator[None]:
        """A file of the copy with a text replaced, for a while."""
        file = self.root / path
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new))
        try:
            yield
        finally:
            file.write_text(before)

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Tools that are not installed, for a while."""
        targets = {name: (self.tools / name).readlink() for name in names}
        for name in names:
            (self.tools / name).unlink()
        try:
            yield
        finally:
            for name, target in targets.items():
                (self.tools / name).symlink_to(target)


@dataclass(frozen=True, slots=True)
class Saved:
    """What `Desk.save` keeps."""

    objects: Mapping[Key, Any]
    remembered: Mapping[str, bytes]


def ended(process: subprocess.Popen[str], typed: str = "", timeout: float = 90) -> Run:
    """Wait for a run's end; one that hangs is killed with its children."""
    try:
        out, err = process.communicate(typed, timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{out}{err}") from None
    return Run(process.returncode, out, err)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """A signal to a run and its children."""
    os.killpg(process.pid, number)


def settled(cluster: Cluster) -> None:
    """Return when the controllers have nothing left to do."""
    version = -1
    while version != cluster.version:
        version = cluster.version
        time.sleep(0.1)
