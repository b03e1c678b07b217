"""Rules, their tests, whom alerts go to, and what is kept of Airflow's metrics."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from services import processes
from services.observability import (
    ALERTMANAGER,
    STATSD_EXPORTER,
    Alertmanager,
    configuration,
    find_tool,
)
from settings import PROJECT_ROOT, settings
from tests.metrics import METRICS, airflow_metrics, recorded, used
from training.__main__ import _parser

FOLDER = PROJECT_ROOT / "monitoring" / "prometheus"
RUNBOOKS = PROJECT_ROOT / "docs" / "runbooks.md"
TESTS = sorted(path.name for path in (FOLDER / "tests").glob("*.yaml"))
# Killed in a test with real servers, where each has to be told of within two minutes.
AT_ONCE = {"ApiDown", "PostgresDown", "MlflowDown"}

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on the PATH")
needs_amtool = pytest.mark.skipif(not shutil.which("amtool"), reason="no amtool on the PATH")

Rule = dict[str, Any]


def rules(folder: Path = FOLDER) -> list[Rule]:
    """All rules of a folder, recording and alerting."""
    return [
        rule
        for file in sorted((folder / "rules").glob("*.yaml"))
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
    ]


def alerts(folder: Path = FOLDER) -> dict[str, Rule]:
    return {rule["alert"]: rule for rule in rules(folder) if "alert" in rule}


def cases(folder: Path = FOLDER) -> Iterator[tuple[str, bool]]:
    """(alert, whether it fires) of each case in the tests of promtool."""
    for file in (folder / "tests").glob("*.yaml"):
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test.get("alert_rule_test", ()):
                yield case["alertname"], bool(case["exp_alerts"])


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in found}


def faults(folder: Path = FOLDER, runbooks: str | None = None) -> Iterator[str]:
    """What is wrong with the rules of a folder, one sentence each."""
    there = alerts(folder)
    tested = set(cases(folder))
    sections = anchors(RUNBOOKS.read_text() if runbooks is None else runbooks)
    names = recorded(folder)
    for rule in rules(folder):
        name = rule.get("alert") or rule["record"]
        if unknown := used(rule["expr"]) - METRICS:
            yield f"{name}: unknown metrics {', '.join(sorted(unknown))}"
        if missing := set(re.findall(r"\b\w+:\w+:\w+\b", rule["expr"])) - names:
            yield f"{name}: nobody records {', '.join(sorted(missing))}"
        if "record" in rule and not re.fullmatch(r"[a-z_]+:[a-z_]+:[a-z0-9_]+", name):
            yield f"{name}: not level:metric:operation"
    for name, rule in there.items():
        if rule["labels"] not in ({"severity": "page"}, {"severity": "ticket"}):
            yield f"{name}: severity is neither page nor ticket"
        said = rule["annotations"]
        if set(said) != {"summary", "description", "runbook_url"}:
            yield f"{name}: annotations are not summary, description and runbook_url"
            continue
        if "$value" not in said["description"]:
            yield f"{name}: the description does not tell the value"
        page, _, anchor = said["runbook_url"].partition("#")
        if page != "docs/runbooks.md" or anchor != name.lower() or anchor not in sections:
            yield f"{name}: no section {said['runbook_url']}"
        yield from (
            f"{name}: no test in which it {what}"
            for fires, what in ((True, "fires"), (False, "stays silent"))
            if (name, fires) not in tested
        )
        if name in AT_ONCE and rule.get("for") != "30s":
            yield f"{name}: waits longer than 30 s"


def test_rules_are_sound() -> None:
    assert list(faults()) == []
    names = [rule.get("alert") or rule["record"] for rule in rules()]
    assert len(names) == len(set(names))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for name in ("rules", "tests"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    return tmp_path


def change(folder: Path, alert: str, old: str, new: str) -> None:
    """Change one rule's text in alerts.yaml, or recording.yaml where it is there."""
    for file in (folder / "rules").glob("*.yaml"):
        text = file.read_text()
        match = re.search(rf"^ +- (alert|record): {re.escape(alert)}$", text, re.MULTILINE)
        if match is None:
            continue
        following = re.search(r"^ +- (alert|record|name): ", text[match.end() :], re.MULTILINE)
        end = match.end() + following.start() if following else len(text)
        rule = text[match.start() : end]
        assert old in rule, f"{alert} holds no {old!r}"
        file.write_text(text[: match.start()] + rule.replace(old, new, 1) + text[end:])
        return
    raise AssertionError(f"no rule {alert}")


