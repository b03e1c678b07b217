"""The search tries the defaults first, prunes what is hopeless, and repeats itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from training.candidates import Report, Table
from training.inference import Matrix
from training.metrics import Scores
from training.search import WARM_UP, Best, Trial, out_of_fold, search

ITERATIONS = 100


def table(rows: int, seed: int) -> Table:
    random = np.random.default_rng(seed)
    signal = random.normal(size=rows)
    target = (random.random(rows) < 1 / (1 + np.exp(1 - signal))).astype(np.int8)
    matrix = np.column_stack([signal, np.arange(rows)])
    return Table(matrix, target, ("signal", "row"), ())


TRAIN, VALIDATION = table(300, 1), table(200, 2)


class Fake:
    """A candidate whose quality is its parameter: the nearer `scale` is to 1, the better."""

    DEFAULTS: Mapping[str, Any] = {"scale": 0.5, "fixed": "x"}

    def __init__(self, low: float = 0.1, high: float = 3.0) -> None:
        self.low, self.high = low, high
        self.fits: list[dict[str, Any]] = []
        self.reported: list[int] = []

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        return {"scale": trial.suggest_float("scale", self.low, self.high)}

    def fit(
        self,
        train: Table,
        validation: Table | None,
        parameters: Mapping[str, Any],
        seed: int,
        threads: int,
        report: Report,
    ) -> tuple[Any, dict[str, Any]]:
        self.fits.append({"rows": train, "seed": seed, "threads": threads, **parameters})
        self.reported.append(0)
        for iteration in range(ITERATIONS):
            self.reported[-1] += 1
            # Falls towards what the parameter is worth.
            if report(iteration, abs(parameters["scale"] - 1) + 1 / (iteration + 1)):
                break
        return {"scale": parameters["scale"]}, {**parameters, "trees": len(self.fits)}

    def save(self, model: Any, folder: Path) -> None:
        raise AssertionError("search calls only fit and margin")

    def load(self, folder: Path) -> Any:
        raise AssertionError("search calls only fit and margin")

    def margin(self, model: Any, matrix: Matrix) -> Matrix:
        margin: Matrix = model["scale"] * matrix[:, 0] - 1
        return margin

    def contributions(self, model: Any, matrix: Matrix) -> Matrix:
        raise AssertionError("search calls only fit and margin")


def searched(fake: Fake, trials: int = 12, seed: int = 130) -> tuple[Best, list[Trial]]:
    seen: list[Trial] = []
    best = search(
        fake, TRAIN, VALIDATION, trials=trials, seed=seed, threads=3, on_trial=seen.append
    )
    return best, seen


def test_defaults_are_tried_first_and_every_trial_is_told_of() -> None:
    fake = Fake()
    best, seen = searched(fake)
    assert [trial.number for trial in seen] == list(range(12))
    assert seen[0].parameters == dict(Fake.DEFAULTS)
    assert all(trial.parameters["fixed"] == "x" for trial in seen)
    assert len({trial.parameters["scale"] for trial in seen}) == 12
    assert [fitted["scale"] for fitted in fake.fits] == [one.parameters["scale"] for one in seen]
    assert {(fitted["seed"], fitted["threads"]) for fitted in fake.fits} == {(130, 3)}
    assert all(trial.seconds >= 0 for trial in seen)
    assert best.trial in seen


def test_the_lowest_log_loss_on_validation_is_best() -> None:
    best, seen = searched(Fake())
    complete = [trial for trial in seen if not trial.pruned]
    assert best.trial is min(complete, key=lambda trial: trial.metrics["log_loss"])
    assert best.trial.number != 0
    assert best.model == {"scale": best.trial.parameters["scale"]}
    # The parameters are the ones that the candidate gave back, the number of trees among them.
    assert best.parameters == {**best.trial.parameters, "trees": best.trial.number + 1}


def test_metrics_are_those_on_validation_rows() -> None:
    best, _ = searched(Fake(), trials=1)
    probability = 1 / (1 + np.exp(1 - 0.5 * VALIDATION.matrix[:, 0]))
    scores = Scores(VALIDATION.target, probability)
    assert best.trial.metrics["log_loss"] == pytest.approx(scores.log_loss(np.ones(200)))
    assert best.trial.metrics["auroc"] == pytest.approx(scores.auroc(np.ones(200)))


class Hopeless(Fake):
    """Its defaults are good, all that it suggests after two more trials is not."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        if trial.number < 2:
            return {"scale": trial.suggest_float("scale", 0.1, 3.0)}
        return {"scale": trial.suggest_float("bad", 50.0, 60.0)}


