"""Reference distributions: shares that add up and that the same data give again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from training import drift
from training.inference import Matrix

FEATURES = [
    {"name": "days", "nominal": False},
    {"name": "visits", "nominal": False},
    {"name": "fixed", "nominal": False},
    {"name": "race", "nominal": True},
    {"name": "code", "nominal": True},
    {"name": "specialty", "nominal": True},
]


def frame(rows: int = 3000) -> pd.DataFrame:
    random = np.random.default_rng(31)
    weights = 1 / np.arange(1, 81)
    specialty = random.choice(80, rows, p=weights / weights.sum())
    return pd.DataFrame(
        {
            "days": random.normal(size=rows),
            "visits": random.poisson(0.6, rows),
            "fixed": np.ones(rows),
            "race": pd.Categorical(random.choice(["A", "B"], rows), ["A", "B", "never seen"]),
            "code": random.choice([1, 2, 11], rows),
            "specialty": [f"specialty {one:02}" for one in specialty],
        }
    )


FRAME = frame()
SCORES = np.random.default_rng(32).beta(2, 14, 1200)


def reference() -> dict[str, Any]:
    """As it comes out of the file beside the model."""
    loaded: dict[str, Any] = json.loads(json.dumps(drift.reference(FRAME, FEATURES, SCORES)))
    return loaded


def shares_again(part: dict[str, Any], values: Any) -> list[float]:
    """What a watcher of drift would compute from new values."""
    if "edges" in part:
        bins = np.digitize(values, part["edges"])
    else:
        places = {level: at for at, level in enumerate(part["levels"][:-1])}
        bins = np.array([places.get(str(value), len(places)) for value in values])
    counts = np.bincount(bins, minlength=len(part["shares"]))
    return [int(count) / len(values) for count in counts]


def parts() -> dict[str, tuple[dict[str, Any], Any]]:
    found = reference()
    named = {name: (part, FRAME[name]) for name, part in found["features"].items()}
    return named | {"score": (found["score"], SCORES)}


@pytest.mark.parametrize("name", [*(str(one["name"]) for one in FEATURES), "score"])
def test_shares_add_up_and_come_out_again(name: str) -> None:
    part, values = parts()[name]
    assert sum(part["shares"]) == pytest.approx(1.0, abs=1e-12)
    assert part["shares"] == shares_again(part, values)


def test_reference_names_every_feature_and_its_rows() -> None:
    found = reference()
    assert list(found["features"]) == [one["name"] for one in FEATURES]
    assert found["rows"] == 3000


@pytest.mark.parametrize("values", [FRAME["days"].to_numpy(), SCORES])
def test_numbers_are_binned_at_their_deciles(values: Matrix) -> None:
    found = drift._bins(values)
    assert len(found["edges"]) == 9
    assert found["shares"] == pytest.approx([0.1] * 10, abs=2 / len(values))


def test_repeated_values_give_fewer_bins() -> None:
    visits = drift._bins(np.repeat(np.arange(20.0), [900, 60, *[1] * 18]))
    assert visits["edges"] == [0]
    assert visits["shares"] == [0.0, 1.0]  # nothing lies below 0; 0 is in the bin above it
    assert reference()["features"]["fixed"] == {"edges": [1.0], "shares": [0.0, 1.0]}


def test_few_values_have_a_bin_each_so_that_a_rare_flag_can_drift() -> None:
    assert drift._bins(np.repeat([0.0, 1.0], [970, 30])) == {"edges": [1.0], "shares": [0.97, 0.03]}
    visits = reference()["features"]["visits"]
    assert visits["edges"] == sorted(set(FRAME["visits"]))[1:]
    assert visits["shares"][0] == float((FRAME["visits"] == 0).mean())


def test_levels_are_ordered_by_how_common_they_are() -> None:
    race = reference()["features"]["race"]
    assert sorted(race["levels"][:2]) == ["A", "B"]
    assert race["levels"][2:] == ["other"]
    assert race["shares"][0] >= race["shares"][1] > race["shares"][2] == 0.0
    assert set(reference()["features"]["code"]["levels"]) == {"1", "2", "11", "other"}


def test_the_rarest_of_many_levels_go_together() -> None:
    specialty = reference()["features"]["specialty"]
    assert len(specialty["levels"]) == len(specialty["shares"]) == 51
    counts = FRAME["specialty"].value_counts()
    assert set(specialty["levels"][:-1]) | set(specialty["rest"]) == set(FRAME["specialty"])
    assert specialty["shares"][-1] == pytest.approx(counts.iloc[50:].sum() / 3000)
    assert min(specialty["shares"][:-1]) >= counts.iloc[50:].max() / 3000


def test_order_of_rows_does_not_matter() -> None:
    shuffled = FRAME.sample(frac=1, random_state=1)
    assert drift.reference(shuffled, FEATURES, SCORES[::-1]) == drift.reference(
        FRAME, FEATURES, SCORES
    )
