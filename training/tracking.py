"""MLflow runs that outlive a lost server.

A run is written to a folder first and sent to MLflow from there. What can't be sent stays, and
`python -m training upload` sends it later.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from training.errors import TrackingLostError, TrainingError

log = logging.getLogger(__name__)

_LOCAL = "local-"


@dataclass(slots=True)
class Run:
    """One run as it is being made; `Tracker.finish` sends it.

    Attributes:
        folder: of the run on this machine; artifacts go to `folder / "artifacts"`.
        id: MLflow's run id, or a local one while the server has not been told of the run.
    """

    folder: Path
    id: str
    name: str
    parent: str | None
    start: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[tuple[str, float, int]] = field(default_factory=list)
    dataset: dict[str, Any] | None = None
    end: int = 0
    status: str = "RUNNING"
    pid: int = field(default_factory=os.getpid)

    @property
    def artifacts(self) -> Path:
        """Where to put what is to be stored with the run."""
        return self.folder / "artifacts"

    def metric(self, name: str, value: float, step: int = 0) -> None:
        """Note one value."""
        self.metrics.append((name, float(value), step))

    def write(self) -> None:
        """Keep what is known so far, whole or not at all."""
        content = {name: getattr(self, name) for name in self.__slots__ if name != "folder"}
        partial = self.folder / "run.json.part"
        partial.write_text(json.dumps(content))
        partial.replace(self.folder / "run.json")

    @classmethod
    def read(cls, folder: Path) -> Run:
        """A run that was kept."""
        content = json.loads((folder / "run.json").read_text())
        content["metrics"] = [tuple(metric) for metric in content["metrics"]]
        return cls(folder=folder, **content)


class Tracker:
    """Writes runs to one experiment of an MLflow server, or keeps them.

    Args:
        uri: of the server (or any MLflow tracking URI).
        folder: where runs stand until the server has them.
        experiment: its name.
    """

    def __init__(self, uri: str, folder: Path, experiment: str) -> None:
        self.uri = uri
        self._folder = folder
        self._experiment = experiment
        self._lost = False

    def begin(
        self,
        name: str,
        parent: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        dataset: dict[str, Any] | None = None,
        seconds_ago: float = 0.0,
    ) -> Run:
        """Start a run, nested under `parent` (an id).

        Args:
            name: shown in MLflow.
            parent: id of the run it belongs to.
            params: hyper-parameters and settings.
            tags: what describes the run.
            dataset: `name`, `digest`, `source` and `profile` of what it learns from.
            seconds_ago: when it began, where it is told of afterwards.
        """
        local = f"{_LOCAL}{uuid.uuid4().hex}"
        run = Run(
            folder=self._folder / local,
            id=local,
            name=name,
            parent=parent,
            start=_now() - int(1000 * seconds_ago),
            params={key: str(value) for key, value in (params or {}).items()},
            tags={key: str(value) for key, value in (tags or {}).items()},
            dataset=dataset,
        )
        run.artifacts.mkdir(parents=True)
        run.write()
        self._try(self._create, run)
        return run

    def finish(self, run: Run, status: str = "FINISHED") -> None:
        """End a run and send all of it; where the server is away, keep it."""
        run.end, run.status = _now(), status
        run.write()
        self._try(self._send, run)

    def close(self, run_id: str, status: str) -> None:
        """End a run that was left open, or keep a note to do so."""
        known = self._known(run_id)
        folder = self._folder / known
        if folder.exists():
            run = Run.read(folder)
        else:
            name = f"{_LOCAL}{uuid.uuid4().hex}"
            run = Run(self._folder / name, known, "", None, _now(), params={}, tags={})
            run.artifacts.mkdir(parents=True)
        self.finish(run, status)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Make one message of whatever MLflow's client says when the server is lost.

        Raises:
            TrackingLostError: it was.
        """
        try:
            yield
        except TrainingError:
            raise
        except Exception as error:
            if self.answers():
                raise
            raise TrackingLostError(
                f"MLflow at {self.uri} was lost on the way. When it is back: python -m training "
                "compare says what it has, python -m training register RUN goes on from there"
            ) from error

    def kept(self) -> list[Run]:
        """Runs that ended (or whose process did) and that the server does not have yet.

        Parents come first. Their start does not tell: a child may begin in the same millisecond.
        """
        runs = [Run.read(file.parent) for file in self._folder.glob("*/run.json")]
        ended = {run.folder.name: run for run in runs if run.end or not _alive(run.pid)}

        def depth(run: Run) -> int:
            return 1 + depth(ended[run.parent]) if run.parent in ended else 0

        return sorted(ended.values(), key=lambda run: (depth(run), run.start))

    def require_all_sent(self) -> None:
        """Fail where runs had to be kept.

        Raises:
            TrackingLostError: says how many and what to do.
        """
        if self._lost:
            raise TrackingLostError(
                f"MLflow at {self.uri} does not answer; {len(self.kept())} runs are kept in "
                f"{self._folder}, nothing was registered. When it is back: "
                "python -m training upload, then python -m training register RUN"
            )

    def upload(self) -> list[str]:
        """Send what was kept and return the run ids, parents first.

        What belongs to a run that is still going on stays until that one has ended.

        Raises:
            TrackingLostError: the server still does not answer; what was sent is not sent again.
        """
        sent = []
        for run in self.kept():
            if run.parent and (self._folder / run.parent).exists():
                continue
            if not run.end:
                run.end, run.status = _now(), "KILLED"
                run.write()
            self._try(self._send, run)
            self.require_all_sent()
            sent.append(run.id)
        return sent

    def answers(self) -> bool:
        """Whether the server can be reached; other kinds of store are taken to be there."""
        if not self.uri.startswith("http"):
            return True
        try:
            answer = requests.get(f"{self.uri.rstrip('/')}/health", timeout=5)
        except requests.RequestException:
            return False
        return answer.status_code < 500

    def client(self) -> Any:
        """MLflow's client.

        Raises:
            TrackingLostError: the server can't be reached.
        """
        if not self.answers():
            self._lost = True
            raise TrackingLostError(f"MLflow at {self.uri} does not answer")
        import mlflow
        from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR

        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # type: ignore[no-untyped-call]
        mlflow.set_tracking_uri(self.uri)
        return mlflow.MlflowClient(self.uri)

    def _try(self, action: Any, run: Run) -> None:
        if self._lost:
            return
        try:
            action(run)
        except TrackingLostError:
            log.warning("MLflow at %s does not answer; runs are kept in %s", self.uri, self._folder)
        except Exception as error:
            if self.answers():
                raise TrainingError(f"MLflow refused run {run.name}: {error}") from error
            self._lost = True
            log.warning("MLflow at %s was lost; runs are kept in %s", self.uri, self._folder)

    def _create(self, run: Run) -> None:
        client = self.client()
        tags = {**run.tags, "mlflow.user": _user(), "mlflow.source.name": "training"}
        if run.parent:
            tags["mlflow.parentRunId"] = self._known(run.parent)
        made = client.create_run(
            self._experiment_id(client), start_time=run.start, tags=tags, run_name=run.name
        )
        run.id = made.info.run_id
        run.write()

    def _send(self, run: Run) -> None:
        from mlflow.entities import Metric, Param

        if (local := run.id).startswith(_LOCAL):
            self._create(run)
            # Its children were made under the local id.
            self._remember(local, run.id)
        client = self.client()
        metrics = [Metric(name, value, run.end, step) for name, value, step in run.metrics]
        params = [Param(name, value) for name, value in run.params.items()]
        # MLflow takes a thousand values in one call.
        for begin in range(0, max(len(metrics), 1), 800):
            client.log_batch(run.id, metrics[begin : begin + 800], params if begin == 0 else (), ())
        if run.dataset:
            client.log_inputs(run.id, [_dataset_input(run.dataset)])
        if any(run.artifacts.iterdir()):
            client.log_artifacts(run.id, str(run.artifacts))
        client.set_terminated(run.id, run.status, run.end)
        shutil.rmtree(run.folder)

    def _experiment_id(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        # Another process may create it at the same moment.
        with suppress(MlflowException):
            if not client.get_experiment_by_name(self._experiment):
                client.create_experiment(self._experiment)
        return str(client.get_experiment_by_name(self._experiment).experiment_id)

    def _known(self, run_id: str) -> str:
        """MLflow's id of a run that had a local one when its children were made."""
        if not run_id.startswith(_LOCAL):
            return run_id
        file = self._folder / "sent.json"
        sent = json.loads(file.read_text()) if file.exists() else {}
        return str(sent.get(run_id, run_id))

    def _remember(self, local: str, run_id: str) -> None:
        file = self._folder / "sent.json"
        sent = json.loads(file.read_text()) if file.exists() else {}
        sent[local] = run_id
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(sent))
        partial.replace(file)


