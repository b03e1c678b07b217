"""What we ask of rendered manifests beyond their schema.

Pure functions: each takes Kubernetes objects as dictionaries and returns the problems it finds in
plain words, none where all is well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any
from zoneinfo import available_timezones

import kubernetes_validate
from croniter import croniter

from tests.manifests import manifests
from tests.manifests.manifests import Object

NAMESPACE = "diabetes-mlops"
PART_OF = "diabetes-readmission"
DEPLOY_STEPS = ("1-storage", "2-init", "3-mlflow", "4-users", "5-services")

_LONG_RUNNING = ("Deployment", "StatefulSet", "DaemonSet")
_WORKLOADS = (*_LONG_RUNNING, "Job", "CronJob", "Pod")
_RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_PLACES = re.compile(r"^(HOME|TMPDIR|PGDATA|GF_PATHS_(DATA|LOGS|PLUGINS)|\w+_(DIR|HOME))$")
_REFERENCE = re.compile(r"\$\((\w+)\)")
_CONFIDENTIAL = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|PRIVATE|(^|_)KEY(S|_HASHES)?$")
_LOGIN_IN_URL = re.compile(r"://[^/\s:@]*:(?!\$\(|\$\{)[^/\s@]+@")
_RANDOM = re.compile(r"\b(?=\w*[a-z])(?=\w*[A-Z])(?=\w*[0-9])[A-Za-z0-9]{24,}\b|\b[0-9a-f]{32,}\b")
_UNITS = {
    "": 1.0,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}


# -- Reading objects


@dataclass(frozen=True, slots=True)
class Pod:
    """What a workload makes pods of.

    Attributes:
        owner: the Deployment, StatefulSet, Job, CronJob or Pod.
        metadata, spec: of the template.
    """

    owner: Object
    metadata: Mapping[str, Any]
    spec: Mapping[str, Any]

    @property
    def labels(self) -> Mapping[str, str]:
        return dict(self.metadata.get("labels", {}))

    @property
    def containers(self) -> list[Object]:
        return manifests.containers(dict(self.spec))

    @property
    def runs_on(self) -> bool:
        """Whether it is meant to run until somebody stops it."""
        return self.owner["kind"] in _LONG_RUNNING

    @property
    def volumes(self) -> dict[str, Object]:
        """Volumes by name, claims of a StatefulSet's template among them."""
        found = {volume["name"]: volume for volume in self.spec.get("volumes", ())}
        for claim in self.owner.get("spec", {}).get("volumeClaimTemplates", ()):
            name = claim["metadata"]["name"]
            found[name] = {"name": name, "persistentVolumeClaim": {"claimName": name}}
        return found


def called(thing: Object) -> str:
    """Kind and name, as kubectl writes them for people."""
    return f"{thing['kind']} {thing['metadata']['name']}"


def pod_of(thing: Object) -> Pod | None:
    """The pod that a workload makes, None for anything else."""
    if thing["kind"] == "Pod":
        return Pod(thing, thing["metadata"], thing["spec"])
    if thing["kind"] not in _WORKLOADS:
        return None
    spec = thing["spec"]
    if thing["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    template = spec["template"]
    return Pod(thing, template.get("metadata", {}), template["spec"])


def pods_of(objects: Iterable[Object]) -> list[Pod]:
    return [pod for thing in objects if (pod := pod_of(thing))]


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] in kinds]


def quantity(text: str | float) -> float:
    """A Kubernetes quantity as a number of cores or bytes."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no quantity such as 250m or 512Mi")
    return float(match[1]) * _UNITS[match[2]]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector with matchLabels and matchExpressions holds; empty selects all."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", ()):
        value, values = labels.get(expression["key"]), expression.get("values", ())
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[expression["operator"]]
        if not holds:
            return False
    return True


def config_maps(objects: Iterable[Object]) -> dict[str, dict[str, str]]:
    """Data of every ConfigMap by its name."""
    found = of_kind(objects, "ConfigMap")
    return {thing["metadata"]["name"]: thing.get("data", {}) for thing in found}


def variables(container: Object, maps: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """A container's environment in its order, `<NAME of secret/key>` for what a Secret holds."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if reference := source.get("configMapRef"):
            for key, value in maps.get(reference["name"], {}).items():
                found[source.get("prefix", "") + key] = value
    for entry in container.get("env", ()):
        origin = entry.get("valueFrom", {})
        if reference := origin.get("configMapKeyRef"):
            value = maps.get(reference["name"], {}).get(reference["key"], "")
        elif reference := origin.get("secretKeyRef"):
            value = f"<{reference['name']}/{reference['key']}>"
        else:
            value = entry.get("value", "")
        # As kubelet does: only what stands further up is known.
        found[entry["name"]] = filled(value, found)
    return found


