"""Airflow DAG: the publisher's CSV -> raw_data.diabetes -> dbt -> clean_data."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, Param, get_current_context, task, task_group
from cosmos import (
    DbtTaskGroup,
    ExecutionConfig,
    ExecutionMode,
    InvocationMode,
    LoadMode,
    ProfileConfig,
    ProjectConfig,
    RenderConfig,
    TestBehavior,
)
from cosmos.profiles import PostgresUserPasswordProfileMapping

from settings import CLEAN_DATA, PROJECT_ROOT, settings

CONNECTION = "postgres_default"
DBT_PROJECT = PROJECT_ROOT / "dbt_diabetes"

# Only what can pass by itself is retried: fetching and writing. A broken file fails at once.
TRANSIENT: dict[str, Any] = {
    "retries": 3,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=5),
}

with DAG(
    dag_id="diabetes_data_processing",
    description="Diabetes 130-US hospitals: raw CSV to train, validation and test tables",
    doc_md=(PROJECT_ROOT / "docs" / "data-pipeline.md").read_text(encoding="utf-8"),
    schedule=None,
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=2),
    default_args={"owner": "data-engineering", "execution_timeout": timedelta(minutes=10)},
    tags=["diabetes", "data"],
    params={
        "source": Param(
            settings().source,
            type="string",
            minLength=1,
            title="Source",
            description="Path to a zip or csv, an http(s) URL, or `synthetic[:rows[:seed]]`.",
        ),
        "reject_limit_percent": Param(
            settings().reject_limit_percent,
            type="number",
            minimum=0,
            maximum=100,
            title="Reject limit (%)",
            description="Share of rows that may break the file contract before nothing is loaded.",
        ),
        "full_refresh": Param(
            False,
            type="boolean",
            title="Full refresh",
            description=(
                "Make raw_data.diabetes hold exactly this source's encounters, and fit the "
                "statistics and batches anew (full batches may change)."
            ),
        ),
    },
) as dag:

    @task_group
    def ingest() -> None:
        """Source file to raw_data.diabetes."""

        @task
        def prepare() -> str:
            """Make the run's temporary folder."""
            from ingestion import tasks

            return tasks.prepare(get_current_context()["run_id"])

        @task(**TRANSIENT, execution_timeout=timedelta(minutes=30))
        def download(folder: str) -> str:
            """Fetch or generate the source."""
            from ingestion import tasks

            return tasks.download(folder, get_current_context()["params"]["source"])

        @task
        def validate(path: str) -> dict[str, Any]:
            """Check every row against the file contract."""
            from ingestion import tasks

            params = get_current_context()["params"]
            return tasks.validate(path, params["source"], params["reject_limit_percent"])

        @task(**TRANSIENT)
        def load(validated: dict[str, Any]) -> dict[str, Any]:
            """COPY into staging, then upsert in one transaction."""
            from ingestion import tasks

            context = get_current_context()
            params = context["params"]
            return tasks.load(
                validated,
                source=params["source"],
                run_id=context["run_id"],
                conn_id=CONNECTION,
                reject_limit_percent=params["reject_limit_percent"],
                full_refresh=params["full_refresh"],
            )

        @task
        def clean_up(folder: str) -> None:
            """Remove the run's temporary folder, whatever became of the load."""
            from ingestion import tasks

            tasks.clean_up(folder)

        folder = prepare()
        loaded = load(validate(download(folder)))
        loaded >> clean_up(folder).as_teardown(setups=folder)

    transform = DbtTaskGroup(
        group_id="transform",
        project_config=ProjectConfig(
            dbt_project_path=DBT_PROJECT,
            manifest_path=settings().dbt_manifest,
            project_name="diabetes",
        ),
        profile_config=ProfileConfig(
            profile_name="diabetes",
            target_name="postgres",
            profile_mapping=PostgresUserPasswordProfileMapping(
                conn_id=CONNECTION, profile_args={"schema": "public", "threads": 4}
            ),
        ),
        render_config=RenderConfig(
            load_method=LoadMode.DBT_MANIFEST,
            # They are for diabetes_drift_monitoring, which makes what they read.
            exclude=["path:models/monitoring"],
            test_behavior=TestBehavior.AFTER_EACH,
            # Detached tests get no result in WATCHER mode: a test over several models is shown by
            # the test task of each of them instead.
            should_detach_multiple_parents_tests=False,
            emit_datasets=False,
        ),
        # Measured against LOCAL and against dbt in the task's process: docs/decisions/cosmos.md.
        execution_config=ExecutionConfig(
            execution_mode=ExecutionMode.WATCHER, invocation_mode=InvocationMode.SUBPROCESS
        ),
        operator_args={
            "full_refresh": "{{ params.full_refresh }}",
            "env": {"DBT_EXCLUDE_RESOURCE_TYPES": "unit_test"},
            "append_env": True,
            "install_deps": False,
            # A deferred sensor whose trigger fires at once can be queued again before the scheduler
            # has seen its first half end, and is then failed: docs/decisions/cosmos.md.
            "deferrable": False,
            "poke_interval": 2,
        },
    )

    # Cosmos' own assets resolve through aliases and stay off the Assets page; these are concrete,
    # and come into being only when every model and test before them has passed.
    @task(outlets=[Asset(name=f"clean_data.{table}") for table in CLEAN_DATA])
    def publish() -> None:
        """Tell the world that clean_data is new."""

    ingest() >> transform >> publish()
