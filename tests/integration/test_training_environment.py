"""The git commit that a training writes down."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_training_environment import git
from training import environment


def test_git_commit_says_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "PROJECT_ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment.git_commit() == commit
    (tmp_path / "not tracked").touch()
    assert environment.git_commit() == commit
    (tmp_path / "file").write_text("2")
    assert environment.git_commit() == f"{commit}+changes"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PROJECT_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_commit() == "unknown"