def filled(text: str, known: Mapping[str, str]) -> str:
    return _REFERENCE.sub(lambda match: known.get(match[1], match[0]), text)


# -- Every object


def metadata(objects: Iterable[Object]) -> list[str]:
    """Namespace, labels and the step of deploy.sh that applies it."""
    problems = []
    for thing in objects:
        about = thing["metadata"]
        labels = about.get("labels", {})
        if thing["kind"] != "Namespace" and about.get("namespace") != NAMESPACE:
            problems.append(f"{called(thing)}: namespace is not {NAMESPACE}")
        if not labels.get("app.kubernetes.io/name"):
            problems.append(f"{called(thing)}: no label app.kubernetes.io/name")
        if labels.get("app.kubernetes.io/part-of") != PART_OF:
            problems.append(f"{called(thing)}: label app.kubernetes.io/part-of is not {PART_OF}")
        if labels.get("deploy-step") not in DEPLOY_STEPS:
            problems.append(
                f"{called(thing)}: label deploy-step is {labels.get('deploy-step')!r}, "
                f"not one of {', '.join(DEPLOY_STEPS)}"
            )
    problems += [
        f"{called(pod.owner)}: label deploy-step is in its pod, so that moving it restarts the pod"
        for pod in pods_of(objects)
        if pod.owner["kind"] != "Pod" and "deploy-step" in pod.labels
    ]
    names = Counter(called(thing) for thing in objects)
    problems += [f"{name}: {times} times" for name, times in names.items() if times > 1]
    return problems


def namespace(objects: Iterable[Object]) -> list[str]:
    """The namespace lets only restricted pods in, whatever we forget."""
    found = of_kind(objects, "Namespace")
    if [thing["metadata"]["name"] for thing in found] != [NAMESPACE]:
        return [f"not exactly the Namespace {NAMESPACE}"]
    labels = found[0]["metadata"].get("labels", {})
    return [
        f"Namespace {NAMESPACE}: label pod-security.kubernetes.io/{mode} is not restricted"
        for mode in ("enforce", "audit", "warn")
        if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted"
    ]


def confidential(objects: Iterable[Object]) -> list[str]:
    """Nothing that looks like a password, in Secrets least of all: deploy.sh makes those."""
    problems = [
        f"{called(thing)}: Secrets are made by deploy.sh, not by manifests"
        for thing in of_kind(objects, "Secret")
    ]
    for thing in of_kind(objects, "ConfigMap"):
        if thing.get("binaryData"):
            problems.append(f"{called(thing)}: binaryData, which nobody can look through")
        for key, text in thing.get("data", {}).items():
            if _CONFIDENTIAL.search(key.upper()) and "\n" not in text:
                problems.append(f"{called(thing)}: {key} sounds like a secret")
            problems += [f"{called(thing)}: {key} holds {what}" for what in looks_secret(text)]
    for pod in pods_of(objects):
        for container in pod.containers:
            where = f"{called(pod.owner)}, container {container['name']}"
            for entry in container.get("env", ()):
                name, value = entry["name"], entry.get("value", "")
                told = not value or _REFERENCE.fullmatch(value) or value.startswith("/")
                if _CONFIDENTIAL.search(name) and not told and value not in ("true", "false"):
                    problems.append(f"{where}: {name} is written out; it belongs into a Secret")
                problems += [f"{where}: {name} holds {what}" for what in looks_secret(value)]
            for word in (*container.get("command", ()), *container.get("args", ())):
                problems += [f"{where}: an argument holds {what}" for what in looks_secret(word)]
    return problems


def looks_secret(text: str) -> Iterator[str]:
    if "PRIVATE KEY-----" in text:
        yield "a private key"
    if _LOGIN_IN_URL.search(text):
        yield "an address with a password"
    if _RANDOM.search(text):
        yield "what looks like a generated password"


