"""What `make run` does about its source before anything is started."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ingestion.errors import IngestionError, SourceUnreachableError
from services import platform as module
from services.platform import Platform
from settings import PUBLISHER_URL, Settings


@pytest.fixture
def state(reachable_tmp: Path) -> Path:
    """A state folder that PostgreSQL's user can enter, or a copy of the wheel would be made."""
    return reachable_tmp / "platform-unit"


def platform(
    state: Path, monkeypatch: pytest.MonkeyPatch, source: str, loaded: set[str], reachable: bool
) -> Platform:
    def obtain(*_: object) -> Path:
        if not reachable:
            raise SourceUnreachableError(f"{source} can't be reached")
        return state / "file.zip"

    monkeypatch.setattr(module, "obtain", obtain)
    chosen = Platform(Settings(state_dir=state, source=source))
    monkeypatch.setattr(chosen, "_origins", lambda: loaded)
    return chosen


def test_publisher_out_of_reach_means_synthetic_and_says_so(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = platform(state, monkeypatch, PUBLISHER_URL, set(), reachable=False)
    with caplog.at_level(logging.WARNING):
        assert chosen._available_source() == "synthetic"
    assert "SYNTHETIC" in caplog.text


def test_publisher_out_of_reach_never_replaces_real_data(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = platform(state, monkeypatch, PUBLISHER_URL, {"real"}, reachable=False)
    with pytest.raises(IngestionError, match="nothing was changed"):
        chosen._available_source()


def test_a_source_of_ones_own_is_never_replaced_by_synthetic(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = platform(state, monkeypatch, "https://host/data.zip", set(), reachable=False)
    with pytest.raises(SourceUnreachableError):
        chosen._available_source()


@pytest.mark.parametrize("source", [PUBLISHER_URL, "synthetic", "synthetic:10:1"])
def test_source_that_is_there_is_taken(
    state: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    chosen = platform(state, monkeypatch, source, set(), reachable=True)
    assert chosen._available_source() == source


@pytest.mark.parametrize(
    ("source", "loaded", "replaces"),
    [
        (PUBLISHER_URL, {"synthetic"}, True),
        (PUBLISHER_URL, {"real"}, False),
        (PUBLISHER_URL, set(), False),
        ("synthetic", {"synthetic"}, False),
        ("synthetic", {"real"}, False),
    ],
)
def test_only_synthetic_data_are_replaced_unasked(
    state: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    loaded: set[str],
    replaces: bool,
) -> None:
    chosen = platform(state, monkeypatch, source, loaded, reachable=True)
    assert chosen._replaces_synthetic(source) is replaces
