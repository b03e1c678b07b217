"""compose.yaml: hardened, in the right order, with the manifests' images and settings; and the
credentials that it makes.

tests/cluster/test_docker_lane.py runs it where there is a Docker engine.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from settings import PROJECT_ROOT, Settings
from tests.manifests import manifests, policy

COMPOSE = PROJECT_ROOT / "compose.yaml"
SCRIPT = PROJECT_ROOT / "infra" / "compose" / "credentials.py"
Object = dict[str, Any]
PORTS = {
    "mlflow": 5000,
    "minio": 9001,
    "airflow-api-server": 8080,
    "api": 8000,
    "ui": 8501,
    "prometheus": 9090,
    "alertmanager": 9093,
    "grafana": 3000,
}


def load_compose() -> Object:
    found: Object = yaml.safe_load(COMPOSE.read_text())
    return found


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("credentials", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CREDENTIALS = load_script()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the services get, by `<service>/<file>`."""
    password = CREDENTIALS.load(tmp_path_factory.mktemp("store") / "passwords.json")
    found: dict[str, str] = CREDENTIALS.files(password)
    return found


def runs_on(service: Object) -> bool:
    """Whether it keeps running; others do their work and end."""
    return service.get("restart") == "unless-stopped"


def mounts(service: Object) -> list[tuple[str, str, bool]]:
    """Source, target and whether it is read-only, of each volume."""
    found = []
    for volume in service.get("volumes", []):
        if isinstance(volume, dict):
            found.append((volume["source"], volume["target"], volume.get("read_only", False)))
        else:
            source, target, *options = volume.split(":")
            found.append((source, target, options == ["ro"]))
    return found


def command(service: Object) -> list[str]:
    """The whole command line."""
    return [*service.get("entrypoint", []), *service.get("command", [])]


def problems(compose: Object) -> list[str]:
    """What is wrong with a compose file of ours."""
    services: dict[str, Object] = compose["services"]
    found = []
    adopted = {
        name
        for service in services.values()
        if runs_on(service) or service.get("depends_on")
        for name, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    for name, service in services.items():
        fills_volumes = name == "secrets"  # which belong to several users
        wanted = {
            "read_only": service.get("read_only") is True,
            "cap_drop: [ALL]": service.get("cap_drop") == ["ALL"],
            "no-new-privileges": "no-new-privileges:true" in service.get("security_opt", []),
            "mem_limit": bool(service.get("mem_limit")),
            "tmpfs for /tmp": "/tmp" in service.get("tmpfs", []),  # noqa: S108
            "a pinned tag": ":" in service["image"] and not service["image"].endswith(":latest"),
            "a healthcheck": not runs_on(service) or "test" in service.get("healthcheck", {}),
            # `docker compose up --wait` fails on one that ends, unless somebody waits for its end.
            "a service that waits for its end": runs_on(service) or name in adopted,
            "cap_add": service.get("cap_add", []) == (["CHOWN"] if fills_volumes else []),
            "a user that is not root": fills_volumes
            or not re.match("0|root", str(service.get("user", "of the image"))),
        }
        found += [f"{name}: {what}" for what, kept in wanted.items() if not kept]
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                found.append(f"{name}: port {port} is open to others")
        for source, target, read_only in mounts(service):
            if source.startswith("secrets-") and name != "secrets" and not read_only:
                found.append(f"{name}: {target} is not read-only")
            if not source.startswith(".") and source not in compose["volumes"]:
                found.append(f"{name}: volume {source} is not declared")
            if source.startswith(".") and not (PROJECT_ROOT / source).exists():
                found.append(f"{name}: {source} is not there")
        for other, how in service.get("depends_on", {}).items():
            if other not in services:
                found.append(f"{name} waits for {other}, which is not there")
            elif how["condition"] == "service_healthy" and "healthcheck" not in services[other]:
                found.append(f"{name} waits for the health of {other}, which has none")
            elif (how["condition"] == "service_completed_successfully") == runs_on(services[other]):
                found.append(f"{name} waits for {other} in the wrong way")
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|_KEY(?!_FILE)", key) and not re.search(
                r"/run/secrets/|^/tmp/", str(value)
            ):
                found.append(f"{name}: {key} is a literal")
        for file in re.findall(r"/run/secrets/\S+", " ".join(map(str, [
            *command(service), *service.get("environment", {}).values()
        ]))):  # fmt: skip
            folder, _, _ = file.rstrip(";").rpartition("/")
            if folder not in [target for _, target, _ in mounts(service)]:
                found.append(f"{name}: {file} is not mounted")
    return found