def schema(objects: Iterable[Object], version: str) -> list[str]:
    """What Kubernetes of this version would refuse, unknown fields among it."""
    problems = []
    for thing in objects:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(step) for step in error.path)
            problems.append(f"{called(thing)}, Kubernetes {version}: {path}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            problems.append(f"{called(thing)}: {error.message}")
    return problems


def schedules(objects: Iterable[Object]) -> list[str]:
    """CronJobs have a schedule that can be read, and say in which time zone."""
    problems = []
    for thing in of_kind(objects, "CronJob"):
        spec = thing["spec"]
        if not croniter.is_valid(spec["schedule"]) or len(spec["schedule"].split()) != 5:
            problems.append(f"{called(thing)}: schedule {spec['schedule']!r} is none")
        if spec.get("timeZone") not in available_timezones():
            problems.append(f"{called(thing)}: timeZone {spec.get('timeZone')!r} is none")
    return problems


# -- What refers to what


def selectors(objects: Sequence[Object]) -> list[str]:
    """Workloads select their own pods; Services, budgets and scalers exactly one workload."""
    problems = []
    pods = pods_of(objects)
    for pod in pods:
        if pod.runs_on and not selects(pod.owner["spec"]["selector"], pod.labels):
            problems.append(f"{called(pod.owner)}: its selector does not match its own pods")
        if pod.runs_on and not pod.owner["spec"]["selector"].get("matchLabels"):
            problems.append(f"{called(pod.owner)}: its selector is empty")
        service = pod.owner.get("spec", {}).get("serviceName")
        if service and service not in _names(objects, "Service"):
            problems.append(f"{called(pod.owner)}: its Service {service} does not exist")
    for thing in of_kind(objects, "Service", "PodDisruptionBudget"):
        chosen = _chosen(thing, pods)
        if len(chosen) != 1:
            found = ", ".join(called(pod.owner) for pod in chosen) or "none"
            problems.append(f"{called(thing)}: selects {found}, not exactly one workload")
    for policy in of_kind(objects, "NetworkPolicy"):
        selector = policy["spec"].get("podSelector", {})
        if not any(selects(selector, pod.labels) for pod in pods):
            problems.append(f"{called(policy)}: selects no pod")
        known = {pod.labels.get("app.kubernetes.io/name") for pod in pods}
        for name in sorted(set(_named_pods(policy["spec"])) - known):
            problems.append(f"{called(policy)}: names pods {name}, which do not exist")
    return problems


def _named_pods(tree: object) -> Iterator[str]:
    """Values of app.kubernetes.io/name anywhere in a policy."""
    if isinstance(tree, list):
        for branch in tree:
            yield from _named_pods(branch)
    elif isinstance(tree, dict):
        if tree.get("key") == "app.kubernetes.io/name":
            yield from tree.get("values", ())
        for key, branch in tree.items():
            if key == "app.kubernetes.io/name":
                yield branch
            yield from _named_pods(branch)


def _chosen(thing: Object, pods: Iterable[Pod]) -> list[Pod]:
    selector = thing["spec"].get("selector") or {}
    if thing["kind"] == "Service":
        selector = {"matchLabels": selector}
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        return []
    return [pod for pod in pods if selects(selector, pod.labels)]


def _names(objects: Iterable[Object], kind: str) -> set[str]:
    return {thing["metadata"]["name"] for thing in of_kind(objects, kind)}


def _ports(containers: Iterable[Object]) -> dict[str | int, int]:
    """Every port that containers declare, by number and by name."""
    found: dict[str | int, int] = {}
    for container in containers:
        for port in container.get("ports", ()):
            found[port["containerPort"]] = port["containerPort"]
            if "name" in port:
                found[port["name"]] = port["containerPort"]
    return found


def ports(objects: Sequence[Object]) -> list[str]:
    """Services reach containers' ports, probes too, and Ingresses Services."""
    problems = []
    pods = pods_of(objects)
    services = {thing["metadata"]["name"]: thing for thing in of_kind(objects, "Service")}
    for service in services.values():
        for pod in _chosen(service, pods):
            for port in service["spec"].get("ports", ()):
                target = port.get("targetPort", port["port"])
                if target not in _ports(pod.spec["containers"]):
                    problems.append(
                        f"{called(service)}: targetPort {target} is no port of {called(pod.owner)}"
                    )
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"].get("rules", ()):
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                known = {
                    value
                    for port in services.get(backend["name"], {}).get("spec", {}).get("ports", ())
                    for value in (port["port"], port.get("name"))
                }
                wanted = backend["port"].get("number", backend["port"].get("name"))
                if wanted not in known:
                    problems.append(
                        f"{called(ingress)}: {rule.get('host')} leads to Service "
                        f"{backend['name']} port {wanted}, which does not exist"
                    )
    for pod in pods:
        for container in pod.containers:
            for probe in _PROBES:
                action = container.get(probe, {})
                for how in ("httpGet", "tcpSocket", "grpc"):
                    port = action.get(how, {}).get("port")
                    if port is not None and port not in _ports([container]):
                        problems.append(
                            f"{called(pod.owner)}, container {container['name']}: "
                            f"{probe} asks port {port}, which it does not declare"
                        )
    return problems


def node_ports(objects: Iterable[Object], expected: Mapping[str, int]) -> list[str]:
    """The ports that every node opens are the expected ones, `Service/port name` -> number."""
    found: dict[str, int | None] = {}
    problems = []
    for service in of_kind(objects, "Service"):
        kind = service["spec"].get("type", "ClusterIP")
        for port in service["spec"].get("ports", ()):
            number = port.get("nodePort")
            if kind == "NodePort" or number is not None:
                found[f"{service['metadata']['name']}/{port.get('name')}"] = number
            if kind == "ClusterIP" and number is not None:
                problems.append(f"{called(service)}: names a NodePort but is a ClusterIP")
        if kind not in ("ClusterIP", "NodePort"):
            problems.append(f"{called(service)}: type {kind}, which opens it to the outside")
    for name, number in found.items():
        if number is None:
            problems.append(f"Service {name}: its NodePort is left to chance")
        elif not 30000 <= number <= 32767:
            problems.append(f"Service {name}: NodePort {number} is not in 30000-32767")
    twice = [number for number, times in Counter(found.values()).items() if number and times > 1]
    problems += [f"NodePort {number} is given twice" for number in twice]
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            problems.append(
                f"Service {name}: NodePort {found.get(name)}, expected {expected.get(name)}"
            )
    return problems


def references(
    objects: Sequence[Object],
    secrets: Mapping[str, Collection[str]],
    external: Collection[str] = (),
) -> list[str]:
    """Every Secret, ConfigMap and claim that is named exists, with the keys that are asked for.

    Args:
        objects: a whole rendering.
        secrets: keys of each Secret that deploy.sh makes.
        external: names of Secrets that somebody else makes (TLS certificates).
    """
    maps = config_maps(objects)
    claims = _names(objects, "PersistentVolumeClaim")
    problems = []

    def check(where: str, kind: str, name: str, keys: Iterable[str]) -> None:
        known: Mapping[str, Collection[str]] = secrets if kind == "Secret" else maps
        if kind == "Secret" and name in external:
            return
        if name not in known:
            problems.append(f"{where}: {kind} {name} does not exist")
            return
        for key in keys:
            if key not in known[name]:
                problems.append(f"{where}: {kind} {name} has no key {key}")

    for pod in pods_of(objects):
        where = called(pod.owner)
        for secret in pod.spec.get("imagePullSecrets", ()):
            check(where, "Secret", secret["name"], ())
        for container in pod.containers:
            for entry in container.get("env", ()):
                origin = entry.get("valueFrom", {})
                for how, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                    if reference := origin.get(how):
                        check(where, kind, reference["name"], [reference["key"]])
            for source in container.get("envFrom", ()):
                for how, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                    if reference := source.get(how):
                        check(where, kind, reference["name"], ())
        for volume in pod.volumes.values():
            for source in (volume, *volume.get("projected", {}).get("sources", ())):
                if secret := source.get("secret"):
                    name = secret.get("secretName", secret.get("name"))
                    check(where, "Secret", name, _keys(secret))
                if mapped := source.get("configMap"):
                    check(where, "ConfigMap", mapped["name"], _keys(mapped))
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            templates = pod.owner.get("spec", {}).get("volumeClaimTemplates", ())
            own = {template["metadata"]["name"] for template in templates}
            if claim and claim not in claims | own:
                problems.append(f"{where}: PersistentVolumeClaim {claim} does not exist")
    for ingress in of_kind(objects, "Ingress"):
        for tls in ingress["spec"].get("tls", ()):
            check(called(ingress), "Secret", tls["secretName"], ())
    return problems


def _keys(source: Mapping[str, Any]) -> list[str]:
    return [item["key"] for item in source.get("items", ())]


def unresolved(objects: Sequence[Object]) -> list[str]:
    """Every `$(NAME)` is a variable that is known where it stands; no variable is given twice."""
    maps = config_maps(objects)
    problems = []
    for pod in pods_of(objects):
        for container in pod.containers:
            where = f"{called(pod.owner)}, container {container['name']}"
            known = variables(container, maps)
            given = Counter(entry["name"] for entry in container.get("env", ()))
            problems += [f"{where}: {name} given twice" for name, n in given.items() if n > 1]
            words = [*container.get("command", ()), *container.get("args", ())]
            left = [name for word in words for name in _REFERENCE.findall(word)]
            problems += [f"{where}: $({name}) is unknown" for name in left if name not in known]
            for name, value in known.items():
                for other in _REFERENCE.findall(value):
                    problems.append(f"{where}: {name} uses $({other}), which is not set before it")
    return problems


def scaling(objects: Sequence[Object]) -> list[str]:
    """Budgets leave room for a drain; scalers have a target, sane bounds and sole rule over it."""
    problems = []
    pods = pods_of(objects)
    workloads = {called(pod.owner): pod.owner for pod in pods if pod.runs_on}
    scalers = of_kind(objects, "HorizontalPodAutoscaler")
    lowest: dict[str, int] = {
        name: owner["spec"].get("replicas", 1) for name, owner in workloads.items()
    }
    for scaler in scalers:
        spec = scaler["spec"]
        target = f"{spec['scaleTargetRef']['kind']} {spec['scaleTargetRef']['name']}"
        least = spec.get("minReplicas", 1)
        if least > spec["maxReplicas"]:
            problems.append(f"{called(scaler)}: minReplicas {least} > {spec['maxReplicas']}")
        if target not in workloads:
            problems.append(f"{called(scaler)}: {target} does not exist")
            continue
        if "replicas" in workloads[target]["spec"]:
            problems.append(
                f"{target}: replicas is set although {called(scaler)} rules it; "
                "each apply would undo the scaling"
            )
        lowest[target] = least
    budgets = of_kind(objects, "PodDisruptionBudget")
    guarded = {called(pod.owner) for budget in budgets for pod in _chosen(budget, pods)}
    problems += [
        f"{name}: {replicas} replicas, and no PodDisruptionBudget keeps one of them"
        for name, replicas in lowest.items()
        if replicas > 1 and name not in guarded
    ]
    for budget in budgets:
        for pod in _chosen(budget, pods):
            replicas = lowest.get(called(pod.owner), 1)
            least = budget["spec"].get("minAvailable")
            most = budget["spec"].get("maxUnavailable")
            if isinstance(least, int) and least >= replicas:
                problems.append(
                    f"{called(budget)}: minAvailable {least} of {replicas} replicas lets no node "
                    "be drained"
                )
            if most in (0, "0%") or least == "100%":
                problems.append(f"{called(budget)}: lets no node be drained")
    return problems


# -- Pods


def _of_each_pod(objects: Iterable[Object], problems: Callable[[Pod], Iterable[str]]) -> list[str]:
    return [f"{called(pod.owner)}: {text}" for pod in pods_of(objects) for text in problems(pod)]


def restricted(objects: Iterable[Object]) -> list[str]:
    """Kubernetes' Pod Security Standard `restricted`, written out."""
    return _of_each_pod(objects, _restricted)


def _restricted(pod: Pod) -> Iterator[str]:
    spec = pod.spec
    shared = spec.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} is on"
    for volume in spec.get("volumes", ()):
        kinds = volume.keys() - {"name"}
        if not kinds <= _RESTRICTED_VOLUMES:
            yield f"volume {volume['name']} is {', '.join(sorted(kinds))}"
    if shared.get("sysctls"):
        yield "sets sysctls"
    for container in (*pod.containers, *spec.get("ephemeralContainers", ())):
        own = container.get("securityContext", {})
        both = {**shared, **own}
        capabilities = own.get("capabilities", {})
        checks = {
            "is privileged": own.get("privileged"),
            "allows privilege escalation": own.get("allowPrivilegeEscalation") is not False,
            "does not drop ALL capabilities": "ALL" not in capabilities.get("drop", ()),
            "adds capabilities": set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"},
            "may run as root (runAsNonRoot is not true)": both.get("runAsNonRoot") is not True,
            "runs as user 0": both.get("runAsUser") == 0,
            "has no seccomp profile": both.get("seccompProfile", {}).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "changes AppArmor": both.get("appArmorProfile", {}).get("type", "RuntimeDefault")
            not in ("RuntimeDefault", "Localhost"),
            "changes SELinux": both.get("seLinuxOptions"),
            "changes /proc": own.get("procMount", "Default") != "Default",
            "is a Windows host process": both.get("windowsOptions"),
            "opens a port of the node": [p for p in container.get("ports", ()) if "hostPort" in p],
            "has a probe or hook that names a host": list(_named_hosts(container)),
        }
        yield from (f"container {container['name']} {text}" for text, bad in checks.items() if bad)


