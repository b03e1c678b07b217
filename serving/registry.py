"""Asking MLflow which version has an alias, and fetching that version into the local cache.

The question goes over MLflow's REST API, so that the service needs none of mlflow's memory; the
download is a process of its own (`python -m serving.registry`), where mlflow's client knows every
kind of artifact store and a corrupt model can bring down nothing but that process.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from serving.errors import ModelRefusedError, RegistryError
from serving.model import MODEL_FOLDER, Model
from settings import PROJECT_ROOT, REGISTERED_MODEL, Settings

PART = ".part"
"""Ending of a folder that a version is on its way into."""

_REFUSED = 3
_DOWNLOADED, _PASSED = "downloaded", "passed"
"""What the process that fetches says of how far it came: a corrupt model can end it in any way, and
with any exit code."""
_TIMEOUT = 300

_HINTS = {
    401: ": set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a login that it takes",
    403: f": this login may not read the registered model {REGISTERED_MODEL}",
}
"""What to do about a refusal, by status."""

log = logging.getLogger(__name__)


class Registry:
    """MLflow's model registry, seen from the service.

    Args:
        chosen: the settings.
    """

    def __init__(self, chosen: Settings) -> None:
        self._uri = chosen.mlflow_tracking_uri.rstrip("/")
        self._session = requests.Session()
        if chosen.mlflow_tracking_username:
            password = chosen.mlflow_tracking_password.get_secret_value()
            self._session.auth = (chosen.mlflow_tracking_username, password)

    def find(self, alias: str, timeout: float = 5) -> dict[str, Any] | None:
        """The version that has this alias, with its tags; None where none has.

        Raises:
            RegistryError: MLflow does not answer, or refuses to.
        """
        if not self._uri:
            raise RegistryError("MLFLOW_TRACKING_URI is not set: name the MLflow server")
        answer = self._ask("alias", timeout, name=REGISTERED_MODEL, alias=alias)
        content = _content(answer)
        if answer.ok:
            if "model_version" not in content:
                raise RegistryError(f"what answers at {self._uri} is no MLflow server")
            found = content["model_version"]
            return {
                "name": REGISTERED_MODEL,
                "alias": alias,
                "version": str(found["version"]),
                "run_id": found["run_id"],
                "registered_at": _seconds(found.get("creation_timestamp")),
                "tags": {tag["key"]: tag.get("value", "") for tag in found.get("tags", [])},
            }
        if content.get("error_code") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        # With logins and workspaces, MLflow answers 403 for a model that does not exist, whatever
        # the user's rights; see training.registry.find_version.
        if answer.status_code == requests.codes.forbidden and not self._is_registered(timeout):
            return None
        status = answer.status_code
        raise RegistryError(f"MLflow at {self._uri} answers {status}{_HINTS.get(status, '')}")

    def _is_registered(self, timeout: float) -> bool:
        """Whether the registry shows our model to this user."""
        wanted = f"name = '{REGISTERED_MODEL}'"
        answer = self._ask("search", timeout, filter=wanted, max_results="1")
        return not answer.ok or bool(_content(answer).get("registered_models"))

    def _ask(self, what: str, timeout: float, **parameters: str) -> requests.Response:
        url = f"{self._uri}/api/2.0/mlflow/registered-models/{what}"
        try:
            return self._session.get(url, params=parameters, timeout=timeout)
        except requests.RequestException as error:
            raise RegistryError(
                f"MLflow at {self._uri} does not answer ({_short(error)}); start it (make up)"
            ) from None

    def fetch(self, found: Mapping[str, Any], folder: Path) -> None:
        """Bring a version into a folder, tested; nothing is left of one that fails.

        Raises:
            ModelRefusedError: it does not pass its self-test, or breaks the process that tries.
            RegistryError: it can't be downloaded now.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(PART, f"{folder.name}-", folder.parent))
        (partial / "version.json").write_text(json.dumps(found), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "serving.registry", str(partial)],
                # mlflow's own settings (login, certificates, S3) are in the environment.
                env={**os.environ, "MLFLOW_TRACKING_URI": self._uri},
                cwd=PROJECT_ROOT,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
            )
            said = done.stderr.strip().splitlines()
            reason = said[-1] if said else "it said nothing"
            told = done.stdout.split()
            if done.returncode == _REFUSED:
                raise ModelRefusedError(reason)
            if _DOWNLOADED not in told:
                raise RegistryError(f"version {found['version']} can't be downloaded: {reason}")
            if done.returncode or _PASSED not in told:
                raise ModelRefusedError(
                    f"version {found['version']}: the process that tested it ended with "
                    f"{done.returncode}: {reason}"
                )
            partial.rename(folder)
        except subprocess.TimeoutExpired:
            raise RegistryError(
                f"version {found['version']} was not downloaded within {_TIMEOUT} s"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def download(folder: Path) -> None:
    """Download the version that `version.json` in the folder names, and test it.

    Raises:
        ModelRefusedError: it lacks something, or does not pass its self-test.
    """
    import mlflow

    found = json.loads((folder / "version.json").read_text(encoding="utf-8"))
    model = Path(
        mlflow.artifacts.download_artifacts(
            f"models:/{REGISTERED_MODEL}/{found['version']}", dst_path=str(folder / "download")
        )
    )
    stored = list(model.glob("artifacts/*/features.json"))
    if not stored:
        raise ModelRefusedError(f"version {found['version']} holds no features.json")
    stored[0].parent.rename(folder / MODEL_FOLDER)
    shutil.rmtree(folder / "download")
    for file in ("evaluation.json", "card/model_card.html"):
        path = mlflow.artifacts.download_artifacts(
            f"runs:/{found['run_id']}/{file}", dst_path=str(folder)
        )
        Path(path).rename(folder / Path(file).name)
    _tell(_DOWNLOADED)
    Model(folder)
    _tell(_PASSED)


def _tell(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _content(answer: requests.Response) -> dict[str, Any]:
    """The answer's JSON object; empty where it holds none (MLflow refuses in HTML)."""
    try:
        content = answer.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _seconds(milliseconds: Any) -> float | None:
    """Seconds since the epoch, where MLflow says so."""
    try:
        return float(milliseconds) / 1000
    except (TypeError, ValueError):
        return None


def _short(error: BaseException) -> str:
    return type(error).__name__


def main(argv: list[str]) -> int:
    """What the service starts: download and test, in a process that may die of it.

    Returns:
        The exit code: 0, `_REFUSED`, or 1 where another try may help; the reason on standard error.
    """
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        download(Path(argv[1]))
    except ModelRefusedError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    except Exception as error:
        text = " ".join(str(error).split())
        sys.stderr.write(f"{type(error).__name__}: {text}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
