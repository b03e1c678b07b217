"""Hyper-parameter search: seeded, pruned, on train with validation for choice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from training.candidates import Candidate, Table, never_stop
from training.inference import sigmoid
from training.metrics import Scores, all_metrics

log = logging.getLogger(__name__)

WARM_UP = 60
"""Iterations before a trial may be pruned: a slow learning rate shows its worth late."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of hyper-parameters that was tried.

    Attributes:
        number: from 0; 0 are the candidate's defaults.
        parameters: as drawn, over the defaults.
        metrics: on validation rows, not calibrated; empty where the trial was pruned.
        losses: (iteration, validation log loss) as training went on.
        seconds: it took.
    """

    number: int
    parameters: dict[str, Any]
    metrics: dict[str, float]
    losses: list[tuple[int, float]]
    seconds: float

    @property
    def pruned(self) -> bool:
        """Whether it was stopped early because others were better at that point."""
        return not self.metrics


@dataclass(frozen=True, slots=True)
class Best:
    """The trial with the lowest log loss on validation rows.

    Attributes:
        model: as trained, stopped where validation said so.
        parameters: give the same model without validation rows.
    """

    model: Any
    parameters: dict[str, Any]
    trial: Trial


def search(
    candidate: Candidate,
    train: Table,
    validation: Table,
    *,
    trials: int,
    seed: int,
    threads: int,
    on_trial: Callable[[Trial], None],
) -> Best:
    """Try sets of hyper-parameters, the candidate's defaults first.

    Args:
        candidate: what to train.
        train: rows to learn from.
        validation: rows to stop, prune and choose by.
        trials: how many.
        seed: of the sampler and of every training; the same gives the same result.
        threads: of one training.
        on_trial: is told of each trial as it ends.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=5),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=WARM_UP),
    )
    study.enqueue_trial(dict(candidate.DEFAULTS))
    best: Best | None = None
    for _ in range(trials):
        current = study.ask()
        parameters = {**candidate.DEFAULTS, **candidate.suggest(current)}
        begin = time.perf_counter()
        model, final, losses, pruned = _fit(
            candidate, train, validation, parameters, seed, threads, current
        )
        metrics: dict[str, float] = {}
        if not pruned:
            probability = sigmoid(candidate.margin(model, validation.matrix))
            metrics = all_metrics(Scores(validation.target, probability))
        trial = Trial(current.number, parameters, metrics, losses, time.perf_counter() - begin)
        if pruned:
            study.tell(current, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(current, metrics["log_loss"])
            if best is None or metrics["log_loss"] < best.trial.metrics["log_loss"]:
                best = Best(model, final, trial)
        on_trial(trial)
    assert best is not None  # noqa: S101  (the first trials are never pruned)
    return best


def _fit(
    candidate: Candidate,
    train: Table,
    validation: Table,
    parameters: Mapping[str, Any],
    seed: int,
    threads: int,
    current: optuna.Trial,
) -> tuple[Any, dict[str, Any], list[tuple[int, float]], bool]:
    losses: list[tuple[int, float]] = []
    pruned = False

    def report(iteration: int, loss: float) -> bool:
        nonlocal pruned
        losses.append((iteration, loss))
        current.report(loss, iteration)
        pruned = pruned or current.should_prune()
        return pruned

    model, final = candidate.fit(train, validation, parameters, seed, threads, report)
    return model, final, losses, pruned


def out_of_fold(
    candidate: Candidate,
    train: Table,
    patients: Any,
    parameters: Mapping[str, Any],
    *,
    folds: int,
    seed: int,
    threads: int,
) -> Any:
    """Log odds of every training row by a model that has not seen its patient, (rows,)."""
    from sklearn.model_selection import GroupKFold

    margins = np.empty(len(train.target))
    for seen, unseen in GroupKFold(folds).split(margins, groups=patients):
        model, _ = candidate.fit(train.take(seen), None, parameters, seed, threads, never_stop)
        margins[unseen] = candidate.margin(model, train.matrix[unseen])
    return margins
