"""`python -m loadtest`: whom it asks, how long, and whose memory it looks at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loadtest import __main__ as command
from loadtest import memory
from services import processes
from services.web import API
from settings import Settings


def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "load"
    assert command.main(["--url=http://127.0.0.1:9", f"--out={out}"]) == 1
    said = capsys.readouterr()
    assert said.err == "error: no answer from http://127.0.0.1:9; is it up? make run starts it\n"
    assert not out.exists()
    first, warning, *_ = said.out.splitlines()
    assert first == "http://127.0.0.1:9: single, steady, 16 users, 60 s ..."
    assert "prediction log" in warning


def test_a_soak_takes_ten_minutes_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = ["--url=http://127.0.0.1:9", f"--out={tmp_path}", "--shape=soak"]
    assert command.main(away) == command.main([*away, "--seconds=7"]) == 1
    said = capsys.readouterr().out
    assert "soak, 16 users, 600 s" in said
    assert "soak, 16 users, 7 s" in said


def test_memory_is_that_of_the_api_of_make_run(tmp_path: Path) -> None:
    chosen = Settings(state_dir=tmp_path)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes.start(API.name, sleeper, tmp_path, {API.port_variable: "1234"}, tmp_path / "log")
    try:
        look = memory.of_platform(chosen, "http://127.0.0.1:1234")
        assert look
        assert 1 < look() < 100
        for other in ("http://127.0.0.1:1235", "http://far:1234", "https://127.0.0.1"):
            assert memory.of_platform(chosen, other) is None
    finally:
        processes.stop(tmp_path)
    assert memory.of_platform(chosen, "http://127.0.0.1:1234") is None
