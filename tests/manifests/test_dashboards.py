"""The dashboards: what Grafana would stumble over, what a reader would, and whether they answer."""

from __future__ import annotations

import copy
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from monitoring.grafana.dashboards import BOARDS, COLUMNS, FOLDER, build
from services import processes
from services.observability import PROMETHEUS, Prometheus, find_tool
from settings import PROJECT_ROOT
from tests.metrics import API, METRICS, PIPELINE, recorded, used
from tests.panels import boards, jobs, queries

Boards = dict[str, dict[str, Any]]

RULES = FOLDER.parents[1] / "prometheus" / "rules"
MOST_PANELS = 15


def alerts() -> dict[str, str]:
    """Expressions of the alerts by name."""
    loaded = yaml.safe_load((RULES / "alerts.yaml").read_text())
    return {
        rule["alert"]: " ".join(rule["expr"].split())
        for group in loaded["groups"]
        for rule in group["rules"]
    }


def problems(found: Boards) -> Iterator[str]:
    """What is wrong with dashboards, one sentence each."""
    uids = [board["uid"] for board in found.values()]
    if len(set(uids)) < len(uids):
        yield "a uid twice"
    known = alerts().keys()
    names = recorded()
    for name, board in found.items():
        panels = board["panels"]
        if not board.get("title") or not board.get("description"):
            yield f"{name}: no title or description"
        numbers = [panel["id"] for panel in panels]
        if len(set(numbers)) < len(numbers):
            yield f"{name}: a panel id twice"
        titles = [panel.get("title") for panel in panels]
        if len(set(titles)) < len(titles):
            yield f"{name}: a title twice"
        for panel in panels:
            yield from (f"{name}: {said}" for said in _panel(panel))
            # Alerts that a description speaks of.
            said = re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", panel.get("description", ""))
            yield from (f"{name}: no alert {alert}" for alert in said if alert not in known)
            for target in panel["targets"]:
                missing = set(re.findall(r"\b\w+:\w+:\w+\b", target["expr"])) - names
                yield from (f"{name}: nobody records {record}" for record in missing)
        for one, other in combinations(panels, 2):
            if _overlap(one["gridPos"], other["gridPos"]):
                yield f"{name}: {one['title']} overlaps {other['title']}"
        if len(panels) > MOST_PANELS:
            yield f"{name}: more than {MOST_PANELS} panels"
        if not any(link["type"] == "dashboards" for link in board["links"]):
            yield f"{name}: no links to the others"


def _panel(panel: dict[str, Any]) -> Iterator[str]:
    title = panel.get("title")
    at = panel["gridPos"]
    if not title:
        yield "a panel without a title"
    if not panel.get("description"):
        yield f"{title}: no description"
    if not panel["fieldConfig"]["defaults"].get("unit"):
        yield f"{title}: no unit"
    if at["x"] < 0 or at["x"] + at["w"] > COLUMNS:
        yield f"{title}: outside the page"
    for asked in (panel, *panel["targets"]):
        if asked["datasource"] != {"type": "prometheus", "uid": "prometheus"}:
            yield f"{title}: another data source"
    if not panel["targets"]:
        yield f"{title}: no query"
    for target in panel["targets"]:
        if not target.get("legendFormat"):
            yield f"{title}: no legend"
        if "$" in target["expr"]:
            yield f"{title}: a variable, which only Grafana knows"
        if unknown := used(target["expr"]) - METRICS:
            yield f"{title}: unknown metrics {', '.join(sorted(unknown))}"


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    apart = (
        one["x"] + one["w"] <= other["x"]
        or other["x"] + other["w"] <= one["x"]
        or one["y"] + one["h"] <= other["y"]
        or other["y"] + other["h"] <= one["y"]
    )
    return not apart


def test_dashboards_are_sound() -> None:
    assert set(boards()) == {"service", "model", "pipeline", "infrastructure"}
    assert list(problems(boards())) == []


def _same_uid(found: Boards) -> None:
    found["model"]["uid"] = found["service"]["uid"]


def _same_id(found: Boards) -> None:
    found["model"]["panels"][1]["id"] = found["model"]["panels"][0]["id"]


def _same_title(found: Boards) -> None:
    found["model"]["panels"][1]["title"] = found["model"]["panels"][0]["title"]


