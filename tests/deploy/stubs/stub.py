"""What the stub commands share: they record how they were called, and fail when told to.

STUB_STATE names a folder: `calls` there takes one JSON list a line, the rest is what a stub has to
remember. STUB_FAIL holds the beginnings of command lines that fail, one a line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

STATE = Path(os.environ["STUB_STATE"])


def called() -> list[str]:
    """Record this call; its arguments, without the command."""
    line = [Path(sys.argv[0]).name, *sys.argv[1:]]
    with (STATE / "calls").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(line) + "\n")
    for beginning in os.environ.get("STUB_FAIL", "").splitlines():
        if " ".join(line).startswith(beginning):
            sys.exit(f"{line[0]}: a test made it fail: {beginning}")
    return sys.argv[1:]


def remembered(what: str) -> list[str]:
    """Lines kept under a name."""
    path = STATE / what
    return path.read_text().splitlines() if path.exists() else []


def remember(what: str, lines: list[str]) -> None:
    """Keep lines under a name."""
    (STATE / what).write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)))
