"""The roles of the two exporters, made where they are missing.

`monitoring` (PostgreSQL's exporter) has pg_monitor and reads no table. `reader` (the pipeline's
exporter) reads every table of the data's database, also those that are made later, and writes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection  # noqa: N812

from infra.jobs.common import JobError, refusal
from services import databases

READER = "reader"
DATA = "diabetes"
"""Database, and role that owns all in it, whose tables are read."""


def ensure(monitoring: str, reader: str, owners: Mapping[str, str]) -> list[str]:
    """Create the two roles, or give them these passwords and rights, where that is missing.

    Args:
        monitoring: password of the one.
        reader: password of the other.
        owners: passwords of the databases' owners; these and their databases are there.

    Returns:
        What was made or mended.

    Raises:
        JobError: something is missing, and the administrator's login may not make it.
        NotReadyError: PostgreSQL does not take connections (any more).
    """
    made = []
    if not _may_watch(monitoring):
        _as_administrator(databases.MONITOR, "and pg_monitor", monitoring, databases.ensure_monitor)
        made.append(f"role {databases.MONITOR}")
    if refusal(dbname=DATA, user=READER, password=reader):
        _as_administrator(READER, "and nothing else", reader, _ensure_reader)
        made.append(f"role {READER}")
    # By the owner, who may give it: no administrator is needed.
    with closing(psycopg2.connect(dbname=DATA, user=DATA, password=owners[DATA])) as connection:
        if _share(connection):
            made.append(f"rights of role {READER}")
    return made


def _may_watch(password: str) -> bool:
    user = databases.MONITOR
    if refusal(dbname="postgres", user=user, password=password):
        return False
    with closing(psycopg2.connect(dbname="postgres", user=user, password=password)) as connection:
        cursor = connection.cursor()
        cursor.execute("select pg_has_role('pg_monitor', 'member')")
        return bool((cursor.fetchone() or (False,))[0])


def _as_administrator(
    name: str, rights: str, password: str, make: Callable[[Connection, str], None]
) -> None:
    if why := refusal(dbname="postgres"):
        raise JobError(f"PGUSER and PGPASSWORD have to be PostgreSQL's administrator: {why}")
    with closing(psycopg2.connect(dbname="postgres")) as connection:
        connection.autocommit = True
        try:
            make(connection, password)
        except psycopg2.errors.InsufficientPrivilege as error:
            raise JobError(
                f"role {name} is missing, has another password or other rights, and this login "
                f"can't mend it: {error}; make it by hand: a role that can log in {rights}"
            ) from error


def _ensure_reader(connection: Connection, password: str) -> None:
    cursor = connection.cursor()
    cursor.execute("select 1 from pg_roles where rolname = %s", (READER,))
    verb = sql.SQL("alter" if cursor.fetchone() else "create")
    statement = sql.SQL("{} role {} login connection limit 5 password %s")
    cursor.execute(statement.format(verb, sql.Identifier(READER)), (password,))


# Of all that this login owns, and will own: what the reader may not read yet.
_DEFAULTS = """
select kind
from unnest(array['r', 'n']::"char"[]) as kind
where not exists (
    select
    from pg_default_acl as given
    cross join aclexplode(given.defaclacl) as acl
    where given.defaclrole = current_user::regrole and given.defaclnamespace = 0
        and given.defaclobjtype = kind and acl.grantee = %(reader)s::regrole
)
"""
_SCHEMAS = """
select nspname
from pg_namespace
where nspowner = current_user::regrole and not has_schema_privilege(%(reader)s, oid, 'usage')
"""
_TABLES = """
select space.nspname, class.relname
from pg_class as class
inner join pg_namespace as space on space.oid = class.relnamespace
where class.relowner = current_user::regrole and class.relkind in ('r', 'v', 'm', 'p')
    and space.nspname !~ '^pg_' and not has_table_privilege(%(reader)s, class.oid, 'select')
"""
_KINDS = {"r": "select on tables", "n": "usage on schemas"}


def _share(connection: Connection) -> bool:
    """Let the reader read all that this login has and will have; whether it could not before."""
    cursor, reader = connection.cursor(), sql.Identifier(READER)

    def missing(query: str) -> list[tuple[str, ...]]:
        cursor.execute(query, {"reader": READER})
        return list(cursor.fetchall())

    defaults, schemas, tables = missing(_DEFAULTS), missing(_SCHEMAS), missing(_TABLES)
    for (kind,) in defaults:
        what = sql.SQL(_KINDS[kind])
        cursor.execute(sql.SQL("alter default privileges grant {} to {}").format(what, reader))
    for (name,) in schemas:
        where = sql.Identifier(name)
        cursor.execute(sql.SQL("grant usage on schema {} to {}").format(where, reader))
    for names in tables:
        table = sql.Identifier(*names)
        cursor.execute(sql.SQL("grant select on {} to {}").format(table, reader))
    connection.commit()
    return bool(defaults or schemas or tables)
