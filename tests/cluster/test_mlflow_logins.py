"""MLflow with logins, as the manifests start it: who may do what, and the first training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import requests

from monitoring.champion import fetch
from tests.deploy.trio import API, Trio
from tests.served import WARNINGS, Registered, running_api, train, wait_until
from tests.warehouse import Database, new_database

pytestmark = WARNINGS

LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


def test_nobody_gets_in_without_a_login_or_with_a_wrong_one(trio: Trio) -> None:
    for path in (f"{API}/experiments/search?max_results=1", "metrics", "", "api/3.0/mlflow/x"):
        for auth in (None, ("serving", "wrong"), ("nobody", "wrong"), ("admin", "password1234")):
            answer = requests.get(f"{trio.url}/{path}", auth=auth, timeout=30)
            assert answer.status_code == 401, (path, auth)


def test_users_get_the_passwords_and_rights_of_the_secret(trio: Trio) -> None:
    kept = trio.login("serving")
    admin = {"json": {"username": "serving", "is_admin": True}}
    assert trio.call("PATCH", f"{API}/users/update-admin", "admin", **admin).ok
    done = trio.job("mlflow-users", SERVING_PASSWORD="another password")
    assert (done.returncode, done.stdout) == (0, "made or mended: serving\n"), done.stderr

    def answer(*auth: str) -> requests.Response:
        return requests.get(f"{trio.url}/{API}/users/current", auth=auth, timeout=30)

    assert answer(*kept).status_code == 401
    assert answer("serving", "another password").json()["user"]["is_admin"] is False
    assert trio.job("mlflow-users").returncode == 0
    assert answer(*kept).ok
    done = trio.job("mlflow-users", MLFLOW_TRACKING_PASSWORD="wrong")
    assert done.returncode == 1
    assert done.stderr.startswith("error: MLflow refuses the password of admin: it keeps the one")
    assert done.stderr.count("\n") == 1


def test_serving_may_read_and_may_not_write(trio: Trio, logged: dict[str, str]) -> None:
    run, experiment = logged["run"], logged["experiment"]
    artifact = "api/2.0/mlflow-artifacts/artifacts"
    root = trio.call("GET", f"{API}/runs/get?run_id={run}").json()["run"]["info"]["artifact_uri"]
    place = f"{artifact}/{root.removeprefix('mlflow-artifacts:/')}/x.txt"
    writes: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"{API}/experiments/create", {"json": {"name": "new"}}),
        ("POST", f"{API}/experiments/delete", {"json": {"experiment_id": experiment}}),
        ("POST", f"{API}/runs/create", {"json": {"experiment_id": experiment}}),
        ("POST", f"{API}/runs/delete", {"json": {"run_id": run}}),
        ("POST", f"{API}/runs/set-tag", {"json": {"run_id": run, "key": "a", "value": "b"}}),
        ("POST", f"{API}/registered-models/create", {"json": {"name": "new"}}),
        ("DELETE", f"{API}/registered-models/delete", {"json": {"name": "of_this_test"}}),
        (
            "POST",
            f"{API}/registered-models/alias",
            {"json": {"name": "of_this_test", "alias": "champion", "version": "1"}},
        ),
        ("POST", f"{API}/users/create", {"json": {"username": "new", "password": "x" * 12}}),
        ("PUT", place, {"data": b"x"}),
        ("DELETE", place, {}),
    ]
    for user in ("serving", "metrics"):
        for method, path, arguments in writes:
            answer = trio.call(method, path, user, **arguments)
            assert answer.status_code == 403, (user, method, path, answer.text)
    # Not refused for being wrong in itself: whoever may, can.
    method, path, arguments = writes[4]
    assert trio.call(method, path, **arguments).ok
    assert trio.call("PUT", place, data=b"x").ok
    assert trio.call("DELETE", place).ok
    assert trio.call("GET", f"{API}/runs/get?run_id={run}", "serving").ok


def test_first_training_yields_a_champion_that_serving_loads(
    trio: Trio,
    built: Database,
    definition: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With logins, MLflow answers 403 for a model that nobody has registered yet."""
    # dbt's data come from the session's server: they are not what this is about.
    with new_database(built.port, f"first_{os.getpid()}", built.name) as database:
        mine = Registered(database, trio.url, "1", "none")
        serving = dict(zip(LOGIN, trio.login("serving"), strict=True))
        with running_api(tmp_path / "api", mine, wait=False, **serving) as api:
            wait_until(lambda: "has the alias champion" in api.readiness())
            for name, value in zip(LOGIN, trio.login("pipeline"), strict=True):
                monkeypatch.setenv(name, value)
            assert fetch(trio.url, "champion", tmp_path) is None
            assert train(database, definition, trio.url, tmp_path, "logistic_regression") == "1"
            api.wait_until_ready()
            assert api.get("/v1/model").json()["version"] == "1"
