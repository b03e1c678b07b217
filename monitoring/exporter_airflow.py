"""What Airflow's REST API says of our DAGs' runs, as metrics."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any
from urllib.parse import quote

import requests
from prometheus_client.core import GaugeMetricFamily, Metric

DAG_PREFIX = "diabetes_"
"""Every DAG of ours is named so; an Airflow that others use too has more."""

NEWEST = 25
"""Runs of a DAG that are looked at."""

_MOST_DAGS = 20
_STATES = ("queued", "running", "success", "failed")
_TIMEOUT = 3
_BUDGET = 15.0


class AirflowReader:
    """A login to Airflow's REST API.

    Args:
        url: of the API server, http(s)://host:port.
        user: login.
        password: its password.
    """

    def __init__(self, url: str, user: str, password: str) -> None:
        self._url = url.rstrip("/")
        self._login = {"username": user, "password": password}
        self._session = requests.Session()
        # Airflow is a neighbour: no proxy stands between, and no .netrc names the user.
        self._session.trust_env = False

    def read(self) -> list[Metric]:
        """The newest runs of each DAG.

        Raises:
            requests.RequestException: Airflow does not answer, or refuses.
            KeyError, ValueError: what answers is no Airflow 3.
        """
        deadline = time.monotonic() + _BUDGET
        listed = self._get("dags", limit=100, dag_id_pattern=f"{DAG_PREFIX}%")["dags"]
        names = sorted(dag["dag_id"] for dag in listed if dag["dag_id"].startswith(DAG_PREFIX))
        runs = {}
        for name in names[:_MOST_DAGS]:
            path = f"dags/{quote(name, safe='')}/dagRuns"
            runs[name] = self._get(path, limit=NEWEST, order_by="-run_after")["dag_runs"]
            if time.monotonic() > deadline:
                raise requests.Timeout(f"Airflow at {self._url} is too slow")
        return metrics(runs)

    def _get(self, path: str, **parameters: str | int) -> Any:
        url = f"{self._url}/api/v2/{path}"
        if "Authorization" not in self._session.headers:
            self._log_in()
        answer = self._session.get(url, params=parameters, timeout=_TIMEOUT)
        if answer.status_code == requests.codes.unauthorized:
            # The token has expired, or Airflow was set up anew.
            self._log_in()
            answer = self._session.get(url, params=parameters, timeout=_TIMEOUT)
        answer.raise_for_status()
        return answer.json()

    def _log_in(self) -> None:
        self._session.headers.pop("Authorization", None)
        answer = self._session.post(f"{self._url}/auth/token", json=self._login, timeout=_TIMEOUT)
        answer.raise_for_status()
        self._session.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"


def metrics(runs: dict[str, list[dict[str, Any]]]) -> list[Metric]:
    """Metrics of the runs of each DAG (newest first), as the REST API describes them."""
    seconds = GaugeMetricFamily(
        "dag_run_duration_seconds", "Duration of the newest run that has ended", labels=["dag_id"]
    )
    success = GaugeMetricFamily(
        "dag_run_success", "1 if the newest run that has ended succeeded", labels=["dag_id"]
    )
    last = GaugeMetricFamily(
        "dag_run_last_success_timestamp_seconds",
        f"End of the newest run that succeeded, of the last {NEWEST}",
        labels=["dag_id"],
    )
    states = GaugeMetricFamily(
        "dag_runs", f"The newest {NEWEST} runs by state", labels=["dag_id", "state"]
    )
    for name, found in runs.items():
        ended = [run for run in found if run["state"] in ("success", "failed")]
        succeeded = [_time(run["end_date"]) for run in ended if run["state"] == "success"]
        if ended:
            newest = ended[0]
            success.add_metric([name], float(newest["state"] == "success"))
            # A run that was marked by hand before it began has no begin.
            if newest["start_date"] and newest["end_date"]:
                took = _time(newest["end_date"]) - _time(newest["start_date"])
                seconds.add_metric([name], max(took, 0.0))
        if succeeded:
            last.add_metric([name], max(succeeded))
        for state in _STATES:
            states.add_metric([name, state], sum(run["state"] == state for run in found))
    return [seconds, success, last, states]


def _time(text: str | None) -> float:
    """Seconds since the epoch; 0 where a run has no such moment."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0