def _named_hosts(container: Object) -> Iterator[str]:
    actions = [container.get(probe, {}) for probe in _PROBES]
    actions += container.get("lifecycle", {}).values()
    for action in actions:
        for how in ("httpGet", "tcpSocket"):
            if host := action.get(how, {}).get("host"):
                yield host


def strict(objects: Iterable[Object]) -> list[str]:
    """Our own rules on top of `restricted`.

    A limit of CPU is wanted too: without one a batch of the API starves PostgreSQL on a small node.
    """
    return _of_each_pod(objects, _strict)


def _strict(pod: Pod) -> Iterator[str]:
    spec, kind = pod.spec, pod.owner["kind"]
    shared = spec.get("securityContext", {})
    for key in ("automountServiceAccountToken", "enableServiceLinks"):
        if spec.get(key) is not False:
            yield f"{key} is not false"
    if "terminationGracePeriodSeconds" not in spec:
        yield "no terminationGracePeriodSeconds"
    if any("persistentVolumeClaim" in volume for volume in pod.volumes.values()) and (
        "fsGroup" not in shared
    ):
        yield "no fsGroup, so that it can't write its volume"
    if not pod.runs_on and kind != "Pod":
        yield from _ends(pod)
    for volume in spec.get("volumes", ()):
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"volume {volume['name']} has no sizeLimit"
    for container in pod.containers:
        own = container.get("securityContext", {})
        found = list(_resources(container))
        if own.get("readOnlyRootFilesystem") is not True:
            found.append("can write its root file system")
        for key in ("runAsUser", "runAsGroup"):
            if key not in shared and key not in own:
                found.append(f"has no {key}")
        if container.get("imagePullPolicy") != "IfNotPresent":
            found.append("has no imagePullPolicy IfNotPresent")
        if pod.runs_on and container in spec["containers"]:
            found += [f"has no {probe}" for probe in _PROBES if probe not in container]
        yield from (f"container {container['name']} {text}" for text in found)


