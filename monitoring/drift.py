"""What the dbt models of drift read: the champion's reference and the rows of the windows.

A check compares two windows with the reference that training stored beside the model: the newest
`predictions`, and the newest `load`. Figures are SQL, in dbt_diabetes/models/monitoring; here their
inputs are put into place, in one transaction.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import cursor as Cursor  # noqa: N812
from psycopg2.extras import Json, execute_values

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

_TABLES = """
create schema if not exists monitoring;
create table if not exists monitoring.windows (
    check_id text not null,
    window_name text not null check (window_name in ('predictions', 'load')),
    checked_at timestamptz not null,
    model_version text not null,
    begins_at timestamptz,
    load_id integer,
    feature_names jsonb not null,
    primary key (check_id, window_name)
);
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
create unlogged table if not exists monitoring.window_rows (
    check_id text not null,
    window_name text not null,
    row_id text not null,
    probability double precision,
    observed smallint,
    features jsonb not null,
    primary key (check_id, window_name, row_id)
);
"""

# In batches and CSVs the same encounter can be asked about again: its newest prediction is the one
# that its outcome is held against.
_PREDICTIONS = """
create temporary table drift_asked on commit drop as
select prediction_id, encounter_hash, probability, features,
    row_number() over (
        partition by encounter_hash order by predicted_at desc, prediction_id desc
    ) = 1 as is_newest
from (
    select *
    from inference.predictions
    where role = 'champion' and model_version = %(version)s
        and predicted_at >= %(begin)s and predicted_at < %(end)s
    order by predicted_at desc, prediction_id desc
    limit %(most)s
) as newest;
insert into monitoring.window_rows
    (check_id, window_name, row_id, probability, features)
select %(check)s, 'predictions', prediction_id, probability, features
from drift_asked;
"""

_OUTCOMES = """
update monitoring.window_rows as w
set observed = o.observed
from drift_outcomes as o
inner join drift_asked as a on a.encounter_hash = o.encounter_hash and a.is_newest
where w.check_id = %(check)s and w.window_name = 'predictions'
    and w.row_id = a.prediction_id::text
"""

_LOADED = """
insert into monitoring.window_rows (check_id, window_name, row_id, features)
select %(check)s, 'load', encounter_id, jsonb_build_array({features})
from intermediate.int_encounters__features
where last_load_id = %(load)s and exclusion_reason is null
order by md5(encounter_id::text)
limit %(most)s
"""

# Not the rows that the champion learnt from: of them it is too sure. Nor those of test, whose
# outcomes are looked at once a champion, by training.
_SCORABLE = """
select w.row_id, f.readmitted_within_30_days, {features}
from monitoring.window_rows as w
inner join intermediate.int_encounters__features as f on f.encounter_id = w.row_id::bigint
where w.check_id = %(check)s and w.window_name = 'load'
    and (f.split = 'validation' or f.split = 'train' and f.first_load_id > %(learnt)s)
"""

_SCORED = """
update monitoring.window_rows as w
set probability = s.probability, observed = s.observed
from drift_scored as s
where w.check_id = %(check)s and w.window_name = 'load' and w.row_id = s.row_id
"""


class DriftError(Exception):
    """The check can't be made; the message says why and what to do."""