@pytest.mark.parametrize(
    ("alert", "old", "new", "said"),
    [
        ("ModelStale", "ModelStale", "ModelOld", "ModelOld: no test in which it fires"),
        ("ModelStale", "model_trained_timestamp", "model_trained_time", "unknown metrics"),
        ("LatencyBurnFast", "ratio_rate5m", "ratio_rate2m", "nobody records"),
        ("job:http_errors:rate5m", "job:http_errors:rate5m", "http_errors_5m", "not level"),
        ("ModelStale", "ticket", "warning", "neither page nor ticket"),
        ("ModelStale", "severity: ticket", "severity: ticket, team: a", "neither page nor ticket"),
        ("ModelStale", "runbook_url", "runbook", "annotations are not"),
        ("ModelStale", "{{ $value | humanizeDuration }}", "long", "does not tell the value"),
        ("ModelStale", "#modelstale", "#modelrefused", "no section"),
        ("ModelStale", "docs/runbooks.md", "runbooks.md", "no section"),
        ("ApiDown", "for: 30s", "for: 5m", "waits longer"),
    ],
)
def test_a_broken_rule_is_named(copied: Path, alert: str, old: str, new: str, said: str) -> None:
    change(copied, alert, old, new)
    assert any(said in fault for fault in faults(copied))


def test_an_alert_without_its_runbook_or_tests_is_named(copied: Path) -> None:
    page = RUNBOOKS.read_text().replace("## DataStale", "## Old data")
    assert list(faults(copied, page)) == ["DataStale: no section docs/runbooks.md#datastale"]
    file = copied / "tests" / "pipeline.yaml"
    loaded = yaml.safe_load(file.read_text())
    loaded["tests"] = [test for test in loaded["tests"] if "DataStale" not in test["name"]]
    file.write_text(yaml.safe_dump(loaded))
    assert list(faults(copied)) == [
        "DataStale: no test in which it fires",
        "DataStale: no test in which it stays silent",
    ]


def test_commands_and_links_of_the_runbooks_are_real() -> None:
    page = RUNBOOKS.read_text()
    commands = re.findall(r"python -m training ([^`#\n]+)", page)
    assert {command.split()[0] for command in commands} == {"rollback", "promote"}
    parser = _parser(settings())
    for command in commands:
        parser.parse_args(shlex.split(command))  # ends the test where it is refused
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page)
    assert "load/results.md" in links
    assert [link for link in links if not (RUNBOOKS.parent / link).exists()] == []


