"""The real manifests: every overlay and task, as kubectl renders them, against all of policy.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from settings import PROJECT_ROOT
from tests.manifests import manifests, policy
from tests.manifests.manifests import K8S, Object, container, find, render
from tests.manifests.policy import Peer

OVERLAYS = ("microk8s", "production", "seaweedfs")
TASKS = ("load-test", "postgres-restore", "smoke-test")
RENDERINGS = (*(f"overlays/{name}" for name in OVERLAYS), *(f"tasks/{name}" for name in TASKS))
# Plain and strict schemas of a version count as one.
KUBERNETES = list(dict.fromkeys(kubernetes_validate.utils.all_versions()))[-3:]


def _secrets() -> dict[str, list[str]]:
    """Keys of the Secrets that deploy.sh makes."""
    tell = 'for name in "${SECRETS[@]}"; do echo "$name ${SECRET_KEYS[$name]}"; done'
    done = subprocess.run(
        ["bash", "-euc", f"source scripts/lib/secrets.sh; {tell}"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name: keys for name, *keys in map(str.split, done.stdout.splitlines())}


SECRETS = _secrets()
# Made by whoever runs a production cluster, by cert-manager for one.
CERTIFICATES = {"platform-tls", "airflow-tls"}
# Made by whoever has receivers of alerts that need a password; Alertmanager starts without it.
BROUGHT = {"alertmanager-receivers"}

NODE_PORTS = {
    "mlflow/http": 30500,
    "minio/console": 30901,
    "minio/s3": 30382,
    "api/http": 30601,
    "ui/http": 30602,
    "grafana/http": 30300,
    "prometheus/http": 30909,
}

_TMP = "/tmp"  # noqa: S108  # a place in the pod
# Where each container writes though its root is read-only; HOME and the like are looked at too.
WRITES = {
    "postgres": ["/var/lib/postgresql", "/var/run/postgresql", _TMP],
    "minio": ["/data", _TMP],
    "mlflow": [_TMP],
    "api": ["/state", _TMP],
    "ui": [_TMP],
    "prometheus": ["/prometheus"],
    "alertmanager": ["/alertmanager"],
    "postgres-exporter": [],
    "pipeline-exporter": ["/state", _TMP],
    "statsd-exporter": [],
    "grafana": ["/var/lib/grafana", _TMP],
    "init-storage": [_TMP],
    "mlflow-migrate": [_TMP],
    "mlflow-users": [_TMP],
    "smoke-test": [_TMP],
    "load-test": [_TMP],
    "dump": ["/backup"],
    "upload": ["/backup", _TMP],
    "fetch": ["/backup", _TMP],
    "restore": ["/backup"],
}

AIRFLOW = ("scheduler", "api-server", "dag-processor", "triggerer", "worker")
_TO_AIRFLOW = {("airflow-api-server", 8080)}

# Who may open which connection inside the namespace; whatever is not here must not pass.
PATHS: dict[str, set[tuple[str, int]]] = {
    "ui": {("api", 8000)},
    "api": {("postgres", 5432), ("mlflow", 5000)},
    "mlflow": {("postgres", 5432), ("minio", 9000)},
    "mlflow-migrate": {("postgres", 5432)},
    "mlflow-users": {("mlflow", 5000)},
    "init-storage": {("postgres", 5432), ("minio", 9000)},
    "prometheus": {
        ("api", 8000),
        ("mlflow", 5000),
        ("alertmanager", 9093),
        ("postgres-exporter", 9187),
        ("pipeline-exporter", 9210),
        ("statsd-exporter", 9102),
    },
    "postgres-exporter": {("postgres", 5432)},
    "pipeline-exporter": {("postgres", 5432), *_TO_AIRFLOW},
    "grafana": {("prometheus", 9090)},
    "postgres-backup": {("postgres", 5432), ("minio", 9000)},
    "postgres-restore": {("postgres", 5432), ("minio", 9000)},
    "smoke-test": {("mlflow", 5000)},
    "load-test": {("api", 8000)},
    **{f"airflow-{part}": {("postgres", 5432), ("mlflow", 5000)} for part in AIRFLOW},
}
# SeaweedFS tells its figures at a port of their own.
METRICS = {"microk8s": 9000, "seaweedfs": 9327}
# These get all of ConfigMap platform, but have no business with MLflow.
UNUSED = {("init-storage", "mlflow", 5000), ("postgres-backup", "mlflow", 5000)}
# Whose address stands in a Secret, where no manifest shows it.
BY_SECRET = {
    ("mlflow", "postgres", 5432),
    ("mlflow-migrate", "postgres", 5432),
    ("pipeline-exporter", "airflow-api-server", 8080),
}
ENTRY = {("mlflow", 5000), ("api", 8000), ("ui", 8501), ("grafana", 3000)}

OUTSIDE = Peer("somebody outside", address="192.0.2.7")
INGRESS = {
    overlay: Peer("the ingress controller", {"a": "b"}, namespace=namespace)
    for overlay, namespace in zip(OVERLAYS, ("ingress", "ingress-nginx", "ingress"), strict=True)
}
DNS = Peer("DNS", {"k8s-app": "kube-dns"}, namespace="kube-system", address="10.152.183.10")
STRANGER = Peer("a pod of another namespace", {"app.kubernetes.io/name": "ui"}, namespace="other")


def airflow_pods() -> list[Object]:
    """Stand-ins for the pods that Airflow's chart makes, with its labels and ports."""
    ports = {"api-server": 8080, "scheduler": 8793, "worker": 8793, "triggerer": 8794}
    return [
        {
            "kind": "Pod",
            "metadata": {
                "name": f"airflow-{part}",
                "labels": {"tier": "airflow", "component": part, "release": "airflow"},
            },
            "spec": {
                "containers": [
                    {
                        "name": part,
                        "ports": [{"containerPort": ports[part]}] if part in ports else [],
                    }
                ]
            },
        }
        for part in AIRFLOW
    ]


