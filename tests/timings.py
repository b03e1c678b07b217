"""Where a test run's seconds go: by lane, by fixture, by test.

`pytest --timings=FILE` adds what the run took to FILE (JSON); `python -m tests.timings FILE` prints
it as the tables of docs/testing.md. Seconds are those of the tests, added up over all workers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_GROUP = re.compile(r"@[\w./-]+$")
"""What xdist adds to the name of a test that belongs to a group."""
_SLOWEST = 30
_QUICK_FIXTURE_SECONDS = 3.0
"""Fixtures that take less in all are not listed."""


class Timings:
    """Collects durations; on a worker of xdist it hands those of fixtures to the controller."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file = Path(config.getoption("timings"))
        self._began = time.time()
        self._tests: Counter[str] = Counter()
        self._fixtures: dict[str, list[float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        """Time one fixture without those that it asks for: they are set up before."""
        begin = time.perf_counter()
        try:
            return (yield)
        finally:
            place = fixturedef.baseid or "pytest"
            self._fixtures.setdefault(f"{place}::{fixturedef.argname}", []).append(
                time.perf_counter() - begin
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add set-up, call and tear-down of a test."""
        # xdist adds the group of a test to its name.
        self._tests[_GROUP.sub("", report.nodeid)] += report.duration

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what a worker has measured."""
        for name, seconds in getattr(node, "workeroutput", {}).get("fixtures", {}).items():
            self._fixtures.setdefault(name, []).extend(seconds)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Hand over, or write down."""
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput["fixtures"] = self._fixtures
            return
        runs = json.loads(self._file.read_text()) if self._file.exists() else []
        runs.append(
            {
                "wall_seconds": time.time() - self._began,
                "tests": dict(self._tests),
                "fixtures": self._fixtures,
            }
        )
        self._file.write_text(json.dumps(runs))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --timings."""
    parser.addoption("--timings", metavar="FILE", default="", help="add the run's seconds to FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Collect where asked to."""
    if config.getoption("timings"):
        config.pluginmanager.register(Timings(config), "timings-of-this-run")


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown: lanes, fixtures, slowest tests of all runs of a file."""
    tests: Counter[str] = Counter()
    fixtures: dict[str, list[float]] = {}
    for run in runs:
        tests.update(run["tests"])
        for name, seconds in run["fixtures"].items():
            fixtures.setdefault(name, []).extend(seconds)
    lanes: dict[str, list[float]] = {}
    for name, seconds in tests.items():
        lanes.setdefault(name.split("/")[1], []).append(seconds)
    lines = ["| lane | tests | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {len(each):,} | {sum(each):.0f} |" for name, each in lanes.items()]
    wall = sum(run["wall_seconds"] for run in runs)
    lines += [f"| all | {len(tests):,} | {sum(tests.values()):.0f} (wall {wall:.0f}) |", ""]
    lines += ["| fixture | times | seconds |", "|---|---|---|"]
    for name, each in sorted(fixtures.items(), key=lambda item: -sum(item[1])):
        if sum(each) >= _QUICK_FIXTURE_SECONDS:
            lines.append(f"| `{name}` | {len(each)} | {sum(each):.1f} |")
    lines += ["", "| test | seconds |", "|---|---|"]
    lines += [f"| `{name}` | {each:.1f} |" for name, each in tests.most_common(_SLOWEST)]
    return "\n".join(lines)


def main() -> None:
    """Print the tables of a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.timings", description=__doc__)
    parser.add_argument("file", type=Path)
    runs = json.loads(parser.parse_args().file.read_text(encoding="utf-8"))
    sys.stdout.write(f"{tables(runs)}\n")


if __name__ == "__main__":
    main()
