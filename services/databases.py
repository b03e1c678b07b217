"""Roles and databases, made once and found again, on the embedded server and in a cluster."""

from __future__ import annotations

from collections.abc import Mapping

from psycopg2 import sql
from psycopg2.extensions import connection as Connection  # noqa: N812


def ensure_databases(connection: Connection, owners: Mapping[str, str]) -> None:
    """Create a role and a database of the same name for each owner (name -> password).

    What is there is kept; only the password becomes the one that is given.

    Args:
        connection: of a login that may create both, in autocommit mode (`create database` runs
            in no transaction).
        owners: name and password of each.
    """
    cursor = connection.cursor()
    cursor.execute("select rolsuper from pg_roles where rolname = current_user")
    (superuser,) = cursor.fetchone() or (False,)
    for name, password in owners.items():
        cursor.execute("select 1 from pg_roles where rolname = %s", (name,))
        role = sql.Identifier(name)
        verb = sql.SQL("alter" if cursor.fetchone() else "create")
        cursor.execute(sql.SQL("{} role {} login password %s").format(verb, role), (password,))
        cursor.execute("select 1 from pg_database where datname = %s", (name,))
        if cursor.fetchone():
            continue
        if not superuser:
            # A managed server's administrator may give a database only to whom it can become.
            cursor.execute(sql.SQL("grant {} to current_user").format(role))
        cursor.execute(sql.SQL("create database {} owner {}").format(role, role))


MONITOR = "monitoring"
"""Role with which PostgreSQL's exporter reads."""


def ensure_monitor(connection: Connection, password: str) -> None:
    """Create the role that reads the server's statistics and no table, or give it this password.

    Args:
        connection: of a login that may create roles and has pg_monitor to give, in autocommit
            mode.
        password: of the role.
    """
    cursor = connection.cursor()
    cursor.execute("select 1 from pg_roles where rolname = %s", (MONITOR,))
    role = sql.Identifier(MONITOR)
    verb = sql.SQL("alter" if cursor.fetchone() else "create")
    statement = sql.SQL("{} role {} login connection limit 5 password %s")
    cursor.execute(statement.format(verb, role), (password,))
    cursor.execute("select pg_has_role(%s, 'pg_monitor', 'member')", (MONITOR,))
    if not (cursor.fetchone() or (False,))[0]:
        cursor.execute(sql.SQL("grant pg_monitor to {}").format(role))
