"""Prometheus, Alertmanager and the exporters of others, where this machine has their programs.

None of them comes with a Python package, so none is required: what is not there is named in one
line, with the way to get it. All listen on the loopback address only.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from services import processes
from services.databases import MONITOR
from settings import PROJECT_ROOT, Settings

RULES = (PROJECT_ROOT / "monitoring" / "prometheus" / "rules" / "*.yaml",)
STATSD_MAPPINGS = PROJECT_ROOT / "monitoring" / "prometheus" / "statsd-mappings.yaml"
OFF = "off"

_INTERVAL = "5s"
_RETENTION = ("15d", "1GB")
_PORT = "DIABETES_SERVICE_PORT"
_STATSD_UDP = "DIABETES_STATSD_UDP_PORT"

log = logging.getLogger(__name__)


class ObservabilityError(Exception):
    """A program can't be used, or did not start; the message says why, or where its log is."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that this machine may have.

    Attributes:
        name: by which its process is found again.
        title: for messages.
        programs: names on the PATH, Debian's and the publisher's.
        variable: the setting that names its path.
        preferred_port: where it listens if it can.
        missing: what there is not without it.
        how: where it can be had.
    """

    name: str
    title: str
    programs: tuple[str, ...]
    variable: str
    preferred_port: int
    missing: str
    how: str

    @property
    def advice(self) -> str:
        """One line for those who do not have it."""
        return f"{self.title}: not found, {self.missing}; {self.how} or set {self.variable}"


PROMETHEUS = Tool(
    "prometheus",
    "Prometheus",
    ("prometheus",),
    "DIABETES_PROMETHEUS",
    9090,
    "no history of metrics and no alerts here",
    "install Debian's package prometheus",
)
ALERTMANAGER = Tool(
    "alertmanager",
    "Alertmanager",
    ("prometheus-alertmanager", "alertmanager"),
    "DIABETES_ALERTMANAGER",
    9093,
    "nobody is told of alerts",
    "install Debian's package prometheus-alertmanager",
)
POSTGRES_EXPORTER = Tool(
    "postgres-exporter",
    "PostgreSQL's exporter",
    ("prometheus-postgres-exporter", "postgres_exporter"),
    "DIABETES_POSTGRES_EXPORTER",
    9187,
    "no metrics of the server itself",
    "install Debian's package prometheus-postgres-exporter",
)
STATSD_EXPORTER = Tool(
    "statsd-exporter",
    "StatsD exporter",
    ("statsd_exporter", "prometheus-statsd-exporter"),
    "DIABETES_STATSD_EXPORTER",
    9102,
    "no metrics of Airflow's own",
    "get statsd_exporter from the Prometheus project",
)


def find_tool(tool: Tool, chosen: str) -> Path | None:
    """The program of a tool.

    Args:
        tool: which.
        chosen: the setting: a path, `off`, or empty to look on the PATH.

    Returns:
        Its path; None where there is none or it is switched off.

    Raises:
        ObservabilityError: the path that was chosen is no program.
    """
    if is_off(chosen):
        return None
    if chosen:
        found = shutil.which(Path(chosen).expanduser())
        if found is None:
            raise ObservabilityError(
                f"{tool.variable} is {chosen}, which is no program; name its file, or say off"
            )
        return Path(found).absolute()
    for program in tool.programs:
        if found := shutil.which(program):
            return Path(found)
    return None


def is_off(chosen: str) -> bool:
    """Whether a setting switches a program off."""
    return chosen.strip().lower() == OFF


class Server:
    """A program that serves HTTP and outlives `make run`.

    Args:
        state: folder of the platform's state.
        tool: what it is.
        binary: its program.
        health: path that answers 200 as soon as it serves.
    """

    def __init__(self, state: Path, tool: Tool, binary: Path, health: str) -> None:
        self._state = state
        self._tool = tool
        self._binary = binary
        self._health = health
        self._home = state / tool.name
        self._log = state / "logs" / f"{tool.name}.log"
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no business on the loopback address

    @property
    def port(self) -> int | None:
        """The port of the one that runs; None where none does."""
        running = processes.environments(self._state, self._tool.name)
        return int(running[0][_PORT]) if running else None

    @property
    def url(self) -> str:
        """Where it is; empty where it does not run."""
        port = self.port
        return f"http://127.0.0.1:{port}" if port else ""

    def wait_until_ready(self, timeout: float = 60) -> int:
        """Return the port when it serves.

        Raises:
            ObservabilityError: it has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            port = self.port
            if port is None:
                raise ObservabilityError(
                    f"{self._tool.title} has ended; see {self._log}, or go on without it: "
                    f"{self._tool.variable}={OFF}"
                )
            if self._get(port, self._health):
                return port
            time.sleep(0.1)
        raise ObservabilityError(
            f"{self._tool.title} does not answer after {timeout:.0f} s; see {self._log}"
        )

    def _run(self, preferred: int, flags: Sequence[str], variables: Mapping[str, str]) -> int:
        """Start it unless one with the same variables runs, and return its port.

        In flags, `{port}` stands for that port.
        """
        known = processes.environments(self._state, self._tool.name)
        if known and all(known[0].get(name) == value for name, value in variables.items()):
            return int(known[0][_PORT])
        processes.stop(self._state, self._tool.name)
        port = processes.free_port(preferred)
        self._home.mkdir(parents=True, exist_ok=True)
        command = [str(self._binary), *(flag.replace("{port}", str(port)) for flag in flags)]
        given = {**os.environ, **variables, _PORT: str(port)}
        processes.start(self._tool.name, command, self._state, given, self._log)
        return port

    def _reload(self, metrics: str, timeout: float = 30) -> None:
        """Have a running one read its configuration again, and see that it did.

        Args:
            metrics: what its metrics on the configuration begin with.
            timeout: seconds to wait.

        Raises:
            ObservabilityError: it can't use it, or does not answer.
        """
        port = self.wait_until_ready(timeout)
        moment = f"{metrics}_config_last_reload_success_timestamp_seconds"
        succeeded = f"{metrics}_config_last_reload_successful"
        before = self._values(port)
        for process in processes.find(self._state, self._tool.name):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            values = self._values(port)
            if values.get(moment, 0.0) > before.get(moment, 0.0):
                return
            # A failure that was there before the signal says nothing of what came with it.
            if values.get(succeeded) == 0 and before.get(succeeded) != 0:
                break
            time.sleep(0.05)
        raise ObservabilityError(
            f"{self._tool.title} goes on with its old configuration, the new one can't be used; "
            f"see {self._log}"
        )

    def _values(self, port: int) -> dict[str, float]:
        """Metrics of its own that have no labels."""
        answer = self._get(port, "/metrics")
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(answer.text if answer else "")
            for sample in family.samples
            if not sample.labels
        }

    def _get(self, port: int, path: str) -> requests.Response | None:
        try:
            answer = self._session.get(f"http://127.0.0.1:{port}{path}", timeout=5)
        except requests.RequestException:
            return None
        return answer if answer.ok else None


