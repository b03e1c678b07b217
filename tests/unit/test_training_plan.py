"""What to train: checked before anything is read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from training import candidates, environment, plan
from training.data import DataFacts
from training.errors import TrainingError
from training.plan import Spec

ALL = tuple(candidates.names())


def test_no_candidates_means_all() -> None:
    assert Spec().checked().candidates == ALL
    assert Spec(candidates=[]).checked().candidates == ALL
    assert Spec(candidates=("xgboost",)).checked().candidates == ("xgboost",)


def test_checked_changes_nothing_else() -> None:
    spec = Spec(candidates=ALL, trials=9, batches=2, seed=1, threads=3, classes=3, force=True)
    assert spec.checked() == spec


def test_spec_comes_back_from_a_plan() -> None:
    spec = Spec(trials=9).checked()
    again = Spec(**json.loads(json.dumps(asdict(spec))))
    assert again.trials_of("lightgbm") == spec.trials_of("lightgbm")
    assert again.checked() == spec


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"candidates": ("forest",)}, f"no candidate forest; known are {', '.join(ALL)}"),
        ({"candidates": ("lightgbm", "forest")}, "no candidate forest"),
        ({"trials": len(ALL) - 1}, f"{len(ALL) - 1} trials for {len(ALL)} candidates: one each"),
        ({"candidates": ("lightgbm",), "trials": 0}, "0 trials for 1 candidates"),
        ({"classes": 4}, "classes is 4, expected 2 or 3"),
        ({"candidates": ("lightgbm", "lightgbm")}, "candidate lightgbm is named twice"),
        ({"batches": -1}, "batches is -1, expected 0"),
    ],
)
def test_wrong_specs_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Spec(**wrong).checked()


@pytest.mark.parametrize("classes", [2, 3])
def test_one_trial_each_is_enough(classes: int) -> None:
    spec = Spec(trials=len(ALL), classes=classes).checked()
    assert [spec.trials_of(name) for name in ALL] == [1] * len(ALL)


@pytest.mark.parametrize(
    ("trials", "shares"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 2, 1]), (20, [7, 7, 6])]
)
def test_trials_are_shared_out_and_the_rest_goes_to_the_first(
    trials: int, shares: list[int]
) -> None:
    names = ("xgboost", "lightgbm", "logistic_regression")
    spec = Spec(candidates=names, trials=trials).checked()
    assert [spec.trials_of(name) for name in names] == shares


FACTS = DataFacts(
    batches=4,
    train_rows=70_000,
    train_hash="a" * 32,
    validation_rows=15_000,
    validation_hash="b" * 32,
    load_id=3,
    source="file.csv",
    is_synthetic=False,
)
DEFINITION: dict[str, Any] = {"sha256": "c" * 64, "tables": {"int_statistics": {"rows": [[65.0]]}}}


def identity(
    spec: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    definition: dict[str, Any] | None = None,
) -> str:
    return plan.identity(
        Spec(**(spec or {})).checked(),
        replace(FACTS, **(facts or {})),
        DEFINITION | (definition or {}),
    )


@pytest.mark.parametrize(
    "same",
    [
        {"spec": {"force": True}},
        {"spec": {"batches": 4}},  # all that there are
        {"spec": {"candidates": ALL}},
        {"facts": {"load_id": 4, "source": "elsewhere.csv"}},
    ],
)
def test_what_changes_no_result_changes_no_identity(same: dict[str, Any]) -> None:
    assert identity(**same) == identity()


@pytest.mark.parametrize(
    "other",
    [
        {"spec": {"candidates": ("lightgbm",)}},
        {"spec": {"trials": 21}},
        {"spec": {"seed": 131}},
        {"spec": {"threads": 1}},
        {"spec": {"classes": 3}},
        {"facts": {"batches": 3}},
        {"facts": {"train_hash": "d" * 32}},
        {"facts": {"validation_hash": "d" * 32}},
        {"definition": {"sha256": "d" * 64}},
        {"definition": {"tables": {"int_statistics": {"rows": [[64.0]]}}}},
    ],
)
def test_what_changes_a_result_changes_the_identity(other: dict[str, Any]) -> None:
    assert identity(**other) != identity()


def test_code_and_packages_belong_to_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "lock_sha256", lambda: "other packages")
        assert identity() != before
    read = Path.read_bytes
    for changed in (
        *(f"candidates/{name}.py" for name in ALL),
        "search.py",
        "data.py",
        "inference.py",
        "pipeline.py",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                Path,
                "read_bytes",
                lambda path, at=changed: read(path) + b"#" * str(path).endswith(f"training/{at}"),
            )
            assert identity() != before, changed
    assert identity() == before


def test_facts_come_back_from_a_plan() -> None:
    stored = json.loads(json.dumps({"facts": FACTS.as_dict()}))
    assert plan.facts_of(stored) == FACTS
    assert stored["facts"]["sha"] == FACTS.sha == "a" * 16 + "b" * 16
