"""What the dbt models of drift read: the champion's reference and the rows of the windows.

A check compares two windows with the reference that training stored beside the model: the newest
`predictions`, and the encounters of the newest `load`. Figures are SQL, in
dbt_diabetes/models/monitoring; here their inputs are put into place, in one transaction.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import cursor as Cursor  # noqa: N812
from psycopg2.extras import Json, execute_values

from ingestion.contract import NOBODY

log = logging.getLogger(__name__)

PREDICTIONS, LOAD = "predictions", "load"
SCORE = "(score)"
"""Named among the features, in brackets as no column is."""

MOST_ROWS = 100_000
"""Of a window; more would move no figure that has two digits."""

_CHUNK = 10_000
_HASH_BYTES = 16
_LOCK = 132  # that of dbt's store_results: both make the schema
_INFINITY = float("inf")

_REFERENCE = """
create schema if not exists monitoring;
create table if not exists monitoring.reference (
    model_version text not null,
    feature text not null,
    bin integer not null,
    kind text not null check (kind in ('interval', 'level', 'other')),
    lower_bound double precision,
    upper_bound double precision,
    level text,
    share double precision not null,
    primary key (model_version, feature, bin)
);
"""

# Of the check that is being made and of no other: made anew each time.
_WINDOWS = """
drop table if exists monitoring.windows, monitoring.window_rows, monitoring.window_outcomes;
create table monitoring.windows (
    check_id text not null,
    window_name text not null check (window_name in ('predictions', 'load')),
    checked_at timestamptz not null,
    model_version text not null,
    learnt_load_id integer not null,
    begins_at timestamptz,
    loads_after integer,
    load_id integer,
    feature_names jsonb not null,
    primary key (check_id, window_name)
);
create unlogged table monitoring.window_rows (
    check_id text not null,
    window_name text not null,
    row_id text not null,
    probability double precision,
    features jsonb not null,
    primary key (check_id, window_name, row_id)
);
create unlogged table monitoring.window_outcomes (
    check_id text not null,
    window_name text not null,
    row_id text not null,
    probability double precision not null,
    observed smallint not null,
    primary key (check_id, window_name, row_id)
);
"""

_PUBLISHED = {split: f"clean_data.diabetes_{split}" for split in ("train", "validation", "test")}

# By whichever version computed the same features in the same way; scores are of one version.
_PREDICTIONS = """
insert into monitoring.window_rows (check_id, window_name, row_id, probability, features)
select %(check)s, 'predictions', p.prediction_id,
    case when p.model_version = %(version)s then p.probability end, p.features
from inference.predictions as p
inner join inference.models as m on m.model_version = p.model_version
where p.role = 'champion' and m.feature_sha256 = %(features)s
    and p.predicted_at >= %(begin)s and p.predicted_at < %(end)s
    and p.encounter_hash is distinct from %(nobody)s
order by p.predicted_at desc, p.prediction_id desc
limit %(most)s
"""

_OF_OTHER_FEATURES = """
select count(*)
from inference.predictions as p
inner join inference.models as m on m.model_version = p.model_version
where p.role = 'champion' and m.feature_sha256 <> %(features)s
    and p.predicted_at >= %(begin)s and p.predicted_at < %(end)s
"""

_ASKED = """
select distinct encounter_hash
from inference.predictions
where role = 'champion' and model_version = %(version)s and encounter_hash is not null
    and predicted_at >= %(begin)s and predicted_at < %(end)s
"""

# An encounter can be asked about again: its outcome is held against the newest prediction of it.
_OUTCOMES = """
insert into monitoring.window_outcomes (check_id, window_name, row_id, probability, observed)
select %(check)s, 'predictions', prediction_id, probability, observed
from (
    select distinct on (p.encounter_hash) p.prediction_id, p.predicted_at, p.probability, o.observed
    from inference.predictions as p
    inner join drift_known as o on o.encounter_hash = p.encounter_hash
    where p.role = 'champion' and p.model_version = %(version)s
        and p.predicted_at >= %(begin)s and p.predicted_at < %(end)s
    order by p.encounter_hash, p.predicted_at desc, p.prediction_id desc
) as newest
order by predicted_at desc, prediction_id desc
limit %(most)s
"""

_LOAD = """
create temporary table drift_load on commit drop as
select encounter_id, readmitted_within_30_days as observed, {unseen} as unseen
from ({published}) as published
where first_load_id > %(after)s and first_load_id <= %(load)s
order by md5(encounter_id::text)
limit %(most)s
"""

# Not the rows that the champion learnt from: of them it is too sure. Nor those of test, whose
# outcomes are looked at once a champion, by training.
_UNSEEN = "(split = 'validation' or split = 'train' and first_load_id > %(learnt)s)"


class DriftError(Exception):
    """The check can't be made; the message says why and what to do."""


