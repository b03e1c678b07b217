"""LightGBM: gradient-boosted trees with native categories (Ke et al., NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightgbm
import numpy as np

if TYPE_CHECKING:
    import optuna

    from training.candidates import Report, Table
    from training.inference import Matrix

DEFAULTS: Mapping[str, Any] = {
    "objective": "binary", "metric": "binary_logloss", "learning_rate": 0.04, "num_leaves": 31,
    "min_data_in_leaf": 100, "feature_fraction": 0.15, "bagging_fraction": 0.8, "bagging_freq": 1,
    "lambda_l2": 10.0, "cat_smooth": 50.0, "cat_l2": 30.0, "max_cat_threshold": 16,
    "extra_trees": False, "deterministic": True, "force_row_wise": True, "verbosity": -1,
}  # fmt: skip
MOST_TREES, PATIENCE = 1500, 60


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.03, 0.08, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 8, 48, log=True),
        "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 40, 300, log=True),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.1, 0.4),
        "lambda_l2": trial.suggest_float("lambda_l2", 1.0, 50.0, log=True),
        "cat_smooth": trial.suggest_float("cat_smooth", 10.0, 200.0, log=True),
        "extra_trees": trial.suggest_categorical("extra_trees", [False, True]),
    }


def fit(
    train: Table, validation: Table | None, parameters: Mapping[str, Any],
    seed: int, threads: int, report: Report,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    settings = {**parameters, "seed": seed, "num_threads": threads}
    trees = settings.pop("trees", MOST_TREES)
    data = lightgbm.Dataset(train.matrix, train.target, categorical_feature=list(train.nominal))
    if validation is None:
        return lightgbm.train(settings, data, trees), dict(parameters)

    def prune(env: Any) -> None:
        loss = env.evaluation_result_list[0][2]
        if report(env.iteration, loss):
            raise lightgbm.callback.EarlyStopException(env.iteration, env.evaluation_result_list)

    model = lightgbm.train(
        settings, data, trees, [data.create_valid(validation.matrix, validation.target)],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False), prune],
    )  # fmt: skip
    return model, {**parameters, "trees": model.best_iteration}


def save(model: Any, folder: Path) -> None:
    model.save_model(folder / "lightgbm.txt")


def load(folder: Path) -> Any:
    return lightgbm.Booster(model_file=folder / "lightgbm.txt")


def margin(model: Any, matrix: Matrix) -> Matrix:
    return np.asarray(model.predict(matrix, raw_score=True))


def contributions(model: Any, matrix: Matrix) -> Matrix:
    return np.asarray(model.predict(matrix, pred_contrib=True))