def _moved_left(found: Boards) -> None:
    found["model"]["panels"][1]["gridPos"]["x"] -= 1


def _moved_up(found: Boards) -> None:
    found["model"]["panels"][-1]["gridPos"]["y"] -= 1


def _too_wide(found: Boards) -> None:
    found["model"]["panels"][-1]["gridPos"]["w"] += 1


def _mistyped(found: Boards) -> None:
    found["model"]["panels"][0]["targets"][0]["expr"] = "sum(modle_info)"


def _not_recorded(found: Boards) -> None:
    found["service"]["panels"][1]["targets"][0]["expr"] = "sum(job:http_requests:rate1m)"


def _variable(found: Boards) -> None:
    expression = "rate(process_cpu_seconds_total[$__rate_interval])"
    found["service"]["panels"][1]["targets"][0]["expr"] = expression


def _no_title(found: Boards) -> None:
    found["model"]["panels"][0]["title"] = ""


def _no_unit(found: Boards) -> None:
    del found["model"]["panels"][0]["fieldConfig"]["defaults"]["unit"]


def _no_legend(found: Boards) -> None:
    del found["model"]["panels"][0]["targets"][0]["legendFormat"]


def _no_query(found: Boards) -> None:
    found["model"]["panels"][0]["targets"] = []


def _no_description(found: Boards) -> None:
    found["model"]["panels"][0]["description"] = ""


def _unknown_alert(found: Boards) -> None:
    found["model"]["panels"][0]["description"] = "Red: ModelTired."


def _other_source(found: Boards) -> None:
    found["model"]["panels"][0]["targets"][0]["datasource"]["uid"] = "mine"


def _crowded(found: Boards) -> None:
    found["model"]["panels"] *= 2


def _no_links(found: Boards) -> None:
    found["model"]["links"] = []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_same_uid, "a uid twice"),
        (_same_id, "a panel id twice"),
        (_same_title, "a title twice"),
        (_moved_left, "overlaps"),
        (_moved_up, "overlaps"),
        (_too_wide, "outside the page"),
        (_mistyped, "unknown metrics modle_info"),
        (_not_recorded, "nobody records job:http_requests:rate1m"),
        (_variable, "a variable"),
        (_no_title, "a panel without a title"),
        (_no_unit, "no unit"),
        (_no_legend, "no legend"),
        (_no_query, "no query"),
        (_no_description, "no description"),
        (_unknown_alert, "no alert ModelTired"),
        (_other_source, "another data source"),
        (_crowded, "more than 15 panels"),
        (_no_links, "no links to the others"),
    ],
)
def test_a_broken_dashboard_is_named(damage: Callable[[Boards], None], said: str) -> None:
    found = copy.deepcopy(boards())
    damage(found)
    assert any(said in problem for problem in problems(found))


def test_committed_dashboards_are_what_the_code_makes() -> None:
    assert BOARDS.keys() == boards().keys()
    for name, board in BOARDS.items():
        committed = (FOLDER / f"{name}.json").read_text()
        assert build(board) == committed, "run python -m monitoring.grafana.dashboards"


def test_the_command_writes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("monitoring.grafana.dashboards.FOLDER", tmp_path / "made")
    from monitoring.grafana.dashboards import main

    assert main() == 0
    for file in FOLDER.glob("*.json"):
        assert (tmp_path / "made" / file.name).read_bytes() == file.read_bytes()


def test_what_the_platform_runs_needs_no_builders() -> None:
    code = "import sys, monitoring.__main__; sys.exit('grafana_foundation_sdk' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_figures_stand_on_top_and_fill_the_row() -> None:
    for board in boards().values():
        top = [panel for panel in board["panels"] if panel["gridPos"]["y"] == 0]
        assert {panel["type"] for panel in top} == {"stat"}
        assert sum(panel["gridPos"]["w"] for panel in top) == COLUMNS


def test_figures_and_bars_show_what_is_so_now() -> None:
    # Over a range they would show the last value of a series that ended, of a dead server's say.
    for board in boards().values():
        for panel in board["panels"]:
            now = panel["type"] in {"stat", "bargauge"}
            for target in panel["targets"]:
                assert bool(target.get("instant")) is now
                assert bool(target.get("range")) is not now