class Scorer(Protocol):
    """What a champion's own code offers, see `training.inference.Scorer`."""

    definition: Mapping[str, Any]

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features in the order of a row."""

    def features(self, columns: Mapping[str, Sequence[Any]], count: int) -> list[tuple[Any, ...]]:
        """Features of raw encounters, given by field."""

    def matrix(self, rows: Sequence[tuple[Any, ...]]) -> npt.NDArray[np.float64]:
        """Encode feature rows."""

    def probabilities(self, matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Probability of readmission within 30 days."""


@dataclass(frozen=True, slots=True)
class Champion:
    """The version that is served, as far as drift is concerned.

    Attributes:
        version: its number in the registry.
        load_id: newest load that it may have learnt from.
        reference: what `training.drift.reference` made.
        scorer: what it scores with.
    """

    version: str
    load_id: int
    reference: Mapping[str, Any]
    scorer: Scorer


@dataclass(frozen=True, slots=True)
class Check:
    """What a check is about.

    Attributes:
        check_id: its name; a check of the same name takes the place of the one before.
        checked_at: end of the window of predictions, with a time zone.
        hours: length of that window.
        outcome_days: how far back predictions are held against outcomes that are known by now.
        key: of the hashes in the prediction log; empty: outcomes can't be found for predictions.
    """

    check_id: str
    checked_at: datetime
    hours: int
    outcome_days: int
    key: bytes


class Found(NamedTuple):
    """What a check found in a window: rows, whether they are enough, PSI of what drifted."""

    window: str
    rows: int
    enough: bool
    drifted: dict[str, float]


class Loads(NamedTuple):
    """The loads that a window takes: those after one, up to the newest."""

    after: int | None
    newest: int | None


def connect(dsn: str) -> Connection:
    """Connect to the data database."""
    return psycopg2.connect(dsn)


def prepare(dsn: str, check: Check, champion: Champion) -> dict[str, int]:
    """Put the reference and both windows where the dbt models read them.

    Args:
        dsn: connection string (libpq) of the data database.
        check: what to look at.
        champion: what to compare it with.

    Returns:
        Rows by window.

    Raises:
        DriftError: nothing has been published yet.
    """
    with closing(connect(dsn)) as connection, connection:
        cursor = connection.cursor()
        begin(cursor, champion)
        counts = add(cursor, check, champion, loads_of(cursor, check.check_id, champion.load_id))
        cursor.execute(
            "analyze monitoring.windows, monitoring.reference, monitoring.window_rows, "
            "monitoring.window_outcomes"
        )
    for name, rows in counts.items():
        log.info("window %s: %s rows", name, f"{rows:,}")
    return counts


def begin(cursor: Cursor, champion: Champion) -> None:
    """Put the reference in place and empty tables for the windows.

    Raises:
        DriftError: nothing has been published yet.
    """
    for table in _PUBLISHED.values():
        if not _columns(cursor, table):
            raise DriftError(
                f"{table} does not exist; run the DAG diabetes_data_processing (or dbt build) first"
            )
    # Two checks that start at once must not both create.
    cursor.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    cursor.execute(_REFERENCE)
    cursor.execute(_WINDOWS)
    write_reference(cursor, champion.version, reference_rows(champion.reference))


def loads_of(cursor: Cursor, check_id: str, learnt: int) -> Loads:
    """Choose the loads that a check looks at.

    Those since the last load that was judged, so that small loads wait for one another until they
    are enough, and none is passed over. Where there is no newer one, what was judged last is
    looked at again. The first check begins with what the champion did not learn from, if there is
    anything. A check that is repeated looks at the loads that it looked at before.

    Args:
        cursor: in a transaction.
        check_id: of the check.
        learnt: newest load that the champion may have learnt from.
    """
    cursor.execute(f"select max(first_load_id) from ({_published('first_load_id')}) as published")
    (newest,) = cursor.fetchone() or (None,)
    if newest is None:
        return Loads(None, None)
    if "load_id" in _columns(cursor, "monitoring.drift_checks"):
        cursor.execute(
            "select check_id, loads_after, load_id from monitoring.drift_checks "
            "where window_name = 'load' and load_id <= %s and (enough_rows or check_id = %s) "
            "order by (check_id = %s) desc, load_id desc, checked_at desc limit 1",
            (newest, check_id, check_id),
        )
        if found := cursor.fetchone():
            judged, after, load_id = found
            again = judged == check_id or load_id == newest
            return Loads(after, load_id) if again else Loads(load_id, newest)
    return Loads(min(learnt, newest - 1), newest)


