"""What is watched in the cluster: rules, dashboards and mappings arrive where they are looked for,
Prometheus has every job and may reach it, and Airflow's counts get through.

The rules themselves are tested by promtool, the dashboards by the tests beside their code.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from settings import PROJECT_ROOT
from tests.manifests import policy
from tests.manifests.manifests import K8S, Object, container, find, pod, render
from tests.manifests.policy import Peer
from tests.manifests.test_compose import load_compose, mounts
from tests.manifests.test_manifests import OUTSIDE, OVERLAYS, STRANGER, peers

MONITORING = PROJECT_ROOT / "monitoring"
JOBS = {"prometheus", "alertmanager", "api", "mlflow", "postgres", "airflow", "pipeline"}
# Figures of the storage in production are its operator's business.
STORAGE = {"microk8s", "seaweedfs"}
# What etcd takes; an object a little above it is refused at `kubectl apply`.
LARGEST = 1_000_000


def files(objects: list[Object], kind: str, name: str) -> dict[str, str]:
    """What a workload's first container sees of ConfigMaps: text by path."""
    spec = pod(find(objects, kind, name))
    assert spec
    maps, found = policy.config_maps(objects), {}
    for mount in spec["containers"][0].get("volumeMounts", ()):
        (volume,) = [each for each in spec["volumes"] if each["name"] == mount["name"]] or [{}]
        if reference := volume.get("configMap"):
            data = maps.get(reference["name"], {})
            named = {item["key"]: item["path"] for item in reference.get("items", ())}
            paths = named or {key: key for key in data}
            found |= {f"{mount['mountPath']}/{path}": data[key] for key, path in paths.items()}
    return found


def flag(objects: list[Object], kind: str, name: str, wanted: str) -> str:
    """Value of a flag of a workload's first container; empty where it is not given."""
    spec = pod(find(objects, kind, name))
    assert spec
    words = dict(word.partition("=")[::2] for word in spec["containers"][0].get("args", ()))
    return words.get(wanted, "")


def prometheus(objects: list[Object]) -> Object:
    """Prometheus' configuration as it sees it, with the scrape configurations of all its files."""
    seen = files(objects, "StatefulSet", "prometheus")
    main = seen.get(flag(objects, "StatefulSet", "prometheus", "--config.file"))
    assert main, "Prometheus' configuration is not where it looks for it"
    found: Object = yaml.safe_load(main)
    jobs = list(found.get("scrape_configs") or ())
    for pattern in found.pop("scrape_config_files", ()):
        for path in sorted(path for path in seen if fnmatch(path, pattern)):
            jobs += yaml.safe_load(seen[path]).get("scrape_configs") or ()
    return {**found, "scrape_configs": jobs}


def lost(objects: list[Object]) -> list[str]:
    """Files of the repository that are not, word for word, where their reader looks for them."""
    rules = files(objects, "StatefulSet", "prometheus")
    patterns = prometheus(objects).get("rule_files", [])
    read = [text for path, text in rules.items() if any(fnmatch(path, p) for p in patterns)]
    grafana = files(objects, "Deployment", "grafana")
    providers = [
        provider
        for path, text in grafana.items()
        if Path(path).parent == Path("/etc/grafana/provisioning/dashboards")
        for provider in yaml.safe_load(text)["providers"]
    ]
    folders = {Path(provider["options"]["path"]) for provider in providers}
    shown = [text for path, text in grafana.items() if Path(path).parent in folders]
    alerting = files(objects, "StatefulSet", "alertmanager")
    counted = files(objects, "Deployment", "statsd-exporter")
    wanted: list[tuple[Path, list[str | None]]] = [
        *((file, read) for file in sorted((MONITORING / "prometheus" / "rules").glob("*.yaml"))),
        *((file, shown) for file in sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))),
        (
            MONITORING / "prometheus" / "alertmanager.yaml",
            [alerting.get(flag(objects, "StatefulSet", "alertmanager", "--config.file"))],
        ),
        (
            MONITORING / "prometheus" / "statsd-mappings.yaml",
            [
                counted.get(
                    flag(objects, "Deployment", "statsd-exporter", "--statsd.mapping-config")
                )
            ],
        ),
    ]
    return [
        f"{file.relative_to(PROJECT_ROOT)} does not arrive"
        for file, there in wanted
        if file.read_text() not in there
    ]


def targets(job: Object) -> Iterator[tuple[str, int]]:
    """Host and port of each target of a job."""
    for way in job.get("static_configs", ()):
        for target in way["targets"]:
            host, _, port = target.partition(":")
            yield host, int(port)
    for way in job.get("dns_sd_configs", ()):
        yield from ((name, way["port"]) for name in way["names"])


