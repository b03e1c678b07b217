"""CatBoost: boosting with ordered target statistics of categories (Prokhorenkova et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import catboost
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import optuna

    from training.candidates import Report, Table
    from training.inference import Matrix

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 0.1, "depth": 6, "l2_leaf_reg": 10.0, "rsm": 0.3, "random_strength": 1.0,
    # Its own defaults, which it would lower where `iterations` is small: another model then.
    "leaf_estimation_iterations": 10, "max_ctr_complexity": 4,
}  # fmt: skip
MOST_TREES, PATIENCE, REPORT_EVERY = 1000, 40, 5
# A data frame costs milliseconds a call, lists cost them by the row.
FEW_ROWS = 64
# Groups of a category add nothing where its target statistics are known, and take time.
IGNORED = ("_group", "is_female", "a1c_level", "a1c_measured", "glucose_level", "insulin_", "has_")


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.07, 0.13, log=True),
        "depth": trial.suggest_int("depth", 5, 7),
        "l2_leaf_reg": trial.suggest_float("l2_leaf_reg", 3.0, 40.0, log=True),
        "rsm": trial.suggest_float("rsm", 0.2, 0.5),
        "random_strength": trial.suggest_float("random_strength", 0.3, 3.0, log=True),
    }


def fit(
    train: Table, validation: Table | None, parameters: Mapping[str, Any],
    seed: int, threads: int, report: Report,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    ignored = [i for i, name in enumerate(train.names) if any(part in name for part in IGNORED)]
    model = catboost.CatBoostClassifier(
        **{"iterations": MOST_TREES, **parameters}, ignored_features=ignored, random_seed=seed,
        cat_features=list(train.nominal), thread_count=threads, allow_writing_files=False,
        verbose=False,
    )  # fmt: skip
    if validation is None:
        return model.fit(_frame(train.matrix, train.nominal), train.target), dict(parameters)

    class Prune:
        def after_iteration(self, info: Any) -> bool:
            losses = info.metrics["validation"]["Logloss"]
            new = info.iteration % REPORT_EVERY == 0
            return not (new and report(info.iteration, losses[-1]))

    model.fit(
        _frame(train.matrix, train.nominal), train.target,
        eval_set=(_frame(validation.matrix, train.nominal), validation.target),
        early_stopping_rounds=PATIENCE, callbacks=[Prune()],
    )  # fmt: skip
    return model, {**parameters, "iterations": model.tree_count_}


def _rows(matrix: Matrix, nominal: Any) -> Any:
    if len(matrix) > FEW_ROWS:
        return _frame(matrix, nominal)
    codes = np.nan_to_num(matrix, nan=-1).astype(np.int64).tolist()
    pairs = zip(matrix.tolist(), codes, strict=True)
    return [
        [code if i in nominal else value for i, (value, code) in enumerate(zip(*pair, strict=True))]
        for pair in pairs
    ]


def _frame(matrix: Matrix, nominal: Any) -> pd.DataFrame:
    codes = {i: np.nan_to_num(matrix[:, i], nan=-1).astype(np.int32) for i in nominal}
    return pd.DataFrame({i: codes.get(i, matrix[:, i]) for i in range(matrix.shape[1])})


def save(model: Any, folder: Path) -> None:
    model.save_model(str(folder / "catboost.cbm"))


def load(folder: Path) -> Any:
    return catboost.CatBoostClassifier().load_model(str(folder / "catboost.cbm"))


def margin(model: Any, matrix: Matrix) -> Matrix:
    rows = _rows(matrix, set(model.get_cat_feature_indices()))
    return np.asarray(model.predict(rows, prediction_type="RawFormulaVal"))


def contributions(model: Any, matrix: Matrix) -> Matrix:
    nominal = model.get_cat_feature_indices()
    pool = catboost.Pool(_rows(matrix, set(nominal)), cat_features=nominal)
    return np.asarray(model.get_feature_importance(pool, type="ShapValues"))
