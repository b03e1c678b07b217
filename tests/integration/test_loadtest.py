"""Load tests against a real prediction API: their verdict, shedding, recovery, the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.load import request
from loadtest import data
from loadtest.probe import probing, recovery
from loadtest.run import SCENARIOS, Load, LoadTestError, Objective, run
from loadtest.verdict import SHED
from settings import PROJECT_ROOT
from tests.served import WARNINGS, Api, Registered, running_api, wait_until

pytestmark = WARNINGS

ANY = Objective(0, float("inf"), 10**9)
EASY = ("--least-rps=5", "--most-p95-ms=5000", "--most-failures=0")


def loadtest(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments],
        cwd=PROJECT_ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_passes_and_leaves_a_report(api: Api, tmp_path: Path) -> None:
    done = loadtest(
        "--seconds=5",
        "--users=4",
        *EASY,
        DIABETES_API_URL=api.url,
        DIABETES_STATE_DIR=str(tmp_path),
        DIABETES_API_KEY="of nobody",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nPASS\n" in done.stdout
    folder = tmp_path / "load"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["requests"] > 25
    assert (summary["failures"], summary["missed"]) == (0, [])
    assert summary["by_name"].keys() == {"/v1/predict"}
    report = (folder / "report.html").read_text()
    assert "/v1/predict" in report
    everything = done.stdout + "".join(path.read_text() for path in folder.iterdir())
    assert "of nobody" not in everything


def test_a_run_fails_by_an_impossible_objective(api: Api, tmp_path: Path) -> None:
    done = loadtest(
        "--scenario=page",
        "--seconds=3",
        "--users=4",
        f"--out={tmp_path}",
        "--least-rps=100000",
        "--most-p95-ms=0.01",
        f"--url={api.url}",
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "FAIL: " in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [said.partition(", wanted")[2] for said in summary["missed"]] == [
        " 100000 or more",
        " 0.01 or less",
    ]
    assert summary["failures"] == 0
    assert "/v1/explain" in summary["by_name"]


@pytest.mark.parametrize("scenario", ["batch", "explain"])
def test_other_scenarios_are_answered(api: Api, tmp_path: Path, scenario: str) -> None:
    answered = tmp_path / "answered"
    found = run(
        Load(api.url, scenario, "spike", 4, 2, "", [f"--answered={answered}"]), ANY, tmp_path
    )
    assert found["requests"] > 2
    assert (found["failures"], found["errors"]) == (0, {})
    ids = answered.read_text().split()
    assert len(ids) == len(set(ids)) > 2


def test_one_clear_message_without_a_champion(registered: Registered, tmp_path: Path) -> None:
    nobody = {"DIABETES_API_ALIAS": "nobody"}
    with running_api(tmp_path / "api", registered, wait=False, **nobody) as api:
        wait_until(lambda: "nobody" in _unready(api), 60)
        with pytest.raises(LoadTestError, match=r"is not ready \(503\): .*alias nobody"):
            run(Load(api.url, seconds=1), ANY, tmp_path / "load")
    assert not (tmp_path / "load").exists()


def _unready(api: Api) -> str:
    try:
        return api.get("/readyz").text
    except OSError:
        return ""


USERS = 32


def test_overload_is_shed_and_over_at_once(registered: Registered, tmp_path: Path) -> None:
    answered = tmp_path / "answered"
    more = ["--accept-shedding", f"--answered={answered}"]
    wire = request("/v1/predict", json.dumps(data.encounters(1)[0]).encode())
    few = {"DIABETES_API_MOST_REQUESTS": "4"}
    with running_api(tmp_path / "api", registered, **few) as api:
        port = int(api.url.rpartition(":")[2])
        with probing(port, wire) as looks:
            found = run(Load(api.url, "single", "steady", USERS, 4, "", more), ANY, tmp_path)
            time.sleep(max(0.0, found["ended"] + 6 - time.time()))
        ids = set(answered.read_text().split())
        wait_until(lambda: ids <= logged(registered, ids), 20)
        # 503 without Retry-After, and any other answer, would be failures.
        assert (found["failures"], found["errors"]) == (0, {})
        assert found["by_name"].keys() == {"/v1/predict", SHED}
        shed = found["by_name"][SHED]["requests"]
        assert shed > 0
        refused = sum(look.status == 503 for look in looks)
        # Of what is under way when Locust stops, one request a user, it does not hear the answer.
        assert 0 <= api.metric("http_requests_shed_total") - shed - refused <= USERS
        assert {look.status for look in looks} <= {200, 503}
        assert recovery(looks, found["ended"], 1000) <= 5
        assert ids
        # Where nobody says that shedding is well, it is a failure.
        load = Load(api.url, "single", "steady", USERS, 2)
        found = run(load, Objective(0, float("inf"), 0), tmp_path)
    assert found["failures"] > 0
    assert list(found["errors"]) == ["/v1/predict: status 503"]
    assert found["missed"] == [f"{found['failures']} failures, wanted 0 or fewer"]


def logged(registered: Registered, ids: set[str]) -> set[str]:
    rows = registered.database.rows(
        "select prediction_id::text from inference.predictions"
        " where prediction_id = any(%s::uuid[])",
        list(ids),
    )
    return {str(number) for (number,) in rows}


def test_the_clusters_files_run_without_our_packages(api: Api, tmp_path: Path) -> None:
    """As the Job mounts them: three files, and nothing of ours beside them."""
    mounted = tmp_path / "load" / "loadtest"
    mounted.mkdir(parents=True)
    for name in ("locustfile.py", "verdict.py", "encounters.json"):
        (mounted / name).write_bytes((PROJECT_ROOT / "loadtest" / name).read_bytes())
    command = [sys.executable, "-m", "locust", "--headless", "--only-summary"]
    command += [f"--locustfile={mounted / 'locustfile.py'}", f"--host={api.url}"]
    command += [f"--encounters={mounted / 'encounters.json'}", SCENARIOS["single"]]
    codes = []
    for least in ("1", "100000"):
        variables = {"LOAD_SECONDS": "2", "LOAD_USERS": "2", "LOAD_LEAST_RPS": least}
        variables |= {"LOAD_MOST_P95_MS": "5000", "PYTHONPATH": str(mounted.parent)}
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        codes.append(done.returncode)
        assert ("PASS" if least == "1" else "FAIL: ") in done.stderr
    assert codes == [0, 1]
