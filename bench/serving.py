"""`python -m bench.serving`: what a prediction costs, beside `mlflow models serve`.

On the champion that MLFLOW_TRACKING_URI has, over the loopback address: how fast the API is ready
and what memory it takes, one encounter at a time, many callers at once, the real CSV and a JSON
batch, and what the prediction log and a shadow add. The log goes to a PostgreSQL of the
benchmark's own (the platform's configuration), so that nothing is left in the data database and
what was logged can be counted. The exit code does not depend on the limits.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as package_version
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import psycopg2

from bench.errors import BenchError
from bench.files import BaseFile, base_file
from bench.load import (
    BATCH_TIMEOUT,
    HOST,
    Client,
    accept,
    get,
    one_by_one,
    percentile,
    request,
    send_csv,
)
from bench.report import Context, describe
from bench.server import Server, running_server
from bench.usage import cpu_seconds, run, sampled
from ingestion.errors import IngestionError
from services.mlflow_server import MlflowServer
from services.postgres import PostgresError
from services.processes import free_port
from serving.errors import RegistryError
from serving.records import ACCEPTED, MOST_ENCOUNTERS
from serving.registry import Registry
from settings import PROJECT_ROOT, REGISTERED_MODEL, Settings, settings

PREDICT, BATCH, INVOCATIONS = "/v1/predict", "/v1/predict/batch", "/invocations"
CHALLENGER = "challenger"

CLIENTS = 16
SINGLES = 3_000
MLFLOW_SINGLES = 1_000
"""A round; each takes it ten times as long."""
WARM_UP = 200
MLFLOW_LOAD_SECONDS = 15.0
TOLERANCE = 1e-9
IDLE_LOAD = 0.5

_DATABASE = "bench_serving"
_PORT = 57800
_START_TIMEOUT = 180.0
_STOP_TIMEOUT = 40.0
_LOG_TIMEOUT = 180.0
_SETTLE_TIMEOUT = 60.0
_IDLE_CPU = 0.05
"""Seconds of CPU in a second below which processes count as idle."""
_SAMPLE_SECONDS = 1.0
_PACKAGES = ("mlflow", "fastapi", "uvicorn", "uvloop", "pandas")

log = logging.getLogger("bench")

_METHOD = f"""\
- Clients, the services and PostgreSQL share the machine's cores; nothing crosses a network. The
  clients are raw sockets with keep-alive (`bench/load.py`), the same for us and for MLflow.
- A value of several rounds is their median, with the smallest and the largest in brackets; a limit
  is held against the median.
- Start: from the fork of `python -m serving` to the first 200 of `/readyz`, asked 50 times a
  second; with an empty state folder the model is downloaded from MLflow and tested, with a filled
  one it is loaded and tested.
- Memory: of the service and all its children (batch workers, their forkserver), idle once nothing
  of it used CPU, and the largest of one look a second during the load, the CSV and the JSON batch.
  PSS counts a page that several processes have in equal parts, so a library that another service
  on the machine maps as well counts less here; RSS counts it whole in every process.
- One encounter: {SINGLES:,} requests a round to us ({MLFLOW_SINGLES:,} to MLflow), one after the
  other over one connection, after {WARM_UP} that don't count; from the send to the last byte. The
  encounters are the examples that the model brings (validation rows), in turn. The services take
  turns within a round; the others are idle meanwhile.
- {CLIENTS} clients: each sends its next request as soon as it has its answer, one run. Failures
  are answers other than 200, broken connections, and 30 s without an answer; they count in no rate.
- `mlflow models serve` is started as its manual says (`--env-manager local`, one worker, which is
  its default) on the same version, and is asked for no reasons (`top` 0), as `/v1/predict` gives
  none. It logs each access to a file, as it does by default, and keeps no prediction log. Its
  probabilities were compared with ours before.
- CSV: from the connection to the last byte of the answer, which is read while the file is sent;
  encounters are rows of the file. After each the log has to hold exactly the predictions of the
  answer; "log complete" is the time from the answer until it does. JSON: the first
  {MOST_ENCOUNTERS:,} rows of the same file as one batch.