def test_metrics_and_jobs_of_a_query_are_found() -> None:
    expression = 'sum by (job) (rate(a_total{b="c_d"}[5m])) / on (x) group_left () e_f or vector(0)'
    assert used(expression) == {"a_total", "e_f"}
    assert jobs("min(pg_up or pipeline_database_up)") == {"postgres", "pipeline"}
    assert jobs('max(up{job=~"mlflow|api"})') == {"mlflow", "api"}
    assert jobs("max(job:http_errors:ratio_rate5m)") == {"api"}
    assert jobs("sum(up == bool 0)") == frozenset()


def test_least_numbers_of_rows_are_those_of_the_alerts() -> None:
    asked = {(query.board, query.panel): query.expression for query in queries()}
    for panel, alert in (
        ("Features drifted", "DriftDetected"),
        ("Drift of the score", "ScoreDrift"),
        ("Calibration error", "CalibrationOff"),
    ):
        (least,) = re.findall(r"and on \(window\) (\w+ >= \d+)", alerts()[alert])
        assert f"and on (window) {least}" in asked["model", panel]


def strangers(metrics: frozenset[str], sources: str) -> list[str]:
    """Metrics that no source names."""
    stems = {name: re.sub(r"_(bucket|count|sum)$", "", name) for name in metrics}
    return sorted(name for name, stem in stems.items() if f'"{stem}"' not in sources)


def test_metrics_that_are_ours_are_in_our_sources() -> None:
    api = "".join(path.read_text() for path in (PROJECT_ROOT / "serving").glob("*.py"))
    exporter = "".join(
        path.read_text() for path in (PROJECT_ROOT / "monitoring").glob("exporter*.py")
    )
    assert strangers(API, api) == []
    assert strangers(PIPELINE, exporter) == []
    assert strangers(frozenset({"drift_psy"}), exporter) == ["drift_psy"]


def test_panels_that_the_runbooks_name_are_there() -> None:
    names = {
        text.lower()
        for board in boards().values()
        for text in (board["title"], *(panel["title"] for panel in board["panels"]))
    }
    page = (PROJECT_ROOT / "docs" / "runbooks.md").read_text()
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]*)\*(?!\*)", page)) - {"Status, Targets"}
    assert len(named) > 5
    assert [text for text in named if not any(text.lower() in name for name in names)] == []


@pytest.mark.parametrize(
    ("board", "panel", "alert", "limit"),
    [
        ("service", "Replicas up", "ApiDown", "== 0"),
        ("service", "Errors", "AvailabilityBurnFast", "> 14.4 * 0.005"),
        ("service", "Slow predictions", "LatencyBurnFast", "> 14.4 * 0.01"),
        ("service", "Spool", "PredictionLogSpoolNearlyFull", "> 0.8"),
        ("service", "Files put aside", "PredictionLogBroken", "> 0"),
        ("model", "Age of the champion", "ModelStale", "> 90 * 86400"),
        ("model", "Calibration error", "CalibrationOff", "> 0.03"),
        ("model", "Last drift check", "DriftCheckStale", "> 2 * 86400"),
        ("model", "Rows in the windows", "DriftDetected", ">= 1000"),
        ("pipeline", "Age of clean_data", "DataStale", "> 35 * 86400"),
        ("pipeline", "Rejected", "RejectsHigh", "> 0.005"),
        ("pipeline", "dbt nodes failed", "DbtFailing", "> 0"),
        ("pipeline", "DAGs failed", "DagFailing", "== 0"),
        ("infrastructure", "Disk free", "DiskNearlyFull", "< 0.1"),
        ("infrastructure", "Targets down", "TargetMissing", "== 0"),
    ],
)
def test_what_turns_red_is_what_the_alert_tells(
    board: str, panel: str, alert: str, limit: str
) -> None:
    assert limit in alerts()[alert]
    (shown,) = [found for found in boards()[board]["panels"] if found["title"] == panel]
    steps = shown["fieldConfig"]["defaults"]["thresholds"]["steps"]
    reds = [place for place, step in enumerate(steps) if step["color"] == "red"]
    assert len(reds) == 1
    # Red from its value on, or, where low is bad, from below up to the next one.
    edge = steps[reds[0]]["value"] if reds[0] else steps[1]["value"]
    operator, _, number = limit.partition(" ")
    if operator == "==" or limit == "> 0":  # of things that are counted
        assert edge == 1
    else:
        assert edge == pytest.approx(math.prod(map(float, number.split(" * "))))
    assert (operator == "<" or panel in {"Replicas up", "Rows in the windows"}) is (not reds[0])


