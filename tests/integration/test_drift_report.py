"""The report on drift: Evidently beside our pandas, without a network, as one page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from monitoring.report import MOST_LEVELS, OTHER, comparable
from settings import PROJECT_ROOT

DRAW = """
import sys
from pathlib import Path
import pandas as pd
import socket

def refuse(*arguments, **options):
    raise AssertionError("Evidently asks the network")

socket.socket.connect = refuse
from monitoring.report import draw
frame = pd.DataFrame({"age": [45.0, 55.0, 65.0, 75.0] * 50, "race": list("abab") * 50})
other = frame.assign(age=frame["age"] + 20)
draw(other, frame, Path(sys.argv[1]), 0.2)
assert "iterative_telemetry" not in sys.modules
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: Evidently warns as it is imported, and takes seconds.
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run(DRAW, str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert "age" in text
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(?:https?:)?//', text)


def test_evidently_still_needs_pandas_old_name() -> None:
    # When this fails, take _give_pandas_its_old_name_back out of monitoring/report.py.
    done = run("import warnings; warnings.simplefilter('ignore'); import evidently")
    assert done.returncode == 1
    assert "infer_dtype_from_object" in done.stderr


def test_both_sides_get_equal_columns() -> None:
    levels = [f"level {number}" for number in range(MOST_LEVELS + 5)]
    reference = pd.DataFrame(
        {
            "constant": 1,
            "code": [7, 8] * 100,
            "number": np.arange(200),
            "specialty": [levels[min(number // 8, 24)] for number in range(200)],
        }
    )
    current = pd.DataFrame(
        {
            "constant": 1,
            "code": [7, 9],
            "number": [3, None],
            "specialty": ["level 0", "new"],
            "unknown to dbt": [1, 2],
        }
    )
    nominal = {name: name in ("code", "specialty") for name in current}
    now, then = comparable(current, reference, nominal)
    assert list(now) == list(then) == ["code", "number", "specialty"]
    assert now["code"].tolist() == ["7", OTHER]
    assert now["specialty"].tolist() == ["level 0", OTHER]
    assert then["specialty"].nunique() == MOST_LEVELS + 1
    assert now["number"].dtype == then["number"].dtype == float