class Scorer(Protocol):
    """What a champion's own code offers, see `training.inference.Scorer`."""

    definition: Mapping[str, Any]

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features in the order of a row."""

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
        key: of the hashes in the prediction log; empty: outcomes can't be found for predictions.
    """

    check_id: str
    checked_at: datetime
    hours: int
    key: bytes


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
        DriftError: dbt has not built the features yet.
    """
    with closing(connect(dsn)) as connection, connection:
        cursor = connection.cursor()
        begin(cursor, champion)
        cursor.execute("select max(last_load_id) from intermediate.int_encounters__features")
        (load_id,) = cursor.fetchone() or (None,)
        counts = add(cursor, check, champion, load_id)
        cursor.execute("analyze monitoring.windows, monitoring.reference, monitoring.window_rows")
    for name, rows in counts.items():
        log.info("window %s: %s rows", name, f"{rows:,}")
    return counts


def begin(cursor: Cursor, champion: Champion) -> None:
    """Put the reference in place and remove the windows of the check before.

    Raises:
        DriftError: dbt has not built the features yet.
    """
    create_tables(cursor)
    if not _there(cursor, "intermediate.int_encounters__features"):
        raise DriftError(
            "intermediate.int_encounters__features does not exist; run the DAG "
            "diabetes_data_processing (or dbt build) first"
        )
    known = _known_levels(cursor, champion)
    write_reference(cursor, champion.version, reference_rows(champion.reference, known))
    cursor.execute("truncate monitoring.windows, monitoring.window_rows")


def add(cursor: Cursor, check: Check, champion: Champion, load_id: int | None) -> dict[str, int]:
    """Put both windows of a check in place, one check a transaction, and return their rows.

    Args:
        cursor: in a transaction.
        check: what to look at.
        champion: whose predictions, and what scores the load.
        load_id: whose encounters; None: nobody's.
    """
    # These tables have just been filled: the planner would take them for small and join them row
    # by row, which is slower by a factor of ten for a thousand rows and more for more.
    cursor.execute("set local enable_nestloop = off")
    names = Json(list(champion.scorer.feature_names))
    start = check.checked_at - timedelta(hours=check.hours)
    execute_values(
        cursor,
        "insert into monitoring.windows (check_id, window_name, checked_at, model_version, "
        "begins_at, load_id, feature_names) values %s",
        [
            (check.check_id, name, check.checked_at, champion.version, begins, load, names)
            for name, begins, load in ((PREDICTIONS, start, None), (LOAD, None, load_id))
        ],
    )
    return {
        PREDICTIONS: _take_predictions(cursor, check, champion, start),
        LOAD: _take_load(cursor, check, champion, load_id),
    }


def create_tables(cursor: Cursor) -> None:
    """Make the inputs' tables where they are missing."""
    # Two checks that start at once must not both create.
    cursor.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    cursor.execute(_TABLES)