- The prediction log is on everywhere but where the table says so. It goes to a PostgreSQL of the
  benchmark's own on the same machine, with the platform's configuration.
"""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table.

    Attributes:
        name: what was measured.
        unit: of the values.
        values: of the rounds.
        at_most, at_least: its limit, where it has one.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def limit(self) -> str:
        """The limit in words; empty where there is none."""
        if self.at_most is not None:
            return f"<= {self.at_most:,g}"
        return f">= {self.at_least:,g}" if self.at_least is not None else ""

    @property
    def word(self) -> str:
        """`ok`, `MISSED`, or nothing where there is no limit."""
        if self.at_most is not None:
            return "ok" if self.value <= self.at_most else "MISSED"
        if self.at_least is not None:
            return "ok" if self.value >= self.at_least else "MISSED"
        return ""

    @property
    def measured(self) -> str:
        """The median, and how far the rounds lie apart."""
        said = number(self.value)
        if len(self.values) > 1:
            said += f" ({number(min(self.values))}-{number(max(self.values))})"
        return said


def number(value: float) -> str:
    """A number with about three digits that say something."""
    if value == int(value) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def as_text(lines: Sequence[Line]) -> str:
    """The table for a terminal."""
    table = [("", "", "measured", "limit", ""), *map(_cells, lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _cells(line: Line) -> tuple[str, str, str, str, str]:
    return (line.name, line.unit, line.measured, line.limit, line.word)


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run found.

    Attributes:
        about: machine, call and data.
        model: name, version and kind of the champion, and the challenger's version.
        versions: of what serves.
        facts: sentences about what was checked.
        lines: of the table.
    """

    about: Context
    model: Mapping[str, str]
    versions: Mapping[str, str]
    facts: Sequence[str]
    lines: Sequence[Line]


def as_markdown(results: Results) -> str:
    """The results as a page."""
    about, model = results.about, results.model
    rows = []
    for line in results.lines:
        name, unit, measured, limit, word = _cells(line)
        word = "**MISSED**" if word == "MISSED" else word
        rows.append(f"| {name} | {measured} {unit} | {limit} | {word} |")
    return "\n".join(
        [
            "# Serving, measured",
            "",
            f"`{about.command}` on {about.cpu_model}, {about.cores} cores, {about.memory_gib} GiB, "
            f"{about.system}; {about.date}, commit {about.commit or 'not a clone'}. Load average "
            f"before the start: {about.load_before}.",
            "",
            f"Model: {model['name']} version {model['version']} ({model['candidate']}). Python "
            f"{about.python}, PostgreSQL {about.postgresql}, "
            + ", ".join(f"{name} {found}" for name, found in results.versions.items())
            + f". CSV: {about.data}, {about.data_rows:,} rows, {about.data_bytes:,} bytes.",
            "",
            "| | measured | limit | |",
            "|---|---|---|---|",
            *rows,
            "",
            *(f"- {fact}" for fact in results.facts),
            "",
            "## How it is measured",
            "",
            _METHOD,
        ]
    )


def write(folder: Path, results: Results) -> None:
    """Write results.md and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "context": asdict(results.about),
        "model": dict(results.model),
        "versions": dict(results.versions),
        "facts": list(results.facts),
        "lines": [
            asdict(line) | {"median": line.value, "verdict": line.word} for line in results.lines
        ],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(as_markdown(results), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Running:
    """A service that was started here.

    Attributes:
        process: it; the others are its children.
        port: where it listens.
        ready: seconds from its start until it was ready.
    """

    process: psutil.Process
    port: int
    ready: float

    @property
    def tree(self) -> list[psutil.Process]:
        """It and its children, those that live."""
        with suppress(psutil.Error):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def memory(self) -> tuple[float, float]:
        """PSS and RSS of all its processes together, in MiB."""
        pss = rss = 0
        for process in self.tree:
            with suppress(psutil.Error):  # it may end meanwhile
                found = process.memory_full_info()
                pss += getattr(found, "pss", found.rss)
                rss += found.rss
        return pss / (1 << 20), rss / (1 << 20)


def settle(*services: Running) -> None:
    """Wait until services have done what they had to do: workers warmed, logs copied."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT
    while time.monotonic() < deadline:
        before = sum(cpu_seconds(service.tree) for service in services)
        time.sleep(1)
        if sum(cpu_seconds(service.tree) for service in services) - before <= _IDLE_CPU:
            return
    log.warning("a service does not come to rest; going on")