def _ends(pod: Pod) -> Iterator[str]:
    spec = pod.owner["spec"]
    if pod.owner["kind"] == "CronJob":
        if spec.get("concurrencyPolicy") != "Forbid":
            yield "two runs may overlap (concurrencyPolicy is not Forbid)"
        if "startingDeadlineSeconds" not in spec:
            yield "no startingDeadlineSeconds: 100 missed runs stop it for good"
        spec = spec["jobTemplate"]["spec"]
    for key in ("activeDeadlineSeconds", "backoffLimit"):
        if key not in spec:
            yield f"no {key}"
    if pod.spec.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "restartPolicy is neither Never nor OnFailure"


def _resources(container: Object) -> Iterator[str]:
    resources = container.get("resources", {})
    for what in ("cpu", "memory"):
        asked, most = (resources.get(key, {}).get(what) for key in ("requests", "limits"))
        if asked is None:
            yield f"has no request of {what}"
        if most is None:
            yield f"has no limit of {what}"
        if asked is not None and most is not None and quantity(asked) > quantity(most):
            yield f"requests {asked} {what}, more than its limit {most}"


def mounts(objects: Iterable[Object]) -> list[str]:
    """Mounts and volumes fit each other."""
    return _of_each_pod(objects, _mounts)


def _mounts(pod: Pod) -> Iterator[str]:
    used = set()
    for container in pod.containers:
        where = f"container {container['name']}"
        given = container.get("volumeMounts", ())
        paths = Counter(mount["mountPath"].rstrip("/") for mount in given)
        yield from (f"{where} mounts {path} twice" for path, times in paths.items() if times > 1)
        used |= {mount["name"] for mount in given}
    yield from (f"volume {name} does not exist" for name in sorted(used - pod.volumes.keys()))
    yield from (f"volume {name} is mounted nowhere" for name in sorted(pod.volumes.keys() - used))