# --- A real Prometheus ----------------------------------------------------------------------------

SERVED = {
    "api": """
http_requests_total{route="/v1/predict",method="POST",status="200"} 100n
http_requests_total{route="/v1/predict",method="POST",status="500"} 1n
http_requests_total{route="/v1/explain",method="POST",status="200"} 10n
http_requests_total{route="none",method="POST",status="503"} 2n
http_requests_in_flight 3
http_requests_shed_total 2n
http_request_duration_seconds_bucket{route="/v1/predict",le="0.1"} 90n
http_request_duration_seconds_bucket{route="/v1/predict",le="0.25"} 95n
http_request_duration_seconds_bucket{route="/v1/predict",le="+Inf"} 100n
http_request_duration_seconds_count{route="/v1/predict"} 100n
http_request_duration_seconds_bucket{route="/v1/explain",le="0.25"} 5n
http_request_duration_seconds_bucket{route="/v1/explain",le="+Inf"} 10n
http_request_duration_seconds_count{route="/v1/explain"} 10n
prediction_probability_bucket{model_version="3",le="0.1"} 60n
prediction_probability_bucket{model_version="3",le="+Inf"} 100n
prediction_probability_sum{model_version="3"} 12n
prediction_probability_count{model_version="3"} 100n
prediction_rows_total{source="single",result="scored"} 100n
prediction_log_rows_total 100n
prediction_log_spooled_rows_total 100n
prediction_log_broken_files 0
prediction_log_spool_bytes 1000
prediction_log_spool_limit_bytes 100000
prediction_log_disk_free_bytes 40
prediction_log_disk_size_bytes 100
model_info{alias="champion",model_version="3",feature_sha256="abc"} 1
model_loads_total{alias="champion",result="swapped"} 1
model_trained_timestamp_seconds{alias="stable"} 1700000000
""",
    "mlflow": 'mlflow_http_request_duration_seconds_count{method="GET",status="200"} 3n',
    "postgres": """
pg_up 1
pg_database_size_bytes{datname="diabetes"} 1000000
pg_stat_database_numbackends{datname="diabetes",datid="5"} 3
pg_stat_database_xact_commit{datname="diabetes",datid="5"} 7n
pg_stat_database_blks_hit{datname="diabetes",datid="5"} 99n
pg_stat_database_blks_read{datname="diabetes",datid="5"} 1n
""",
    "airflow": """
airflow_scheduler_heartbeat_total 1n
airflow_triggerer_heartbeat_total 1n
airflow_dag_processor_heartbeat_total 1n
airflow_executor_running_tasks{executor_class_name="LocalExecutor"} 1
airflow_executor_queued_tasks{executor_class_name="LocalExecutor"} 0
airflow_executor_open_slots{executor_class_name="LocalExecutor"} 15
""",
    "pipeline": """
pipeline_database_up 1
pipeline_split_rows{split="train"} 70000
pipeline_load_rows{result="inserted"} 900
pipeline_load_rows{result="rejected"} 100
pipeline_last_load_timestamp_seconds 1700000000
pipeline_published_timestamp_seconds 1700000000
pipeline_clipped_rows{feature="time_in_hospital",bound="upper"} 12
dbt_results{resource_type="model",status="success"} 15
dbt_build_duration_seconds{selection="data"} 9
airflow_api_up 1
dag_run_duration_seconds{dag_id="one"} 50
dag_run_success{dag_id="one"} 1
dag_run_success{dag_id="two"} 0
dag_runs{dag_id="one",state="success"} 3
drift_limit{window="load"} 0.2
drift_limit{window="predictions"} 0.05
drift_psi{window="load",feature="age",model_version="3"} 0.3
drift_psi{window="load",feature="race",model_version="3"} 0.1
drift_psi{window="predictions",feature="age",model_version="3"} 0.9
drift_score_psi{window="load",model_version="3"} 0.1
drift_missing_share{window="load",feature="race"} 0.05
drift_missing_share{window="predictions",feature="race"} 0.01
drift_missing_share_reference{feature="race"} 0.02
drift_new_category_share{window="load",feature="race"} 0.01
drift_window_rows{window="load"} 1000
drift_window_rows{window="predictions"} 999
drift_labelled_rows{window="load"} 5000
drift_calibration_error{window="load"} 0.01
drift_checked_timestamp_seconds{window="load"} 1700000000
disk_free_bytes{volume="state"} 30
disk_size_bytes{volume="state"} 100
""",
}
"""What the services would say; n grows from scrape to scrape."""

