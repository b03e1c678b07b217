"""Keeps dumps of PostgreSQL in the S3 storage: `upload` a folder of them, `list` what there is."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.jobs.common import JobError, run, storage, variable
from infra.jobs.sets import MANIFEST, Sets, describe, key

_STAMP = "%Y%m%dT%H%M%SZ"
_MAGIC = b"PGDMP"  # what pg_dump --format=custom begins with
_ABANDONED = timedelta(days=1)


def upload(client: Any, sets: Sets, folder: Path, keep: int) -> str:
    """Upload the dumps of a folder as one set; after that delete all but the newest sets.

    Raises:
        JobError: there is no dump, or one is none.
    """
    dumps = sorted(folder.glob("*.dump"))
    if not dumps:
        raise JobError(f"{folder} has no *.dump: pg_dump has to write them there first")
    for dump in dumps:
        with dump.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                raise JobError(f"{dump} is no dump of pg_dump --format=custom; nothing is uploaded")
    now = datetime.now(UTC)
    stamp = now.strftime(_STAMP)
    files = {dump.name: describe(dump) for dump in dumps}
    for dump in dumps:
        client.upload_file(str(dump), sets.bucket, key(stamp, dump.name))
        stored = client.head_object(Bucket=sets.bucket, Key=key(stamp, dump.name))["ContentLength"]
        if stored != files[dump.name]["bytes"]:
            raise JobError(
                f"{key(stamp, dump.name)} has {stored:,} bytes in the storage, the dump "
                f"{files[dump.name]['bytes']:,}: this is no backup, those before are kept"
            )
    body = json.dumps({"files": files}, indent=2).encode()
    client.put_object(Bucket=sets.bucket, Key=key(stamp, MANIFEST), Body=body)
    deleted = rotate(sets, keep, now)
    size = sum(file["bytes"] for file in files.values())
    return (
        f"backup {stamp}: {', '.join(dump.stem for dump in dumps)} ({size:,} bytes); "
        f"{len(sets.whole())} kept, {deleted} deleted"
    )


def rotate(sets: Sets, keep: int, now: datetime) -> int:
    """Delete all but the newest whole sets, and what interrupted uploads have left.

    Returns:
        How many sets it deleted.
    """
    found = sets.keys()
    whole = [stamp for stamp, names in found.items() if MANIFEST in names]
    # A young set without manifest may be another upload that is not done yet.
    young = (now - _ABANDONED).strftime(_STAMP)
    abandoned = [stamp for stamp in found if stamp not in whole and stamp < young]
    doomed = [*whole[:-keep], *abandoned]
    for stamp in doomed:
        sets.delete(stamp, found[stamp])
    return len(doomed)


def table(sets: Sets) -> str:
    """The whole sets, the newest first, as lines of text."""
    lines = []
    for stamp in reversed(sets.whole()):
        files = sets.manifest(stamp)
        size = sum(file["bytes"] for file in files.values())
        lines.append(f"{stamp}  {size:>15,} bytes  {', '.join(Path(name).stem for name in files)}")
    return "\n".join(lines) or f"no backup in bucket {sets.bucket}"


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m infra.jobs.backup", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sending = commands.add_parser("upload", help="upload <folder>/*.dump as one set, then rotate")
    sending.add_argument("--folder", type=Path, required=True)
    sending.add_argument("--keep", type=_positive, default=14, help="sets to keep (14)")
    commands.add_parser("list", help="the backups, the newest first")
    arguments = parser.parse_args(argv)

    def job() -> str:
        client = storage()
        sets = Sets(client, variable("BACKUP_BUCKET"))
        if arguments.command == "list":
            return table(sets)
        return upload(client, sets, arguments.folder, arguments.keep)

    return run(job)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected 1 or more: 0 would delete the new backup too")
    return number


if __name__ == "__main__":
    sys.exit(main())
