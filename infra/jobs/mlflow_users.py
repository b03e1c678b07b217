"""The users of MLflow beside its administrator, with the passwords that the Secret gives them.

`serving` (the prediction API) and `metrics` (Prometheus) read; `pipeline` (Airflow) may change
every experiment and model, those that somebody else made too.

To give one of them another password: change the Secret, run this job again, restart who uses it.
The administrator's is different: MLflow takes it from the Secret at its very first start only.
Change it in MLflow first (PATCH users/update-password), then in the Secret.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import requests

from infra.jobs.common import JobError, NotReadyError, run, variable, wait_for

_WORKSPACE = "default"

USERS: dict[str, dict[str, str]] = {
    "serving": {"experiment": "READ", "registered_model": "READ"},
    "metrics": {},  # /metrics asks for a login, not for rights
    # USE of the workspace is the right to create.
    "pipeline": {"workspace": "USE", "experiment": "MANAGE", "registered_model": "MANAGE"},
}
"""Rights of each user, on all resources of a type; with them a role of the user's name is made."""


class Users:
    """MLflow's users, by its REST API.

    Args:
        uri: of the server.
        admin: name and password of an administrator.
    """

    def __init__(self, uri: str, admin: tuple[str, str]) -> None:
        self._uri = uri.rstrip("/")
        self._admin = admin
        self._session = requests.Session()

    def wait(self, timeout: float) -> None:
        """Return when the server takes the administrator's login.

        Raises:
            JobError: it does not come up, or refuses us.
        """

        def attempt() -> requests.Response:
            try:
                return self._call("GET", "2.0/mlflow/users/current", login=self._admin)
            except requests.RequestException as error:
                raise NotReadyError(str(error)) from error

        answer = wait_for(f"MLflow at {self._uri}", attempt, timeout)
        if answer.status_code == requests.codes.unauthorized:
            raise JobError(
                f"MLflow refuses the password of {self._admin[0]}: it keeps the one of its first "
                "start, whatever the Secret says since; put that one into the Secret, or change "
                "it in MLflow first and in the Secret after that"
            )
        _check(answer, "let us in")

    def ensure(self, name: str, password: str) -> bool:
        """Create a user who is no administrator, or set the password, where the login fails.

        Returns:
            Whether anything was done.
        """
        login = (name, password)
        answer = self._call("GET", "2.0/mlflow/users/current", login=login)
        if answer.ok and not answer.json()["user"]["is_admin"]:
            return False
        known = self._call("GET", "2.0/mlflow/users/get", params={"username": name})
        if known.status_code == requests.codes.not_found:
            body: dict[str, Any] = {"username": name, "password": password}
            _check(self._call("POST", "2.0/mlflow/users/create", json=body), f"make {name}")
            return True
        _check(known, f"look {name} up")
        for path, body in (
            ("update-password", {"username": name, "password": password}),
            ("update-admin", {"username": name, "is_admin": False}),
        ):
            answer = self._call("PATCH", f"2.0/mlflow/users/{path}", json=body)
            _check(answer, f"change {name} ({path})")
        return True

    def grant(self, name: str, rights: Mapping[str, str]) -> bool:
        """Give a user rights on all resources of a type (type -> right), by a role of its name.

        Returns:
            Whether anything was done.
        """
        done = False
        roles = self._get("roles/list", "roles", workspace=_WORKSPACE)
        role = next((role["id"] for role in roles if role["name"] == name), None)
        if role is None:
            made = self._post("roles/create", workspace=_WORKSPACE, name=name)
            role = made["role"]["id"]
            done = True
        granted = {
            (right["resource_type"], right["resource_pattern"], right["permission"])
            for right in self._get("roles/permissions/list", "role_permissions", role_id=str(role))
        }
        for resource, permission in rights.items():
            if (resource, "*", permission) not in granted:
                self._post(
                    "roles/permissions/add",
                    role_id=role,
                    resource_type=resource,
                    resource_pattern="*",
                    permission=permission,
                )
                done = True
        if role not in [
            held["id"] for held in self._get("users/roles/list", "roles", username=name)
        ]:
            self._post("roles/assign", username=name, role_id=role)
            done = True
        return done

    def _get(self, path: str, what: str, **parameters: str) -> list[dict[str, Any]]:
        answer = self._call("GET", f"3.0/mlflow/{path}", params=parameters)
        _check(answer, f"answer {path}")
        found: list[dict[str, Any]] = answer.json()[what]
        return found

    def _post(self, path: str, **body: object) -> Any:
        answer = self._call("POST", f"3.0/mlflow/{path}", json=body)
        _check(answer, f"do {path}")
        return answer.json()

    def _call(
        self, method: str, path: str, *, login: tuple[str, str] | None = None, **arguments: Any
    ) -> requests.Response:
        url = f"{self._uri}/api/{path}"
        auth = login or self._admin
        answer = self._session.request(method, url, auth=auth, timeout=60, **arguments)
        if answer.status_code in (502, 503, 504):
            raise requests.ConnectionError(f"{url} answers {answer.status_code}")
        return answer


def _check(answer: requests.Response, wanted: str) -> None:
    if not answer.ok:
        raise JobError(f"MLflow does not {wanted}: HTTP {answer.status_code}, {answer.text[:500]}")


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 0 or 1."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.jobs.mlflow_users",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for MLflow")
    timeout = parser.parse_args(argv).timeout

    def job() -> str:
        passwords = {name: variable(f"{name.upper()}_PASSWORD") for name in USERS}
        admin = (variable("MLFLOW_TRACKING_USERNAME"), variable("MLFLOW_TRACKING_PASSWORD"))
        users = Users(variable("MLFLOW_TRACKING_URI"), admin)
        users.wait(timeout)
        done = []
        for name, rights in USERS.items():
            made = users.ensure(name, passwords[name])
            if (rights and users.grant(name, rights)) or made:
                done.append(name)
        return f"made or mended: {', '.join(done)}" if done else "all there, nothing to do"

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
