"""Brings the tables of MLflow and of its login to this image's version, in one database.

An empty database gets all tables, an older one is migrated, a current one is left as it is. Done
before the roll-out, since the server, when it starts, does it for some older versions, each replica
for itself, and refuses to start on the others.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from infra.jobs.common import JobError, one_line, refusal, run, variable, wait_for


def migrate(uri: str, timeout: float) -> str:
    """Migrate both.

    Returns:
        The revisions, before and after.

    Raises:
        JobError: PostgreSQL does not come up or refuses the login, or the tables are newer.
    """
    # Seconds of import, not needed to say what is wrong with the arguments.
    from alembic.util import CommandError
    from mlflow.db import commands as tracking
    from mlflow.server.auth.cli import commands as login
    from sqlalchemy.engine import make_url

    # As libpq reads it, with sslmode and whatever else it names.
    dsn = make_url(uri).set(drivername="postgresql").render_as_string(hide_password=False)
    if why := wait_for("PostgreSQL", lambda: refusal(dsn=dsn), timeout):
        raise JobError(f"PostgreSQL refuses the login of MLFLOW_BACKEND_STORE_URI: {why}")
    before = _revisions(uri)
    try:
        # In this process, since on a command line everyone could read the password. MLflow's own
        # first: it takes a database that has any table for one with all of its tables.
        tracking.main(["upgrade", uri], standalone_mode=False)
        login.main(["db", "upgrade", "--url", uri], standalone_mode=False)
    except CommandError as error:
        raise JobError(
            f"the tables are of a newer MLflow than this image's {version('mlflow')} "
            f"({one_line(error)}): deploy that one, or restore a backup made before it"
        ) from error
    after = _revisions(uri)
    if before == after:
        return f"MLflow's tables are current ({after}), nothing to do"
    return f"MLflow's tables migrated: {before} -> {after}"


def _revisions(uri: str) -> str:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    found: list[str] = []
    with engine.connect() as connection:
        for table in ("alembic_version", "alembic_version_auth"):
            if sqlalchemy.inspect(connection).has_table(table):
                query = sqlalchemy.text(f"select version_num from {table}")
                found += connection.execute(query).scalars()
    engine.dispose()
    return ", ".join(found) or "none"


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m infra.jobs.migrate", description=__doc__)
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for PostgreSQL")
    timeout = parser.parse_args(argv).timeout
    return run(lambda: migrate(variable("MLFLOW_BACKEND_STORE_URI"), timeout))


if __name__ == "__main__":
    sys.exit(main())