def test_hopeless_trials_are_stopped_early() -> None:
    fake = Hopeless()
    best, seen = searched(fake, trials=6)
    assert [trial.pruned for trial in seen] == [False, False, True, True, True, True]
    assert fake.reported == [ITERATIONS] * 2 + [WARM_UP + 1] * 4
    assert all(trial.metrics == {} for trial in seen[2:])
    assert [len(trial.losses) for trial in seen] == fake.reported
    assert best.trial.number < 2


def test_a_trial_that_was_pruned_in_its_last_iteration_is_never_best() -> None:
    class Late(Hopeless):
        """Does not heed that it is to stop, and ends with what would be the best model."""

        def fit(self, *given: Any) -> tuple[Any, dict[str, Any]]:
            model, final = super().fit(*given)
            return ({"scale": 1.0} if final["scale"] > 3 else model), final

    best, seen = searched(Late(), trials=4)
    assert [trial.pruned for trial in seen] == [False, False, True, True]
    assert best.trial.number < 2


def test_losses_are_kept_with_their_iterations() -> None:
    _, (first, *_) = searched(Fake(), trials=2)
    expected = [(iteration, 0.5 + 1 / (iteration + 1)) for iteration in range(ITERATIONS)]
    assert first.losses == expected


def test_seed_decides_what_is_tried() -> None:
    def drawn(seed: int) -> list[float]:
        return [trial.parameters["scale"] for trial in searched(Fake(), seed=seed)[1]]

    assert drawn(130) == drawn(130)
    assert drawn(130)[0] == drawn(131)[0]
    assert not set(drawn(130)[1:]) & set(drawn(131)[1:])


class Memory(Fake):
    """A model that remembers the rows it saw and tells when asked about one of them."""

    def margin(self, model: Any, matrix: Matrix) -> Matrix:
        seen = self.fits[model["at"]]["rows"].matrix[:, 1]
        assert not np.isin(matrix[:, 1], seen).any()
        return np.asarray(model["at"] * 1000 + matrix[:, 1])

    def fit(self, *given: Any) -> tuple[Any, dict[str, Any]]:
        _, final = super().fit(*given)
        assert given[1] is None
        return {"at": len(self.fits) - 1}, final


@pytest.mark.parametrize("folds", [2, 3])
def test_nobody_is_predicted_by_a_model_that_knows_them(folds: int) -> None:
    patients = np.random.default_rng(3).integers(0, 90, 300) * 7
    memory = Memory()
    margins = out_of_fold(memory, TRAIN, patients, {"scale": 1.0}, folds=folds, seed=11, threads=2)
    assert len(memory.fits) == folds
    assert {(fitted["seed"], fitted["threads"]) for fitted in memory.fits} == {(11, 2)}
    models, rows = np.divmod(margins, 1000)
    np.testing.assert_array_equal(rows, np.arange(300))  # every row has its own answer
    for at, fitted in enumerate(memory.fits):
        asked, knew = patients[models == at], patients[fitted["rows"].matrix[:, 1].astype(int)]
        assert len(asked) > 300 / folds / 2
        assert not set(asked) & set(knew)
        assert len(asked) + len(knew) == 300


def test_out_of_fold_never_asks_to_stop() -> None:
    fake = Fake()
    patients = np.arange(300)
    given = {"scale": math.pi}
    out_of_fold(fake, TRAIN, patients, given, folds=3, seed=1, threads=1)
    assert fake.reported == [ITERATIONS] * 3
    assert all(fitted["scale"] == math.pi for fitted in fake.fits)
