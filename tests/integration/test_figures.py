"""Drawing figures changes nothing global; seen in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from training import figures


def test_nothing_global_is_touched(tmp_path: Path) -> None:
    """In a process of its own: another test may have imported pyplot."""
    code = (
        "import sys, pathlib, numpy as np\n"
        "from training import figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figure = figures.roc(np.array([0, 1], np.int8), np.array([0.1, 0.2]))\n"
        f"figures.save(figure, pathlib.Path({str(tmp_path / 'roc.png')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    project = Path(figures.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project)
