"""dbt as `make run` needs it: the manifest that Cosmos renders from, and the documentation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from settings import PROJECT_ROOT

PROJECT = PROJECT_ROOT / "dbt_diabetes"
_DBT = Path(sys.executable).with_name("dbt")  # of this environment, whatever the PATH says


class DbtError(Exception):
    """dbt failed; the message holds the end of what it said."""


def write_manifest(folder: Path, environment: Mapping[str, str]) -> None:
    """Make `folder/manifest.json`, unless the project is unchanged since the last time.

    The file appears whole: Airflow may be reading the old one.
    """
    mark = folder / "project.sha256"
    digest = _project_digest()
    if (folder / "manifest.json").exists() and mark.exists() and mark.read_text() == digest:
        return
    _run(("parse", "--no-partial-parse"), folder / "new", environment)
    (folder / "new" / "manifest.json").replace(folder / "manifest.json")
    mark.write_text(digest)


def write_docs(folder: Path, environment: Mapping[str, str], static: bool = False) -> Path:
    """Build the documentation with the database's catalog in `folder` and return its page."""
    flags = ("--static",) if static else ()
    made = folder / "new"
    _run(("docs", "generate", *flags), made, environment)
    if static:
        return made / "static_index.html"
    for name in ("catalog.json", "index.html"):
        (made / name).replace(folder / name)
    return folder / "index.html"


def _run(arguments: tuple[str, ...], target: Path, environment: Mapping[str, str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [_DBT, "--log-path", target, "--quiet", *arguments, "--target-path", target],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DbtError(f"dbt {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def _project_digest() -> str:
    digest = sha256()
    for path in sorted(PROJECT.rglob("*")):
        relative = path.relative_to(PROJECT)
        if path.is_file() and relative.parts[0] not in ("target", "logs", "dbt_packages"):
            digest.update(f"{relative}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
