"""Import the DAG folder as Airflow does and print what it found, as JSON.

In a process of its own: importing Airflow makes folders, reads AIRFLOW_HOME and warns.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any


def describe(folder: str) -> dict[str, Any]:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=folder)
    return {
        "errors": bag.import_errors,
        "modules": sorted(sys.modules),
        "dags": {
            dag_id: {
                "max_active_runs": dag.max_active_runs,
                "doc_md": dag.doc_md,
                "schedule": _schedule(dag.timetable.asset_condition),
                "cron": getattr(getattr(dag.timetable, "timetable", None), "expression", None),
                "catchup": dag.catchup,
                "params": {
                    name: {
                        "title": dag.params.get_param(name).schema.get("title"),
                        "description": dag.params.get_param(name).description,
                        "default": dag.params.get_param(name).value,
                        "schema": dag.params.get_param(name).schema,
                    }
                    for name in dag.params
                },
                "tasks": {
                    task.task_id: {
                        "type": type(task).__name__,
                        "upstream": sorted(task.upstream_task_ids),
                        "retries": task.retries,
                        "exponential": bool(task.retry_exponential_backoff),
                        "timeout": task.execution_timeout and task.execution_timeout.seconds,
                        "teardown": task.is_teardown,
                        "setup": task.is_setup,
                        "mapped_over": _mapped_over(task),
                        "at_once": task.max_active_tis_per_dagrun,
                        "outlets": [outlet.name for outlet in task.outlets],
                        "triggers": getattr(task, "trigger_dag_id", None),
                        "triggered_run": getattr(task, "trigger_run_id", None),
                        "vars": getattr(task, "vars", None),
                        "watched_tests": getattr(task, "tests_per_model", None),
                        "node": getattr(task, "extra_context", {})
                        .get("dbt_node_config", {})
                        .get("unique_id"),
                    }
                    for task in dag.tasks
                },
            }
            for dag_id, dag in bag.dags.items()
        },
    }


def _schedule(condition: Any) -> list[str]:
    """How the assets that start a DAG are joined, and their names; empty without assets."""
    names = sorted(asset.name for asset in getattr(condition, "objects", ()))
    return [type(condition).__name__, *names] if names else []


def _mapped_over(task: Any) -> list[str]:
    """Arguments that a task is mapped over; empty where it is not mapped."""
    return sorted(getattr(getattr(task, "op_kwargs_expand_input", None), "value", {}))


if __name__ == "__main__":
    logging.disable()
    sys.stdout.write("\n" + json.dumps(describe(sys.argv[1]), default=str))
