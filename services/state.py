"""What the platform keeps between runs beside its databases: generated secrets and ports."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path

_NAMES = (
    "postgres",
    "diabetes",
    "airflow",
    "mlflow",
    "admin",
    "api",
    "jwt",
    "fernet",
    "identifiers",
    "monitoring",
)


class Secrets(dict[str, str]):
    """Secrets by name, generated at first use and kept in one file that only its owner reads.

    Args:
        state: folder of the platform's state; the file is `secrets.json` in it.
    """

    def __init__(self, state: Path) -> None:
        file = state / "secrets.json"
        super().__init__(json.loads(file.read_text()) if file.exists() else {})
        missing = [name for name in _NAMES if name not in self]
        if not missing:
            return
        for name in missing:
            self[name] = _generate(name)
        state.mkdir(parents=True, exist_ok=True)
        write_private(file, json.dumps(self, indent=2))


def _generate(name: str) -> str:
    if name == "fernet":
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    if name in ("api", "jwt"):
        return secrets.token_urlsafe(48)
    return secrets.token_urlsafe(18)


def write_private(file: Path, text: str) -> None:
    """Write a file whole or not at all, readable by its owner only."""
    partial = file.with_name(f"{file.name}.part")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(text)
    partial.replace(file)


def write_shell_environment(file: Path, variables: Mapping[str, str]) -> None:
    """Write variables as `export` lines: after `source`, our programs work by hand."""
    lines = [
        f'export PATH={shlex.quote(value.split(os.pathsep)[0])}:"$PATH"'
        if name == "PATH"
        else f"export {name}={shlex.quote(value)}"
        for name, value in variables.items()
    ]
    write_private(
        file, "\n".join(["# source this file to use dbt, airflow and mlflow by hand", *lines, ""])
    )