def download(client: Any, run_id: str, path: str, target: Path) -> Path:
    """Bring an artifact (a file or a folder) of a run to this machine.

    Raises:
        TrainingError: the run has no such artifact.
    """
    from mlflow.exceptions import MlflowException

    target.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client.download_artifacts(run_id, path, str(target)))
    except (MlflowException, OSError) as error:
        raise TrainingError(f"run {run_id} has no artifact {path}: {error}") from error


def experiment_url(uri: str, experiment_id: str, run_id: str = "") -> str:
    """Address of an experiment or run in MLflow's page; empty for a store without one."""
    if not uri.startswith("http"):
        return ""
    run = f"/runs/{run_id}" if run_id else ""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}{run}"


def _dataset_input(dataset: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return DatasetInput(
        Dataset(
            name=dataset["name"],
            digest=dataset["digest"],
            source_type="postgresql",
            source=json.dumps(dataset["source"]),
            profile=json.dumps(dataset["profile"]),
        ),
        [InputTag("mlflow.data.context", "training")],
    )


def _now() -> int:
    return time.time_ns() // 1_000_000


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _alive(pid: int) -> bool:
    import psutil

    return pid == os.getpid() or psutil.pid_exists(pid)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by a point: what tags and params can hold."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def write_json(path: Path, content: Any) -> None:
    """Write plain values, readable for people too."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
