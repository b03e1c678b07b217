"""What the jobs share: their environment, their one message on failure, waiting, S3, PostgreSQL."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import boto3
import psycopg2
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

Found = TypeVar("Found")


class JobError(Exception):
    """The job can't do its work; the message says why and what to do."""


class NotReadyError(Exception):
    """What is waited for is not up yet; the message says how that shows."""


def variable(name: str, default: str | None = None) -> str:
    """A variable that the manifests set; an empty one counts as none.

    The only place of the jobs that reads the environment. `settings` is not in MLflow's image, and
    these are not settings of ours but what Secrets and ConfigMaps give to this one pod. libpq's
    (PGHOST ...), boto3's (AWS_...) and MLflow's own are read by those libraries.
    """
    found = os.environ.get(name) or default
    if found is None:
        raise JobError(f"{name} is not set: the pod's Secret or ConfigMap has to give it")
    return found


def run(job: Callable[[], str]) -> int:
    """Do the job and say what came of it.

    Returns:
        The exit code: 0 with the job's last word on standard output, 1 with one line on standard
        error.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    try:
        said = job()
    except (JobError, BotoCoreError, ClientError, OSError, psycopg2.Error) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 1
    sys.stdout.write(f"{said}\n")
    return 0


def one_line(error: Exception) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def wait_for(what: str, attempt: Callable[[], Found], timeout: float) -> Found:
    """Repeat an attempt as long as it raises NotReadyError.

    Raises:
        JobError: the time is over.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return attempt()
        except NotReadyError as error:
            if time.monotonic() >= deadline:
                raise JobError(
                    f"{what} is not up after {timeout:.0f} s: {one_line(error)}"
                ) from error
        time.sleep(0.5)


def storage() -> Any:
    """A client of the S3 storage; an empty MLFLOW_S3_ENDPOINT_URL means Amazon's."""
    # A session of its own: boto3's shared one would keep the login of its first client.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=variable("MLFLOW_S3_ENDPOINT_URL", "") or None,
        config=Config(connect_timeout=10, retries={"mode": "standard", "max_attempts": 4}),
    )


_REFUSED = (
    "authentication failed",
    "does not exist",
    "no password supplied",
    "no pg_hba.conf entry",
    "not permitted to log in",
    "permission denied",
)


def refusal(**login: Any) -> str:
    """What PostgreSQL has against a login (`psycopg2.connect`'s arguments); empty: nothing.

    Raises:
        NotReadyError: the server does not take connections (yet).
    """
    try:
        with closing(psycopg2.connect(**login, connect_timeout=10)):
            return ""
    except psycopg2.OperationalError as error:
        # libpq gives no code for a refused login, only the server's words.
        if any(words in str(error) for words in _REFUSED):
            return one_line(error)
        raise NotReadyError(str(error)) from error
