"""Reference distributions that go with a model: what its features and scores looked like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from training.inference import Matrix

BINS = 10
MOST_LEVELS = 50


def reference(
    frame: pd.DataFrame, features: Sequence[Mapping[str, Any]], scores: Matrix
) -> dict[str, Any]:
    """Shares by bin of each feature among training rows, and of the score among validation rows.

    Numbers are binned at their deciles (fewer bins where values repeat, and one for each value
    where there are ten or fewer), nominal features by level, the rarest together as `other`.
    Scores come from validation: on rows that a model was trained on they are too sure.

    Returns:
        `features` by name and `score`, each with `edges` (inner bounds; a value equal to a bound
        belongs to the bin above) or `levels` (and `rest`, those that are counted in `other`), and
        with `shares` that add up to 1, `percentiles`
        (101 scores, the lowest and the highest included: the place of one among all), and `rows`.
    """
    return {
        "rows": len(frame),
        "features": {
            str(feature["name"]): _levels(frame[feature["name"]])
            if feature["nominal"]
            else _bins(frame[feature["name"]].to_numpy(float))
            for feature in features
        },
        "score": _bins(scores),
        "percentiles": np.quantile(scores, np.linspace(0, 1, 101)).tolist(),
    }


def _bins(values: Matrix) -> dict[str, Any]:
    found = np.unique(values)
    # Deciles of a rare flag are all equal, and its drift would be in no bin: a bin each, if few.
    edges = (
        found[1:]
        if 1 < len(found) <= BINS
        else np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1], method="lower"))
    )
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    return {"edges": edges.tolist(), "shares": (counts / len(values)).tolist()}


def _levels(values: pd.Series[Any]) -> dict[str, Any]:
    counts = values.astype(str).value_counts()
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0])))
    kept, rest = ordered[:MOST_LEVELS], ordered[MOST_LEVELS:]
    shares = [int(count) / len(values) for _, count in kept]
    return {
        "levels": [str(level) for level, _ in kept] + ["other"],
        "rest": [str(level) for level, count in rest if count],
        "shares": [*shares, sum(int(count) for _, count in rest) / len(values)],
    }
