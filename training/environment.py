"""What a result depends on beside data and seed: installed packages and the checked-out code."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from hashlib import sha256
from importlib.metadata import distributions, packages_distributions, version
from pathlib import Path

from settings import PROJECT_ROOT


@cache
def lock() -> str:
    """Every installed distribution as `name==version`, one a line, sorted."""
    found = {
        f"{distribution.metadata['Name'].lower()}=={distribution.version}"
        for distribution in distributions()
    }
    return "\n".join([f"python=={sys.version.split()[0]}", *sorted(found), ""])


def lock_sha256() -> str:
    """SHA-256 of `lock()`."""
    return sha256(lock().encode()).hexdigest()


def git_commit() -> str:
    """The commit of this checkout, `+changes` where files differ from it; `unknown` without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    # The folder may belong to another user (an image, a mount): that is no reason to fail.
    command = ["git", "-c", f"safe.directory={PROJECT_ROOT}", *arguments]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def requirements(*files: Path) -> list[str]:
    """What these Python files import from outside the standard library, pinned as installed."""
    modules = set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.split(".")[0])
    known = packages_distributions()
    outside = {
        # `mlflow` is also in mlflow-skinny, which is not all of it.
        name if name in known[name] else known[name][0]
        for name in modules - sys.stdlib_module_names
        if name in known
    }
    return sorted(f"{name}=={version(name)}" for name in outside)