def promtool(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@needs_promtool
def test_prometheus_accepts_rules_and_configuration(tmp_path: Path) -> None:
    file = tmp_path / "prometheus.yaml"
    made = configuration({"api": "127.0.0.1:1"}, alertmanager="127.0.0.1:2")
    file.write_text(yaml.safe_dump(made))
    code, said = promtool("check", "config", file)
    assert code == 0, said
    assert said.count("rules found") == 2
    assert promtool("check", "rules", *(FOLDER / "rules").glob("*.yaml"))[0] == 0
    broken = tmp_path / "broken.yaml"
    broken.write_text((FOLDER / "rules" / "alerts.yaml").read_text().replace("min(pg_up)", "min("))
    assert promtool("check", "rules", broken)[0] != 0


@needs_promtool
@pytest.mark.parametrize("name", TESTS)
def test_alerts_fire_and_stay_silent_as_told(name: str) -> None:
    code, said = promtool("test", "rules", FOLDER / "tests" / name)
    assert code == 0, said


def only(folder: Path, name: str) -> Path:
    """The tests that ask for one alert or recorded name, and no other alert, to be quick."""
    kept: list[Rule] = []
    shared: Rule = {}
    for file in sorted((folder / "tests").glob("*.yaml")):
        loaded = yaml.safe_load(file.read_text())
        for test in loaded.pop("tests"):
            cases = [case for case in test.get("alert_rule_test", ()) if case["alertname"] == name]
            exprs = [case for case in test.get("promql_expr_test", ()) if name in case["expr"]]
            if cases or exprs:
                kept.append({**test, "alert_rule_test": cases, "promql_expr_test": exprs})
                shared = loaded
    rule = alerts(folder).get(name)
    groups = [{"name": "only", "rules": [rule] if rule else []}]
    (folder / "rules" / "alerts.yaml").write_text(yaml.safe_dump({"groups": groups}))
    made = folder / "tests" / "only.yaml"
    made.write_text(yaml.safe_dump({**shared, "tests": kept}))
    return made


# --- Alertmanager ---------------------------------------------------------------------------------


@needs_amtool
def test_alertmanager_accepts_the_example(tmp_path: Path) -> None:
    example = FOLDER / "alertmanager.yaml"
    assert subprocess.run(["amtool", "check-config", example], capture_output=True).returncode == 0
    broken = tmp_path / "broken.yaml"
    broken.write_text(example.read_text().replace("receiver: on-call", "receiver: nobody"))
    assert subprocess.run(["amtool", "check-config", broken], capture_output=True).returncode != 0


@needs_amtool
def test_every_alert_goes_to_its_receiver() -> None:
    def receivers(*labels: str) -> str:
        file = f"--config.file={FOLDER / 'alertmanager.yaml'}"
        command = ["amtool", "config", "routes", "test", file, *labels]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for name, rule in alerts().items():
        severity = rule["labels"]["severity"]
        found = receivers(f"alertname={name}", f"severity={severity}")
        assert found == {"page": "on-call", "ticket": "tickets"}[severity]
    assert receivers("alertname=Unheard") == "tickets"


@needs_amtool
def test_the_template_in_the_docs_makes_a_link_of_the_runbook(tmp_path: Path) -> None:
    page = (PROJECT_ROOT / "docs" / "monitoring.md").read_text()
    ((template, address),) = re.findall(r"```text\n(.*?(https://\S+?)\{\{.*?)```", page, re.DOTALL)
    fired = {"annotations": alerts()["ApiDown"]["annotations"]}
    data, none = tmp_path / "data.json", tmp_path / "none.tmpl"
    data.write_text(json.dumps({"alerts": [fired]}))
    none.touch()
    command = ["amtool", "template", "render", f"--template.glob={none}"]
    command += [f"--template.data={data}", f"--template.text={template}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{address}docs/runbooks.md#apidown" in told


def test_pages_are_told_at_once_and_only_known_alerts_are_inhibited() -> None:
    loaded = yaml.safe_load((FOLDER / "alertmanager.yaml").read_text())
    (page,) = loaded["route"]["routes"]
    assert (page["receiver"], page["group_wait"]) == ("on-call", "5s")
    known = alerts()
    for rule in loaded["inhibit_rules"]:
        patterns = [
            re.sub(r'^alertname\s*=~?\s*"(.*)"$', r"\1", matcher.strip())
            for key in ("source_matchers", "target_matchers")
            for matcher in rule[key]
            if matcher.startswith("alertname")
        ]
        for pattern in patterns:
            named = re.sub(
                r"\(Availability\|Latency\)Burn\(Fast\|Slow\)",
                "AvailabilityBurnFast|AvailabilityBurnSlow|LatencyBurnFast|LatencyBurnSlow",
                pattern,
            )
            assert set(named.split("|")) <= known.keys()


@pytest.mark.skipif(not find_tool(ALERTMANAGER, ""), reason="no alertmanager on the PATH")
def test_what_follows_from_a_dead_service_is_not_told(tmp_path: Path) -> None:
    fired = {
        "ApiDown": {"job": "api"},
        "AvailabilityBurnFast": {"job": "api"},
        "NoChampion": {"job": "api"},
        "MlflowDown": {"job": "mlflow"},
        "DiskNearlyFull": {"job": "pipeline", "instance": "a:1", "volume": "state"},
        "PredictionLogSpoolNearlyFull": {"job": "api", "instance": "a:1"},
    }
    growing = [{"job": "api", "instance": f"{name}:1"} for name in "ab"]
    refused = [{"alias": "champion", "result": result} for result in ("refused", "failed")]
    sent = [
        *fired.items(),
        *(("PredictionLogSpoolGrowing", labels) for labels in growing),
        *(("ModelRefused", labels) for labels in refused),
    ]
    server = Alertmanager(tmp_path, find_tool(ALERTMANAGER, "") or Path())
    try:
        server.start(FOLDER / "alertmanager.yaml", preferred_port=56870)
        server.wait_until_ready()
        made = [{"labels": {"alertname": name, **labels}} for name, labels in sent]
        requests.post(f"{server.url}/api/v2/alerts", json=made, timeout=10).raise_for_status()

        def told() -> set[tuple[str, ...]]:
            found = requests.get(f"{server.url}/api/v2/alerts", timeout=10).json()
            assert len(found) == len(sent)
            return {
                (alert["labels"]["alertname"], *sorted(alert["labels"].values()))[:1]
                + tuple(v for k, v in alert["labels"].items() if k in ("instance", "result"))
                for alert in found
                if not alert["status"]["inhibitedBy"]
            }

        expected = {
            ("ApiDown",),
            ("MlflowDown",),
            ("DiskNearlyFull", "a:1"),
            ("PredictionLogSpoolNearlyFull", "a:1"),
            ("PredictionLogSpoolGrowing", "b:1"),
            ("ModelRefused", "refused"),
        }
        wait_until(lambda: told() == expected)

        def dead_database(evidence: str) -> None:
            labels = {"alertname": "PostgresDown", "evidence": evidence}
            made = [{"labels": labels}]
            requests.post(f"{server.url}/api/v2/alerts", json=made, timeout=10).raise_for_status()
            sent.append(("PostgresDown", {}))

        # That no exporter answers is no evidence against the others.
        dead_database("silence")
        expected |= {("PostgresDown",)}
        wait_until(lambda: told() == expected)
        dead_database("exporter")
        expected -= {("MlflowDown",), ("PredictionLogSpoolGrowing", "b:1")}
        expected -= {("ModelRefused", "refused")}
        wait_until(lambda: told() == expected)
    finally:
        processes.stop(tmp_path)


def wait_until(true: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


# --- Airflow's metrics ----------------------------------------------------------------------------


def mappings() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((FOLDER / "statsd-mappings.yaml").read_text())[
        "mappings"
    ]
    return found


def test_mappings_are_of_metrics_that_airflow_has_and_drop_the_rest() -> None:
    *kept, last = mappings()
    assert (last["match"], last["match_type"], last["action"]) == (".", "regex", "drop")
    spec = find_spec("airflow")
    assert spec
    assert spec.origin
    template = Path(spec.origin).parent / "_shared" / "observability" / "metrics"
    known = {
        f"airflow.{metric['name']}": metric["type"]
        for metric in yaml.safe_load((template / "metrics_template.yaml").read_text())["metrics"]
    }
    names = [mapping["name"] for mapping in kept]
    assert len(names) == len(set(names))
    for mapping in kept:
        kind = known[mapping["match"]]
        name = mapping["name"]
        assert name.startswith("airflow_")
        assert name.endswith("_total") == (kind == "counter"), name
        assert kind != "timer" or name.endswith("_seconds"), name
        # What grows with hosts, files and runs; and tasks, but for those that failed.
        assert {"hostname", "file_path", "run_id", "job_id"} <= mapping["labels"].keys()
        assert not any(mapping["labels"].values())
    assert {metric for metric in METRICS if metric.startswith("airflow_")} - {
        "airflow_api_up"
    } <= airflow_metrics()


@pytest.mark.skipif(not find_tool(STATSD_EXPORTER, ""), reason="no statsd_exporter on the PATH")
def test_what_airflow_sends_becomes_few_series(tmp_path: Path) -> None:
    udp, http = processes.free_port(56880), processes.free_port(56890)
    program = find_tool(STATSD_EXPORTER, "")
    command = [
        str(program),
        f"--statsd.mapping-config={FOLDER / 'statsd-mappings.yaml'}",
        f"--statsd.listen-udp=127.0.0.1:{udp}",
        "--statsd.listen-tcp=",
        f"--web.listen-address=127.0.0.1:{http}",
    ]
    sent = [
        "airflow.scheduler_heartbeat:1|c",
        *(f"airflow.task.duration,dag_id=d,task_id=g.t{n}:1500|ms" for n in range(20)),
        *(f"airflow.dag.d.g__t{n}.duration:1500|ms" for n in range(20)),
        *(f"airflow.ti.finish,dag_id=d,task_id=t{n},state=success:1|c" for n in range(20)),
        *(f"airflow.ti.finish.d.t{n}.success:1|c" for n in range(20)),
        *(f"airflow.triggers.running,hostname=host{n}:{n}|g" for n in range(20)),
        "airflow.ti_failures,dag_id=d,task_id=g.t1,run_id=manual:1|c",
        "airflow.pool.open_slots,pool_name=default_pool:128|g",
        "airflow.LocalTaskJob_start:1|c",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        url = f"http://127.0.0.1:{http}/metrics"

        def answers() -> bool:
            try:
                return requests.get(url, timeout=5).ok
            except requests.ConnectionError:
                return False

        wait_until(answers)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to:
            for line in sent:
                to.sendto(line.encode(), ("127.0.0.1", udp))

        def series() -> dict[str, float]:
            lines = requests.get(url, timeout=5).text.splitlines()
            found = [line.rpartition(" ") for line in lines if line.startswith("airflow_")]
            return {
                re.sub(r'\w+="",?', "", key).replace(",}", "}").replace("{}", ""): float(value)
                for key, _, value in found
                if "_bucket{" not in key
            }

        wait_until(lambda: 'airflow_pool_open_slots{pool_name="default_pool"}' in series())
        assert series() == {
            "airflow_scheduler_heartbeat_total": 1,
            'airflow_task_duration_seconds_sum{dag_id="d"}': 30,
            'airflow_task_duration_seconds_count{dag_id="d"}': 20,
            'airflow_tasks_finished_total{dag_id="d",state="success"}': 20,
            "airflow_triggers_running": 19,
            'airflow_task_failures_total{dag_id="d",task_id="g.t1"}': 1,
            'airflow_pool_open_slots{pool_name="default_pool"}': 128,
        }
    finally:
        process.terminate()
        process.wait(10)