def test_compose_keeps_the_rules() -> None:
    assert problems(load_compose()) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("api.read_only", False, "api: read_only"),
        ("api.cap_drop", [], "api: cap_drop"),
        ("ui.security_opt", [], "ui: no-new-privileges"),
        ("ui.mem_limit", None, "ui: mem_limit"),
        ("ui.tmpfs", [], "ui: tmpfs"),
        ("postgres.image", "postgres", "postgres: a pinned tag"),
        ("postgres.image", "postgres:latest", "postgres: a pinned tag"),
        ("postgres.user", "0:0", "postgres: a user that is not root"),
        ("postgres.cap_add", ["CHOWN"], "postgres: cap_add"),
        ("secrets.cap_add", ["SYS_ADMIN"], "secrets: cap_add"),
        ("grafana.healthcheck", {}, "grafana: a healthcheck"),
        ("minio.ports", ["9001:9001"], "open to others"),
        ("api.volumes", ["secrets-api:/run/secrets/api"], "is not read-only"),
        ("api.volumes", ["else:/state"], "is not declared"),
        ("api.volumes", [], "is not mounted"),
        ("prometheus.volumes", ["./infra/none:/etc/prometheus:ro"], "is not there"),
        ("ui.depends_on", {"none": {"condition": "service_healthy"}}, "which is not there"),
        ("ui.depends_on", {"secrets": {"condition": "service_healthy"}}, "which has none"),
        (
            "ui.depends_on",
            {"api": {"condition": "service_completed_successfully"}},
            "in the wrong way",
        ),
        ("mlflow.depends_on", {}, "mlflow-migrate: a service that waits for its end"),
        ("minio.environment", {"MINIO_ROOT_PASSWORD": "minio123"}, "is a literal"),
    ],
)
def test_each_rule_can_fail(path: str, value: object, said: str) -> None:
    broken = copy.deepcopy(load_compose())
    service, field = path.split(".")
    broken["services"][service][field] = value
    assert any(said in problem for problem in problems(broken))