def add(cursor: Cursor, check: Check, champion: Champion, loads: Loads) -> dict[str, int]:
    """Put both windows of a check in place, and return their rows.

    Args:
        cursor: in a transaction, which takes one check.
        check: what to look at.
        champion: whose predictions, and what scores the load.
        loads: whose encounters.
    """
    # These tables have just been filled: the planner would take them for small and join them row
    # by row, which is slower by a factor of ten for a thousand rows and more for more.
    cursor.execute("set local enable_nestloop = off")
    start = check.checked_at - timedelta(hours=check.hours)
    about = (check.checked_at, champion.version, champion.load_id)
    names = Json(list(champion.scorer.feature_names))
    execute_values(
        cursor,
        "insert into monitoring.windows (check_id, window_name, checked_at, model_version, "
        "learnt_load_id, begins_at, loads_after, load_id, feature_names) values %s",
        [
            (check.check_id, PREDICTIONS, *about, start, None, None, names),
            (check.check_id, LOAD, *about, None, *loads, names),
        ],
    )
    return {
        PREDICTIONS: _take_predictions(cursor, check, champion, start),
        LOAD: _take_load(cursor, check, champion, loads),
    }


def reference_rows(reference: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The reference as rows of `monitoring.reference`, without the version.

    Levels that the reference counts in `other` get a bin without a share, so that they are not
    taken for new.

    Args:
        reference: what `training.drift.reference` made.

    Returns:
        feature, bin, kind, lower bound (included), upper bound (excluded), level, share.
    """
    rows: list[tuple[Any, ...]] = []
    for feature, found in {**reference["features"], SCORE: reference["score"]}.items():
        shares = found["shares"]
        if "edges" in found:
            bounds = [-_INFINITY, *found["edges"], _INFINITY]
            rows += [
                (feature, number, "interval", bounds[number], bounds[number + 1], None, share)
                for number, share in enumerate(shares)
            ]
            continue
        *levels, _ = found["levels"]
        rest = found.get("rest", [])  # champions from before 2026-11-29 do not name them
        rows += [
            (feature, number, "level", None, None, level, share)
            for number, (level, share) in enumerate(
                zip([*levels, *rest], [*shares[:-1], *(0.0 for _ in rest)], strict=True)
            )
        ]
        rows.append((feature, len(levels) + len(rest), "other", None, None, None, shares[-1]))
    return rows


def write_reference(cursor: Cursor, version: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Store the reference of a version in the place of what was there of it."""
    cursor.execute("delete from monitoring.reference where model_version = %s", (version,))
    execute_values(
        cursor,
        "insert into monitoring.reference (model_version, feature, bin, kind, lower_bound, "
        "upper_bound, level, share) values %s",
        [(version, *row) for row in rows],
        page_size=1000,
    )


def encounter_hash(key: bytes, encounter_id: int) -> str:
    """An identifier as the prediction log writes it: keyed BLAKE2b (RFC 7693), 16 bytes as hex.

    Not taken from `serving.prediction_log`: Airflow's image has no need of what that imports.
    """
    return blake2b(str(encounter_id).encode(), key=key, digest_size=_HASH_BYTES).hexdigest()


def version_of(dsn: str, check_id: str) -> str | None:
    """The version that a check compared with when it was made before; None where it was not."""
    with closing(connect(dsn)) as connection:
        cursor = connection.cursor()
        if not _columns(cursor, "monitoring.drift_checks"):
            return None
        cursor.execute(
            "select model_version from monitoring.drift_checks where check_id = %s limit 1",
            (check_id,),
        )
        found = cursor.fetchone()
        return str(found[0]) if found else None


def found(dsn: str, check_id: str) -> list[Found]:
    """What a check found, by window; of what drifted, the furthest first.

    Raises:
        DriftError: there is no such check.
    """
    with closing(connect(dsn)) as connection:
        cursor = connection.cursor()
        cursor.execute(
            "select c.window_name, c.rows, c.enough_rows, coalesce("
            "  json_object_agg(d.feature, d.psi order by d.psi desc, d.feature)"
            "  filter (where d.drifted), '{}') "
            "from monitoring.drift_checks as c "
            "left join monitoring.drift as d using (check_id, window_name) "
            "where c.check_id = %s "
            "group by c.window_name, c.rows, c.enough_rows order by c.window_name",
            (check_id,),
        )
        windows = [Found(*row) for row in cursor.fetchall()]
    if not windows:
        raise DriftError(f"monitoring.drift_checks holds no check {check_id}")
    return windows


def _columns(cursor: Cursor, table: str) -> set[str]:
    """Columns of a table, named with its schema; empty where there is no such table."""
    schema, name = table.split(".")
    cursor.execute(
        "select column_name from information_schema.columns "
        "where table_schema = %s and table_name = %s",
        (schema, name),
    )
    return {column for (column,) in cursor.fetchall()}


def _published(columns: str) -> str:
    """Query for columns of all encounters that were published, and their split."""
    return " union all ".join(
        f"select {columns}, '{split}' as split from {table}" for split, table in _PUBLISHED.items()
    )


def _take_predictions(cursor: Cursor, check: Check, champion: Champion, start: datetime) -> int:
    if not _columns(cursor, "inference.predictions"):
        log.info("inference.predictions does not exist yet: nothing was predicted")
        return 0
    arguments = {
        "check": check.check_id,
        "version": champion.version,
        "features": champion.scorer.definition["sha256"],
        "begin": start,
        "end": check.checked_at,
        "most": MOST_ROWS,
        # A load test asks for nobody; it says nothing of patients.
        "nobody": encounter_hash(check.key, NOBODY),
    }
    cursor.execute(_PREDICTIONS, arguments)
    rows = int(cursor.rowcount)
    cursor.execute(_OF_OTHER_FEATURES, arguments)
    (others,) = cursor.fetchone() or (0,)
    if others:
        log.warning(
            "%s predictions are left out: their version computed its features in another way",
            f"{others:,}",
        )
    if check.key:
        earliest = check.checked_at - timedelta(days=check.outcome_days)
        _take_outcomes(cursor, check, champion, {**arguments, "begin": earliest})
    else:
        log.warning(
            "DIABETES_PREDICTION_LOG_KEY is not set: predictions can't be held against outcomes"
        )
    return rows


def _take_outcomes(
    cursor: Cursor, check: Check, champion: Champion, arguments: Mapping[str, Any]
) -> None:
    """Hold predictions against outcomes that are known by now, without an id of anyone."""
    cursor.execute(_ASKED, arguments)
    asked = {digest for (digest,) in cursor.fetchall()}
    if not asked:
        return
    cursor.execute(
        "create temporary table drift_known "
        "(encounter_hash text primary key, observed smallint not null) on commit drop"
    )
    cursor.execute(
        "select encounter_id, readmitted_within_30_days from ("
        + _published("encounter_id, readmitted_within_30_days, first_load_id")
        + f") as published where {_UNSEEN}",
        {"learnt": champion.load_id},
    )
    _copy(
        cursor,
        "drift_known (encounter_hash, observed)",
        (
            (digest, observed)
            for encounter, observed in cursor.fetchall()
            if (digest := encounter_hash(check.key, encounter)) in asked
        ),
    )
    cursor.execute("analyze drift_known")
    cursor.execute(_OUTCOMES, arguments)
    log.info("outcomes are known of %s predictions", f"{cursor.rowcount:,}")


def _take_load(cursor: Cursor, check: Check, champion: Champion, loads: Loads) -> int:
    """Rows of the load with the champion's own features, as the API would have computed them."""
    if loads.newest is None:
        return 0
    columns = "encounter_id, readmitted_within_30_days, first_load_id"
    cursor.execute(
        _LOAD.format(unseen=_UNSEEN, published=_published(columns)),
        {
            "after": loads.after,
            "load": loads.newest,
            "learnt": champion.load_id,
            "most": MOST_ROWS,
        },
    )
    rows = int(cursor.rowcount)
    fields = {each["name"]: each["column"] for each in champion.scorer.definition["fields"]}
    raw = ", ".join(f"r.{column}" for column in fields.values())
    with cursor.connection.cursor("drift_raw") as reading:
        reading.itersize = _CHUNK
        reading.execute(
            f"select l.encounter_id, l.observed, l.unseen, {raw} from drift_load as l "
            "inner join raw_data.diabetes as r using (encounter_id)"
        )
        while chunk := reading.fetchmany(_CHUNK):
            ids, observed, unseen, *values = zip(*chunk, strict=True)
            features = champion.scorer.features(dict(zip(fields, values, strict=True)), len(chunk))
            scores = champion.scorer.probabilities(champion.scorer.matrix(features)).tolist()
            scored = [score if one else None for score, one in zip(scores, unseen, strict=True)]
            key = (check.check_id, LOAD)
            _copy(
                cursor,
                "monitoring.window_rows (check_id, window_name, row_id, probability, features)",
                (
                    (*key, encounter, score, json.dumps(row))
                    for encounter, score, row in zip(ids, scored, features, strict=True)
                ),
            )
            _copy(
                cursor,
                "monitoring.window_outcomes (check_id, window_name, row_id, probability, observed)",
                (
                    (*key, encounter, score, outcome)
                    for encounter, score, outcome in zip(ids, scored, observed, strict=True)
                    if score is not None
                ),
            )
    return rows


def _copy(cursor: Cursor, into: str, rows: Iterator[tuple[Any, ...]]) -> None:
    """COPY rows into the columns of a table."""
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerows(rows)
    lines.seek(0)
    cursor.copy_expert(f"copy {into} from stdin with (format csv)", lines)
