"""The prediction API as a process of its own, on a real registry and a real PostgreSQL."""

from __future__ import annotations

import csv
import io

import pytest

from tests.served import Api

# mlflow warns of its own use of pandas and of type hints in itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*Any type hint is inferred"),
]

ENCOUNTER = {"age": "[70-80)", "number_inpatient": 2, "time_in_hospital": 5}


def test_single_batch_and_csv_give_the_same_risk(api: Api) -> None:
    single = api.post("/v1/predict", json=ENCOUNTER).json()
    batch = api.post("/v1/predict/batch", json={"encounters": [ENCOUNTER, {}]}).json()
    text = ",".join(ENCOUNTER) + "\n" + ",".join(map(str, ENCOUNTER.values())) + "\n"
    answer = api.post("/v1/predict/batch", data=text, headers={"content-type": "text/csv"})
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert batch["predictions"][0]["probability"] == single["probability"]
    assert float(row["probability"]) == pytest.approx(single["probability"], abs=5e-7)
