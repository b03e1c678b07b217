"""`python -m ingestion`: a result on standard output, or one line that says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import pytest

from ingestion.synthetic import csv_blocks
from settings import PROJECT_ROOT

CSV = b"".join(csv_blocks(50))


class Database(Protocol):
    @property
    def environment(self) -> dict[str, str]: ...

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]: ...


Result = subprocess.CompletedProcess[str]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a command with a state folder of its own and no database, unless given one."""
    inherited = {name: value for name, value in os.environ.items() if "DIABETES_" not in name}

    def run_it(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
        own = {"DIABETES_STATE_DIR": str(tmp_path / "state"), "DIABETES_DB_PORT": "1"}
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "ingestion", *map(str, arguments)],
            env={**inherited, "NO_PROXY": "*", **own, **(env or {})},
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run_it


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "diabetic_data.csv"
    path.write_bytes(CSV)
    return path


def result_of(done: Result) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    return dict(json.loads(done.stdout))


def test_synthesize_writes_what_was_asked_for(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.csv"
    result = result_of(run("synthesize", path, "--rows", "40", "--seed", "7"))
    assert result == {"path": str(path), "rows": 40, "seed": 7}
    assert path.read_bytes() == b"".join(csv_blocks(40, 7))


def test_validate_needs_no_database(run: Run, file: Path) -> None:
    file.write_bytes(CSV + b"broken\r\n")
    assert result_of(run("validate", "--source", file, "--reject-limit-percent", "2")) == {
        "path": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "rows_read": 51,
        "rows_rejected": 1,
        "first_rejects": ["line 52: 1 fields, expected 50"],
    }


def test_load_reports_and_logs_itself(run: Run, database: Database, file: Path) -> None:
    result = result_of(run("load", "--source", file, env=database.environment))
    assert (result["rows_read"], result["rows_inserted"]) == (50, 50)
    assert database.rows("select source, run_id from raw_data.ingestion_log") == [
        (str(file), "command line")
    ]
    refresh = run("load", "--source", "synthetic:20", "--full-refresh", env=database.environment)
    assert result_of(refresh)["rows_deleted"] == 30


def test_source_comes_from_the_environment(run: Run, file: Path) -> None:
    assert result_of(run("validate", env={"DIABETES_SOURCE": str(file)}))["rows_read"] == 50


@pytest.fixture
def url(file: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = partial(Quiet, directory=str(file.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{file.name}"
        server.shutdown()
        thread.join()


def test_download_tells_where_the_file_lies(run: Run, url: str, tmp_path: Path) -> None:
    path = Path(result_of(run("download", "--source", url))["path"])
    assert path.is_relative_to(tmp_path / "state" / "cache")
    assert path.read_bytes() == CSV


WRONG_SHA256 = {"DIABETES_SOURCE": "synthetic:20", "DIABETES_SOURCE_SHA256": "ab" * 32}


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["load", "--source", "/nowhere.zip"], {}, "/nowhere.zip: no such file; set DIABETES_SO"),
        (["load", "--source", "/dev/null"], {}, "/dev/null: no such file; set DIABETES_SOURCE"),
        (["validate", "--source", "pyproject.toml"], {}, "pyproject.toml, line 1: wrong header: m"),
        (["load", "--source", "ftp://x/y"], {}, "ftp://x/y: expected http:// or https:// and a"),
        (["validate", "--source", "synthetic:0"], {}, "synthetic:0: rows must be from 1 to 100,"),
        (["download", "--source", "synthetic:9"], {}, "synthetic:9: nothing to download; write"),
        (["synthesize", "x.csv", "--rows", "0"], {}, "rows must be from 1 to 100,000,000, got 0"),
        (["synthesize", "/proc/no/x.csv"], {}, "[Errno 2] No such file or directory: '/proc/no'"),
        (
            ["load", "--source", "synthetic:20"],
            {},
            "Connection refused Is the server running on that host and accepting TCP/IP "
            "connections?; start it with make run, or set DIABETES_DB_*",
        ),
        (["validate"], WRONG_SHA256, "SHA-256 of the CSV is "),
        (["validate"], {"DIABETES_REJECT_LIMIT_PERCENT": "x"}, "DIABETES_REJECT_LIMIT_PERCENT: "),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    run: Run, arguments: list[str], env: dict[str, str], message: str
) -> None:
    done = run(*arguments, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert before in ([], ["generating 20 synthetic encounters (seed 130)"])


def test_password_is_never_shown(run: Run, database: Database) -> None:
    wrong = {**database.environment, "DIABETES_DB_PASSWORD": "a-wrong-secret"}
    done = run("load", "--source", "synthetic:20", env=wrong)
    assert done.returncode == 1
    assert "password authentication failed" in done.stderr
    assert "a-wrong-secret" not in done.stderr


def test_load_that_refuses_a_file_says_so_in_one_line(
    run: Run, database: Database, file: Path
) -> None:
    file.write_bytes(CSV + b"broken\r\n" * 9)
    done = run("load", "--source", file, env=database.environment)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: diabetic_data.csv: 9 of 59 rows (15.25%) break the contract")
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["load", "--unknown"],
        ["load", "extra"],
        ["synthesize"],
        ["synthesize", "x.csv", "--rows", "many"],
        ["load", "--reject-limit-percent", "many"],
        ["load", "--reject-limit-percent", "-1"],
        ["validate", "--reject-limit-percent", "100.1"],
        ["validate", "--reject-limit-percent", "nan"],
    ],
)
def test_bad_arguments_end_with_the_usage_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    from ingestion.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.startswith("usage: python -m ingestion")


def test_exit_code_2_reaches_the_shell(run: Run) -> None:
    done = run("load", "--unknown")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m ingestion")
