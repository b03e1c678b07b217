"""Fetches a backup of PostgreSQL from the S3 storage and verifies it; pg_restore comes after."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from infra.jobs.common import JobError, one_line, run, storage, variable
from infra.jobs.sets import Sets, describe, key

LATEST = "latest"


def fetch(client: Any, sets: Sets, stamp: str, databases: list[str], folder: Path) -> str:
    """Download the dumps of a set into a folder.

    Args:
        client: of the S3 storage.
        sets: the backups.
        stamp: of the set, or `latest`.
        databases: to fetch; none of them means all of the set.
        folder: is given what is verified, and nothing where one dump is damaged.

    Raises:
        JobError: there is no such backup or database in it, or a dump is not what was uploaded.
    """
    whole = sets.whole()
    if not whole:
        raise JobError(f"bucket {sets.bucket} has no backup: the CronJob postgres-backup makes one")
    if stamp == LATEST:
        stamp = whole[-1]
    if stamp not in whole:
        raise JobError(f"there is no backup {stamp}; there are {', '.join(reversed(whole))}")
    files = sets.manifest(stamp)
    wanted = [f"{name}.dump" for name in databases] or list(files)
    if missing := [Path(name).stem for name in wanted if name not in files]:
        there = ", ".join(Path(name).stem for name in files)
        raise JobError(f"backup {stamp} has no {', '.join(missing)}; it has {there}")
    fetched = [folder / f"{name}.part" for name in wanted]
    for name, partial in zip(wanted, fetched, strict=True):
        try:
            client.download_file(sets.bucket, key(stamp, name), str(partial))
            found = _say(describe(partial))
        except ClientError as error:
            found = one_line(error)
        if found != (expected := _say(files[name])):
            for file in fetched:
                file.unlink(missing_ok=True)
            raise JobError(
                f"{sets.bucket}/{key(stamp, name)} is damaged: expected {expected}, got {found}; "
                "nothing is restored, choose another backup"
            )
    for partial in fetched:
        partial.rename(partial.with_suffix(""))
    return f"backup {stamp} is whole: {', '.join(Path(name).stem for name in wanted)}"


def _say(file: dict[str, Any]) -> str:
    return f"{file['bytes']:,} bytes with SHA-256 {file['sha256']}"


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m infra.jobs.restore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="download a backup's dumps and verify them")
    fetching.add_argument("--folder", type=Path, required=True)
    fetching.add_argument("--backup", default=LATEST, metavar="STAMP|latest")
    fetching.add_argument("--database", action="append", default=[], metavar="NAME")
    arguments = parser.parse_args(argv)

    def job() -> str:
        client = storage()
        sets = Sets(client, variable("BACKUP_BUCKET"))
        return fetch(client, sets, arguments.backup, arguments.database, arguments.folder)

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