def configuration(
    targets: Mapping[str, str],
    *,
    alertmanager: str = "",
    rules: Sequence[Path] = RULES,
    scrape_interval: str = _INTERVAL,
    evaluation_interval: str = _INTERVAL,
) -> dict[str, Any]:
    """What Prometheus (2.x and 3.x) is to scrape, and whom to tell.

    Args:
        targets: host:port of each job.
        alertmanager: host:port; empty: nobody is told.
        rules: files of rules, each may be a pattern.
        scrape_interval: between two scrapes of a target.
        evaluation_interval: between two evaluations of a rule.
    """
    jobs = {**targets, **({"alertmanager": alertmanager} if alertmanager else {})}
    made: dict[str, Any] = {
        "global": {
            "scrape_interval": scrape_interval,
            "scrape_timeout": scrape_interval,
            "evaluation_interval": evaluation_interval,
        },
        "rule_files": [str(rule) for rule in rules],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]}
            for job, target in sorted(jobs.items())
        ],
    }
    if alertmanager:
        made["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
    return made


class Prometheus(Server):
    """A Prometheus with its data in `prometheus/` of a state folder.

    Args:
        state: the folder.
        binary: its program.
    """

    def __init__(self, state: Path, binary: Path) -> None:
        super().__init__(state, PROMETHEUS, binary, "/-/ready")

    def start(
        self,
        targets: Mapping[str, str],
        *,
        alertmanager: str = "",
        rules: Sequence[Path] = RULES,
        preferred_port: int = PROMETHEUS.preferred_port,
        scrape_interval: str = _INTERVAL,
        evaluation_interval: str = _INTERVAL,
    ) -> int:
        """Start it, or have the running one read the new configuration; return its port.

        A started one is not waited for. Arguments as in `configuration`; the job `prometheus`
        is added.

        Raises:
            ObservabilityError: the running one can't use the configuration.
        """
        file = self._home / "prometheus.yaml"
        running = self.port
        time_limit, size_limit = _RETENTION
        port = running or processes.free_port(preferred_port)
        made = configuration(
            {"prometheus": f"127.0.0.1:{port}", **targets},
            alertmanager=alertmanager,
            rules=rules,
            scrape_interval=scrape_interval,
            evaluation_interval=evaluation_interval,
        )
        self._home.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        partial.write_text(
            f"# Written by services/observability.py.\n{yaml.safe_dump(made, sort_keys=False)}",
            encoding="utf-8",
        )
        partial.replace(file)
        if running:
            self._reload("prometheus")
            return running
        return self._run(
            port,
            [
                f"--config.file={file}",
                f"--storage.tsdb.path={self._home / 'data'}",
                f"--storage.tsdb.retention.time={time_limit}",
                f"--storage.tsdb.retention.size={size_limit}",
                "--web.listen-address=127.0.0.1:{port}",
            ],
            {},
        )


class Alertmanager(Server):
    """An Alertmanager with its data in `alertmanager/` of a state folder.

    Args:
        state: the folder.
        binary: its program.
    """

    def __init__(self, state: Path, binary: Path) -> None:
        super().__init__(state, ALERTMANAGER, binary, "/-/ready")

    def start(self, config: Path, *, preferred_port: int = ALERTMANAGER.preferred_port) -> int:
        """Start it, or have the running one read its configuration; return its port.

        A started one is not waited for.

        Args:
            config: its configuration. Where there is no such file, alerts are shown and nobody
                is told.
            preferred_port: where it listens if it can.

        Raises:
            ObservabilityError: the running one can't use the configuration.
        """
        if not config.exists():
            log.warning("Alertmanager: %s is not there: alerts are shown, nobody is told", config)
            config = self._home / "alertmanager.yaml"
            nobody = {"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}
            self._home.mkdir(parents=True, exist_ok=True)
            config.write_text(yaml.safe_dump(nobody), encoding="utf-8")
        before = self.port
        port = self._run(
            preferred_port,
            [
                f"--config.file={config}",
                f"--storage.path={self._home / 'data'}",
                "--web.listen-address=127.0.0.1:{port}",
                # It is alone: without this it would listen to others on every address.
                "--cluster.listen-address=",
            ],
            {"DIABETES_ALERTMANAGER_CONFIG": str(config)},
        )
        if port == before:
            self._reload("alertmanager")
        return port


class PostgresExporter(Server):
    """The exporter of PostgreSQL's own statistics.

    Args:
        state: folder of the platform's state.
        binary: its program.
    """

    def __init__(self, state: Path, binary: Path) -> None:
        super().__init__(state, POSTGRES_EXPORTER, binary, "/")

    def start(
        self,
        postgres_port: int,
        password: str,
        *,
        user: str = MONITOR,
        database: str = "diabetes",
        preferred_port: int = POSTGRES_EXPORTER.preferred_port,
    ) -> int:
        """Start it if it is down or knows another database; return its port.

        Args:
            postgres_port: of the server on the loopback address.
            password: of the role.
            user: role that may read statistics.
            database: where it logs in.
            preferred_port: where it listens if it can.
        """
        return self._run(
            preferred_port,
            [
                "--web.listen-address=127.0.0.1:{port}",
                # Debian's asks for columns that PostgreSQL 17 has elsewhere, and logs it each time.
                "--no-collector.bgwriter",
            ],
            {
                # On a command line everyone could read the password.
                "DATA_SOURCE_URI": f"127.0.0.1:{postgres_port}/{database}?sslmode=disable",
                "DATA_SOURCE_USER": user,
                "DATA_SOURCE_PASS": password,
            },
        )


class StatsdExporter(Server):
    """The exporter that Airflow counts for.

    Args:
        state: folder of the platform's state.
        binary: its program.
    """

    def __init__(self, state: Path, binary: Path) -> None:
        super().__init__(state, STATSD_EXPORTER, binary, "/metrics")

    @property
    def udp_port(self) -> int | None:
        """Where the one that runs is counted for; None where none runs."""
        running = processes.environments(self._state, self._tool.name)
        return int(running[0][_STATSD_UDP]) if running else None

    def start(
        self,
        preferred_udp_port: int = 9125,
        *,
        mappings: Path = STATSD_MAPPINGS,
        preferred_port: int = STATSD_EXPORTER.preferred_port,
    ) -> int:
        """Start it if it is down; return its web port.

        Args:
            preferred_udp_port: where it is counted for, if it can.
            mappings: which counts get which names; left out where there is no such file.
            preferred_port: where it answers Prometheus if it can.
        """
        udp = self.udp_port or free_udp_port(preferred_udp_port)
        flags = [
            "--web.listen-address=127.0.0.1:{port}",
            f"--statsd.listen-udp=127.0.0.1:{udp}",
            "--statsd.listen-tcp=",
        ]
        known = str(mappings) if mappings.exists() else ""
        if known:
            flags.append(f"--statsd.mapping-config={known}")
        variables = {_STATSD_UDP: str(udp), "DIABETES_STATSD_MAPPINGS": known}
        return self._run(preferred_port, flags, variables)


def free_udp_port(preferred: int) -> int:
    """The preferred UDP port of the loopback address if nobody has it, else a free one."""
    for port in (*range(preferred, preferred + 20), 0):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free UDP port on 127.0.0.1")


class Observability:
    """What `make run` starts of all this, and where it is.

    Args:
        chosen: the settings.

    Raises:
        ObservabilityError: a setting names no program.
    """

    def __init__(self, chosen: Settings) -> None:
        self._settings = chosen
        self._state = chosen.state_dir
        chosen_programs = {
            PROMETHEUS: chosen.prometheus,
            ALERTMANAGER: chosen.alertmanager,
            POSTGRES_EXPORTER: chosen.postgres_exporter,
            STATSD_EXPORTER: chosen.statsd_exporter,
        }
        self._binaries = {tool: find_tool(tool, name) for tool, name in chosen_programs.items()}
        self._off = {tool for tool, name in chosen_programs.items() if is_off(name)}
        self._started: list[Server] = []
        self.targets: dict[str, str] = {}
        self.urls: dict[str, str] = {}

    def start_statsd(self, known_port: int | None) -> int | None:
        """Start the exporter that Airflow counts for; before Airflow, which has to know its port.

        Args:
            known_port: UDP port that a running Airflow sends to, if it sends at all.

        Returns:
            The UDP port; None where there is no exporter.
        """
        binary = self._program(STATSD_EXPORTER)
        if binary is None:
            return None
        server = StatsdExporter(self._state, binary)
        port = server.start(known_port or 9125)
        self._add(server, "airflow", port)
        return server.udp_port

    def start(self, postgres_port: int, monitor_password: str, targets: Mapping[str, str]) -> None:
        """Start the rest, and wait until all of it answers.

        Args:
            postgres_port: of the embedded server.
            monitor_password: of the role `monitoring` there.
            targets: host:port of each job that is there by now.

        Raises:
            ObservabilityError: what did not start, and where its log is.
        """
        self.targets.update(targets)
        if binary := self._program(POSTGRES_EXPORTER):
            exporter = PostgresExporter(self._state, binary)
            self._add(exporter, "postgres", exporter.start(postgres_port, monitor_password))
        told = ""
        if binary := self._program(ALERTMANAGER):
            alertmanager = Alertmanager(self._state, binary)
            port = alertmanager.start(
                self._settings.alertmanager_config, preferred_port=self._settings.alertmanager_port
            )
            told = f"127.0.0.1:{port}"
            self._add(alertmanager, "", port)
            self.urls[ALERTMANAGER.title] = f"http://{told}"
        if binary := self._program(PROMETHEUS):
            prometheus = Prometheus(self._state, binary)
            port = prometheus.start(
                self.targets, alertmanager=told, preferred_port=self._settings.prometheus_port
            )
            self._add(prometheus, "", port)
            self.urls[PROMETHEUS.title] = f"http://127.0.0.1:{port}"
        for server in self._started:
            server.wait_until_ready()

    def _program(self, tool: Tool) -> Path | None:
        """The program of a tool; where there is none, one that still runs is ended."""
        binary = self._binaries[tool]
        if binary is None:
            processes.stop(self._state, tool.name)
            if tool in self._off:
                log.info("%s: switched off by %s", tool.title, tool.variable)
            else:
                log.info("%s", tool.advice)
        return binary

    def _add(self, server: Server, job: str, port: int) -> None:
        self._started.append(server)
        if job:
            self.targets[job] = f"127.0.0.1:{port}"
