"""The one module that reads the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from settings import PROJECT_ROOT, PUBLISHER_CSV_SHA256, PUBLISHER_URL, Settings


def test_every_setting_is_documented() -> None:
    page = (PROJECT_ROOT / "docs" / "settings.md").read_text()
    named = set(re.findall(r"`((?:DIABETES|MLFLOW)?_[A-Z0-9_]+)`", page))
    for name, field in Settings.model_fields.items():
        variable = str(field.validation_alias or f"DIABETES_{name.upper()}")
        assert variable in named or f"_{variable.rsplit('_', 1)[1]}" in named, variable
        assert field.description


def test_nothing_else_reads_our_variables() -> None:
    reading = re.compile(r"(os\.environ|getenv)[^\n]*DIABETES_")
    packages = [PROJECT_ROOT / name for name in ("ingestion", "services", "dags")]
    readers = [
        str(path)
        for package in packages
        for path in package.rglob("*.py")
        if reading.search(path.read_text())
    ]
    assert readers == []


def test_relative_state_folder_becomes_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIABETES_STATE_DIR", "here")
    assert Settings().state_dir == Path.cwd() / "here"


def test_checksum_belongs_to_its_source() -> None:
    own = Settings(source="https://host/file.zip", source_sha256="ABC")
    assert own.expected_sha256("https://host/file.zip") == "abc"
    assert own.expected_sha256("/another/file.zip") == ""
    assert own.expected_sha256(PUBLISHER_URL) == PUBLISHER_CSV_SHA256


def test_password_does_not_show() -> None:
    assert "geheim" not in repr(Settings(db_password="geheim"))  # type: ignore[arg-type]
