"""Every candidate keeps the protocol's promises; a file that does not is refused."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from settings import PROJECT_ROOT
from training import candidates
from training.candidates import Candidate, Table
from training.errors import TrainingError
from training.inference import Matrix, sigmoid
from training.metrics import Scores

NAMES = candidates.names()
OURS = {path.name for path in PROJECT_ROOT.iterdir() if path.is_dir()} | {"tests"}

# Small trees grow on few rows only if they are let.
SMALL: dict[str, dict[str, Any]] = {
    "lightgbm": {"min_data_in_leaf": 20, "feature_fraction": 0.6, "learning_rate": 0.1},
    "xgboost": {"eta": 0.2},
    "catboost": {"learning_rate": 0.2},
}


def table(rows: int, seed: int, levels: int = 5) -> Table:
    """Encounters whose risk is known: a number, two nominal features and two that say nothing."""
    random = np.random.default_rng(seed)
    visits, noise = random.poisson(1, rows), random.normal(size=rows)
    level, flag = random.integers(0, levels, rows), random.integers(0, 3, rows)
    risk = sigmoid(-1.5 + 0.6 * visits + 1.0 * (level == 2) + 0.5 * (flag == 1))
    return Table(
        np.column_stack([visits, level, noise, random.normal(size=rows), flag]).astype(float),
        (random.random(rows) < risk).astype(np.int8),
        ("visits", "level", "noise", "other_noise", "flag"),
        (1, 4),
    )


TRAIN, VALIDATION = table(1200, 1), table(600, 2)


def unheard(_iteration: int, _loss: float) -> bool:
    return False


@dataclass(frozen=True)
class Fitted:
    """A candidate that was trained with validation."""

    candidate: Candidate
    model: Any
    parameters: dict[str, Any]
    losses: list[tuple[int, float]]

    def margin(self, matrix: Matrix = VALIDATION.matrix) -> Matrix:
        return self.candidate.margin(self.model, matrix)


def fit(
    name: str,
    train: Table = TRAIN,
    validation: Table | None = VALIDATION,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 7,
    stop: Callable[[int], bool] = lambda _iteration: False,
) -> Fitted:
    candidate = candidates.load(candidates.file(name))
    chosen = {**candidate.DEFAULTS, **SMALL.get(name, {})} if parameters is None else parameters
    losses: list[tuple[int, float]] = []

    def report(iteration: int, loss: float) -> bool:
        losses.append((iteration, float(loss)))
        return stop(iteration)

    model, final = candidate.fit(train, validation, chosen, seed, 1, report)
    return Fitted(candidate, model, final, losses)


@cache
def fitted(name: str) -> Fitted:
    return fit(name)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_there_are_candidates() -> None:
    assert {"catboost", "lightgbm", "logistic_regression", "xgboost"} <= set(NAMES)


def test_candidate_defines_what_the_protocol_says(name: str) -> None:
    candidate = candidates.load(candidates.file(name))
    for method in ("suggest", "fit", "save", "load", "margin", "contributions"):
        wanted = list(inspect.signature(getattr(Candidate, method)).parameters)[1:]
        assert list(inspect.signature(getattr(candidate, method)).parameters) == wanted, method
    assert isinstance(candidate.DEFAULTS, Mapping)


def test_candidate_imports_nothing_of_this_repository(name: str) -> None:
    tree = ast.parse(candidates.file(name).read_text())
    for_types = [
        each
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for each in ast.walk(node)
    ]
    imported = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported
    assert not imported & OURS


def test_inference_imports_standard_library_and_numpy_only() -> None:
    tree = ast.parse((PROJECT_ROOT / "training" / "inference.py").read_text())
    imported = {
        str(node.module).split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {one.split(".")[0] for one in imported} <= sys.stdlib_module_names | {"numpy"}


def test_candidate_learns(name: str) -> None:
    found = Scores(VALIDATION.target, sigmoid(fitted(name).margin()))
    assert found.auroc(np.ones(600)) > 0.65


def test_loaded_model_scores_as_the_saved_one(name: str, tmp_path: Path) -> None:
    found = fitted(name)
    found.candidate.save(found.model, tmp_path)
    assert not list(tmp_path.glob("*.pkl"))
    # Another import of the file, as when a stored model is loaded.
    again = candidates.load(candidates.file(name))
    model = again.load(tmp_path)
    matrix = VALIDATION.matrix
    np.testing.assert_allclose(again.margin(model, matrix), found.margin(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        again.contributions(model, matrix),
        found.candidate.contributions(found.model, matrix),
        rtol=0,
        atol=1e-12,
    )


def with_unknown(columns: list[int]) -> Matrix:
    matrix = VALIDATION.matrix.copy()
    matrix[:, columns] = np.nan
    return matrix


@pytest.mark.parametrize("unknown", [[], [1], [1, 4]], ids=str)
def test_contributions_add_up_to_the_margin(name: str, unknown: list[int]) -> None:
    """Also for unknown categories, which training never saw."""
    found, matrix = fitted(name), with_unknown(unknown)
    shares = found.candidate.contributions(found.model, matrix)
    margin = found.margin(matrix)
    assert shares.shape == (600, 6)
    assert margin.dtype == shares.dtype == np.float64
    tolerance = 1e-4 if name == "xgboost" else 1e-8  # sums in 32 bits
    np.testing.assert_allclose(shares.sum(axis=1), margin, rtol=0, atol=tolerance)
    assert np.isfinite(margin).all()
    assert np.ptp(shares[:, -1]) <= tolerance


def test_a_level_that_this_training_did_not_see_is_scored(name: str) -> None:
    """A fold, or the patients who did not come back soon, may lack the rarest level."""
    found = fitted(name)
    matrix = VALIDATION.matrix.copy()
    matrix[:, 1] = 9
    assert np.isfinite(found.margin(matrix)).all()
    shares = found.candidate.contributions(found.model, matrix)
    np.testing.assert_allclose(shares.sum(axis=1), found.margin(matrix), rtol=0, atol=1e-4)


@pytest.mark.parametrize("column", [1, 4])
def test_nominal_feature_without_a_known_level(name: str, column: int) -> None:
    matrix = TRAIN.matrix.copy()
    matrix[:, column] = np.nan
    found = fit(name, Table(matrix, TRAIN.target, TRAIN.names, TRAIN.nominal))
    assert np.isfinite(found.margin()).all()
    shares = found.candidate.contributions(found.model, VALIDATION.matrix)
    assert shares.shape == (600, 6)
    np.testing.assert_allclose(shares[:, column], 0, atol=1e-12)


def test_constant_number_does_no_harm(name: str) -> None:
    matrix = TRAIN.matrix.copy()
    matrix[:, 2] = 3.0
    found = fit(name, Table(matrix, TRAIN.target, TRAIN.names, TRAIN.nominal))
    assert np.isfinite(found.margin()).all()


def test_returned_parameters_give_the_same_model_without_validation(name: str) -> None:
    found = fitted(name)
    again = fit(name, validation=None, parameters=found.parameters)
    assert again.losses == []
    assert again.parameters == found.parameters
    np.testing.assert_allclose(again.margin(), found.margin(), rtol=0, atol=1e-12)


def test_validation_decides_how_long_to_train(name: str) -> None:
    found = fitted(name)
    if not found.losses:
        assert found.parameters == found.candidate.DEFAULTS
        return
    count = found.parameters.get("trees") or found.parameters["iterations"]
    iterations, losses = zip(*found.losses, strict=True)
    assert list(iterations) == sorted(set(iterations))
    assert 1 < count < max(iterations)
    # What is reported is the loss on validation, and the model is the one where it was lowest
    # (which may be an iteration that was not reported).
    own = Scores(VALIDATION.target, sigmoid(found.margin())).log_loss(np.ones(600))
    assert min(losses) - 5e-3 < own <= min(losses) + 1e-6


def test_same_seed_gives_the_same_model(name: str) -> None:
    again = fit(name)
    np.testing.assert_array_equal(again.margin(), fitted(name).margin())
    assert again.parameters == fitted(name).parameters
    assert again.losses == fitted(name).losses


def test_another_seed_gives_another_model_where_anything_is_drawn(name: str) -> None:
    differs = bool((fit(name, seed=8).margin() != fitted(name).margin()).any())
    assert differs == (name != "logistic_regression")


def test_report_stops_a_training(name: str) -> None:
    found = fit(name, stop=lambda iteration: iteration >= 5)
    if not fitted(name).losses:
        assert found.losses == []
        return
    assert 5 <= found.losses[-1][0] <= 10
    assert found.losses == fitted(name).losses[: len(found.losses)]
    assert np.isfinite(found.margin()).all()


def test_defaults_are_among_what_is_suggested(name: str) -> None:
    """Else the first trial would not be the defaults, or Optuna would warn."""
    candidate = candidates.load(candidates.file(name))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(dict(candidate.DEFAULTS))
    first, second = study.ask(), study.ask()
    suggested = candidate.suggest(first)
    assert suggested
    assert {**candidate.DEFAULTS, **suggested} == candidate.DEFAULTS
    drawn = candidate.suggest(second)
    assert drawn != suggested
    assert drawn.keys() <= candidate.DEFAULTS.keys()


def test_parameters_of_a_trial_are_taken(name: str) -> None:
    candidate = candidates.load(candidates.file(name))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=2))
    drawn = {**candidate.DEFAULTS, **SMALL.get(name, {}), **candidate.suggest(study.ask())}
    found = fit(name, parameters=drawn)
    assert drawn.items() <= found.parameters.items()
    assert (found.margin() != fitted(name).margin()).any()


def test_table_takes_rows() -> None:
    part = TRAIN.take(np.array([5, 2]))
    np.testing.assert_array_equal(part.matrix, TRAIN.matrix[[5, 2]])
    assert part.target.tolist() == [TRAIN.target[5], TRAIN.target[2]]
    assert (part.names, part.nominal) == (TRAIN.names, TRAIN.nominal)


def test_a_new_file_is_a_new_candidate(tmp_path: Path) -> None:
    for stem in ("b", "a", "__init__", "_helper"):
        (tmp_path / f"{stem}.py").touch()
    assert candidates.names(tmp_path) == ["a", "b"]
    assert candidates.file("a", tmp_path) == tmp_path / "a.py"


@pytest.mark.parametrize("unknown", ["forest", "__init__", ""])
def test_unknown_name_lists_the_known_ones(unknown: str) -> None:
    with pytest.raises(TrainingError) as caught:
        candidates.file(unknown)
    assert str(caught.value) == f"no candidate {unknown}; known are {', '.join(NAMES)}"


def test_broken_file_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("DEFAULTS = {}\ndef suggest(trial): ...\ndef fit(*given): ...\nload = save = 1")
    with pytest.raises(TrainingError, match=r"broken\.py defines no margin, contributions \(see"):
        candidates.load(path)
