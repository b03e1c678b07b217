"""Sets of dumps in the backup bucket: how they are named, and which of them are whole.

`postgres/<UTC yyyymmddThhmmssZ>/<database>.dump`, and last of all `manifest.json` beside them with
the size and the SHA-256 of each. Without it a set is no backup: its upload was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from infra.jobs.common import JobError

PREFIX = "postgres/"
MANIFEST = "manifest.json"
_KEY = re.compile(rf"{PREFIX}(\d{{8}}T\d{{6}}Z)/([^/]+)")


class Sets:
    """What lies in the bucket.

    Args:
        client: of the S3 storage.
        bucket: of the backups.
    """

    def __init__(self, client: Any, bucket: str) -> None:
        self._client = client
        self.bucket = bucket

    def keys(self) -> dict[str, list[str]]:
        """File names of each set, by its stamp, the oldest set first; whole or not."""
        found: dict[str, list[str]] = {}
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=PREFIX):
            for item in page.get("Contents", []):
                if match := _KEY.fullmatch(item["Key"]):
                    found.setdefault(match[1], []).append(match[2])
        return dict(sorted(found.items()))

    def whole(self) -> list[str]:
        """Stamps of the sets that are backups, the oldest first."""
        return [stamp for stamp, names in self.keys().items() if MANIFEST in names]

    def manifest(self, stamp: str) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of each file of a set."""
        body = self._client.get_object(Bucket=self.bucket, Key=key(stamp, MANIFEST))["Body"].read()
        try:
            files: dict[str, dict[str, Any]] = json.loads(body)["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{self.bucket}/{key(stamp, MANIFEST)} is damaged ({error}): choose another backup"
            ) from error
        return files

    def delete(self, stamp: str, names: list[str]) -> None:
        """Delete a set, its manifest first: what is left of it in between is no backup."""
        for name in sorted(names, key=lambda name: name != MANIFEST):
            self._client.delete_object(Bucket=self.bucket, Key=key(stamp, name))


def key(stamp: str, name: str) -> str:
    """Key of a file of a set."""
    return f"{PREFIX}{stamp}/{name}"


def describe(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