def rendered(path: str, overlay: str = "microk8s") -> list[Object]:
    """A rendering; a task's with the image and the ConfigMap of an overlay, as scripts start it."""
    if not path.startswith("tasks/"):
        return render(path)
    around = render(f"overlays/{overlay}")
    server = find(around, "Deployment", "mlflow")["spec"]["template"]["spec"]
    settings = find(around, "ConfigMap", "platform")["metadata"]["name"]
    objects = render(path)
    for pod in policy.pods_of(objects):
        for each in pod.containers:
            if each["image"] == "diabetes-mlflow":
                each["image"] = container(server, "mlflow")["image"]
        for reference in _config_maps(pod.spec):
            if reference["name"] == "platform":
                reference["name"] = settings
    return objects


def platform(overlay: str) -> list[Object]:
    """An overlay with the tasks that scripts start beside it."""
    tasks = [thing for name in TASKS for thing in rendered(f"tasks/{name}", overlay)]
    return [*render(f"overlays/{overlay}"), *tasks]


def _config_maps(tree: Any) -> Iterator[Object]:
    """References to ConfigMaps, wherever they are in a pod."""
    if isinstance(tree, list):
        for branch in tree:
            yield from _config_maps(branch)
    elif isinstance(tree, dict):
        for key, branch in tree.items():
            if key in ("configMap", "configMapRef", "configMapKeyRef"):
                yield branch
            yield from _config_maps(branch)


def peers(objects: list[Object]) -> dict[str, Peer]:
    everybody = policy.pods_of([*objects, *airflow_pods()])
    return {pod.owner["metadata"]["name"]: policy.peer_of(pod) for pod in everybody}