def test_docker_compose_reads_it() -> None:
    # Its client alone does that; no engine is asked.
    version = subprocess.run(
        ["docker", "compose", "version"], capture_output=True, text=True, check=False
    )
    if version.returncode:
        pytest.skip("docker's compose plugin is not installed")
    done = subprocess.run(
        ["docker", "compose", "--file", COMPOSE, "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_ports_are_the_documented_ones() -> None:
    services = load_compose()["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {name: [f"127.0.0.1:{port}:{port}"] for name, port in PORTS.items()}


# --- agreement with the manifests ------------------------------------------------------------

SERVICES = {
    "postgres": ("StatefulSet", "postgres"),
    "minio": ("StatefulSet", "minio"),
    "init-storage": ("Job", "init-storage"),
    "mlflow-migrate": ("Job", "mlflow-migrate"),
    "mlflow": ("Deployment", "mlflow"),
    "mlflow-users": ("Job", "mlflow-users"),
    "api": ("StatefulSet", "api"),
    "ui": ("Deployment", "ui"),
    "prometheus": ("StatefulSet", "prometheus"),
    "alertmanager": ("StatefulSet", "alertmanager"),
    "postgres-exporter": ("Deployment", "postgres-exporter"),
    "pipeline-exporter": ("Deployment", "pipeline-exporter"),
    "statsd-exporter": ("Deployment", "statsd-exporter"),
    "grafana": ("Deployment", "grafana"),
}
# These need nobody's password.
WITHOUT_CREDENTIALS = {"alertmanager", "statsd-exporter"}
# Set by the image itself, or in another way in a cluster.
ELSEWHERE = {
    "HOME",
    "DIABETES_API_HOST",
    "DIABETES_STATE_DIR",
    "DIABETES_UI_HOST",
    "MINIO_ROOT_USER",
    "MINIO_ROOT_PASSWORD",
    "MLFLOW_CLUSTER_HOSTS",
    "MLFLOW_ENTRY_HOSTS",
    "MLFLOW_ENTRY_ORIGINS",
    "MLFLOW_TRACKING_URI",
    "POD_IP",
    "POSTGRES_EXPORTER_SSLMODE",
    "POSTGRES_HOST",
    "POSTGRES_PORT",
}


def differences(compose: Object, made: dict[str, str]) -> list[str]:
    """In what compose.yaml and the rendered manifests differ, where they should not."""
    objects = manifests.render("base")
    found = []
    for name, (kind, item) in SERVICES.items():
        service = compose["services"][name]
        pod = manifests.pod(manifests.find(objects, kind, item))
        assert pod
        container = manifests.container(pod, item)
        if service["image"] != container["image"]:
            found.append(f"{name}: image {service['image']}, not {container['image']}")
        user = pod["securityContext"]["runAsUser"]
        if str(service.get("user", "10001:10001")).split(":")[0] != str(user):
            found.append(f"{name}: user {service.get('user')}, not {user}")
        limit = container["resources"]["limits"]["memory"]
        if mebibytes(service["mem_limit"]) != mebibytes(limit):
            found.append(f"{name}: memory {service['mem_limit']}, not {limit}")
        ours = [str(word) for word in service.get("command", [])]
        theirs = [*container.get("command", []), *container.get("args", [])]
        missing = [
            word
            for word in theirs
            if "$(" not in word and not any(word == own or word in own for own in ours)
        ]
        if missing and ours != ["python", "-m", "serving"] and ours != ["python", "-m", "ui"]:
            found.append(f"{name}: arguments {missing} are missing")
        wanted = plain(container, objects)
        own = variables(name, service, made)
        for key, value in wanted.items():
            if key in ELSEWHERE:
                continue
            if key not in own:
                found.append(f"{name}: {key} is not set")
            elif value is not None and str(own[key]) != value:
                found.append(f"{name}: {key} is {own[key]}, not {value}")
    return found


def mebibytes(size: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([mgMG])i?", size).groups()  # type: ignore[union-attr]
    return int(number) * {"m": 1, "g": 1024}[unit.lower()]


def plain(container: Object, objects: list[Object]) -> dict[str, str | None]:
    """The container's variables; None for the values that a Secret holds."""

    def of_map(name: str) -> dict[str, str]:
        (found,) = (o["data"] for o in objects if o["metadata"]["name"] == name)
        return dict(found)

    found: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        found |= of_map(source["configMapRef"]["name"])
    for item in container.get("env", []):
        if "value" in item:
            known = {name: value for name, value in found.items() if value is not None}
            found[item["name"]] = policy.filled(item["value"], known)
        elif reference := item["valueFrom"].get("configMapKeyRef"):
            found[item["name"]] = of_map(reference["name"])[reference["key"]]
        else:
            found[item["name"]] = None
    return found


def variables(name: str, service: Object, made: dict[str, str]) -> dict[str, str]:
    """What a service of compose.yaml sees: its environment and its file of credentials."""
    folder = next((s for s, _, _ in mounts(service) if s.startswith("secrets-")), "")
    lines = made.get(f"{folder.removeprefix('secrets-')}/env", "").splitlines()
    return {**service.get("environment", {}), **dict(line.split("=", 1) for line in lines)}


def test_compose_agrees_with_the_manifests(made: dict[str, str]) -> None:
    assert differences(load_compose(), made) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("postgres.image", "postgres:18.3-bookworm", "postgres: image"),
        ("minio.user", "1001:1001", "minio: user"),
        ("grafana.mem_limit", "1g", "grafana: memory"),
        ("prometheus.command", ["--config.file=/else"], "prometheus: arguments"),
        ("mlflow-users.environment", {}, "MLFLOW_TRACKING_USERNAME is not set"),
        ("api.environment", {"DIABETES_DB_USER": "postgres"}, "DIABETES_DB_USER is postgres"),
    ],
)
def test_each_difference_is_seen(path: str, value: object, said: str, made: dict[str, str]) -> None:
    broken = copy.deepcopy(load_compose())
    service, field = path.split(".")
    broken["services"][service][field] = value
    assert any(said in difference for difference in differences(broken, made))


def test_prometheus_finds_its_targets() -> None:
    services = load_compose()["services"]
    names = set(services)
    for service in services.values():
        names |= set(service.get("networks", {}).get("default", {}).get("aliases", []))
    folder = PROJECT_ROOT / "infra" / "k8s" / "base" / "prometheus"
    asked = set()
    for file in folder.glob("*.yaml"):
        for job in yaml.safe_load(file.read_text()).get("scrape_configs", []):
            for way in job.get("dns_sd_configs", []):
                asked |= set(way["names"])
            for way in job.get("static_configs", []):
                asked |= {target.split(":")[0] for target in way["targets"]}
            if login := job.get("basic_auth"):
                mounted = {target for _, target, _ in mounts(services["prometheus"])}
                assert str(Path(login["password_file"]).parent) in mounted
    assert asked >= {"api-pods", "mlflow-pods", "minio", "statsd-exporter"}
    assert asked - {"localhost"} <= names


# --- how services start ----------------------------------------------------------------------


def shell(service: str, folder: Path, environment: dict[str, str]) -> str:
    """What a service's entrypoint hands over to its command."""
    words = [
        str(word).replace("$$", "$").replace(f"/run/secrets/{service}", str(folder))
        for word in load_compose()["services"][service]["entrypoint"]
    ]
    code = "print(json.dumps([sys.argv[1:], dict(os.environ), os.getpid()]))"
    show = [sys.executable, "-c", f"import json, os, sys; {code}"]
    started = subprocess.Popen(
        [*words, *show, "argument"],
        env={"PATH": os.environ["PATH"]} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    said, _ = started.communicate(timeout=30)
    assert started.returncode == 0
    # The process itself, so that signals arrive.
    assert json.loads(said)[2] == started.pid
    return said


@pytest.mark.parametrize(
    "service", ["api", "ui", "mlflow", "mlflow-users", "init-storage", "pipeline-exporter"]
)
def test_entrypoint_hands_the_credentials_to_the_command(
    service: str, made: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "env").write_text(made[f"{service}/env"])
    arguments, seen, _ = json.loads(shell(service, tmp_path, {"ALLOWED_HOSTS": "mlflow:5000"}))
    expected = dict(line.split("=", 1) for line in made[f"{service}/env"].splitlines())
    assert expected
    assert expected.items() <= seen.items()
    assert arguments[0] == "argument"
    if service == "mlflow":
        assert re.fullmatch(r"--allowed-hosts=mlflow:5000,[\d.]+:5000", arguments[1])


@pytest.mark.parametrize("anchor", ["x-component-health", "x-url-health"])
def test_healthchecks_are_python_that_fails_where_nobody_answers(anchor: str) -> None:
    code = load_compose()[anchor].replace("airflow-api-server:8080", "127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", code, "http://127.0.0.1:9/"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "URLError" in done.stderr


# --- credentials -----------------------------------------------------------------------------


def write(folder: Path, *arguments: str) -> int:
    """Run the script as compose.yaml does, on folders as it mounts them."""
    services = load_compose()["services"]["secrets"]
    for _, target, _ in mounts(services):
        if target.startswith("/services/"):
            (folder / target.removeprefix("/")).mkdir(parents=True, exist_ok=True)
    (folder / "storage").mkdir(exist_ok=True)
    code: int = CREDENTIALS.main(
        [
            *arguments,
            f"--store={folder}/passwords.json",
            f"--folder={folder}/services",
            f"--storage-data={folder}/storage",
        ]
    )
    return code


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Who was made the owner of the storage's data, instead of making him that."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, user, group: seen.append((user, group)))
    return seen


def test_credentials_are_made_once_and_never_printed(
    tmp_path: Path, owner: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(tmp_path) == 0
    first = contents(tmp_path)
    assert write(tmp_path) == 0
    assert contents(tmp_path) == first
    assert capsys.readouterr() == ("", "")
    user, _, _ = load_compose()["services"]["minio"]["user"].partition(":")
    assert owner == [(int(user), int(user))] * 2
    assert stat.S_IMODE((tmp_path / "passwords.json").stat().st_mode) == 0o600


def test_lost_files_come_back_with_the_same_passwords(
    tmp_path: Path, owner: list[tuple[int, int]]
) -> None:
    write(tmp_path)
    first = contents(tmp_path)
    (tmp_path / "services" / "api" / "env").unlink()
    store = json.loads((tmp_path / "passwords.json").read_text())
    # As an older version would have left it.
    del store["grafana-admin"]
    (tmp_path / "passwords.json").write_text(json.dumps(store))
    write(tmp_path)
    second = contents(tmp_path)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"passwords.json", "services/grafana/admin-password"}


def test_show_prints_the_logins_of_people(
    tmp_path: Path, owner: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(tmp_path, "show") == 1
    assert "docker compose up --wait" in capsys.readouterr().err
    write(tmp_path)
    assert write(tmp_path, "show") == 0
    said = capsys.readouterr().out
    store = json.loads((tmp_path / "passwords.json").read_text())
    shown = {name for name, password in store.items() if password in said}
    assert shown == {
        "airflow-admin",
        "api-operator-key",
        "grafana-admin",
        "mlflow-admin",
        "storage",
    }
    for port in PORTS.values():
        assert port in (9090, 9093) or f"http://localhost:{port}" in said


def test_broken_store_and_unwritable_folder_give_one_message(
    tmp_path: Path, owner: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "passwords.json").write_text("{")
    assert write(tmp_path) == 1
    said = capsys.readouterr().err
    assert "is broken" in said
    assert said.count("\n") == 1
    (tmp_path / "passwords.json").unlink()
    (tmp_path / "services").rename(tmp_path / "else")
    assert CREDENTIALS.main([f"--store={tmp_path}/passwords.json", f"--folder={tmp_path}/x"]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_each_service_gets_its_own_credentials_only(made: dict[str, str]) -> None:
    services = load_compose()["services"]
    written = {target.removeprefix("/services/"): source
               for source, target, _ in mounts(services["secrets"])
               if target.startswith("/services/")}  # fmt: skip
    assert {name.split("/")[0] for name in made} == set(written)
    assert all(source == f"secrets-{name}" for name, source in written.items())
    for name, service in services.items():
        if name == "secrets":
            continue
        own = [source for source, _, _ in mounts(service) if source.startswith("secrets-")]
        if name in WITHOUT_CREDENTIALS:
            assert not own
            continue
        assert len(own) == 1
        assert name.startswith(own[0].removeprefix("secrets-"))
        assert "credentials" not in [source for source, _, _ in mounts(service)]


def test_passwords_fit_each_other(tmp_path: Path) -> None:
    password = CREDENTIALS.load(tmp_path / "passwords.json")
    assert len(set(password.values())) == len(CREDENTIALS.PASSWORDS)
    for name, value in password.items():
        assert name == "airflow-fernet" or re.fullmatch("[A-Za-z0-9]{32}", value)
    made = CREDENTIALS.files(password)
    values = {
        name: dict(line.split("=", 1) for line in text.splitlines())
        for name, text in made.items()
        if name.endswith("/env")
    }
    database = values["init-storage/env"]["MLFLOW_PASSWORD"]
    assert (
        f"mlflow:{database}@postgres:5432/mlflow"
        in (values["mlflow/env"]["MLFLOW_BACKEND_STORE_URI"])
    )
    assert values["mlflow/env"]["MLFLOW_BACKEND_STORE_URI"] in made["mlflow/basic_auth.ini"]
    assert (
        values["api/env"]["DIABETES_DB_PASSWORD"]
        in (values["airflow/env"]["AIRFLOW_CONN_POSTGRES_DEFAULT"])
    )
    users = values["mlflow-users/env"]
    assert users["SERVING_PASSWORD"] == values["api/env"]["MLFLOW_TRACKING_PASSWORD"]
    assert users["PIPELINE_PASSWORD"] == values["airflow/env"]["MLFLOW_TRACKING_PASSWORD"]
    exporter = values["pipeline-exporter/env"]
    assert values["init-storage/env"]["READER_PASSWORD"] == exporter["DIABETES_DB_PASSWORD"]
    assert values["init-storage/env"]["MONITORING_PASSWORD"] == made["postgres-exporter/password"]
    known = json.loads(made["airflow/passwords.json"])
    assert known["metrics"] == exporter["DIABETES_AIRFLOW_PASSWORD"]
    assert users["METRICS_PASSWORD"] == made["prometheus/metrics-password"]
    assert made["minio/secret-key"] == values["mlflow/env"]["AWS_SECRET_ACCESS_KEY"]
    assert made["minio/access-key"] == "adminuser"
    key = values["ui/env"]["DIABETES_API_KEY"]
    hashes = dict(
        item.split(":") for item in values["api/env"]["DIABETES_API_KEY_HASHES"].split(",")
    )
    assert hashes["page"] == hashlib.sha256(key.encode()).hexdigest()
    assert set(hashes) == {"page", "operator"}
    key = values["api/env"]["DIABETES_PREDICTION_LOG_KEY"]
    assert len(key) == 32
    assert values["airflow/env"]["DIABETES_PREDICTION_LOG_KEY"] == key
    assert "DIABETES_API_KEY_HASHES".removeprefix("DIABETES_").lower() in Settings.model_fields
