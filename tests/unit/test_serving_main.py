"""The command line of the API: keys, and how it ends when it can't start."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

import pytest

from serving import __main__ as command
from serving.app import create_app
from serving.errors import ServingError
from serving.guard import read_keys
from settings import Settings


def test_a_key_that_is_made_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    made = []
    for _ in range(2):
        assert command.main(["key", "ward 3"]) == 0
        first, second = capsys.readouterr().out.splitlines()
        key = first.removeprefix("key").strip()
        assert re.fullmatch(r"[\w-]{43}", key)
        hashes = read_keys(second.removeprefix("hash").strip())
        assert hashes == {sha256(key.encode()).hexdigest(): "ward 3"}
        made.append(key)
    assert made[0] != made[1]


def test_names_may_be_odd_but_for_what_the_setting_can_not_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(["key", "a:b"]) == 0
    line = capsys.readouterr().out.splitlines()[1].removeprefix("hash")
    assert list(read_keys(line).values()) == ["a:b"]
    for name in ("ward,3", " ", "", "two\nlines"):
        with pytest.raises(SystemExit) as ended:
            command.main(["key", name])
        assert ended.value.code == 2
        assert "a name without commas" in capsys.readouterr().err


def test_other_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["key"], ["walk"]):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 2
        assert "usage: python -m serving" in capsys.readouterr().err


def test_what_hinders_the_start_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: Settings) -> None:
        raise ServingError("no room")

    monkeypatch.setattr(command, "run", run)
    assert command.main(["run"]) == command.main([]) == 1
    assert capsys.readouterr().err.splitlines() == ["error: no room"] * 2


def test_settings_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="DIABETES_API_KEY_HASHES"):
        create_app(Settings(state_dir=tmp_path, api_key_hashes="plain", prediction_log=False))