@contextmanager
def service(
    command: Sequence[str], environment: Mapping[str, str], port: int, path: str, said: Path
) -> Iterator[Running]:
    """Start a service, wait until a path of it answers 200, and end it with all its children.

    Args:
        command: what to start.
        environment: variables beside ours.
        port: where it will listen.
        path: which tells that it is ready.
        said: file for its output.

    Raises:
        BenchError: it ended, or was not ready in time.
    """
    begin = time.perf_counter()
    with said.open("ab") as output:
        started = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for us; we end it.
            start_new_session=True,
        )
    process = psutil.Process(started.pid)
    try:
        while True:
            with suppress(OSError, BenchError):
                get(port, path)
                break
            if started.poll() is not None or time.perf_counter() - begin > _START_TIMEOUT:
                tail = said.read_text(errors="replace")[-2000:]
                raise BenchError(f"{shlex.join(command)} did not become ready; it says:\n{tail}")
            time.sleep(0.02)
        yield Running(process, port, time.perf_counter() - begin)
    finally:
        _end(started, process)


def _end(started: subprocess.Popen[bytes], process: psutil.Process) -> None:
    """First the process itself, which ends its children, then whatever is left of them.

    psutil knows a process by its start as well, so no recycled pid is hit.
    """
    try:
        children = process.children(recursive=True)
    except psutil.Error:
        children = []
    if started.poll() is None:
        started.terminate()
        try:
            started.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
    _, alive = psutil.wait_procs(children, timeout=3)
    for child in alive:
        with suppress(psutil.Error):
            child.terminate()
    _, alive = psutil.wait_procs(alive, timeout=5)
    for child in alive:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(alive, timeout=5)


@dataclass(frozen=True, slots=True)
class Champion:
    """What both services serve, and what they are asked.

    Attributes:
        version: of the registered model.
        candidate: kind of model.
        ours, theirs: bodies of single requests, the same encounters.
    """

    version: str
    candidate: str
    ours: tuple[bytes, ...]
    theirs: tuple[bytes, ...]


def bodies(
    examples: Sequence[Mapping[str, Any]],
) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Encounters as `/v1/predict` and as `/invocations` want them.

    MLflow's signature of the model has numbers as doubles, because pandas knows no missing
    integer.
    """
    doubles = {name for name, field in ACCEPTED.items() if field.kind in ("id", "count", "code")}
    ours, theirs = [], []
    for example in examples:
        ours.append(json.dumps(example).encode())
        record = {
            name: float(value) if name in doubles and isinstance(value, int) else value
            for name, value in example.items()
        }
        theirs.append(
            json.dumps({"dataframe_records": [record], "params": {"top": 0}}).encode(),
        )
    return tuple(ours), tuple(theirs)


def json_batch(path: Path, most: int) -> tuple[bytes, int]:
    """The first rows of the publisher's CSV as a JSON batch, and how many they are."""
    encounters: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if len(encounters) == most:
                break
            encounters.append(
                {
                    name: int(row[name])
                    if field.kind in ("id", "count", "code") and row[name].isdigit()
                    else row[name]
                    for name, field in ACCEPTED.items()
                    if name in row
                }
            )
    return json.dumps({"encounters": encounters}).encode(), len(encounters)


@dataclass(frozen=True, slots=True)
class CsvAnswer:
    """What a CSV answer holds: ids of predictions, and how many rows got none, and why."""

    ids: frozenset[str]
    excluded: int
    broken: int


