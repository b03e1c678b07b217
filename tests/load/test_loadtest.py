"""Load tests against a real prediction API: their verdict, shedding, recovery, the log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest

from bench.load import request
from loadtest import data
from loadtest.probe import probing, recovery
from loadtest.run import SCENARIOS, Load, LoadTestError, Objective, run
from loadtest.verdict import SHED
from services.web import API
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
    assert re.search(r"^PASS over \d+ s$", done.stdout, re.MULTILINE)
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
    assert re.search(r"^FAIL over \d+ s: ", done.stdout, re.MULTILINE)
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


def test_what_a_load_test_left_in_the_log_can_be_deleted(
    registered: Registered, api: Api, tmp_path: Path
) -> None:
    real = api.post("/v1/predict", json={**data.encounters(1)[0], "patient_nbr": 7}).json()
    answered = tmp_path / "answered"
    runs = [
        run(Load(api.url, scenario, "steady", 2, 1, "", [f"--answered={answered}"]), ANY, tmp_path)
        for scenario in ("single", "batch")
    ]
    ids = set(answered.read_text().split())
    assert len(ids) > 50
    kept = {real["prediction_id"]}
    wait_until(lambda: logged(registered, ids | kept) == ids | kept, 20)
    # One of either run knows them all.
    registered.database.rows(runs[1]["forget"])
    assert logged(registered, ids | kept) == kept


def test_a_soak_looks_at_the_memory_of_the_api_of_make_run(
    registered: Registered, api: Api, tmp_path: Path
) -> None:
    arguments = ("--shape=soak", "--seconds=3", "--users=2", *EASY)
    here = {"DIABETES_STATE_DIR": str(tmp_path)}
    with running_api(tmp_path / "api", registered, DIABETES_SERVICE=f"{API.name}@{tmp_path}"):
        assert "MiB (PSS) after the first minute" in loadtest(*arguments, **here).stdout
        elsewhere = loadtest(*arguments, DIABETES_API_URL=api.url, **here)
    assert (elsewhere.returncode, elsewhere.stderr) == (0, "")
    assert "memory     was not looked at" in elsewhere.stdout


Answering = Callable[[BaseHTTPRequestHandler, int], None]

PREDICTION = b'{"prediction_id":"1","probability":0.5,"excluded":null}'


@contextmanager
def stub(answering: Answering) -> Iterator[str]:
    """A service that is ready, and answers POST as the test wants; the URL."""
    numbers = count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            send(self, 200, b'{"model_version":"1"}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answering(self, next(numbers))

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Who asked has gone."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    length = {} if "Transfer_Encoding" in headers else {"Content_Length": str(len(body))}
    handler.send_response(status)
    for name, value in {**length, **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
    # What says another length than it has, or none, ends with the connection.
    handler.close_connection = not length or "Content_Length" in headers


@pytest.mark.parametrize("shape", ["steady", "spike"])
def test_a_rate_is_kept_and_no_request_lost_where_users_end(shape: str, tmp_path: Path) -> None:
    """Locust ends users who wait for their turn; that is no failure of the service."""
    with stub(lambda handler, _: send(handler, 200, PREDICTION)) as url:
        found = run(Load(url, shape=shape, users=32, seconds=4, rate=160), ANY, tmp_path)
    assert (found["failures"], found["errors"]) == (0, {})
    assert found["requests_per_second"] < 165
    assert found["requests"] > (300 if shape == "steady" else 100)


def test_a_service_that_hangs_fails(tmp_path: Path) -> None:
    begun: list[float] = []
    ended = threading.Event()

    def answering(handler: BaseHTTPRequestHandler, _: int) -> None:
        begun.append(time.monotonic())
        if begun[-1] - begun[0] > 2:
            ended.wait(30)
        send(handler, 200, PREDICTION)

    with stub(answering) as url:
        load = Load(url, users=2, seconds=4, more=["--stop-timeout=2"])
        found = run(load, Objective(0.1, 1e9, 0), tmp_path)
        ended.set()
    assert found["seconds"] >= 6
    assert found["requests_per_second"] == pytest.approx((found["requests"] - 2) / found["seconds"])
    assert found["errors"] == {"not answered, or not understood": 2}
    assert found["missed"] == ["2 failures, wanted 0 or fewer"]


BUSY = b'{"detail":"128 requests are being served; try again in a second"}'
BROKEN: tuple[tuple[str, int, bytes, dict[str, str]], ...] = (
    ("broke off", 200, PREDICTION[:-3], {"Content_Length": "999"}),
    ("broke off", 200, b"40\r\n" + PREDICTION, {"Transfer_Encoding": "chunked"}),
    ("200 without what was asked for", 200, b"", {}),
    ("200 without what was asked for", 200, b'{"probability":null,"excluded":null}', {}),
    ("in a user: ", 200, b'{"probability":0.1', {}),
    ("status 503", 503, b'{"detail":"the spool is full"}', {"Retry_After": "1"}),
    ("status 503", 503, BUSY, {"Retry_After": "30"}),
    ("status 503", 503, BUSY, {}),
    ("status 500", 500, BUSY, {"Retry_After": "1"}),
)


def test_only_a_whole_answer_is_one(tmp_path: Path) -> None:
    """And only shedding is shed, also where that is well; each in turn, and no good one but it."""

    def answering(handler: BaseHTTPRequestHandler, number: int) -> None:
        place = number % (len(BROKEN) + 1)
        if place == len(BROKEN):
            send(handler, 503, BUSY, Retry_After="1")
            return
        _, status, body, headers = BROKEN[place]
        send(handler, status, body, **headers)

    with stub(answering) as url:
        load = Load(url, users=1, seconds=2, more=["--accept-shedding"])
        found = run(load, Objective(0, float("inf"), 0), tmp_path)
    shed = found["by_name"][SHED]["requests"]
    assert shed == found["requests"] - found["failures"] == found["requests"] // (len(BROKEN) + 1)
    assert shed > 0
    for said in {said for said, *_ in BROKEN}:
        assert any(said in error for error in found["errors"]), said
    assert found["missed"] == [f"{found['failures']} failures, wanted 0 or fewer"]


@pytest.mark.parametrize("scenario", ["explain", "batch", "page"])
def test_an_answer_is_what_was_asked_for(scenario: str, tmp_path: Path) -> None:
    """A bare prediction has no reasons, is no whole batch, and no CSV."""
    with stub(lambda handler, _: send(handler, 200, PREDICTION)) as url:
        found = run(Load(url, scenario, users=1, seconds=1), Objective(0, 1e9, 0), tmp_path)
    assert found["requests"] == found["failures"] > 0


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
        # Every refusal is heard, also of what is under way when users are told to stop.
        assert api.metric("http_requests_shed_total") == shed + refused
        assert {look.status for look in looks} <= {200, 503}
        assert recovery(looks, found["ended"], 6, 1000) <= 5
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
        assert ("PASS over " if least == "1" else "FAIL over ") in done.stderr
        assert "delete from inference.predictions" in done.stderr
    assert codes == [0, 1]