EXPECTED = {
    ("service", "Replicas up"): [1],
    ("service", "Spool"): [0.01],
    ("service", "Files put aside"): [0],
    ("model", "Features drifted"): [1],  # not the one in the window of too few rows
    ("model", "Drift of the score"): [0.5],
    ("model", "Calibration error"): [0.01],
    ("pipeline", "Encounters"): [70000],
    ("pipeline", "Rejected"): [0.1],
    ("pipeline", "dbt nodes failed"): [0],
    ("pipeline", "DAGs failed"): [1],
    ("infrastructure", "Services"): [1, 1, 1, 1],
    ("infrastructure", "Targets down"): [0],
    ("infrastructure", "Disk free"): [0.3],
}


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on the PATH")
def test_a_scheduler_that_was_never_heard_is_down_where_airflow_runs(tmp_path: Path) -> None:
    (shown,) = [
        query.expression
        for query in queries()
        if query.panel == "Services" and "airflow" in query.jobs
    ]
    answers = 'airflow_api_up{job="pipeline"}'
    counted = 'up{job="airflow"}'
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": "1x30"} for name in there],
            "promql_expr_test": [{"expr": shown, "eval_time": "20m", "exp_samples": expected}],
        }
        for there, expected in (
            ([answers, counted], [{"labels": "{}", "value": 0}]),
            ([answers], [{"labels": "{}", "value": 1}]),
            ([counted], []),
        )
    ]
    file = tmp_path / "panel.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@contextmanager
def served(text: str) -> Iterator[str]:
    """A target that says these metrics; gives its host and port."""
    scrapes = iter(range(1, 100_000))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = next(scrapes)
            said = re.sub(r" (\d+)n$", lambda m: f" {int(m[1]) * number}", text, flags=re.M)
            said += f"\nprocess_resident_memory_bytes 5\nprocess_cpu_seconds_total {number}\n"
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(said.lstrip().encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(url: str, expression: str) -> list[float]:
    """Values that Prometheus has for an expression now."""
    found = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10)
    assert found.ok, f"{expression}: {found.text}"
    return [float(one["value"][1]) for one in found.json()["data"]["result"]]


@pytest.mark.skipif(not find_tool(PROMETHEUS, ""), reason="no prometheus on the PATH")
def test_every_query_is_understood_and_answered_by_prometheus(tmp_path: Path) -> None:
    server = Prometheus(tmp_path, find_tool(PROMETHEUS, "") or Path())
    often: dict[str, Any] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    try:
        with ExitStack() as stack:
            server.start({}, preferred_port=56840, **often)
            server.wait_until_ready()
            for query in queries():
                ask(server.url, query.expression)
            with pytest.raises(AssertionError, match="parse error"):
                ask(server.url, "sum(up")
            targets = {job: stack.enter_context(served(text)) for job, text in SERVED.items()}
            server.start(targets, preferred_port=56840, **often)
            open_questions = list(queries())
            deadline = time.monotonic() + 30
            while open_questions and time.monotonic() < deadline:
                time.sleep(0.5)
                open_questions = [
                    query for query in open_questions if not ask(server.url, query.expression)
                ]
            assert open_questions == []
            for (board, panel), values in EXPECTED.items():
                found = [
                    value
                    for query in queries()
                    if (query.board, query.panel) == (board, panel)
                    for value in ask(server.url, query.expression)
                ]
                assert found == pytest.approx(values), panel
    finally:
        processes.stop(tmp_path)
