"""Apply the faults of mutants.toml one by one to a copy of the tree, and list what no test notices.

A mutant is killed where one of its tests fails, and has survived where all of them pass. It is
invalid, which is no better, where nothing was tested: no test ran, or none ended in time.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LEAST_SHARE = 0.95
_SECONDS, _CHECK_SECONDS = 900, 3_600
_PYTEST = (".venv/bin/python", "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider")


class MutantsError(Exception):
    """The list does not fit the tree, or a test fails without any fault."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault: what stands in a file, what it becomes, what that breaks, who should notice."""

    name: str
    promise: str
    file: str
    line: str
    fault: str
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What tests said: killed, SURVIVED or INVALID, and by which test or why."""

    outcome: str
    words: str
    seconds: float


def load(root: Path) -> list[Mutant]:
    """Read the list, and refuse it where a mutant does not fit the tree."""
    text = (root / "tests" / "mutants" / "mutants.toml").read_text(encoding="utf-8")
    mutants: dict[str, Mutant] = {}
    for entry in tomllib.loads(text)["mutant"]:
        mutant = Mutant(**{**entry, "tests": tuple(entry["tests"])})
        if mutant.name in mutants:
            raise MutantsError(f"{mutant.name}: there are two of this name")
        if problem := _problem(mutant, root):
            raise MutantsError(f"{mutant.name}: {problem}")
        mutants[mutant.name] = mutant
    return list(mutants.values())


def _problem(mutant: Mutant, root: Path) -> str:
    """What does not fit; empty where all does."""
    path = root / mutant.file
    times = path.read_text(encoding="utf-8").count(mutant.line) if path.is_file() else 0
    if times != 1:
        return f"its line is {times} times in {mutant.file}, not once"
    if mutant.fault == mutant.line or "\n" in mutant.line + mutant.fault:
        return "its fault is the line itself, or has more than one line"
    for test in mutant.tests:
        file, _, names = test.partition("::")
        definition = f"def {names.rpartition('::')[2]}("
        if not (root / file).is_file() or definition not in (root / file).read_text("utf-8"):
            return f"there is no test {test}"
    return "" if mutant.tests else "it names no test"


def copy_tree(folder: Path) -> Path:
    """Copy what git would see to main/ in a folder, as a repository of its own."""
    target = folder / "main"
    listed = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    # Scripts ask git for the files of an image, and a training writes down its commit.
    _git(target, "init", "--quiet")
    _git(target, "add", "--all", "--force")
    author = ("-c", "user.name=mutants", "-c", "user.email=mutants@example.org")
    _git(target, *author, "commit", "--quiet", "--message", "A copy")
    (target / ".git" / "info" / "exclude").write_text("/.venv\n/.venv-policy\n", encoding="utf-8")
    # The real file is looked for beside the tree.
    for name in (".venv", ".venv-policy", "../shared"):
        if (ROOT / name).exists():
            (target / name).symlink_to((ROOT / name).resolve())
    return target


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def run_tests(tree: Path, worker: int, lane: str, tests: Sequence[str], limit: int) -> Found:
    """Run tests in a copy until one fails, and say what came of it."""
    command = [*_PYTEST, *(("-m", lane) if lane else ()), *tests]
    # tests/conftest.py makes ports of it: two copies must not want the same one.
    environment = {**os.environ, "PYTEST_XDIST_WORKER": f"gw{worker}"}
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            # Interrupted, pytest still takes down what its fixtures started.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return Found("INVALID", "timed out", time.monotonic() - begin)
        output.seek(0)
        said = output.read()
    seconds = time.monotonic() - begin
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", said, re.MULTILINE)
    if code == 1 and failed:
        return Found("killed", failed[1], seconds)
    if code == 0 and re.search(r"\b\d+ passed\b", said):
        return Found("SURVIVED", "", seconds)
    last = (said.strip().splitlines() or ["nothing said"])[-1]
    return Found("INVALID", f"pytest ended with {code}: {last}", seconds)


def judge(mutant: Mutant, tree: Path, worker: int, lane: str) -> Found:
    """Apply a fault to a copy, run its tests and take the fault back."""
    path = tree / mutant.file
    whole, before = path.read_text(encoding="utf-8"), path.stat()
    path.write_text(whole.replace(mutant.line, mutant.fault), encoding="utf-8")
    try:
        return run_tests(tree, worker, lane, mutant.tests, _SECONDS)
    finally:
        path.write_text(whole, encoding="utf-8")
        # Python knows compiled files by time and size: without a fault, both are the old ones.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def judge_all(mutants: list[Mutant], lane: str, jobs: int, *, check: bool) -> list[Found]:
    """Judge all mutants, in as many copies side by side as there are jobs."""
    copies: queue.SimpleQueue[tuple[Path, int]] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        # PostgreSQL, which never runs as root, reads files of the tree.
        Path(folder).chmod(0o755)
        trees = [copy_tree(Path(folder, str(worker))) for worker in range(jobs)]
        if check:
            tests = sorted({test for mutant in mutants for test in mutant.tests})
            found = run_tests(trees[0], 0, lane, tests, _CHECK_SECONDS)
            if found.outcome != "SURVIVED":
                raise MutantsError(f"tests have to pass without a fault: {found.words}")
        for worker, tree in enumerate(trees):
            copies.put((tree, worker))

        def judged(mutant: Mutant) -> Found:
            tree, worker = copies.get()
            try:
                found = judge(mutant, tree, worker, lane)
            finally:
                copies.put((tree, worker))
            _tell(f"{found.outcome:<9}{found.seconds:6.1f} s  {mutant.name:<32}{found.words}")
            return found

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(judged, mutants))


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants to apply (all)")
    parser.add_argument("--jobs", type=int, default=1, help="copies side by side (1)")
    parser.add_argument(
        "--lane", default="not long", help="tests that count, as in pytest -m (those of make test)"
    )
    parser.add_argument("--list", action="store_true", help="list mutants and apply none")
    parser.add_argument("--skip-check", action="store_true", help="run no tests without a fault")
    asked = parser.parse_args()
    try:
        mutants = load(ROOT)
        if strangers := set(asked.only or ()) - {mutant.name for mutant in mutants}:
            raise MutantsError(f"there is no mutant {', '.join(sorted(strangers))}")
        mutants = [mutant for mutant in mutants if not asked.only or mutant.name in asked.only]
        if asked.list:
            for mutant in mutants:
                _tell(f"{mutant.name:<32}{mutant.file:<58} {mutant.promise}")
            return 0
        found = judge_all(mutants, asked.lane, asked.jobs, check=not asked.skip_check)
    except MutantsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for outcome in ("SURVIVED", "INVALID"):
        for mutant, one in zip(mutants, found, strict=True):
            if one.outcome == outcome:
                _tell(f"{outcome}: {mutant.name} ({mutant.file}): {mutant.promise}")
    killed = sum(one.outcome == "killed" for one in found)
    share = killed / len(mutants)
    _tell(f"{killed} of {len(mutants)} killed ({100 * share:.1f} %)")
    return 0 if share >= _LEAST_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