def reference_rows(
    reference: Mapping[str, Any], known: Mapping[str, Iterable[str]]
) -> list[tuple[Any, ...]]:
    """The reference as rows of `monitoring.reference`, without the version.

    Args:
        reference: what `training.drift.reference` made.
        known: by nominal feature, levels that the champion has seen. Those that the reference
            counts in `other` get a bin without a share, so that they are not taken for new.

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
        tail = sorted(set(known.get(feature, ())) - set(levels))
        rows += [
            (feature, number, "level", None, None, level, share)
            for number, (level, share) in enumerate(
                zip([*levels, *tail], [*shares[:-1], *(0.0 for _ in tail)], strict=True)
            )
        ]
        rows.append((feature, len(levels) + len(tail), "other", None, None, None, shares[-1]))
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


def drifted(dsn: str, check_id: str) -> list[tuple[str, str, float]]:
    """What a check found to have drifted: window, feature and PSI, the furthest first."""
    with closing(connect(dsn)) as connection:
        cursor = connection.cursor()
        cursor.execute(
            "select window_name, feature, psi from monitoring.drift "
            "where check_id = %s and drifted order by psi desc, window_name, feature",
            (check_id,),
        )
        return [(window, feature, float(psi)) for window, feature, psi in cursor.fetchall()]


def _there(cursor: Cursor, table: str) -> bool:
    cursor.execute("select to_regclass(%s) is not null", (table,))
    (there,) = cursor.fetchone() or (False,)
    return bool(there)


def _columns(cursor: Cursor) -> dict[str, str]:
    """Types of the features that dbt computes now, by name."""
    cursor.execute(
        "select column_name, data_type from information_schema.columns "
        "where table_schema = 'intermediate' and table_name = 'int_encounters__features'"
    )
    return dict(cursor.fetchall())


def _known_levels(cursor: Cursor, champion: Champion) -> dict[str, list[str]]:
    """By nominal feature, the levels in training rows that the champion may have learnt from."""
    nominal = [
        str(feature["name"])
        for feature in champion.scorer.definition["features"]
        if feature["nominal"]
    ]
    there = _columns(cursor)
    known = {}
    for name in nominal:
        if name in there:
            cursor.execute(
                f"select distinct {name}::text from intermediate.int_encounters__features "
                "where split = 'train' and exclusion_reason is null and first_load_id <= %s",
                (champion.load_id,),
            )
            known[name] = [level for (level,) in cursor.fetchall()]
    return known


def _take_predictions(cursor: Cursor, check: Check, champion: Champion, start: datetime) -> int:
    if not _there(cursor, "inference.predictions"):
        log.info("inference.predictions does not exist yet: nothing was predicted")
        return 0
    arguments = {
        "check": check.check_id,
        "version": champion.version,
        "begin": start,
        "end": check.checked_at,
        "most": MOST_ROWS,
    }
    cursor.execute(_PREDICTIONS, arguments)
    rows = int(cursor.rowcount)
    if rows and not check.key:
        log.warning(
            "DIABETES_PREDICTION_LOG_KEY is not set: predictions can't be held against outcomes"
        )
    elif rows:
        _take_outcomes(cursor, check)
    return rows


def _take_outcomes(cursor: Cursor, check: Check) -> None:
    """Find the outcomes of what was predicted, without an id of anyone in the window."""
    cursor.execute("select encounter_hash from drift_asked where encounter_hash is not null")
    asked = {digest for (digest,) in cursor.fetchall()}
    if not asked:
        return
    cursor.execute(
        "create temporary table drift_outcomes "
        "(encounter_hash text primary key, observed smallint not null) on commit drop"
    )
    cursor.execute("select encounter_id, readmitted = '<30' from raw_data.diabetes")
    lines = (
        f"{digest}\t{int(readmitted)}\n"
        for encounter, readmitted in cursor.fetchall()
        if (digest := encounter_hash(check.key, encounter)) in asked
    )
    cursor.copy_expert(
        "copy drift_outcomes (encounter_hash, observed) from stdin", io.StringIO("".join(lines))
    )
    cursor.execute(_OUTCOMES, {"check": check.check_id})
    log.info("outcomes are known of %s predictions", f"{cursor.rowcount:,}")


def _take_load(cursor: Cursor, check: Check, champion: Champion, load_id: int | None) -> int:
    there = _columns(cursor)
    names = champion.scorer.feature_names
    gone = [name for name in names if name not in there]
    values = ", ".join("null" if name in gone else name for name in names)
    cursor.execute(
        _LOADED.format(features=values),
        {"check": check.check_id, "load": load_id, "most": MOST_ROWS},
    )
    rows = int(cursor.rowcount)
    if gone:
        log.warning(
            "version %s knows features that dbt computes no longer (%s): the load is not scored",
            champion.version,
            ", ".join(gone),
        )
    elif rows:
        _score(cursor, check, champion)
    return rows


def _score(cursor: Cursor, check: Check, champion: Champion) -> None:
    cursor.execute(
        "create temporary table drift_scored (row_id text primary key, "
        "probability double precision not null, observed smallint not null) on commit drop"
    )
    with cursor.connection.cursor("drift_scorable") as reading:
        reading.itersize = _CHUNK
        reading.execute(
            _SCORABLE.format(features=", ".join(f"f.{n}" for n in champion.scorer.feature_names)),
            {"check": check.check_id, "learnt": champion.load_id},
        )
        for chunk in _chunks(reading):
            matrix = champion.scorer.matrix([tuple(row[2:]) for row in chunk])
            scored = zip(chunk, champion.scorer.probabilities(matrix).tolist(), strict=True)
            lines = (f"{row[0]}\t{probability!r}\t{row[1]}\n" for row, probability in scored)
            cursor.copy_expert("copy drift_scored from stdin", io.StringIO("".join(lines)))
    cursor.execute(_SCORED, {"check": check.check_id})
    log.info("scored %s encounters that the champion did not learn from", f"{cursor.rowcount:,}")


def _chunks(cursor: Cursor) -> Iterator[list[tuple[Any, ...]]]:
    while chunk := cursor.fetchmany(_CHUNK):
        yield chunk
