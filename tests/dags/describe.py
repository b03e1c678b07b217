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
        "dags": {
            dag_id: {
                "max_active_runs": dag.max_active_runs,
                "doc_md": dag.doc_md,
                "params": {
                    name: {
                        "title": dag.params.get_param(name).schema.get("title"),
                        "description": dag.params.get_param(name).description,
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
                        "outlets": [outlet.name for outlet in task.outlets],
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


if __name__ == "__main__":
    logging.disable()
    sys.stdout.write("\n" + json.dumps(describe(sys.argv[1]), default=str))