def writable(objects: Sequence[Object], needed: Mapping[str, Collection[str]]) -> list[str]:
    """A container can write where it has to, though its root is read-only.

    Args:
        objects: a whole rendering.
        needed: folders that a container writes to, by its name.
    """
    maps = config_maps(objects)

    def missing(pod: Pod) -> Iterator[str]:
        for container in pod.containers:
            name = container["name"]
            if name not in needed:
                yield f"nobody has said where container {name} writes"
            wanted = {*needed.get(name, ()), *filter(None, [container.get("workingDir")])}
            for key, value in variables(container, maps).items():
                if _PLACES.match(key) and value.startswith("/"):
                    wanted.add(value)
            for folder in sorted(wanted):
                mount = _mount_over(container, folder) or {}
                volume = pod.volumes.get(mount.get("name", ""), {})
                kinds = {"emptyDir", "persistentVolumeClaim", "ephemeral"} & volume.keys()
                if not kinds or mount.get("readOnly"):
                    yield f"container {name} can't write {folder}"

    return _of_each_pod(objects, missing)


def _mount_over(container: Object, folder: str) -> Object | None:
    over = [
        mount
        for mount in container.get("volumeMounts", ())
        if f"{folder.rstrip('/')}/".startswith(mount["mountPath"].rstrip("/") + "/")
    ]
    return max(over, key=lambda mount: len(mount["mountPath"]), default=None)


