"""Airflow DAG: clean_data -> candidates in MLflow -> a judged version -> the champion."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, Param, get_current_context, task

from settings import CLEAN_DATA, PROJECT_ROOT, settings

CONNECTION = "postgres_default"
CANDIDATES = sorted(
    file.stem
    for file in (PROJECT_ROOT / "training" / "candidates").glob("*.py")
    if not file.stem.startswith("_")
)
CHOSEN = [name for name in settings().training_candidates.split(",") if name] or CANDIDATES

with DAG(
    dag_id="diabetes_model_training",
    description="clean_data to a champion in MLflow: search, choose, judge, register, promote",
    doc_md=(PROJECT_ROOT / "docs" / "experiments.md").read_text(encoding="utf-8"),
    schedule=[Asset(name=f"clean_data.{table}") for table in CLEAN_DATA],
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=6),
    default_args={
        "owner": "data-science",
        "execution_timeout": timedelta(hours=2),
        # For a lost MLflow server or database; what a retry can't mend fails at once.
        "retries": 2,
        "retry_delay": timedelta(seconds=30),
    },
    tags=["diabetes", "model"],
    params={
        "candidates": Param(
            CHOSEN,
            type="array",
            minItems=1,
            uniqueItems=True,
            items={"enum": CANDIDATES},
            examples=CANDIDATES,
            title="Candidates",
            description="Files of training/candidates that compete.",
        ),
        "trials": Param(
            settings().training_trials,
            type="integer",
            minimum=1,
            title="Trials",
            description="Sets of hyper-parameters tried in all, shared out among the candidates.",
        ),
        "batches": Param(
            0,
            type="integer",
            minimum=0,
            title="Batches",
            description="Learn from train batches 1 to this; 0: from all.",
        ),
        "seed": Param(settings().training_seed, type="integer", minimum=0, title="Seed"),
        "classes": Param(
            2,
            enum=[2, 3],
            title="Classes",
            description="2: readmitted within 30 days or not; 3: later readmission told apart.",
        ),
        "learning_curve": Param(True, type="boolean", title="Learning curve by batch"),
        "force": Param(
            False,
            type="boolean",
            title="Force",
            description="Train even where the champion was made from exactly these data, features "
            "and settings.",
        ),
        "leak_overridden_by": Param(
            None,
            type=["null", "string"],
            title="Suspected leak overridden by",
            description="Your name, if you answer for an AUROC above 0.72 on validation rows.",
        ),
    },
) as dag:

    def params() -> dict[str, Any]:
        """The run's Params."""
        return dict(get_current_context()["params"])

    @task(multiple_outputs=False)
    def prepare() -> dict[str, Any]:
        """Check data and project, take the feature SQL from dbt, open the parent run."""
        from training import tasks

        return tasks.prepare(CONNECTION, params())

    @task
    def candidates(plan: dict[str, Any]) -> list[str]:
        """Who competes: search is mapped over this."""
        return list(plan["spec"]["candidates"])

    # One at a time: each training uses all the threads it is given.
    @task(max_active_tis_per_dagrun=1, map_index_template="{{ task.op_kwargs['candidate'] }}")
    def search(plan: dict[str, Any], candidate: str) -> dict[str, Any]:
        """Search one candidate's hyper-parameters."""
        from training import tasks

        return tasks.search(CONNECTION, plan, candidate)

    @task
    def choose(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
        """Take the candidate with the lowest log loss on validation rows."""
        from training import tasks

        return tasks.choose(CONNECTION, outcomes)

    @task
    def learning_curve(plan: dict[str, Any], outcome: dict[str, Any]) -> list[dict[str, float]]:
        """Train the chosen candidate on 1, 2, ... batches."""
        from training import tasks

        if not params()["learning_curve"]:
            return []
        return tasks.learning_curve(CONNECTION, plan, outcome)

    @task(outlets=[Asset(name="models.diabetes_readmission")])
    def judge(
        plan: dict[str, Any], outcome: dict[str, Any], curve: list[dict[str, float]]
    ) -> dict[str, Any]:
        """Calibrate, evaluate, register as challenger; promote if every gate is passed."""
        from training import tasks

        return tasks.judge(CONNECTION, params(), plan, outcome, curve)

    @task
    def close(plan: dict[str, Any]) -> None:
        """End the parent run, whatever became of the training."""
        from training import tasks

        judged = get_current_context()["ti"].xcom_pull(task_ids="judge")
        tasks.close(CONNECTION, plan, succeeded=bool(judged))

    plan = prepare()
    outcome = choose(search.partial(plan=plan).expand(candidate=candidates(plan)))
    judged = judge(plan, outcome, learning_curve(plan, outcome))
    judged >> close(plan).as_teardown(setups=plan)
