"""The scripts as an operator runs them: real kubectl, the tests' cluster, stubs for the rest."""

from __future__ import annotations

import base64
import hashlib
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

import pytest
import yaml

from settings import PROJECT_ROOT
from tests.deploy.apiserver import (
    KINDS,
    Behaviour,
    Cluster,
    Key,
    Object,
    Request,
    Server,
    running,
)
from tests.manifests.manifests import KUBECTL

NAMESPACE = "diabetes-mlops"
PLAIN = ("--skip-build", "--without-airflow")
"""Flags for a test that is about neither images nor Airflow."""
PLURALS = {kind.name: kind.plural for kind in KINDS.values()}
STUBS = Path(__file__).with_name("stubs")
ORDER = [
    "statefulsets/postgres",
    "statefulsets/minio",
    "jobs/init-storage",
    "jobs/mlflow-migrate",
    "deployments/mlflow",
    "jobs/mlflow-users",
]
"""Stores, Jobs and MLflow, as a deployment has to bring them up."""
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

    def rendered(self, overlay: str = "microk8s") -> list[Object]:
        """What deploy.sh has applied last."""
        folder = self.root / ".run" / "deploy" / overlay
        done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, check=True)
        return list(yaml.safe_load_all(done.stdout))

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


def key_of(item: Object) -> Key:
    """Where the cluster keeps an object."""
    plural = PLURALS[item["kind"]]
    return plural, NAMESPACE if KINDS[plural].namespaced else "", item["metadata"]["name"]


def consistent(secrets: dict[str, dict[str, str]]) -> None:
    """What one Secret derives from another fits."""
    postgres, mlflow = secrets["postgres-credentials"], secrets["mlflow-credentials"]
    uri = f"postgresql+psycopg2://mlflow:{postgres['mlflow-password']}@postgres:5432/mlflow"
    assert mlflow["backend-store-uri"] == uri
    assert f"database_uri = {uri}\n" in mlflow["basic_auth.ini"]
    api, page = secrets["api-credentials"], secrets["ui-credentials"]["api-key"]
    hashes = dict(part.split(":") for part in api["key-hashes"].split(","))
    assert hashes == {
        "page": hashlib.sha256(page.encode()).hexdigest(),
        "operator": hashlib.sha256(api["operator-key"].encode()).hexdigest(),
    }
    if airflow := secrets.get("airflow-credentials"):
        server = "postgres:5432"
        own, data = postgres["airflow-password"], postgres["diabetes-password"]
        assert airflow["connection"] == f"postgresql+psycopg2://airflow:{own}@{server}/airflow"
        assert airflow["postgres-default"] == f"postgres://diabetes:{data}@{server}/diabetes"
        assert json.loads(airflow["passwords.json"]) == {"admin": airflow["admin-password"]}
        watching = secrets["airflow-monitoring"]
        assert json.loads(watching["passwords.json"]) == {watching["user"]: watching["password"]}


@dataclass(frozen=True, slots=True)
class First:
    """The first deployment on an empty cluster, and what it left.

    Attributes:
        objects: what was rendered and applied.
        waited: Jobs and MLflow, and whether all before them was ready when they came.
    """

    run: Run
    objects: list[Object]
    waited: dict[str, bool]
    saved: Saved
    calls: list[list[str]]
    command_lines: str
    journal: list[Request]
    secrets: dict[str, dict[str, str]]


@pytest.fixture(scope="session")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk and its server, for the fixtures below."""
    with running() as server:
        yield Desk.laid_out(server, tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="session")
def first(laid_out: Desk) -> First:
    """The first deployment."""
    laid_out.clear()
    cluster, waited = laid_out.cluster, dict[str, bool]()

    def look(request: Request) -> None:
        name = f"{request.resource}/{request.name}"
        if name in ORDER[2:] and request.verb == "patch":
            before = [one.split("/") for one in ORDER[: ORDER.index(name)]]
            states = [cluster.get(*one, NAMESPACE)["status"] for one in before]
            waited[name] = all(
                state.get("readyReplicas") or state.get("succeeded") for state in states
            )

    cluster.after_change = look
    for name in ORDER:
        cluster.behaviours[name.partition("/")[2]] = Behaviour(delay=0.3)
    run = laid_out.deploy().fine()
    settled(cluster)
    calls, command_lines = laid_out.calls, laid_out.command_lines
    return First(
        run,
        laid_out.rendered(),
        waited,
        laid_out.save(),
        calls,
        command_lines,
        list(cluster.journal),
        laid_out.secrets(),
    )


@pytest.fixture
def desk(laid_out: Desk) -> Desk:
    """A desk with a new cluster."""
    laid_out.clear()
    return laid_out


@pytest.fixture
def deployed(laid_out: Desk, first: First) -> Desk:
    """A desk whose cluster has the platform."""
    laid_out.load(first.saved)
    return laid_out
