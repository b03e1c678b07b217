"""The one place that reads the environment.

Every variable is named `DIABETES_...`, but for the one that MLflow's own client reads too, and
listed in docs/settings.md. Importing this module has no effect; `settings()` reads the environment
once and keeps the answer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

PROJECT_ROOT = Path(__file__).resolve().parent.parent

PUBLISHER_URL = (
    "https://archive.ics.uci.edu/static/public/296/"
    "diabetes+130-us+hospitals+for+years+1999-2008.zip"
)
PUBLISHER_CSV_SHA256 = "0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97"

REGISTERED_MODEL = "diabetes_readmission"
"""In MLflow's registry."""

CLEAN_DATA = (
    "diabetes_train",
    "diabetes_validation",
    "diabetes_test",
    "diabetes_excluded",
    "batch_info",
    "clip_report",
)
"""Tables of schema clean_data; each is an Asset by which Airflow schedules what comes after."""

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Settings(BaseSettings):
    """What a user can set, with the defaults that `make run` works with."""

    model_config = SettingsConfigDict(env_prefix="DIABETES_", extra="ignore", frozen=True)

    state_dir: AbsolutePath = Field(
        PROJECT_ROOT / ".run", description="Databases, logs, downloads and generated secrets"
    )
    source: str = Field(
        PUBLISHER_URL,
        description="Path to a zip or csv, a URL, or synthetic[:rows[:seed]]",
    )
    source_sha256: str = Field(
        "", description="Expected SHA-256 of the CSV; the publisher's is built in"
    )
    reject_limit_percent: float = Field(
        1.0, ge=0, le=100, description="Share of broken rows from which a load fails"
    )
    full_refresh: bool = Field(
        False, description="Let `make run` replace what raw_data.diabetes holds, and fit anew"
    )
    db_host: str = Field("127.0.0.1", description="Data database: host")
    db_port: int = Field(55432, description="Data database: port")
    db_user: str = Field("diabetes", description="Data database: user")
    db_password: SecretStr = Field(SecretStr(""), description="Data database: password")
    db_name: str = Field("diabetes", description="Data database: name")
    dbt_manifest: AbsolutePath = Field(
        PROJECT_ROOT / "dbt_diabetes" / "target" / "manifest.json",
        description="What Cosmos renders the DAG from; made by dbt parse",
    )
    airflow_port: int = Field(8080, description="Preferred port of the Airflow UI")
    mlflow_port: int = Field(5000, description="Preferred port of the MLflow server")
    mlflow_tracking_uri: str = Field(
        "",
        validation_alias="MLFLOW_TRACKING_URI",
        description="An MLflow server to use instead of starting one",
    )
    mlflow_tracking_username: str = Field(
        "", validation_alias="MLFLOW_TRACKING_USERNAME", description="Login there, if it asks"
    )
    mlflow_tracking_password: SecretStr = Field(
        SecretStr(""), validation_alias="MLFLOW_TRACKING_PASSWORD", description="Its password"
    )
    training_candidates: str = Field(
        "", description="Names of files in training/candidates, comma-separated; empty: all"
    )
    training_trials: int = Field(20, ge=1, description="Sets of hyper-parameters tried in all")
    training_seed: int = Field(130, ge=0, description="Of everything that training draws")
    training_threads: int = Field(2, ge=1, description="Threads of one training")
    api_host: str = Field("127.0.0.1", description="Address that the prediction API listens on")
    api_port: int = Field(8000, description="Preferred port of the prediction API")
    api_key_hashes: str = Field(
        "", description="name:SHA-256 of each accepted key, comma-separated; empty: no key is asked"
    )
    api_alias: str = Field("champion", description="Alias of the version that the API serves")
    api_shadow: bool = Field(False, description="Let the challenger score the same requests")
    api_alert_rate: float = Field(0.2, description="Alerts that a caller gets who names no rate")
    api_poll_seconds: float = Field(10, gt=0, description="How often the API asks for the alias")
    api_batch_workers: int = Field(2, ge=1, description="Processes that score batches")
    api_most_requests: int = Field(128, ge=1, description="Requests served at once; more get 503")
    api_timeout: float = Field(30, gt=0, description="Seconds a caller may take to send a body")
    api_csv_limit_mib: int = Field(512, ge=1, description="Largest CSV that is accepted")
    prediction_log: bool = Field(True, description="Write predictions to inference.predictions")
    prediction_log_key: SecretStr = Field(
        SecretStr(""), description="Key with which identifiers are hashed in the prediction log"
    )
    prediction_log_limit_mib: int = Field(
        1024, ge=1, description="Predictions kept on disk while the database is away"
    )
    api_url: str = Field("http://127.0.0.1:8000", description="The API that the page talks to")
    api_key: SecretStr = Field(SecretStr(""), description="The key with which the page asks")
    ui_host: str = Field("127.0.0.1", description="Address that the page listens on")
    ui_port: int = Field(8501, description="Preferred port of the page")
    exporter_host: str = Field(
        "127.0.0.1", description="Address that the pipeline's exporter listens on"
    )
    exporter_port: int = Field(9210, description="Preferred port of the pipeline's exporter")
    airflow_url: str = Field(
        "", description="Airflow whose runs the exporter tells of; empty: it tells of none"
    )
    airflow_user: str = Field("admin", description="Login there")
    airflow_password: SecretStr = Field(SecretStr(""), description="Its password")
    drift_limit: float = Field(
        0.2, gt=0, description="PSI from which a feature or the score has drifted"
    )
    drift_retrain: bool = Field(
        False, description="Start the training DAG where a feature or the score has drifted"
    )
    prometheus: str = Field("", description="Path of its program; empty: looked for; off: none")
    prometheus_port: int = Field(9090, description="Preferred port of Prometheus")
    alertmanager: str = Field("", description="Path of its program; empty: looked for; off: none")
    alertmanager_port: int = Field(9093, description="Preferred port of Alertmanager")
    alertmanager_config: AbsolutePath = Field(
        PROJECT_ROOT / "monitoring" / "prometheus" / "alertmanager.yaml",
        description="Who is told of an alert, and how",
    )
    postgres_exporter: str = Field(
        "", description="Path of its program; empty: looked for; off: none"
    )
    statsd_exporter: str = Field(
        "", description="Path of its program; empty: looked for; off: none"
    )
    run_timeout: int = Field(3600, description="Seconds `make run` waits for each DAG")

    @property
    def cache_dir(self) -> Path:
        """Where downloads are kept between runs."""
        return self.state_dir / "cache"

    @property
    def work_dir(self) -> Path:
        """Where each run's temporary folder is made."""
        return self.state_dir / "work"

    @property
    def dsn(self) -> str:
        """Connection string (libpq) of the data database."""
        from psycopg2.extensions import make_dsn

        return str(
            make_dsn(
                host=self.db_host,
                port=self.db_port,
                user=self.db_user,
                password=self.db_password.get_secret_value(),
                dbname=self.db_name,
                application_name="ingestion",
            )
        )

    def expected_sha256(self, source: str) -> str:
        """SHA-256 that the CSV of `source` must have; empty where any is accepted."""
        if self.source_sha256 and source == self.source:
            return self.source_sha256.lower()
        return PUBLISHER_CSV_SHA256 if source == PUBLISHER_URL else ""


@cache
def settings() -> Settings:
    """The settings of this process, read from the environment once."""
    return Settings()
