"""What `kubectl kustomize` makes of a folder, and finding one's way in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from settings import PROJECT_ROOT

Object = dict[str, Any]

K8S = PROJECT_ROOT / "infra" / "k8s"
KUBECTL = Path(sys.executable).with_name("kubectl")


@cache
def _text(path: Path) -> str:
    done = subprocess.run([KUBECTL, "kustomize", path], capture_output=True, text=True, check=False)
    assert not done.returncode, f"kubectl kustomize {path}: {done.stderr}"
    return done.stdout


def render(path: str | Path) -> list[Object]:
    """Objects of a kustomization: a path, or one below infra/k8s such as "overlays/microk8s"."""
    # Parsed anew each time: a test may break what it gets. In C, for dashboards are large.
    return [found for found in yaml.load_all(_text(K8S / path), yaml.CSafeLoader) if found]


def find(objects: Iterable[Object], kind: str, name: str) -> Object:
    """The one object of this kind and name; a name with a hash of its content is found without."""
    found = [
        item
        for item in objects
        if item["kind"] == kind
        and (item["metadata"]["name"] == name or _unhashed(item["metadata"]["name"]) == name)
    ]
    assert len(found) == 1, f"{len(found)} objects {kind}/{name}"
    return found[0]


def pod(item: Object) -> Object | None:
    """Spec of the pods that an object makes; None where it makes none."""
    if item["kind"] == "Pod":
        return item["spec"]
    if item["kind"] == "CronJob":
        item = item["spec"]["jobTemplate"]
    return item["spec"].get("template", {}).get("spec") if "spec" in item else None


def pods(objects: Iterable[Object]) -> Iterator[tuple[Object, Object]]:
    """Each object that makes pods, and their spec."""
    for item in objects:
        spec = pod(item)
        if spec is not None:
            yield item, spec


def containers(spec: Object) -> list[Object]:
    """All containers of a pod in the order of their start: the initContainers first."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def container(spec: Object, name: str) -> Object:
    """The container of this name."""
    (found,) = (item for item in containers(spec) if item["name"] == name)
    return found


def _unhashed(name: str) -> str:
    # kustomize's hash: ten characters of its own alphabet, which has no vowels to speak of.
    stem, _, end = name.rpartition("-")
    return stem if len(end) == 10 and set(end) <= set("bcdfghkmt2456789") else name
