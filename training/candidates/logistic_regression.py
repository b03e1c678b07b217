"""Logistic regression with an L2 penalty: the baseline that the others have to beat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

if TYPE_CHECKING:
    import optuna

    from training.candidates import Report, Table
    from training.inference import Matrix

DEFAULTS: Mapping[str, Any] = {"c": 0.02}


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {"c": trial.suggest_float("c", 0.003, 0.3, log=True)}


def fit(
    train: Table, validation: Table | None, parameters: Mapping[str, Any],
    seed: int, threads: int, report: Report,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    matrix = train.matrix
    model: dict[str, Any] = {"features": len(train.names), "levels": {}, "numbers": {}}
    for index in range(model["features"]):
        column = matrix[:, index]
        if index in train.nominal:
            model["levels"][str(index)] = int(np.nanmax(column, initial=-1)) + 1
        else:
            model["numbers"][str(index)] = [float(column.mean()), float(column.std()) or 1.0]
    design = _design(model, matrix)
    solved = LogisticRegression(C=parameters["c"], max_iter=300).fit(design, train.target)
    model["weights"] = solved.coef_[0].tolist()
    model["intercept"] = float(solved.intercept_[0])
    model["means"] = np.asarray(design.mean(axis=0)).ravel().tolist()
    return model, dict(parameters)


def _owners(model: Any) -> list[int]:
    """Which feature each column of the design belongs to: numbers first, then a column a level."""
    owners = [int(index) for index in model["numbers"]]
    for index, levels in model["levels"].items():
        owners += [int(index)] * levels
    return owners


def _design(model: Any, matrix: Matrix) -> Any:
    blocks = [
        (matrix[:, int(i)] - mean)[:, None] / std for i, (mean, std) in model["numbers"].items()
    ]
    for index, levels in model["levels"].items():
        rows = np.flatnonzero(matrix[:, int(index)] < levels)  # neither NaN nor a level not seen
        codes = matrix[rows, int(index)].astype(int)
        shape = (len(matrix), levels)
        blocks.append(sparse.csr_matrix((np.ones(len(rows)), (rows, codes)), shape))
    return sparse.hstack(blocks, format="csr")


def save(model: Any, folder: Path) -> None:
    (folder / "logistic_regression.json").write_text(json.dumps(model))


def load(folder: Path) -> Any:
    return json.loads((folder / "logistic_regression.json").read_text())


def margin(model: Any, matrix: Matrix) -> Matrix:
    return np.asarray(_design(model, matrix) @ np.array(model["weights"]) + model["intercept"])


def contributions(model: Any, matrix: Matrix) -> Matrix:
    weights, means = np.array(model["weights"]), np.array(model["means"])
    shape = (len(weights), model["features"])
    owners = sparse.csr_matrix((weights, (np.arange(len(weights)), _owners(model))), shape)
    shares = np.asarray((_design(model, matrix) @ owners).todense()) - means @ owners
    return np.column_stack([shares, np.full(len(matrix), weights @ means + model["intercept"])])