def images(objects: Iterable[Object]) -> list[str]:
    """Every image names the version that it is."""
    problems = []
    for pod in pods_of(objects):
        for container in pod.containers:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in image and tag in ("", "latest", "main", "master", "nightly"):
                problems.append(f"{called(pod.owner)}: image {image} is not pinned")
    return problems


def requests_of(objects: Iterable[Object]) -> dict[str, float]:
    """CPU cores and bytes of memory that all pods of a rendering ask for at the same time."""
    total = {"cpu": 0.0, "memory": 0.0}
    for pod in pods_of(objects):
        replicas = pod.owner["spec"].get("replicas", 1)
        for what in total:
            main, initial = (
                [quantity(c["resources"]["requests"][what]) for c in pod.spec.get(key, ())]
                for key in ("containers", "initContainers")
            )
            # Those that prepare the pod run one after the other, before the rest.
            total[what] += replicas * max(sum(main), *initial, 0.0)
    return total


# -- Network


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a connection.

    Attributes:
        name: for messages and tables.
        labels: of the pod; none for somebody outside of the cluster.
        namespace: of the pod; its label `kubernetes.io/metadata.name` is known.
        address: the pod's, or that of the machine outside.
        ports: named ports.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str = "10.1.0.9"
    ports: Mapping[str | int, int] = field(default_factory=dict)


def peer_of(pod: Pod) -> Peer:
    """A pod of the rendering as an end of a connection."""
    return Peer(pod.owner["metadata"]["name"], pod.labels, ports=_ports(pod.spec["containers"]))


