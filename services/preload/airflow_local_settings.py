"""Airflow imports a module of this name when it starts; only the local scheduler finds this one.

The scheduler forks the workers of its LocalExecutor, and these fork a process for each task. What
is imported here, before the first fork, is there in all of them: a task of the pipeline starts in
a third of a second instead of one and a half.
"""

# ruff: noqa: F401

import airflow.sdk.execution_time.supervisor
import airflow.sdk.execution_time.task_runner
import cosmos.converter
import cosmos.operators.watcher
import cosmos.profiles