def read_csv_answer(body: bytes, rows: int) -> CsvAnswer:
    """Read the answer to a CSV.

    Raises:
        BenchError: it has not exactly one line a row, in order, each with one outcome.
    """
    ids, excluded, broken, count = set(), 0, 0, 0
    for count, row in enumerate(csv.DictReader(io.StringIO(body.decode())), start=1):
        outcomes = [row["prediction_id"], row["excluded"], row["error"]]
        if row["row"] != str(count) or sum(map(bool, outcomes)) != 1:
            raise BenchError(f"line {count} of the answer is not that row's: {row}")
        if row["prediction_id"]:
            ids.add(row["prediction_id"])
        excluded += bool(row["excluded"])
        broken += bool(row["error"])
    if count != rows or len(ids) + excluded + broken != rows:
        raise BenchError(f"the answer has {count:,} lines and {len(ids):,} ids for {rows:,} rows")
    return CsvAnswer(frozenset(ids), excluded, broken)


class Bench:
    """One run.

    Args:
        chosen: the settings.
        server: PostgreSQL of the benchmark's own, for the prediction log.
        folder: temporary; state folders and output of the services.
        rounds: of everything that is short.
        seconds: of the load.
    """

    def __init__(
        self, chosen: Settings, server: Server, folder: Path, rounds: int, seconds: float
    ) -> None:
        self._chosen = chosen
        self._server = server
        self._folder = folder
        self._rounds = rounds
        self._seconds = seconds
        self._lines: list[Line] = []
        self.facts: list[str] = []

    def measure(self, version: str, challenger: str, data: BaseFile) -> tuple[Champion, list[Line]]:
        """Measure everything.

        Raises:
            BenchError: a service did not start, fail or lose something.
        """
        self._server.fresh(_DATABASE)
        champion = self._compared(version)
        self._starts()
        with self._api("main") as api:
            settle(api)
            ours = self._memory_and_throughput(api, champion, data)
        with self._mlflow(champion.version) as theirs:
            with ExitStack() as stack:
                apis = {"": stack.enter_context(self._api("main"))}
                apis[", without the log"] = stack.enter_context(
                    self._api("no-log", DIABETES_PREDICTION_LOG="false")
                )
                if challenger:
                    apis[", with a challenger in the shadow"] = stack.enter_context(
                        self._api("shadow", DIABETES_API_SHADOW="true")
                    )
                    self._wait_for_shadow(apis[", with a challenger in the shadow"], challenger)
                self._singles(apis, theirs, champion)
                for api in apis.values():
                    self._check_version(api, champion.version)
            self._baseline(theirs, champion, ours)
        return champion, self._lines

    def _add(self, name: str, unit: str, *values: float, **limit: float) -> None:
        line = Line(name, unit, values, **limit)
        self._lines.append(line)
        log.info("%-52s %s %s  %s", line.name, line.measured, line.unit, line.word)

    def _api(self, name: str, **variables: str) -> AbstractContextManager[Running]:
        """`python -m serving` on the champion, with a state folder of that name."""
        state = self._folder / name
        state.mkdir(exist_ok=True)
        port = free_port(_PORT)
        environment = {
            **self._server.environment(_DATABASE),
            "DIABETES_STATE_DIR": str(state),
            "MLFLOW_TRACKING_URI": self._chosen.mlflow_tracking_uri,
            "DIABETES_API_HOST": HOST,
            "DIABETES_API_PORT": str(port),
            "DIABETES_API_KEY_HASHES": "",
            "DIABETES_API_SHADOW": "false",
            "DIABETES_PREDICTION_LOG": "true",
            "DIABETES_PREDICTION_LOG_KEY": "of the benchmark",
            **variables,
        }
        command = [sys.executable, "-m", "serving"]
        return service(command, environment, port, "/readyz", state / "output.log")

    def _mlflow(self, version: str) -> AbstractContextManager[Running]:
        """`mlflow models serve` on the same version; named by number, so that it stays the same."""
        downloads = self._folder / "mlflow"
        downloads.mkdir(exist_ok=True)
        port = free_port(_PORT)
        command = [
            str(Path(sys.executable).with_name("mlflow")),
            *("models", "serve", "-m", f"models:/{REGISTERED_MODEL}/{version}"),
            *("--env-manager", "local", "-h", HOST, "-p", str(port)),
        ]
        environment = {
            "MLFLOW_TRACKING_URI": self._chosen.mlflow_tracking_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # It leaves its copy of the model behind.
            "TMPDIR": str(downloads),
            # It looks for uvicorn on the PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        return service(command, environment, port, "/ping", self._folder / "mlflow.log")

    def _check_version(self, api: Running, version: str) -> None:
        found = json.loads(get(api.port, "/readyz"))["model_version"]
        if found != version:
            raise BenchError(
                f"version {found} answers, not {version}: the alias was moved; measure again"
            )

    def _compared(self, version: str) -> Champion:
        """See that both services say the same; MLflow is gone afterwards, with its memory."""
        with self._api("main") as api, self._mlflow(version) as theirs:
            self._check_version(api, version)
            examples = json.loads(get(api.port, "/v1/fields"))["examples"]
            candidate = json.loads(get(api.port, "/v1/model"))["candidate"]
            champion = Champion(version, candidate, *bodies(examples))
            worst = 0.0
            with Client(api.port) as one, Client(theirs.port) as other:
                for our_body, their_body in zip(champion.ours, champion.theirs, strict=True):
                    ours = json.loads(accept(one.ask(request(PREDICT, our_body))))
                    said = json.loads(accept(other.ask(request(INVOCATIONS, their_body))))
                    (found,) = said["predictions"]
                    worst = max(worst, abs(ours["probability"] - found["probability"]))
        if not worst <= TOLERANCE:
            raise BenchError(f"our probabilities and MLflow's lie {worst:.1e} apart")
        self.facts.append(
            f"{len(champion.ours)} encounters: our probabilities and those of `mlflow models "
            f"serve` differ by {worst:.1e} at most."
        )
        log.info("%s", self.facts[-1])
        return champion

    def _starts(self) -> None:
        empty: list[float] = []
        filled: list[float] = []
        for turn in range(self._rounds):
            for found in (empty, filled):
                with self._api(f"start-{turn}") as api:
                    found.append(api.ready)
        self._add("start to ready, empty cache", "s", *empty, at_most=10)
        self._add("start to ready, filled cache", "s", *filled, at_most=10)

    def _memory_and_throughput(self, api: Running, champion: Champion, data: BaseFile) -> float:
        """The service alone; returns its requests/s under load."""
        idle_pss, idle_rss = api.memory()
        whole: list[float] = []

        def look() -> float:
            pss, rss = api.memory()
            whole.append(rss)
            return pss

        with sampled(look, _SAMPLE_SECONDS) as shared:
            load = self._logged_load(api, champion)
            csv_rates, csv_waits = self._csv(api, champion.version, data)
            json_rates = self._json(api, champion.version, data)
        self._check_version(api, champion.version)
        self._add("memory idle, PSS of all processes", "MiB", idle_pss, at_most=500)
        self._add("memory at most, PSS", "MiB", max(shared, default=idle_pss), at_most=500)
        self._add("memory idle, RSS", "MiB", idle_rss)
        self._add("memory at most, RSS", "MiB", max(whole, default=idle_rss))
        self._add(f"{CLIENTS} clients", "requests/s", load["per_second"], at_least=400)
        self._add(f"{CLIENTS} clients, p50", "ms", load["p50"])
        self._add(f"{CLIENTS} clients, p95", "ms", load["p95"], at_most=100)
        self._add(f"{CLIENTS} clients, p99", "ms", load["p99"])
        self._add(f"{CLIENTS} clients, failures", "requests", load["failures"], at_most=0)
        self._add("CSV", "encounters/s", *csv_rates, at_least=20_000)
        self._add("CSV, log complete after the answer", "s", *csv_waits)
        self._add("JSON batch", "encounters/s", *json_rates)
        return load["per_second"]

    def _logged_load(self, api: Running, champion: Champion) -> dict[str, float]:
        """The load, and whether the log has all of it."""
        version = champion.version
        ((before,),) = self._logged("count(*)", version, "single")
        load = self._load(api.port, PREDICT, champion.ours, self._seconds)
        settle(api)
        ((after,),) = self._logged("count(*)", version, "single")
        # Of a request that failed nobody knows whether it was scored before it did.
        if not 0 <= after - before - load["requests"] <= load["failures"]:
            raise BenchError(
                f"{load['requests']:,} requests were answered, the log has {after - before:,}"
            )
        return load

    def _load(
        self, port: int, path: str, encounters: Sequence[bytes], seconds: float
    ) -> dict[str, float]:
        file = self._folder / "bodies.jsonl"
        file.write_bytes(b"\n".join(encounters))
        command = [sys.executable, "-m", "bench.load", f"--port={port}", f"--path={path}"]
        command += [f"--bodies={file}", f"--clients={CLIENTS}", f"--seconds={seconds}"]
        found: dict[str, float] = json.loads(run(command, {}).output.splitlines()[-1])
        return found

    def _csv(self, api: Running, version: str, data: BaseFile) -> tuple[list[float], list[float]]:
        rates, waits = [], []
        known: set[str] = set()
        for _ in range(self._rounds):
            settle(api)
            seconds, body = send_csv(api.port, BATCH, data.path)
            answered = time.monotonic()
            rates.append(data.rows / seconds)
            answer = read_csv_answer(body, data.rows)
            known |= answer.ids
            waits.append(self._wait_for_log(version, "csv", known, answered))
        self.facts.append(
            f"CSV: one line a row; of {data.rows:,} rows {len(answer.ids):,} were scored, "
            f"{answer.excluded:,} excluded (died, hospice), {answer.broken:,} broke the contract. "
            "After each round the log held exactly the scored."
        )
        return rates, waits

    def _json(self, api: Running, version: str, data: BaseFile) -> list[float]:
        body, count = json_batch(data.path, MOST_ENCOUNTERS)
        wire = request(BATCH, body)
        rates = []
        known: set[str] = set()
        for _ in range(self._rounds):
            settle(api)
            begin = time.perf_counter()
            with Client(api.port, BATCH_TIMEOUT) as client:
                answer = accept(client.ask(wire))
            rates.append(count / (time.perf_counter() - begin))
            found = json.loads(answer)["predictions"]
            if len(found) != count:
                raise BenchError(f"{len(found):,} predictions for {count:,} encounters")
            known |= {one["prediction_id"] for one in found if not one["excluded"]}
            self._wait_for_log(version, "batch", known, time.monotonic())
        return rates

    def _logged(self, what: str, version: str, source: str) -> list[tuple[Any, ...]]:
        return self._server.rows(
            _DATABASE,
            f"select {what} from inference.predictions where source = '{source}' "
            f"and role = 'champion' and model_version = '{int(version)}'",
        )

    def _wait_for_log(
        self, version: str, source: str, expected: set[str], answered: float
    ) -> float:
        """Seconds from the answer until the log has as many; then it must have the same."""
        while (there := self._logged("count(*)", version, source)[0][0]) < len(expected):
            if time.monotonic() - answered > _LOG_TIMEOUT:
                raise BenchError(f"the log holds {there:,} of {len(expected):,} predictions")
            time.sleep(0.2)
        waited = time.monotonic() - answered
        found = {one for (one,) in self._logged("prediction_id::text", version, source)}
        if found != expected or there != len(expected):
            raise BenchError(
                f"the log holds {there:,} predictions ({source}), {len(found - expected):,} of "
                f"which nobody got; {len(expected - found):,} are missing"
            )
        return waited

    def _wait_for_shadow(self, api: Running, version: str) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while json.loads(get(api.port, "/v1/model"))["shadow_version"] != version:
            if time.monotonic() > deadline:
                raise BenchError(f"the challenger, version {version}, was not loaded")
            time.sleep(0.2)

    def _singles(self, apis: Mapping[str, Running], theirs: Running, champion: Champion) -> None:
        ours = [request(PREDICT, body) for body in champion.ours]
        others = [request(INVOCATIONS, body) for body in champion.theirs]
        found: dict[str, list[list[float]]] = {name: [] for name in (*apis, "mlflow")}
        for _ in range(self._rounds):
            for name, api in apis.items():
                settle(*apis.values(), theirs)
                found[name].append(one_by_one(api.port, ours, SINGLES, WARM_UP))
            settle(*apis.values(), theirs)
            found["mlflow"].append(one_by_one(theirs.port, others, MLFLOW_SINGLES, WARM_UP))
        limits = {50: {"at_most": 4.0}, 99: {"at_most": 15.0}}
        for name in found:
            title = "`mlflow models serve`, one" if name == "mlflow" else "one"
            for percent, limit in limits.items():
                self._add(
                    f"{title} encounter{'' if name == 'mlflow' else name}, p{percent}",
                    "ms",
                    *(1000 * percentile(seconds, percent) for seconds in found[name]),
                    **({} if name else limit),
                )

    def _baseline(self, theirs: Running, champion: Champion, ours: float) -> None:
        settle(theirs)
        load = self._load(theirs.port, INVOCATIONS, champion.theirs, MLFLOW_LOAD_SECONDS)
        title = f"`mlflow models serve`, {CLIENTS} clients"
        self._add(title, "requests/s", load["per_second"])
        self._add(f"{title}, p95", "ms", load["p95"])
        self._add(f"{title}, failures", "requests", load["failures"])
        ratio = ours / load["per_second"]
        self._add("requests/s, ours / MLflow's", "x", ratio, at_least=5)


def find_versions(chosen: Settings) -> tuple[str, str]:
    """Numbers of the champion and of the challenger, empty where there is none.

    Raises:
        BenchError: there is no champion to measure.
    """
    registry = Registry(chosen)
    try:
        champion = registry.find(chosen.api_alias)
        challenger = registry.find(CHALLENGER)
    except RegistryError as error:
        raise BenchError(f"there is no model to measure: {error}") from error
    if champion is None:
        raise BenchError(
            f"no version of {REGISTERED_MODEL} has the alias {chosen.api_alias} at "
            f"{chosen.mlflow_tracking_uri}; train one first (make run)"
        )
    return champion["version"], challenger["version"] if challenger else ""


def measure(chosen: Settings, arguments: Sequence[str], rounds: int, seconds: float) -> Results:
    """Measure everything; nothing is left running.

    Raises:
        BenchError, IngestionError, PostgresError: something could not be measured.
    """
    before = os.getloadavg()[0]
    version, challenger = find_versions(chosen)
    with tempfile.TemporaryDirectory(prefix="diabetes-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
        data = base_file(chosen, folder)
        log.info("%s rows: %s", f"{data.rows:,}", data.origin)
        with running_server(folder) as server:
            ((postgresql,),) = server.rows("postgres", "show server_version")
            about = describe((), str(postgresql), before, data)
            bench = Bench(chosen, server, folder, rounds, seconds)
            champion, lines = bench.measure(version, challenger, data)
    facts = list(bench.facts)
    if challenger:
        facts.append(f"The challenger in the shadow is version {challenger}.")
    else:
        facts.append("The registry has no challenger, so the cost of a shadow is not measured.")
    if before > IDLE_LOAD:
        facts.append(f"**The machine was not idle: load average {before:.2f} before the start.**")
    return Results(
        replace(about, command=shlex.join(["python", "-m", "bench.serving", *arguments])),
        {
            "name": REGISTERED_MODEL,
            "version": version,
            "candidate": champion.candidate,
            "challenger": challenger,
        },
        {package: package_version(package) for package in _PACKAGES},
        facts,
        lines,
    )


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Leave through every `finally`, and let no second signal cut that short."""
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write docs/benchmarks/serving/results.md and .json.

    Returns:
        The exit code: 0 when everything was measured, 1 with one message on standard error when
        not, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of the load (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=PROJECT_ROOT / "docs" / "benchmarks" / "serving"
    )
    asked = parser.parse_args(arguments)
    if asked.rounds < 1 or not asked.seconds > 0:
        parser.error("--rounds and --seconds: expected more than 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, _interrupt)
    chosen = settings()
    if not chosen.mlflow_tracking_uri:  # the server of make run, as far as it is up
        last = MlflowServer(chosen.state_dir, "").last_url
        chosen = chosen.model_copy(update={"mlflow_tracking_uri": last})
    try:
        results = measure(chosen, arguments, asked.rounds, asked.seconds)
    except (BenchError, IngestionError, PostgresError, OSError, psycopg2.Error) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; nothing is left running and nothing was written.\n")
        return 130
    print(as_text(results.lines))
    write(asked.out, results)
    print(f"\nWritten to {asked.out}. Limits do not change the exit code.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
