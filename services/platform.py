"""The platform as a whole: bring it up, run the pipeline on it, take it down."""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import closing
from pathlib import Path

import psycopg2

from ingestion.errors import IngestionError, SourceUnreachableError
from ingestion.load import loaded_origins
from ingestion.source import Source, obtain
from services import dbt, processes
from services.airflow import ADMIN, COMPONENTS, STATSD_PORT, Airflow, environment
from services.mlflow_server import MlflowServer, check
from services.observability import Observability
from services.postgres import Postgres, address
from services.report import champion, champion_version, summary
from services.state import Secrets, write_shell_environment
from services.web import API, EXPORTER, PAGE, Web, answers, served_version
from settings import PROJECT_ROOT, PUBLISHER_URL, Settings

DAG_ID = "diabetes_data_processing"
TRAINING_DAG_ID = "diabetes_model_training"
_SWAP_SECONDS = 60
"""For the API to find a new champion, fetch and test it."""
_SIGNS = {"success": "ok", "up_for_retry": "will retry"}

log = logging.getLogger(__name__)


class Platform:
    """PostgreSQL, MLflow, Airflow, dbt, prediction API, page and metrics of one state folder.

    Args:
        chosen: the settings; `state_dir` is the folder.
    """

    def __init__(self, chosen: Settings) -> None:
        self._settings = chosen
        self._state = chosen.state_dir
        self._docs = self._state / "dbt"
        self._secrets = Secrets(self._state)
        self._postgres = Postgres(self._state)
        self._environment: dict[str, str] = {}
        self._urls: dict[str, str] = {}

    def up(self) -> Airflow:
        """Start what is not running and return the healthy Airflow.

        Raises:
            PostgresError, MlflowError, DbtError, AirflowError, WebError, ObservabilityError: what
                did not start, and where its log is.
        """
        observability = Observability(self._settings)
        postgres_port = self.start_postgres()
        _say_where("PostgreSQL", postgres_port, self._settings.db_port)
        # It starts while dbt parses and Airflow starts, and is waited for below.
        tracking_uri, mlflow = self._start_mlflow(postgres_port)
        statsd_port = observability.start_statsd(self._known_statsd_port())
        airflow_port = self._airflow_port(tracking_uri, statsd_port)
        self._environment = environment(
            self._settings, self._secrets, postgres_port, airflow_port, tracking_uri, statsd_port
        )
        web = self._start_web()
        write_shell_environment(self._state / "env.sh", self._environment)
        dbt.write_manifest(self._docs, self._environment)
        airflow = Airflow(self._state, self._environment, self._secrets["admin"])
        log.info(
            "Airflow: preparing the metadata database, then starting %s", ", ".join(COMPONENTS)
        )
        airflow.migrate()
        airflow.start()
        if mlflow:
            _say_where("MLflow", mlflow.wait_until_ready(), self._settings.mlflow_port)
        airflow.wait_until_healthy()
        _say_where("Airflow", airflow_port, self._settings.airflow_port)
        for service, port, preferred in web:
            service.wait_until_up(self._state, port)
            _say_where(service.title, port, preferred)
        ports = {service.name: port for service, port, _ in web}
        self._start_observability(observability, postgres_port, ports, mlflow)
        return airflow

    def _start_web(self) -> list[tuple[Web, int, int]]:
        """Start the API and the page (without waiting); each with its port and the preferred."""
        chosen, variables, started = self._settings, self._environment, []
        for service, preferred in ((API, chosen.api_port), (PAGE, chosen.ui_port)):
            port = service.port(self._state, preferred, variables)
            service.start(self._state, port, variables)
            started.append((service, port, preferred))
            variables[f"DIABETES_{'API' if service is API else 'UI'}_URL"] = (
                f"http://127.0.0.1:{port}"
            )
        variables["DIABETES_AIRFLOW_URL"] = variables["AIRFLOW__API__BASE_URL"]
        variables["DIABETES_AIRFLOW_USER"] = ADMIN
        variables["DIABETES_AIRFLOW_PASSWORD"] = self._secrets["admin"]
        port = EXPORTER.port(self._state, chosen.exporter_port, variables)
        EXPORTER.start(self._state, port, variables)
        return [*started, (EXPORTER, port, chosen.exporter_port)]

    def _start_observability(
        self,
        observability: Observability,
        postgres_port: int,
        ports: dict[str, int],
        mlflow: MlflowServer | None,
    ) -> None:
        """Start Prometheus and its company on what is there by now."""
        self._postgres.ensure_monitor(
            postgres_port, self._secrets["postgres"], self._secrets["monitoring"]
        )
        targets = {
            "api": f"127.0.0.1:{ports[API.name]}",
            "pipeline": f"127.0.0.1:{ports[EXPORTER.name]}",
        }
        # A server that is not ours is watched by those whose it is.
        if mlflow and answers(f"{mlflow.last_url}/metrics"):
            targets["mlflow"] = f"127.0.0.1:{mlflow.port}"
        observability.start(postgres_port, self._secrets["monitoring"], targets)
        self._urls = observability.urls
        for name, url in self._urls.items():
            log.info("%s: %s", name, url)

    def start_postgres(self) -> int:
        """Start the embedded PostgreSQL with our databases if it is down; return its port."""
        if self._postgres.port is None:
            # Whatever is left of Airflow and MLflow knows the port of a server that is gone.
            processes.stop(self._state)
        password = self._secrets["postgres"]
        port = self._postgres.start(self._settings.db_port, password)
        owners = {name: self._secrets[name] for name in ("diabetes", "airflow", "mlflow")}
        self._postgres.ensure_databases(port, password, owners)
        return port

    def down(self) -> None:
        """Stop everything that was started for this state folder; data stay."""
        ended = processes.stop(self._state)
        stopped = self._postgres.stop()
        also = ", and PostgreSQL" if stopped else ""
        log.info("Stopped %d processes%s.", ended, also)

    def run(self) -> bool:
        """Bring the source to clean_data through the DAG and show what came of it.

        Returns:
            Whether the run succeeded.

        Raises:
            IngestionError: the source can't be used.
            PostgresError, MlflowError, DbtError, AirflowError, WebError, ObservabilityError: a
                service did not start or answer.
        """
        source = self._available_source()
        airflow = self.up()
        full_refresh = self._settings.full_refresh or self._replaces_synthetic(source)
        conf = {
            "source": source,
            "full_refresh": full_refresh,
            "reject_limit_percent": self._settings.reject_limit_percent,
        }
        manifest = (self._docs / "manifest.json").stat().st_mtime
        for dag_id in (DAG_ID, TRAINING_DAG_ID):
            file = PROJECT_ROOT / "dags" / f"{dag_id}.py"
            airflow.wait_for_dag(dag_id, max(file.stat().st_mtime, manifest))
        known = airflow.runs(TRAINING_DAG_ID)
        run_id = airflow.trigger(DAG_ID, conf)
        log.info("DAG %s, run %s, source %s\n", DAG_ID, run_id, source)
        if not self._follow(airflow, DAG_ID, run_id):
            return False
        # The assets of clean_data start it; by hand it would not be what users see.
        training = airflow.wait_for_scheduled_run(TRAINING_DAG_ID, known)
        log.info(
            "\nDAG %s, run %s, started by the assets of clean_data\n", TRAINING_DAG_ID, training
        )
        dbt.write_docs(self._docs, self._environment)
        if not self._follow(airflow, TRAINING_DAG_ID, training):
            return False
        self._conclude(airflow)
        return True

    def write_static_docs(self, target: Path) -> None:
        """Build dbt's documentation as one static page at `target`."""
        port = self.start_postgres()
        # dbt reads neither Airflow's port nor MLflow's address, and nothing else is to be started.
        variables = environment(
            self._settings, self._secrets, port, self._settings.airflow_port, ""
        )
        page = dbt.write_docs(self._docs, variables, static=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        page.replace(target)
        log.info("dbt docs: %s", target)

    def _start_mlflow(self, postgres_port: int) -> tuple[str, MlflowServer | None]:
        """Where MLflow is, and the server if it is ours (started, but not waited for)."""
        database = address(postgres_port, "mlflow", self._secrets["mlflow"])
        server = MlflowServer(self._state, f"postgresql+psycopg2://{database}")
        given = self._settings.mlflow_tracking_uri.rstrip("/")
        # A shell that has sourced env.sh names our own server, which may be down by now.
        if given and given != server.last_url:
            check(given)
            log.info("MLflow: using %s", given)
            return given, None
        return server.start(self._settings.mlflow_port), server

    def _known_statsd_port(self) -> int | None:
        """The UDP port that the Airflow that runs sends its metrics to, if it does."""
        known = processes.environments(self._state, COMPONENTS[0])
        port = known[0].get(STATSD_PORT) if known else None
        return int(port) if port else None

    def _airflow_port(self, tracking_uri: str, statsd_port: int | None) -> int:
        """The port of the Airflow that runs; a free one if it has to be started, or anew."""
        found = [processes.environments(self._state, component) for component in COMPONENTS]
        variables = [component[0] for component in found if component]
        statsd = str(statsd_port) if statsd_port else None
        if len(variables) == len(COMPONENTS) and all(
            known.get("MLFLOW_TRACKING_URI") == tracking_uri and known.get(STATSD_PORT) == statsd
            for known in variables
        ):
            return int(variables[0]["AIRFLOW__API__PORT"])
        if any(found):
            log.info("Airflow: ending its processes: one is missing, or a neighbour has moved")
            processes.stop(self._state, *COMPONENTS)
        return processes.free_port(self._settings.airflow_port)

    def _available_source(self) -> str:
        """The source, fetched already if it is a URL, or synthetic where the publisher is away."""
        text = self._settings.source
        source = Source.parse(text)
        if source.kind == "synthetic":
            return text
        try:
            with tempfile.TemporaryDirectory(prefix="diabetes-") as folder:
                path = obtain(
                    source,
                    Path(folder),
                    self._settings.cache_dir,
                    self._settings.expected_sha256(text),
                )
        except SourceUnreachableError as error:
            if text != PUBLISHER_URL:
                raise
            if "real" in self._origins():
                raise IngestionError(
                    f"{error}. raw_data.diabetes holds real encounters already; nothing was changed"
                ) from error
            log.warning(
                "\n%s\n*** %s\n*** Going on with SYNTHETIC data from our own generator.\n%s\n",
                "*" * 79,
                error,
                "*" * 79,
            )
            return "synthetic"
        return str(path) if source.kind == "file" else text

    def _replaces_synthetic(self, source: str) -> bool:
        replaces = not source.startswith("synthetic") and self._origins() == {"synthetic"}
        if replaces:
            log.warning("The synthetic encounters of an earlier run will be replaced.")
        return replaces

    def _origins(self) -> set[str]:
        with closing(self._connect(self.start_postgres())) as connection:
            return loaded_origins(connection.cursor())

    def _connect(self, port: int) -> psycopg2.extensions.connection:
        return psycopg2.connect(
            host="127.0.0.1",
            port=port,
            user="diabetes",
            password=self._secrets["diabetes"],
            dbname="diabetes",
        )

    def _follow(self, airflow: Airflow, dag_id: str, run_id: str) -> bool:
        begin = time.monotonic()
        failed = []
        for task in airflow.follow(dag_id, run_id, self._settings.run_timeout):
            if task.state == "running":
                continue
            if task.state == "failed":
                failed.append(task)
            elapsed = time.monotonic() - begin
            state = _SIGNS.get(task.state, task.state.upper())
            log.info("%6.1f s  %-60s %5.1f s  %s", elapsed, task.name, task.seconds, state)
        if airflow.run_state(dag_id, run_id) == "success":
            return True
        for task in failed[:1]:
            log.error("\n%s failed; the end of its log:", task.name)
            for line in airflow.task_log(dag_id, run_id, task.task_id, task.map_index):
                log.error("  %s", line)
        log.error("\nThe run failed: %s/dags/%s/runs/%s", airflow.url, dag_id, run_id)
        return False

    def _conclude(self, airflow: Airflow) -> None:
        with closing(self._connect(int(self._environment["DIABETES_DB_PORT"]))) as connection:
            log.info("\n%s\n", summary(connection))
        uri = self._environment["MLFLOW_TRACKING_URI"]
        log.info("%s\n", champion(uri, self._state))
        api = self._environment["DIABETES_API_URL"]
        wanted = champion_version(uri, self._state)
        served = served_version(api, wanted, _SWAP_SECONDS)
        said = f"serves version {served}" if served else "waits for a champion"
        if wanted and served != wanted:
            said = f"serves version {served or 'none'}, not {wanted}; see {self._state}/logs"
        log.info("Page      %s", self._environment["DIABETES_UI_URL"])
        log.info("API       %s/docs (%s); scripts/predict.sh asks it", api, said)
        log.info("Airflow   %s/dags", airflow.url)
        log.info("          login %s, password %s", ADMIN, self._secrets["admin"])
        log.info("MLflow    %s", uri)
        for name, url in self._urls.items():
            log.info("Monitor   %s (%s)", url, name)
        log.info("dbt docs  %s/cosmos/diabetes/dbt_docs_index.html", airflow.url)
        log.info("          (also in Airflow's menu Browse; readable without login)")
        log.info("By hand   source %s/env.sh; cd dbt_diabetes; dbt build", self._state)
        log.info("Stop      make down")


def _say_where(name: str, port: int, preferred: int) -> None:
    note = "" if port == preferred else f" (port {preferred} is taken by another program)"
    log.info("%s: listening on 127.0.0.1:%d%s", name, port, note)
