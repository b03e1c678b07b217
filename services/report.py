"""The table that `make run` ends with: what was loaded, and what became of it."""

from __future__ import annotations

from psycopg2.extensions import connection as Connection  # noqa: N812

_SPLITS = """
select 'train' as part, 'batch ' || batch_id as detail, rows, patients, positives, batch_id
from clean_data.batch_info
union all
select 'train', 'all', count(*), count(distinct patient_nbr), sum(readmitted_within_30_days), 1e6
from clean_data.diabetes_train
union all
select 'validation', '', count(*), count(distinct patient_nbr), sum(readmitted_within_30_days), 2e6
from clean_data.diabetes_validation
union all
select 'test', '', count(*), count(distinct patient_nbr), sum(readmitted_within_30_days), 3e6
from clean_data.diabetes_test
union all
select 'excluded', 'died or hospice', count(*), count(distinct patient_nbr), null, 4e6
from clean_data.diabetes_excluded
order by 6
"""

_LOAD = """
select load_id, source, sha256, is_synthetic, rows_read, rows_inserted, rows_updated, rows_deleted,
    rows_unchanged, rows_rejected
from raw_data.ingestion_log
order by load_id desc
limit 1
"""


def summary(connection: Connection) -> str:
    """Describe the last load and the rows of each split and batch, as lines of text."""
    cursor = connection.cursor()
    cursor.execute(_LOAD)
    load_id, source, sha256, synthetic, read, inserted, updated, deleted, unchanged, rejected = (
        cursor.fetchone() or (None,) * 10
    )
    lines = [
        f"Load {load_id}: {source}",
        f"  SHA-256 {sha256}",
        f"  {read:,} rows: {inserted:,} new, {updated:,} changed, {unchanged:,} unchanged, "
        f"{rejected:,} rejected; {deleted:,} removed",
    ]
    if synthetic:
        lines.insert(0, "*** SYNTHETIC DATA: made by a generator, no patient stands behind it ***")
    cursor.execute(_SPLITS)
    lines += ["", f"{'split':<12}{'':<16}{'rows':>9}{'patients':>10}{'<30 days':>10}{'rate':>8}"]
    for part, detail, rows, patients, positives, _ in cursor.fetchall():
        rate = f"{positives / rows:.1%}" if positives is not None and rows else ""
        known = f"{positives:,}" if positives is not None else ""
        lines.append(f"{part:<12}{detail:<16}{rows:>9,}{patients:>10,}{known:>10}{rate:>8}")
    return "\n".join(lines)
