"""The list of deliberate faults fits the tree, so that it does not rot."""

from __future__ import annotations

from pathlib import Path

import pytest

from settings import PROJECT_ROOT
from tests.mutants.__main__ import MutantsError, load

PRODUCT = {
    *("dags", "dbt_diabetes", "infra", "ingestion", "monitoring", "scripts"),
    *("serving", "services", "settings", "training", "ui"),
}
ENTRY = """
[[mutant]]
name = "wrong-sum"
promise = "Two numbers are added."
file = "sum.py"
line = 'a + b'
fault = '{fault}'
tests = ["{test}"]
"""


def listed(root: Path, source: str, *, entries: int = 1, fault: str = "a - b", test: str) -> Path:
    """A tree with one file, one test and a list of mutants."""
    (root / "tests" / "mutants").mkdir(parents=True)
    (root / "sum.py").write_text(source)
    (root / "tests" / "test_sum.py").write_text("def test_sum() -> None: ...\n")
    text = ENTRY.format(fault=fault, test=f"tests/test_sum.py::{test}") * entries
    (root / "tests" / "mutants" / "mutants.toml").write_text(text)
    return root


def test_every_line_is_once_in_its_file_and_every_part_has_a_fault() -> None:
    mutants = load(PROJECT_ROOT)
    assert len(mutants) >= 40
    assert len({mutant.promise for mutant in mutants}) == len(mutants)
    assert PRODUCT - {mutant.file.partition("/")[0] for mutant in mutants} == set()


def test_a_list_that_fits_is_taken(tmp_path: Path) -> None:
    (mutant,) = load(listed(tmp_path, "return a + b\n", test="test_sum"))
    assert (mutant.name, mutant.tests) == ("wrong-sum", ("tests/test_sum.py::test_sum",))


@pytest.mark.parametrize(
    ("source", "entries", "fault", "test", "said"),
    [
        ("return a\n", 1, "a - b", "test_sum", "its line is 0 times in sum.py, not once"),
        ("a + b\na + b\n", 1, "a - b", "test_sum", "its line is 2 times in sum.py, not once"),
        ("a + b\n", 1, "a + b", "test_sum", "its fault is the line itself"),
        ("a + b\n", 1, "a - b", "test_of_old", "there is no test tests/test_sum.py::test_of_old"),
        ("a + b\n", 2, "a - b", "test_sum", "there are two of this name"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, source: str, entries: int, fault: str, test: str, said: str
) -> None:
    root = listed(tmp_path, source, entries=entries, fault=fault, test=test)
    with pytest.raises(MutantsError, match=f"^wrong-sum: {said}"):
        load(root)