def allowed(
    objects: Iterable[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether the NetworkPolicies let `source` open a connection to a port of `target`."""
    policies = of_kind(objects, "NetworkPolicy")
    return all(
        _passes(policies, direction, own, other, target, port, protocol)
        for direction, own, other in (("Egress", source, target), ("Ingress", target, source))
    )


def _passes(
    policies: Iterable[Object],
    direction: str,
    own: Peer,
    other: Peer,
    target: Peer,
    port: int,
    protocol: str,
) -> bool:
    if not own.labels:
        return True  # no pod of the cluster: nothing here rules it
    side, rules_of = ("from", "ingress") if direction == "Ingress" else ("to", "egress")
    ruling = []
    for policy in policies:
        spec = policy["spec"]
        default = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
        home = policy["metadata"].get("namespace", NAMESPACE)
        if (
            direction in spec.get("policyTypes", default)
            and home == own.namespace
            and selects(spec.get("podSelector", {}), own.labels)
        ):
            ruling.append((home, spec.get(rules_of) or ()))
    return not ruling or any(
        (not rule.get(side) or any(_is_peer(peer, other, home) for peer in rule[side]))
        and (
            not rule.get("ports")
            or any(_is_port(entry, target, port, protocol) for entry in rule["ports"])
        )
        for home, rules in ruling
        for rule in rules
    )


def _is_peer(peer: Object, other: Peer, home: str) -> bool:
    if block := peer.get("ipBlock"):
        address = ip_address(other.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(hole) for hole in block.get("except", ())
        )
    if not other.labels:
        return False
    if "namespaceSelector" in peer:
        known = {"kubernetes.io/metadata.name": other.namespace}
        if not selects(peer["namespaceSelector"] or {}, known):
            return False
    elif other.namespace != home:
        return False
    return selects(peer.get("podSelector") or {}, other.labels)


def _is_port(entry: Object, target: Peer, port: int, protocol: str) -> bool:
    if entry.get("protocol", "TCP") != protocol:
        return False
    wanted = entry.get("port", port)
    if isinstance(wanted, str):
        return target.ports.get(wanted) == port
    return bool(wanted <= port <= entry.get("endPort", wanted))


def default_deny(objects: Sequence[Object]) -> list[str]:
    """A policy forbids every pod everything, both ways, that no other policy lets through."""
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        if (
            not spec.get("podSelector")
            and set(spec.get("policyTypes", ())) == {"Ingress", "Egress"}
            and not spec.get("ingress")
            and not spec.get("egress")
        ):
            return []
    return ["no NetworkPolicy denies every pod both ways by default"]


def implied_connections(objects: Sequence[Object]) -> set[tuple[str, str, int]]:
    """What pods are told to talk to: (workload, Service, port).

    Read from variables, arguments and the ConfigMaps that a pod mounts: `service:port` in any of
    its spellings, NAME_HOST or PGHOST with its NAME_PORT or PGPORT, and what Prometheus is to find
    by DNS.
    """
    maps = config_maps(objects)
    services = _names(objects, "Service")
    spelling = re.compile(
        rf"(?<![\w.-])({'|'.join(sorted(services, key=len, reverse=True))})"
        rf"(?:\.{NAMESPACE}(?:\.svc(?:\.cluster\.local)?)?)?:(\d+)\b"
    )
    discovered = re.compile(r"names:\s*\[([\w-]+)\]\s+type:\s*A\s+port:\s*(\d+)")
    found = set()
    for pod in pods_of(objects):
        own = pod.owner["metadata"]["name"]
        texts = []
        for container in pod.containers:
            known = variables(container, maps)
            words = [*container.get("command", ()), *container.get("args", ())]
            texts += [filled(word, known) for word in words]
            for name, value in known.items():
                texts.append(value)
                if name.endswith("HOST") and value in services:
                    port = known.get(f"{name.removesuffix('HOST')}PORT", "")
                    if port.isdigit():
                        texts.append(f"{value}:{port}")
        for volume in pod.volumes.values():
            texts += maps.get(volume.get("configMap", {}).get("name", ""), {}).values()
        found |= {
            (own, service, int(port))
            for text in texts
            for service, port in (*spelling.findall(text), *discovered.findall(text))
            if service != own
        }
    return found


# -- What people and scripts read

_KINDS = {
    "deployment": "Deployment",
    "deploy": "Deployment",
    "statefulset": "StatefulSet",
    "sts": "StatefulSet",
    "job": "Job",
    "cronjob": "CronJob",
    "service": "Service",
    "svc": "Service",
    "secret": "Secret",
    "ingress": "Ingress",
    "pvc": "PersistentVolumeClaim",
    "persistentvolumeclaim": "PersistentVolumeClaim",
}
_ANY_KIND = "|".join(_KINDS)
_VERBS = "create|delete|describe|exists|get|logs|patch|remove|restart|scale"
_NAMED = (
    re.compile(rf"(?<![\w./-])({_ANY_KIND})s?/([a-z][a-z0-9-]*)"),
    re.compile(rf"\b(?:{_VERBS}) ({_ANY_KIND})s? ([a-z][a-z0-9-]*)"),
)


def unknown_names(text: str, objects: Iterable[Object], secrets: Collection[str]) -> list[str]:
    """Objects that a script or a page names as kubectl takes them and nobody makes."""
    made = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    made |= {("Secret", name) for name in secrets}
    found = {(_KINDS[kind], name) for form in _NAMED for kind, name in form.findall(text)}
    return [f"{kind} {name} does not exist" for kind, name in sorted(found - made)]


def unknown_node_ports(text: str, expected: Collection[int]) -> list[str]:
    """Numbers that look like a NodePort of ours (30000 to 30999) and are none."""
    found = {int(number) for number in re.findall(r"(?<![\d.,])30\d{3}(?![\d,]|\.\d)", text)}
    return [f"{number} is no NodePort of ours" for number in sorted(found - set(expected))]