def test_every_overlay_and_task_is_tested() -> None:
    for folder, names in (("overlays", OVERLAYS), ("tasks", TASKS)):
        assert sorted(path.name for path in (K8S / folder).iterdir()) == sorted(names)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_accepts_every_object(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would read its 2 MB of definitions anew for each object.
    validation = kubernetes_validate.utils
    monkeypatch.setattr(validation, "schema_contents", cache(validation.schema_contents))
    # Most objects are the same in all renderings.
    everything = {str(thing): thing for path in ("base", *RENDERINGS) for thing in render(path)}
    assert policy.schema(everything.values(), version) == []


def test_three_versions_of_kubernetes() -> None:
    assert len({tuple(version.split(".")[:2]) for version in KUBERNETES}) == 3


EACH: list[Callable[[list[Object]], list[str]]] = [
    policy.metadata,
    policy.confidential,
    policy.schedules,
    policy.ports,
    policy.unresolved,
    policy.scaling,
    policy.restricted,
    policy.strict,
    policy.mounts,
    policy.images,
    lambda objects: policy.writable(objects, WRITES),
]


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_rendering_keeps_the_rules(rendering: str) -> None:
    objects = rendered(rendering)
    assert [problem for check in EACH for problem in check(objects)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_is_complete(overlay: str) -> None:
    objects = platform(overlay)
    assert policy.namespace(objects) == []
    assert policy.default_deny(objects) == []
    assert policy.selectors([*objects, *airflow_pods()]) == []
    assert policy.references(objects, SECRETS, CERTIFICATES | BROUGHT) == []


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [("microk8s", NODE_PORTS), ("seaweedfs", NODE_PORTS), ("production", {})],
)
def test_node_ports(overlay: str, expected: dict[str, int]) -> None:
    assert policy.node_ports(render(f"overlays/{overlay}"), expected) == []


def test_versions_of_images_stand_in_one_place() -> None:
    """`images:` of kustomize says registries and tags; the manifests name images only."""
    found = [
        image
        for file in K8S.rglob("*.yaml")
        if "airflow" not in file.relative_to(K8S).parts
        for image in re.findall(r"^[\s-]*image:\s*(\S+)", file.read_text(), re.MULTILINE)
    ]
    assert found
    assert [image for image in found if re.search(r"[:@]", image)] == []


def test_microk8s_takes_our_images_from_its_registry() -> None:
    images = {c["image"] for pod in policy.pods_of(platform("microk8s")) for c in pod.containers}
    ours = {image for image in images if "diabetes-" in image}
    assert ours == {f"localhost:32000/diabetes-{name}:dev" for name in ("mlflow", "api", "ui")}


# -- Configuration


def users(objects: list[Object]) -> dict[str, set[str]]:
    """The ConfigMaps that each workload uses."""
    found = defaultdict(set)
    for pod in policy.pods_of(objects):
        found[policy.called(pod.owner)] |= {
            reference["name"] for reference in _config_maps(pod.spec)
        }
    return found


def test_changed_configuration_rolls_out(tmp_path: Path) -> None:
    for folder in ("infra/k8s", "monitoring"):
        shutil.copytree(PROJECT_ROOT / folder, tmp_path / folder)
    before = render("overlays/microk8s")
    names = [thing["metadata"]["name"] for thing in policy.of_kind(before, "ConfigMap")]
    assert all(re.fullmatch(r"[a-z-]+-[bcdfghkmt2456789]{10}", name) for name in names)
    for name in names:
        stem = name.rpartition("-")[0]
        changed = tmp_path / stem
        changed.mkdir()
        kustomization = {
            "namespace": policy.NAMESPACE,
            "resources": ["../infra/k8s/overlays/microk8s"],
            "configMapGenerator": [{"name": stem, "behavior": "merge", "literals": ["new=line"]}],
        }
        (changed / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        after = render(changed)
        templates = {policy.called(pod.owner): pod.spec for pod in policy.pods_of(before)}
        rolled = {
            policy.called(pod.owner)
            for pod in policy.pods_of(after)
            if pod.spec != templates[policy.called(pod.owner)]
        }
        asked = {workload for workload, maps in users(before).items() if name in maps}
        assert rolled == asked
        assert asked, f"nobody uses ConfigMap {stem}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_mlflow_server(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    pod = find(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]
    server = container(pod, "mlflow")
    known = policy.variables(server, policy.config_maps(objects))
    words = [policy.filled(word, known) for word in server["args"]]
    flags = dict(word.partition("=")[::2] for word in words)
    assert flags.keys() >= {"--serve-artifacts", "--expose-prometheus", "--artifacts-destination"}
    assert flags["--app-name"] == "basic-auth"
    hosts = flags["--allowed-hosts"].split(",")
    origins = flags["--cors-allowed-origins"].split(",")
    assert "*" not in hosts
    assert {"mlflow:5000", f"mlflow.{policy.NAMESPACE}.svc.cluster.local:5000"} <= set(hosts)
    (entry,) = [
        rule["host"]
        for rule in find(objects, "Ingress", "platform")["spec"]["rules"]
        if rule["http"]["paths"][0]["backend"]["service"]["name"] == "mlflow"
    ]
    assert entry in hosts
    scheme = "https" if overlay == "production" else "http"
    assert f"{scheme}://{entry}" in origins
    if overlay != "production":
        assert "localhost:30500" in hosts
        assert "http://localhost:30500" in origins
    # On a command line everyone in the pod could read it.
    assert not any("<" in word for word in words), "a Secret is in an argument"


# -- Network


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_exactly_the_named_paths_are_open(overlay: str) -> None:
    objects = platform(overlay)
    everybody = peers(objects)
    ports = {name: set(peer.ports.values()) for name, peer in everybody.items()}
    found = {
        source: {
            (target, port)
            for target in everybody
            for port in ports[target]
            if source != target and policy.allowed(objects, one, everybody[target], port)
        }
        for source, one in everybody.items()
    }
    expected = {
        name: {path for path in PATHS.get(name, ()) if path[0] in everybody} for name in everybody
    }
    if overlay in METRICS:
        expected["prometheus"].add(("minio", METRICS[overlay]))
    for part in AIRFLOW:  # it talks to itself: API server, logs
        expected[f"airflow-{part}"] |= {
            (other, port)
            for other in everybody
            if other.startswith("airflow-") and other != f"airflow-{part}"
            for port in ports[other]
        }
    assert found == expected


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_connections_that_settings_imply_are_open(overlay: str) -> None:
    objects = platform(overlay)
    everybody = peers(objects)
    workloads = {
        service["metadata"]["name"]: service["spec"]["selector"]["app.kubernetes.io/name"]
        for service in policy.of_kind(objects, "Service")
    }
    implied = {
        (source, workloads[service], port)
        for source, service, port in policy.implied_connections(objects)
        if workloads[service] != source
    }
    closed = {
        (source, target, port)
        for source, target, port in implied
        if not policy.allowed(objects, everybody[source], everybody[target], port)
    }
    assert closed == UNUSED & implied
    if overlay == "microk8s":
        assert implied >= UNUSED, "an exception that nobody needs any more"
        inside = {(source, *path) for source, found in PATHS.items() for path in found}
        inside.add(("prometheus", "minio", METRICS[overlay]))
        unused = {path for path in inside if not path[0].startswith("airflow-")} - implied
        assert unused == BY_SECRET, "a path is open that nobody is told to use"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_api_without_a_model_lives_and_gets_no_requests(overlay: str) -> None:
    spec = manifests.pod(find(render(f"overlays/{overlay}"), "StatefulSet", "api"))
    assert spec is not None
    probes = {
        kind: probe["httpGet"]["path"]
        for kind, probe in container(spec, "api").items()
        if kind.endswith("Probe")
    }
    assert probes == {
        "startupProbe": "/livez",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ways_in(overlay: str) -> None:
    objects = platform(overlay)
    everybody = peers(objects)

    def reached_by(caller: Peer) -> set[tuple[str, int]]:
        return {
            (name, port)
            for name, peer in everybody.items()
            for port in peer.ports.values()
            if policy.allowed(objects, caller, peer, port)
        }

    by_node_port = {
        ("mlflow", 5000),
        ("minio", 9000),
        ("minio", 9001),
        ("api", 8000),
        ("ui", 8501),
        ("grafana", 3000),
        ("prometheus", 9090),
    }
    opened = set() if overlay == "production" else by_node_port
    assert reached_by(OUTSIDE) == opened
    assert reached_by(STRANGER) == opened
    assert reached_by(INGRESS[overlay]) == ENTRY | _TO_AIRFLOW | opened


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ways_out(overlay: str) -> None:
    objects = platform(overlay)
    metadata_service = Peer("metadata service", address="169.254.169.254")
    for name, peer in peers(objects).items():
        for protocol in ("UDP", "TCP"):
            assert policy.allowed(objects, peer, DNS, 53, protocol), f"{name} finds no name"
        assert not policy.allowed(objects, peer, metadata_service, 80), name
        fetches = name == "airflow-worker"  # the publisher's file
        steers = name == "airflow-scheduler"  # Kubernetes
        tells = name == "alertmanager"
        stores = overlay == "production" and ("minio", 9000) in PATHS.get(name, ())
        assert steers or not policy.allowed(objects, peer, DNS, 443), name
        reaches = policy.allowed(objects, peer, OUTSIDE, 443)
        assert reaches == (fetches or steers or stores or tells), name
        assert policy.allowed(objects, peer, OUTSIDE, 587) == tells, name


def test_production_reaches_its_own_database() -> None:
    objects = platform("production")
    database = Peer("PostgreSQL elsewhere", address="10.20.0.7")
    reaching = {
        name
        for name, peer in peers(objects).items()
        if policy.allowed(objects, peer, database, 5432)
    }
    assert reaching == {name for name, found in PATHS.items() if ("postgres", 5432) in found}


# -- Room


def test_microk8s_fits_a_small_machine() -> None:
    """All requests with Airflow and as many tasks as it starts: within 4 cores and 8 GiB."""
    lasting = [thing for thing in render("overlays/microk8s") if thing["kind"] != "Job"]
    total = policy.requests_of(lasting)
    values = yaml.safe_load((K8S / "airflow" / "values.yaml").read_text())
    parts = ("scheduler", "apiServer", "dagProcessor", "triggerer")
    asked = [values[part]["resources"]["requests"] for part in parts]
    asked.append(values["scheduler"]["logGroomerSidecar"]["resources"]["requests"])
    worker = values["workers"]["kubernetes"]["resources"]["requests"]
    asked += [worker] * values["config"]["core"]["parallelism"]
    said = re.search(r"8 tasks at once: ([\d.]+) GiB", OPERATIONS.read_text())
    for what in total:
        total[what] += sum(policy.quantity(requests[what]) for requests in asked)
    assert total["cpu"] <= 4
    assert total["memory"] <= 8 * 2**30
    assert said
    assert float(said[1]) == round(total["memory"] / 2**30, 1)


# -- What people and scripts read


OPERATIONS = PROJECT_ROOT / "docs" / "operations.md"
# What others make: Airflow's chart, MicroK8s' addon, a StatefulSet's template of claims.
MADE_ELSEWHERE = [
    {"kind": kind, "metadata": {"name": name}}
    for kind, names in {
        "Deployment": (
            "airflow-api-server",
            "airflow-scheduler",
            "airflow-dag-processor",
            "airflow-triggerer",
            "registry",
        ),
        "Service": ("airflow-api-server",),
        "Job": ("airflow-run-airflow-migrations",),
        "PersistentVolumeClaim": ("data-postgres-0",),
    }.items()
    for name in names
]
READ = [
    "README.md",
    "README.es.md",
    "docs/operations.md",
    *(f"scripts/{name}.sh" for name in ("deploy", "cleanup", "restore", "lib/cluster")),
]


@pytest.mark.parametrize("file", READ)
def test_names_and_ports_that_people_read_exist(file: str) -> None:
    text = (PROJECT_ROOT / file).read_text()
    made = [*platform("microk8s"), *MADE_ELSEWHERE]
    assert policy.unknown_names(text, made, SECRETS) == []
    assert policy.unknown_node_ports(text, NODE_PORTS.values()) == []


# -- Airflow's values


CHART_KEYS = {
    "metadataSecretName": "connection",
    "fernetKeySecretName": "fernet-key",
    "apiSecretKeySecretName": "api-secret-key",
    "jwtSecretName": "jwt-secret",
}


def named_secrets(tree: Any) -> Iterator[tuple[str, str | None]]:
    """Secrets and keys that values for Airflow's chart name."""
    if isinstance(tree, list):
        for branch in tree:
            yield from named_secrets(branch)
    elif isinstance(tree, dict):
        for name, branch in tree.items():
            if name == "secretKeyRef":
                yield branch["name"], branch["key"]
            elif name in CHART_KEYS:
                yield branch, CHART_KEYS[name]
            elif name == "secretName":
                yield from ((branch, item["key"]) for item in tree.get("items", ()))
                if "items" not in tree:
                    yield branch, None
            yield from named_secrets(branch)


def missing_secrets(tree: Any) -> list[tuple[str, str | None]]:
    return [
        (name, key)
        for name, key in named_secrets(tree)
        if name not in CERTIFICATES and (key is None or key not in SECRETS.get(name, ()))
    ]


@pytest.mark.parametrize("file", ["values.yaml", "values-production.yaml"])
def test_airflow_names_secrets_and_claims_that_exist(file: str) -> None:
    text = (K8S / "airflow" / file).read_text()
    assert missing_secrets(yaml.safe_load(text)) == []
    claims = set(re.findall(r"claimName: (\S+)", text))
    made = policy.of_kind(render("overlays/microk8s"), "PersistentVolumeClaim")
    assert claims <= {claim["metadata"]["name"] for claim in made}
    assert not list(policy.looks_secret(text))


def test_wrong_secret_in_values_is_found() -> None:
    values = yaml.safe_load((K8S / "airflow" / "values.yaml").read_text())
    values["fernetKeySecretName"] = "postgres-credentials"
    values["workers"]["kubernetes"]["env"][0]["valueFrom"]["secretKeyRef"]["key"] = "x"
    values["extra"] = [{"secret": {"secretName": "lost"}}]
    assert sorted(missing_secrets(values), key=str) == [
        ("airflow-credentials", "x"),
        ("lost", None),
        ("postgres-credentials", "fernet-key"),
    ]


# -- checkov


CHECKOV = PROJECT_ROOT / ".venv-policy" / "bin" / "checkov"
CONFIG = K8S / "checkov.yaml"


@dataclass(frozen=True, slots=True)
class Skip:
    """A check that checkov.yaml leaves out."""

    reason: str
    only: frozenset[str]


def skips(text: str) -> dict[str, Skip]:
    """Skipped checks with the comments above them; an assertion fails where one has none."""
    found = {}
    comment: list[str] = []
    for line in text.partition("skip-check:")[2].splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.removeprefix("#").strip())
        elif stripped.startswith("- "):
            reason, _, only = " ".join(comment).partition("Only: ")
            check = stripped.removeprefix("- ").strip()
            assert len(reason.split()) > 5, f"{check} is skipped without a reason"
            assert only, f"{check} is skipped for whom?"
            found[check] = Skip(reason.strip(), frozenset(re.split(r",\s*", only)))
            comment = []
    return found


def checkov(folder: Path, config: Path) -> set[tuple[str, str, str]]:
    """Failed checks on a folder: (file, check, object)."""
    assert CHECKOV.exists(), "checkov is not there: run scripts/setup.sh policy"
    done = subprocess.run(
        [CHECKOV, "--config-file", config, "--directory", ".", "--output", "json"],
        cwd=folder,
        # No proxy, no token: it needs nobody.
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    reports = json.loads(done.stdout)
    found = set()
    for report in reports if isinstance(reports, list) else [reports]:
        assert not report["summary"]["parsing_errors"], report["results"]["parsing_errors"]
        for failed in report["results"]["failed_checks"]:
            parts = failed["resource"].split(".")
            thing = f"{parts[0]} {parts[-1]}"
            if report["check_type"] == "dockerfile":
                thing = Path(failed["file_path"]).name
            found.add((failed["file_path"].strip("/"), failed["check_id"], thing))
    assert bool(found) == bool(done.returncode)
    return found


@cache
def _rendered(path: str) -> str:
    return yaml.safe_dump_all(rendered(path))


@pytest.fixture
def scanned(tmp_path: Path) -> Path:
    """A folder with all that checkov is to look at."""
    for rendering in RENDERINGS:
        (tmp_path / f"{rendering.replace('/', '-')}.yaml").write_text(_rendered(rendering))
    for file in (PROJECT_ROOT / "infra" / "docker").glob("Dockerfile.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


BROKEN = """
apiVersion: v1
kind: Pod
metadata: {name: broken}
spec:
  containers:
    - name: main
      image: broken
      securityContext: {privileged: true}
"""


def test_checkov_finds_nothing_but_what_it_is_given(scanned: Path) -> None:
    (scanned / "broken.yaml").write_text(BROKEN)
    (scanned / "Dockerfile.broken").write_text("FROM scratch\nUSER root\n")
    found = checkov(scanned, CONFIG)
    assert {check for file, check, _ in found if file == "broken.yaml"} >= {"CKV_K8S_16"}
    assert ("Dockerfile.broken", "CKV_DOCKER_8", "Dockerfile.broken") in found
    assert {finding for finding in found if "broken" not in finding[0]} == set()


def test_checkov_skips_nothing_in_vain(scanned: Path) -> None:
    """Without its skips exactly the skipped checks fail, and for nobody but those it names."""
    everything = yaml.safe_load(CONFIG.read_text())
    listed = skips(CONFIG.read_text())
    assert listed.keys() == set(everything.pop("skip-check"))
    bare = scanned / "checkov-without-skips.yml"
    bare.write_text(yaml.safe_dump(everything))
    found: dict[str, set[str]] = defaultdict(set)
    for _, check, thing in checkov(scanned, bare):
        found[check].add(thing)
    assert found.keys() == listed.keys()
    for check, skip in listed.items():
        if not any(name.startswith("every ") for name in skip.only):
            assert found[check] == skip.only, f"{check} fails for others than checkov.yaml says"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skip-check:\n  - CKV_K8S_1\n", "without a reason"),
        ("skip-check:\n  # short\n  # Only: Pod x\n  - CKV_K8S_1\n", "without a reason"),
        ("skip-check:\n  # one two three four five six\n  - CKV_K8S_1\n", "for whom"),
    ],
)
def test_skip_needs_a_reason(text: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        skips(text)


def test_base_images_are_pinned() -> None:
    """What CKV_DOCKER_7 can't see: the default of the build argument."""
    for file in (PROJECT_ROOT / "infra" / "docker").glob("Dockerfile.*"):
        text = file.read_text()
        stages = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
        defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
        for image in set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - stages:
            named = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image)  # noqa: B023
            pinned = {"kind": "Pod", "metadata": {"name": file.name}}
            pinned["spec"] = {"containers": [{"name": "base", "image": named}]}
            assert policy.images([pinned]) == []