def behind(
    objects: list[Object], everybody: dict[str, Peer], service: str, port: int, protocol: str
) -> tuple[Peer, int] | None:
    """Who answers at a port of a Service, and at which port of the pod."""
    for thing in policy.of_kind(objects, "Service"):
        if thing["metadata"]["name"] != service:
            continue
        selector = {"matchLabels": thing["spec"]["selector"]}
        for entry in thing["spec"]["ports"]:
            if entry["port"] == port and entry.get("protocol", "TCP") == protocol:
                for peer in everybody.values():
                    if policy.selects(selector, peer.labels):
                        return peer, peer.ports[entry.get("targetPort", port)]
    return None


def unreached(objects: list[Object], jobs: set[str]) -> list[str]:
    """Jobs of the contract that Prometheus has not, and targets that it can't reach."""
    everybody, found = peers(objects), []
    configuration = prometheus(objects)
    by_name = {job["job_name"]: list(targets(job)) for job in configuration["scrape_configs"]}
    for way in configuration.get("alerting", {}).get("alertmanagers", ()):
        by_name.setdefault("(who is told)", []).extend(targets(way))
    for name in sorted({*jobs, "(who is told)"} - by_name.keys()):
        found.append(f"job {name} is missing")
    for name, asked in by_name.items():
        for host, port in asked:
            if (name, host) == ("prometheus", "localhost"):
                continue
            answering = behind(objects, everybody, host, port, "TCP")
            if answering is None:
                found.append(f"job {name}: nobody answers at {host}:{port}")
            elif not policy.allowed(objects, everybody["prometheus"], *answering):
                found.append(f"job {name}: no policy lets Prometheus ask {host}:{port}")
    return found


def values() -> Object:
    found: Object = yaml.safe_load((K8S / "airflow" / "values.yaml").read_text())
    return found


def uncounted(objects: list[Object], given: Object) -> list[str]:
    """Why the counts of Airflow's pods don't arrive."""
    everybody = peers(objects)
    variables = {item["name"]: item.get("value", "") for item in given["env"]}
    host = variables.get("AIRFLOW__METRICS__STATSD_HOST", "")
    port = int(variables.get("AIRFLOW__METRICS__STATSD_PORT", 0))
    found = [
        f"{name} is not {value}"
        for name, value in {
            "AIRFLOW__METRICS__STATSD_ON": "True",
            "AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED": "True",
            "AIRFLOW__METRICS__STATSD_PREFIX": "airflow",
        }.items()
        if variables.get(name) != value
    ]
    answering = behind(objects, everybody, host, port, "UDP")
    if answering is None:
        return [*found, f"nobody listens at {host}:{port}/UDP"]
    listens = flag(objects, "Deployment", "statsd-exporter", "--statsd.listen-udp")
    if listens != f":{answering[1]}":
        found.append(f"the exporter listens at {listens}, not :{answering[1]}")
    for name, peer in everybody.items():
        reaches = policy.allowed(objects, peer, *answering, protocol="UDP")
        if reaches != (peer.labels.get("tier") == "airflow"):
            found.append(f"{name} {'may' if reaches else 'may not'} send to {host}")
    for peer in (OUTSIDE, STRANGER):
        if policy.allowed(objects, peer, *answering, protocol="UDP"):
            found.append(f"{peer.name} may send to {host}")
    return found


