"""Containers of rendered manifests as processes of this machine.

Command, arguments, environment and mounted files are those of the manifest. What differs is said in
one table (text -> text), for addresses and ports, and by folders in the place of mounts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from settings import PROJECT_ROOT
from tests.manifests.manifests import Object, container, find, pod

# What an image starts where the manifest gives arguments only.
ENTRYPOINTS = {
    "postgres": ["postgres"],
    "chrislusf/seaweedfs": ["weed"],
    # By Debian's names.
    "prom/prometheus": ["prometheus"],
    "prom/alertmanager": ["prometheus-alertmanager"],
    "quay.io/prometheuscommunity/postgres-exporter": ["prometheus-postgres-exporter"],
    "prom/statsd-exporter": ["statsd_exporter"],
}
_REFERENCE = re.compile(r"\$\((\w+)\)")


@dataclass(frozen=True, slots=True)
class Process:
    """What a container runs."""

    command: list[str]
    environment: dict[str, str]

    def run(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command,
            env=self.environment,
            cwd=PROJECT_ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )


@dataclass(slots=True)
class Cluster:
    """Rendered objects, Secrets, and where this machine puts things.

    Attributes:
        objects: what kubectl kustomize says.
        secrets: name -> key -> value.
        folder: mounts become folders below it.
        programs: folders that stand for the images' PATH.
        fields: values of the downward API.
        table: regular expression -> text, used on every argument, variable and mounted file.
        appended: arguments that a container gets beside its own; what it names itself wins.
    """

    objects: list[Object]
    secrets: dict[str, dict[str, str]]
    folder: Path
    programs: Sequence[Path]
    fields: dict[str, str] = field(default_factory=dict)
    table: dict[str, str] = field(default_factory=dict)
    appended: dict[str, list[str]] = field(default_factory=dict)

    def process(
        self, kind: str, name: str, container_name: str = "", *, use: str = "", **variables: str
    ) -> Process:
        """A container of an object.

        Args:
            kind, name: of the object.
            container_name: the object's own name where there is none.
            use: folder of its emptyDirs; one that was used before keeps what is in it.
            variables: to set otherwise than the manifest, for faults.
        """
        item = find(self.objects, kind, name)
        spec = pod(item)
        assert spec is not None
        found = container(spec, container_name or name)
        environment = {**self._environment(found), **variables}
        mounts = self._mounts(item, spec, found, use or name)
        image = re.sub(r"[:@].*", "", found["image"])
        command = found.get("command") or ENTRYPOINTS[image]
        arguments = [_expand(text, environment) for text in (*command, *found.get("args", []))]
        named = {text.partition("=")[0] for text in arguments if "=" in text}
        arguments += [
            text
            for text in self.appended.get(found["name"], [])
            if text.partition("=")[0] not in named
        ]
        local = {name: self._local(value, mounts) for name, value in environment.items()}
        return Process(
            [self._local(text, mounts) for text in arguments],
            {
                "PATH": os.pathsep.join([*map(str, self.programs), os.environ["PATH"]]),
                "LANG": "C.UTF-8",
                "TMPDIR": str(mounts.get("/tmp", self.folder)),  # noqa: S108
                # As the image sets it.
                "PYTHONPATH": str(PROJECT_ROOT),
                "PYTHONUNBUFFERED": "1",
                **local,
            },
        )

    def mount(self, kind: str, name: str, container_name: str, path: str) -> Path:
        """The folder that stands for a mount."""
        item = find(self.objects, kind, name)
        spec = pod(item)
        assert spec is not None
        return self._mounts(item, spec, container(spec, container_name), name)[path]

    def _environment(self, found: Object) -> dict[str, str]:
        environment: dict[str, str] = {}
        for source in found.get("envFrom", []):
            if "configMapRef" in source:
                environment |= find(self.objects, "ConfigMap", source["configMapRef"]["name"])[
                    "data"
                ]
            else:
                environment |= self.secrets[source["secretRef"]["name"]]
        for variable in found.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef", {})
            if reference.get("optional") and reference["name"] not in self.secrets:
                continue
            environment[variable["name"]] = (
                _expand(variable["value"], environment)
                if "value" in variable
                else self._value(variable["valueFrom"])
            )
        return environment

    def _value(self, source: Object) -> str:
        if "fieldRef" in source:
            return self.fields[source["fieldRef"]["fieldPath"]]
        if "secretKeyRef" in source:
            reference = source["secretKeyRef"]
            return self.secrets[reference["name"]][reference["key"]]
        reference = source["configMapKeyRef"]
        value: str = find(self.objects, "ConfigMap", reference["name"])["data"][reference["key"]]
        return value

    def _mounts(self, item: Object, spec: Object, found: Object, use: str) -> dict[str, Path]:
        volumes: dict[str, Any] = {volume["name"]: volume for volume in spec.get("volumes", [])}
        mounts = {}
        for mount in found.get("volumeMounts", []):
            folder = self.folder / use / mount["name"]
            folder.mkdir(parents=True, exist_ok=True)
            mounts[mount["mountPath"]] = folder
            volume = volumes.get(mount["name"], {})
            if "secret" in volume:
                if volume["secret"].get("optional") and (
                    volume["secret"]["secretName"] not in self.secrets
                ):
                    continue
                content: Mapping[str, str] = self.secrets[volume["secret"]["secretName"]]
                items = volume["secret"].get("items")
            elif "configMap" in volume:
                content = find(self.objects, "ConfigMap", volume["configMap"]["name"])["data"]
                items = volume["configMap"].get("items")
            else:
                continue
            files = {entry["path"]: entry["key"] for entry in items} if items else None
            for path, key in (files or {key: key for key in content}).items():
                (folder / path).write_text(self._local(content[key], {}))
        return mounts

    def _local(self, text: str, mounts: Mapping[str, Path]) -> str:
        for pattern, replacement in self.table.items():
            text = re.sub(pattern, replacement, text)
        if not mounts:
            return text
        # One pass, the longest first: what has been put in must not be looked at again.
        paths = "|".join(map(re.escape, sorted(mounts, key=len, reverse=True)))
        return re.sub(
            rf"(?<![\w./-])({paths})(?![\w.-])", lambda match: str(mounts[match[1]]), text
        )


def _expand(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` as the kubelet does: what is unknown stays."""
    return _REFERENCE.sub(lambda match: environment.get(match[1], match[0]), text)


PYTHON_PROGRAMS = Path(sys.executable).parent
