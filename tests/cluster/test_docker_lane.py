"""Builds and runs what the other tests only read; skips itself where no Docker engine answers.

It takes half an hour and the ports of compose.yaml, and leaves the images behind, nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from settings import PROJECT_ROOT
from tests.manifests.test_images import IMAGES, LIMIT

PROJECT = f"diabetes-test-{os.getpid()}"

pytestmark = pytest.mark.timeout(5400)


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    )


def compose(*arguments: str) -> str:
    done = docker("compose", "--project-name", PROJECT, *arguments)
    assert done.returncode == 0, f"docker compose {' '.join(arguments)}:\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def engine() -> None:
    try:
        answer = docker("info", "--format", "{{.ServerVersion}}")
    except FileNotFoundError:
        pytest.skip("docker is not installed")
    if answer.returncode:
        pytest.skip(f"no Docker engine answers: {answer.stderr.strip().splitlines()[-1]}")
    if docker("compose", "version").returncode:
        pytest.skip("docker's compose plugin is not installed")


@pytest.fixture(scope="session")
def built(engine: None) -> None:
    compose("build")


@pytest.fixture(scope="session")
def running(built: None) -> Iterator[None]:
    try:
        compose("up", "--wait", "--wait-timeout", "900")
        yield
    finally:
        docker("compose", "--project-name", PROJECT, "down", "--volumes", "--timeout", "30")


@pytest.mark.parametrize("image", IMAGES)
def test_image_runs_as_somebody(image: str, built: None) -> None:
    (found,) = json.loads(docker("image", "inspect", f"diabetes-{image}:dev").stdout)
    user = found["Config"]["User"]
    assert user == ("50000:0" if image == "airflow" else "10001:10001")
    assert found["Config"]["Labels"]["org.opencontainers.image.title"] == f"diabetes-{image}"


def test_api_image_is_small(built: None) -> None:
    # What it takes on the disk: the layers as `docker history` lists them.
    (found,) = json.loads(docker("image", "inspect", "diabetes-api:dev").stdout)
    assert found["Size"] < LIMIT


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_but_state_can_be_written(image: str, built: None) -> None:
    hardened = ("--rm", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--network=none")
    attempt = "import pathlib; pathlib.Path('/opt/platform/x').touch()"
    done = docker("run", *hardened, f"diabetes-{image}:dev", "python", "-c", attempt)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr


def test_everything_is_healthy_and_the_smoke_test_passes(running: None) -> None:
    lines = compose("ps", "--all", "--format", "json").splitlines()
    states = [state for line in lines for state in _listed(json.loads(line))]
    assert len(states) == 16
    for state in states:
        fine = state["Health"] == "healthy" or (state["State"], state["ExitCode"]) == ("exited", 0)
        assert fine, state
    said = compose("run", "--rm", "mlflow-users", "python", "-m", "infra.jobs.smoke_test")
    assert "MLflow works" in said


def _listed(found: object) -> list[dict[str, object]]:
    # One object a line, or one list, as compose's version has it.
    return found if isinstance(found, list) else [found]  # type: ignore[list-item]


def test_second_start_keeps_the_credentials(running: None) -> None:
    before = compose("run", "--rm", "secrets", "show")
    assert "adminuser" in before
    compose("up", "--wait", "--wait-timeout", "900")
    assert compose("run", "--rm", "secrets", "show") == before


def test_roots_are_read_only_and_users_are_not_root(running: None) -> None:
    for identity in compose("ps", "--quiet").split():
        (found,) = json.loads(docker("inspect", identity).stdout)
        assert found["HostConfig"]["ReadonlyRootfs"], found["Name"]
        assert found["Config"]["User"] not in ("", "0", "root", "0:0"), found["Name"]
        for bound in (found["HostConfig"]["PortBindings"] or {}).values():
            assert {port["HostIp"] for port in bound} == {"127.0.0.1"}, found["Name"]