def wanted(overlay: str) -> set[str]:
    return JOBS | ({"storage"} if overlay in STORAGE else set())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_arrives_where_it_is_looked_for(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    assert lost(objects) == []
    assert list((MONITORING / "prometheus" / "rules").glob("*.yaml"))
    assert len(list((MONITORING / "grafana" / "dashboards").glob("*.json"))) >= 4
    large = {
        thing["metadata"]["name"]: size
        for thing in policy.of_kind(objects, "ConfigMap")
        if (size := len(yaml.safe_dump(thing).encode())) > LARGEST
    }
    assert large == {}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_has_every_job_and_reaches_it(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    assert unreached(objects, wanted(overlay)) == []
    names = [job["job_name"] for job in prometheus(objects)["scrape_configs"]]
    assert sorted(names) == sorted(wanted(overlay))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_airflow_alone_counts(overlay: str) -> None:
    assert uncounted(render(f"overlays/{overlay}"), values()) == []


def test_scrapes_are_often_enough_for_alerts_within_two_minutes() -> None:
    configuration = prometheus(render("overlays/microk8s"))["global"]
    assert configuration["scrape_interval"] == "15s"
    assert configuration["evaluation_interval"] == "15s"


def test_exporters_read_and_nothing_more() -> None:
    objects = render("overlays/microk8s")
    maps = policy.config_maps(objects)

    def login(name: str, user: str) -> tuple[str, str]:
        spec = pod(find(objects, "Deployment", name))
        assert spec
        known = policy.variables(container(spec, name), maps)
        return known[user], str(known)

    user, known = login("postgres-exporter", "DATA_SOURCE_USER")
    assert user == "monitoring"
    assert "superuser" not in known
    user, known = login("pipeline-exporter", "DIABETES_DB_USER")
    assert user == "reader"
    assert "<postgres-credentials/" not in known
    assert "<airflow-credentials/" not in known


def mounted(service: Object) -> dict[str, str]:
    """What a service of compose.yaml sees of the repository: text by path."""
    found = {}
    for source, target, _ in mounts(service):
        if source.startswith("./"):
            path = PROJECT_ROOT / source
            inside = path.glob("*") if path.is_dir() else [path]
            found |= {
                f"{target}/{file.name}" if path.is_dir() else target: file.read_text()
                for file in inside
                if file.is_file()
            }
    return found


def differing(compose: Object) -> list[str]:
    """Files that a pod of the base sees and a service of compose.yaml does not, or otherwise."""
    objects = render("base")
    return [
        f"{name}: {path}"
        for kind, name in READERS
        for path, text in files(objects, kind, name).items()
        if mounted(compose["services"][name]).get(path) != text
    ]


READERS = [
    ("StatefulSet", "prometheus"),
    ("StatefulSet", "alertmanager"),
    ("Deployment", "grafana"),
    ("Deployment", "statsd-exporter"),
]


def test_compose_shows_the_same_files() -> None:
    assert differing(load_compose()) == []


@pytest.mark.parametrize(
    ("service", "path"),
    [
        ("prometheus", "/etc/prometheus/rules/alerts.yaml"),
        ("grafana", "/var/lib/grafana-dashboards/service.json"),
        ("statsd-exporter", "/etc/statsd-exporter/statsd-mappings.yaml"),
        ("alertmanager", "/etc/alertmanager/configuration/alertmanager.yaml"),
    ],
)
def test_a_file_that_compose_does_not_show_is_missed(service: str, path: str) -> None:
    compose = load_compose()
    volumes = compose["services"][service]["volumes"]
    volumes[:] = [volume for volume in volumes if not str(volume).startswith("./monitoring")]
    assert f"{service}: {path}" in differing(compose)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_reads_its_configuration(overlay: str, tmp_path: Path) -> None:
    objects = render(f"overlays/{overlay}")
    # Merged, for Debian's knows no scrape_config_files yet.
    configuration = prometheus(objects)
    seen = files(objects, "StatefulSet", "prometheus")
    rules = [path for path in seen if any(fnmatch(path, p) for p in configuration["rule_files"])]
    assert rules
    for path in rules:
        (tmp_path / Path(path).name).write_text(seen[path])
    configuration["rule_files"] = [str(tmp_path / Path(path).name) for path in rules]
    for job in configuration["scrape_configs"]:
        if login := job.get("basic_auth"):
            login["password_file"] = str(tmp_path / "password")
    (tmp_path / "password").write_text("unused")
    main = tmp_path / "prometheus.yaml"

    def check() -> subprocess.CompletedProcess[str]:
        main.write_text(yaml.safe_dump(configuration))
        command = ["promtool", "check", "config", main]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
    configuration["alerting"] = {"alertmanager": []}
    assert check().returncode != 0


# --- each check can fail ---------------------------------------------------------------------


def _drop_policy(objects: list[Object], name: str) -> None:
    objects.remove(find(objects, "NetworkPolicy", name))


def _spec(objects: list[Object], kind: str, name: str) -> Any:
    return pod(find(objects, kind, name))


def _unmount(objects: list[Object], kind: str, name: str, path: str) -> None:
    mounts = _spec(objects, kind, name)["containers"][0]["volumeMounts"]
    (mount,) = [each for each in mounts if each["mountPath"] == path]
    mounts.remove(mount)


def _move(objects: list[Object], kind: str, name: str, path: str) -> None:
    for mount in _spec(objects, kind, name)["containers"][0]["volumeMounts"]:
        if mount["mountPath"] == path:
            mount["mountPath"] = "/elsewhere"


def _forget(objects: list[Object], name: str, key: str) -> None:
    del find(objects, "ConfigMap", name)["data"][key]


def _change(objects: list[Object], name: str, key: str, old: str, new: str) -> None:
    data = find(objects, "ConfigMap", name)["data"]
    assert old in data[key]
    data[key] = data[key].replace(old, new)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda o: _unmount(o, "StatefulSet", "prometheus", "/etc/prometheus/rules"),
            "rules/alerts.yaml",
        ),
        (
            lambda o: _move(o, "StatefulSet", "prometheus", "/etc/prometheus/rules"),
            "rules/recording.yaml",
        ),
        (lambda o: _forget(o, "prometheus-rules", "alerts.yaml"), "rules/alerts.yaml"),
        (
            lambda o: _change(o, "prometheus-rules", "alerts.yaml", "ApiDown", "ApiUp"),
            "rules/alerts.yaml",
        ),
        (lambda o: _forget(o, "grafana-dashboards", "model.json"), "dashboards/model.json"),
        (
            lambda o: _move(o, "Deployment", "grafana", "/var/lib/grafana-dashboards"),
            "dashboards/service.json",
        ),
        (
            lambda o: _unmount(o, "Deployment", "grafana", "/etc/grafana/provisioning/dashboards"),
            "dashboards/pipeline.json",
        ),
        (lambda o: _forget(o, "alertmanager", "alertmanager.yaml"), "alertmanager.yaml"),
        (lambda o: _forget(o, "statsd-mappings", "statsd-mappings.yaml"), "statsd-mappings.yaml"),
    ],
)
def test_a_file_that_does_not_arrive_is_missed(
    break_it: Callable[[list[Object]], None], said: str
) -> None:
    objects = render("overlays/microk8s")
    break_it(objects)
    assert any(f"{said} does not arrive" in problem for problem in lost(objects))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda o: _change(
                o,
                "prometheus",
                "scrape-services.yaml",
                "pipeline",
                "other",
            ),
            "job pipeline is missing",
        ),
        (
            lambda o: _change(o, "prometheus", "scrape-services.yaml", ":9187", ":9188"),
            "job postgres: nobody answers at postgres-exporter:9188",
        ),
        (lambda o: _change(o, "prometheus", "prometheus.yaml", ":9093", ":1"), "(who is told)"),
        (
            lambda o: _change(o, "prometheus", "prometheus.yaml", "alerting:", "storage:"),
            "job (who is told) is missing",
        ),
        (lambda o: _forget(o, "prometheus", "scrape-storage.yaml"), "job storage is missing"),
        (lambda o: _drop_policy(o, "to-exporters"), "lets Prometheus ask pipeline-exporter"),
        (lambda o: _drop_policy(o, "exporters"), "lets Prometheus ask statsd-exporter"),
        (lambda o: _drop_policy(o, "alertmanager"), "lets Prometheus ask alertmanager"),
        (lambda o: _drop_policy(o, "to-alertmanager"), "lets Prometheus ask alertmanager"),
    ],
)
def test_a_job_that_is_not_reached_is_missed(
    break_it: Callable[[list[Object]], None], said: str
) -> None:
    objects = render("overlays/microk8s")
    break_it(objects)
    assert any(said in problem for problem in unreached(objects, wanted("microk8s")))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AIRFLOW__METRICS__STATSD_ON", "False", "STATSD_ON is not True"),
        ("AIRFLOW__METRICS__STATSD_PREFIX", "flow", "STATSD_PREFIX is not airflow"),
        ("AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED", "False", "INFLUXDB_ENABLED is not True"),
        ("AIRFLOW__METRICS__STATSD_HOST", "statsd", "nobody listens at statsd:9125"),
        ("AIRFLOW__METRICS__STATSD_PORT", "8125", "nobody listens at statsd-exporter:8125"),
    ],
)
def test_values_that_send_nowhere_are_seen(name: str, value: str, said: str) -> None:
    given = values()
    for item in given["env"]:
        if item["name"] == name:
            item["value"] = value
    assert any(said in problem for problem in uncounted(render("overlays/microk8s"), given))


def _as_tcp(objects: list[Object]) -> None:
    for port in find(objects, "Service", "statsd-exporter")["spec"]["ports"]:
        port["protocol"] = "TCP"


def _for_everybody(objects: list[Object]) -> None:
    (rule,) = find(objects, "NetworkPolicy", "statsd")["spec"]["ingress"]
    del rule["from"]


def _elsewhere(objects: list[Object]) -> None:
    arguments = _spec(objects, "Deployment", "statsd-exporter")["containers"][0]["args"]
    arguments[:] = [word.replace(":9125", ":8125") for word in arguments]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda o: _drop_policy(o, "statsd"), "airflow-worker may not send"),
        (lambda o: _drop_policy(o, "to-statsd-from-airflow"), "airflow-scheduler may not send"),
        (_as_tcp, "nobody listens"),
        (_for_everybody, "somebody outside may send"),
        (_elsewhere, "the exporter listens at :8125"),
    ],
)
def test_counts_that_do_not_arrive_are_missed(
    break_it: Callable[[list[Object]], None], said: str
) -> None:
    objects = copy.deepcopy(render("overlays/microk8s"))
    break_it(objects)
    assert any(said in problem for problem in uncounted(objects, values()))
