"""XGBoost: gradient-boosted trees by histograms (Chen and Guestrin, KDD 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xgboost

if TYPE_CHECKING:
    import optuna

    from training.candidates import Report, Table
    from training.inference import Matrix

DEFAULTS: Mapping[str, Any] = {
    "objective": "binary:logistic", "eval_metric": "logloss", "tree_method": "hist", "eta": 0.07,
    "max_depth": 5, "min_child_weight": 20.0, "subsample": 0.8, "colsample_bynode": 0.2,
    "lambda": 10.0, "max_cat_to_onehot": 4, "max_cat_threshold": 32,
}  # fmt: skip
MOST_TREES, PATIENCE = 800, 40


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "eta": trial.suggest_float("eta", 0.04, 0.12, log=True),
        "max_depth": trial.suggest_int("max_depth", 3, 7),
        "min_child_weight": trial.suggest_float("min_child_weight", 5.0, 60.0, log=True),
        "colsample_bynode": trial.suggest_float("colsample_bynode", 0.1, 0.4),
        "lambda": trial.suggest_float("lambda", 1.0, 50.0, log=True),
    }


def fit(
    train: Table, validation: Table | None, parameters: Mapping[str, Any],
    seed: int, threads: int, report: Report,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    settings = {**parameters, "seed": seed, "nthread": threads}
    trees = settings.pop("trees", MOST_TREES)
    data = _matrix(train.matrix, _types(train), train.target)
    if validation is None:
        return xgboost.train(settings, data, num_boost_round=trees), dict(parameters)

    class Prune(xgboost.callback.TrainingCallback):
        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            return report(epoch, evals_log["validation"]["logloss"][-1])

    stop = xgboost.callback.EarlyStopping(rounds=PATIENCE, save_best=True)
    evaluated = [(_matrix(validation.matrix, _types(train), validation.target), "validation")]
    model = xgboost.train(
        settings,
        data,
        num_boost_round=trees,
        evals=evaluated,
        callbacks=[stop, Prune()],
        verbose_eval=False,
    )
    return model, {**parameters, "trees": model.num_boosted_rounds()}


def _types(table: Table) -> list[str]:
    return ["c" if index in table.nominal else "q" for index in range(len(table.names))]


def _matrix(matrix: Matrix, types: Any, target: Any = None) -> xgboost.DMatrix:
    return xgboost.DMatrix(matrix, target, feature_types=types, enable_categorical=True)


def save(model: Any, folder: Path) -> None:
    model.save_model(folder / "xgboost.ubj")


def load(folder: Path) -> Any:
    return xgboost.Booster(model_file=folder / "xgboost.ubj")


def margin(model: Any, matrix: Matrix) -> Matrix:
    scores = model.predict(_matrix(matrix, model.feature_types), output_margin=True)
    return np.asarray(scores, dtype=float)


def contributions(model: Any, matrix: Matrix) -> Matrix:
    shares = model.predict(_matrix(matrix, model.feature_types), pred_contribs=True)
    return np.asarray(shares, dtype=float)
