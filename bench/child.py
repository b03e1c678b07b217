"""The jobs that run in a process of their own: `python -m bench.child copy | ingest FILE`.

The database comes from the environment (`DIABETES_DB_*`). Times are taken around the job itself,
from the connection to the commit: Python's start and the imports are not part of them. The last
line on standard output is JSON: rows, wall, cpu, peak_mib, changed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg2

from bench.usage import own_peak_mib
from ingestion.contract import COLUMNS, FIELDS
from ingestion.load import load
from settings import settings

# The shape of raw_data.diabetes: the same columns, types and key, and so rows of the same width.
_TABLE = f"""
create table plain_copy (
    {", ".join(f"{field.column} {field.sql_type} not null" for field in FIELDS)},
    first_load_id integer not null default 1,
    last_load_id integer not null default 1,
    primary key (encounter_id)
)
"""


def plain_copy(path: Path, dsn: str) -> tuple[int, int]:
    """COPY the file as it is into a new table, in one transaction.

    Returns:
        Rows in the file, and rows that came in or changed.
    """
    with closing(psycopg2.connect(dsn)) as connection, path.open("rb") as file:
        cursor = connection.cursor()
        cursor.execute(_TABLE)
        cursor.copy_expert(
            f"copy plain_copy ({', '.join(COLUMNS)}) from stdin with (format csv, header)", file
        )
        rows = cursor.rowcount
        connection.commit()
    return rows, rows


def ingest(path: Path, dsn: str) -> tuple[int, int]:
    """Our ingestion, as the command line and the DAG call it.

    Returns:
        Rows in the file, and rows that came in or changed.
    """
    report = load(path, dsn, source=path.name, run_id="bench", reject_limit_percent=1.0)
    return report.rows_read, report.rows_inserted + report.rows_updated


JOBS: dict[str, Callable[[Path, str], tuple[int, int]]] = {"copy": plain_copy, "ingest": ingest}


def main() -> None:
    """Run one job and print what it cost."""
    parser = argparse.ArgumentParser(prog="python -m bench.child", description=__doc__)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    job, dsn = JOBS[arguments.job], settings().dsn
    wall, cpu = time.perf_counter(), time.process_time()
    rows, changed = job(arguments.file, dsn)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        json.dumps(
            {
                "rows": rows,
                "changed": changed,
                "wall": wall,
                "cpu": cpu,
                "peak_mib": own_peak_mib(),
            }
        )
    )


if __name__ == "__main__":
    main()
