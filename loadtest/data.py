"""What is sent: encounters drawn from the marginals of the real file, made before the load begins.

The cluster's Job has none of our packages: it reads the same from a file, `encounters.json`, which
`python -m loadtest --write-encounters` makes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ingestion.contract import FIELDS, NOBODY
from ingestion.synthetic import csv_blocks

COUNT = 2000
SEED = 130
JOB_COUNT = 300
"""Of the cluster's file: a ConfigMap has to stay small."""

_NUMBERS = frozenset({"count", "code"})


def encounters(count: int = COUNT, seed: int = SEED) -> list[dict[str, Any]]:
    """Encounters of nobody, as a caller of the JSON API sends them.

    Args:
        count: how many.
        seed: the same seed gives the same encounters.
    """
    lines = b"".join(csv_blocks(count, seed)).decode().splitlines()
    return [
        {
            known.name: (
                NOBODY if known.kind == "id" else int(value) if known.kind in _NUMBERS else value
            )
            for known, value in zip(FIELDS, line.split(","), strict=True)
            if known.name != "readmitted"
        }
        for line in lines[1:]
    ]


def as_text(found: list[dict[str, Any]]) -> str:
    """As the locustfile reads them: the names once, then one encounter a line."""
    rows = ",\n".join(json.dumps(list(one.values()), separators=(",", ":")) for one in found)
    return f'{{"fields":{json.dumps(list(found[0]))},\n"rows":[\n{rows}\n]}}\n'


def write(path: Path, count: int = COUNT, seed: int = SEED) -> None:
    """Write encounters to a file."""
    path.write_text(as_text(encounters(count, seed)), encoding="utf-8")
