"""Buckets, roles and databases of the platform, made where they are missing.

Two of the roles only look: `monitoring` at the server's statistics, `reader` at the data's tables.

What is there is only looked at, with the logins that will use it: with a managed PostgreSQL or S3
whose administrator has made everything, no right to create anything is needed.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from functools import partial
from typing import Any

import psycopg2
from botocore.exceptions import BotoCoreError, ClientError

from infra.jobs import watchers
from infra.jobs.common import JobError, NotReadyError, refusal, run, storage, variable, wait_for
from services.databases import ensure_databases

BUCKETS = ("MLFLOW_BUCKET", "BACKUP_BUCKET")
DATABASES = ("mlflow", "diabetes", "airflow")


def ensure_buckets(client: Any, names: list[str], timeout: float) -> list[str]:
    """Create the buckets that are missing.

    Returns:
        Those.

    Raises:
        JobError: the storage does not come up, or does not let us.
    """
    made = []
    for name in names:
        if wait_for("S3 storage", partial(_exists, client, name), timeout):
            continue
        region = client.meta.region_name
        place = {} if region == "us-east-1" else {"LocationConstraint": region}
        try:
            client.create_bucket(
                Bucket=name, **({"CreateBucketConfiguration": place} if place else {})
            )
        except client.exceptions.BucketAlreadyOwnedByYou:
            continue  # by another run of this job, meanwhile
        except ClientError as error:
            raise JobError(
                f"bucket {name} is missing and can't be made: {error}; make it by hand, or give "
                "a login that may create buckets"
            ) from error
        made.append(name)
    return made


def _exists(client: Any, name: str) -> bool:
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 404:
            return False
        if status >= 500:
            raise NotReadyError(str(error)) from error
        raise JobError(
            f"the storage refuses access to bucket {name} (HTTP {status}): AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY have to be those of a login that may use it"
        ) from error
    except BotoCoreError as error:
        raise NotReadyError(str(error)) from error
    return True


def ensure_roles(passwords: dict[str, str], timeout: float) -> list[str]:
    """Create roles and databases of these names, or set their passwords, where a login fails.

    Returns:
        The names for which something was done.

    Raises:
        JobError: PostgreSQL does not come up, or the administrator's login may not do it.
    """

    def refused() -> dict[str, str]:
        return {
            name: password
            for name, password in passwords.items()
            if refusal(dbname=name, user=name, password=password)
        }

    missing = wait_for("PostgreSQL", refused, timeout)
    if not missing:
        return []
    if why := refusal(dbname="postgres"):
        raise JobError(f"PGUSER and PGPASSWORD have to be PostgreSQL's administrator: {why}")
    with closing(psycopg2.connect(dbname="postgres")) as connection:
        connection.autocommit = True
        try:
            ensure_databases(connection, missing)
        except psycopg2.errors.InsufficientPrivilege as error:
            raise JobError(
                f"roles or databases are missing or have another password ({', '.join(missing)}), "
                f"and this login may not make them: {error}; give one with CREATEROLE and "
                "CREATEDB, or make for each a role that can log in and a database that it owns"
            ) from error
    return list(missing)


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m infra.jobs.init_storage", description=__doc__)
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for each")
    timeout = parser.parse_args(argv).timeout

    def job() -> str:
        buckets = [variable(name) for name in BUCKETS]
        passwords = {name: variable(f"{name.upper()}_PASSWORD") for name in DATABASES}
        monitoring, reader = variable("MONITORING_PASSWORD"), variable("READER_PASSWORD")
        made = [
            *(f"bucket {name}" for name in ensure_buckets(storage(), buckets, timeout)),
            *(f"role and database {name}" for name in ensure_roles(passwords, timeout)),
            *wait_for(
                "PostgreSQL", partial(watchers.ensure, monitoring, reader, passwords), timeout
            ),
        ]
        return f"made or mended: {', '.join(made)}" if made else "all there, nothing to do"

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
