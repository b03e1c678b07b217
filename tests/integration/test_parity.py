"""A model computes from raw fields what dbt computed into clean_data: every row of the real file.

The feature SQL runs on PostgreSQL for training and on SQLite inside a model. Both have to give the
same features and hence the same probabilities.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlglot
from sqlglot import exp

from services.mlflow_server import client_environment
from tests.warehouse import Database
from training import candidates, data, evaluate, features, inference, publish
from training.candidates import Table, never_stop
from training.features import RAW_FIELDS, SOURCE
from training.inference import FeatureQuery, Scorer, sigmoid

ROWS = 101_766
PUBLISHED = 99_343  # train, validation and test; the others died or went to a hospice

# mlflow warns of its own use of pandas and of type hints in itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*Any type hint is inferred"),
]


@pytest.fixture(scope="module")
def definition(real: Database) -> dict[str, Any]:
    return features.read(real.dsn)


@pytest.fixture(scope="module")
def raw(real: Database) -> dict[str, list[Any]]:
    """Raw fields by the publisher's names, in the order of encounter_id, which is with them."""
    names = {"encounter_id": "encounter_id", **{field.name: field.column for field in RAW_FIELDS}}
    rows = real.rows(
        f"select {', '.join(names.values())} from raw_data.diabetes order by encounter_id"
    )
    assert len(rows) == ROWS
    columns = zip(*rows, strict=True)
    return {name: list(values) for name, values in zip(names, columns, strict=True)}


@pytest.fixture(scope="module")
def computed(definition: dict[str, Any], raw: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    """Features as a model computes them."""
    return FeatureQuery(definition).rows(raw, ROWS)


def test_features_from_raw_fields_are_those_of_dbt(
    real: Database, definition: dict[str, Any], computed: list[tuple[Any, ...]]
) -> None:
    names = [feature["name"] for feature in definition["features"]]
    of_dbt = real.rows(
        f"select {', '.join(names)} from intermediate.int_encounters__features "
        "order by encounter_id"
    )
    assert len(of_dbt) == len(computed) == ROWS
    wrong = {}
    for index, feature in enumerate(definition["features"]):
        expected = [row[index] for row in of_dbt]
        found = [row[index] for row in computed]
        if feature["type"] == "double precision":
            difference = np.abs(np.array(expected, float) - np.array(found, float)).max()
            if not difference <= 1e-9:  # NaN is wrong too
                wrong[feature["name"]] = difference
            continue
        assert {type(value) for value in found} == {type(value) for value in expected}
        if expected != found:
            pairs = zip(expected, found, strict=True)
            wrong[feature["name"]] = next(pair for pair in pairs if pair[0] != pair[1])
    assert wrong == {}


def test_known_record_has_the_features_worked_out_by_hand(definition: dict[str, Any]) -> None:
    # The first two lines of the publisher's file.
    records = [
        {
            "race": "Caucasian", "gender": "Female", "age": "[0-10)", "weight": "?",
            "admission_type_id": 6, "discharge_disposition_id": 25, "admission_source_id": 1,
            "time_in_hospital": 1, "payer_code": "?",
            "medical_specialty": "Pediatrics-Endocrinology", "num_lab_procedures": 41,
            "num_procedures": 0, "num_medications": 1, "number_outpatient": 0,
            "number_emergency": 0, "number_inpatient": 0, "diag_1": "250.83", "diag_2": "?",
            "diag_3": "?", "number_diagnoses": 1, "max_glu_serum": "None", "A1Cresult": "None",
            "insulin": "No", "change": "No", "diabetesMed": "No",
        },
        {
            "race": "Caucasian", "gender": "Female", "age": "[10-20)", "weight": "?",
            "admission_type_id": 1, "discharge_disposition_id": 1, "admission_source_id": 7,
            "time_in_hospital": 3, "payer_code": "?", "medical_specialty": "?",
            "num_lab_procedures": 59, "num_procedures": 0, "num_medications": 18,
            "number_outpatient": 0, "number_emergency": 0, "number_inpatient": 0,
            "diag_1": "276", "diag_2": "250.01", "diag_3": "255", "number_diagnoses": 9,
            "max_glu_serum": "None", "A1Cresult": "None", "insulin": "Up", "change": "Ch",
            "diabetesMed": "Yes",
        },
    ]  # fmt: skip
    columns = {name: [record[name] for record in records] for name in records[0]}
    query = FeatureQuery(definition)
    first, second = (dict(zip(query.names, row, strict=True)) for row in query.rows(columns, 2))
    assert first.items() >= {
        "race": "Caucasian", "is_female": 1, "weight_measured": 0, "age_midpoint": 5,
        "payer_code": "Unknown", "medical_specialty": "Pediatrics-Endocrinology",
        "diag_1_category": "250", "diag_1_group": "Diabetes", "has_diabetes_diagnosis": 1,
        "has_circulatory_diagnosis": 0, "insulin_up": 0, "takes_diabetes_medication": 0,
        "medication_changed": 0, "a1c_measured": 0, "visits_before": 0,
        "lab_procedures_per_day": 41.0,
    }.items()  # fmt: skip
    assert second.items() >= {
        "age_midpoint": 15, "medical_specialty": "Unknown", "diag_2_group": "Diabetes",
        "diag_3_group": "Other", "insulin": "Up", "insulin_up": 1, "doses_raised": 1,
        "medication_changed": 1, "takes_diabetes_medication": 1, "medications_per_day": 6.0,
    }.items()  # fmt: skip


def test_features_do_not_depend_on_which_rows_are_asked_together(
    definition: dict[str, Any], raw: dict[str, list[Any]], computed: list[tuple[Any, ...]]
) -> None:
    query = FeatureQuery(definition)
    some = list(range(ROWS - 1, 0, -997))
    columns = {name: [values[row] for row in some] for name, values in raw.items()}
    assert query.rows(columns, len(some)) == [computed[row] for row in some]
    for row in some[:5]:
        one = {name: [values[row]] for name, values in raw.items()}
        assert query.rows(one, 1) == [computed[row]]


def test_query_knows_no_id_no_outcome_and_no_split(definition: dict[str, Any]) -> None:
    tree = sqlglot.parse_one(definition["query"], read="sqlite")
    columns = list(tree.find_all(exp.Column))
    words = {node.name.lower() for node in tree.find_all(exp.Identifier)}
    words |= {node.name.lower() for node in tree.find_all(exp.Anonymous)}
    forbidden = {
        "patient_nbr", "readmitted", "readmitted_within_30_days", "split", "exclusion_reason",
        "is_training_row", "first_load_id", "last_load_id", "batch_id", "patient_hash",
    }  # fmt: skip
    assert not words & forbidden
    assert not list(tree.find_all(exp.MD5, exp.MD5Digest, exp.SHA))
    assert "md5" not in definition["query"].lower()
    # The id is handed on from CTE to CTE and sorts in the end; nothing is computed from it.
    ids = [column for column in columns if column.name == "encounter_id"]
    assert ids
    for column in ids:
        carrier = column.parent
        carried = isinstance(carrier, exp.Alias) and carrier.alias == "encounter_id"
        assert carried or isinstance(carrier, exp.Select | exp.Ordered), column.parent_select
    # And from the raw table nothing is read but what a caller may send.
    read = {column.name for column in columns if column.table == SOURCE}
    assert read <= {"encounter_id", *(field.column for field in RAW_FIELDS)}
    names = {feature["name"] for feature in definition["features"]}
    assert not names & (forbidden | {"encounter_id"})


@pytest.fixture(scope="module")
def encounters(real: Database, definition: dict[str, Any]) -> dict[str, data.Encounters]:
    """All splits as training reads them."""
    wanted = definition["features"]
    return {
        "train": data.read(real.dsn, "train", wanted),
        "validation": data.read(real.dsn, "validation", wanted),
        "test": data.read(real.dsn, "test", wanted),
    }


@pytest.fixture(scope="module")
def folder(
    definition: dict[str, Any],
    encounters: dict[str, data.Encounters],
    raw: dict[str, list[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A quick model's folder, as a judgement makes it."""
    made = tmp_path_factory.mktemp("model") / "readmission"
    (made / "fitted").mkdir(parents=True)
    source = candidates.file("lightgbm")
    module = candidates.load(source)
    train = encounters["train"]
    encoder = data.fit_encoder(train, definition["features"])
    table = Table.of(train, encoder)
    parameters = {**module.DEFAULTS, "trees": 80, "learning_rate": 0.2, "feature_fraction": 0.5}
    model, _ = module.fit(table, None, parameters, 130, 2, never_stop)
    module.save(model, made / "fitted")
    shutil.copyfile(source, made / "candidate.py")
    shutil.copyfile(inference.__file__, made / "inference.py")
    probability = sigmoid(0.9 * module.margin(model, table.matrix) - 0.1)
    examples = [{name: values[row] for name, values in raw.items()} for row in range(3)]
    for example in examples:
        del example["encounter_id"]
    for name, content in {
        "features": definition,
        "encoder": {"names": encoder.names, "vocabularies": encoder.vocabularies},
        "scoring": {
            "slope": 0.9,
            "intercept": -0.1,
            "thresholds": evaluate.choose_thresholds(probability),
        },
        "examples": {"records": examples},
    }.items():
        (made / f"{name}.json").write_text(json.dumps(content))
    return made


def test_probabilities_through_mlflow_are_those_of_clean_data(
    folder: Path,
    encounters: dict[str, data.Encounters],
    raw: dict[str, list[Any]],
    mlflow_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in client_environment(mlflow_server).items():
        monkeypatch.setenv(name, value)
    import mlflow

    mlflow.set_tracking_uri(mlflow_server)
    client = mlflow.MlflowClient()
    experiment = client.create_experiment(f"parity {os.getpid()}")
    run_id = client.create_run(experiment).info.run_id
    loaded = mlflow.pyfunc.load_model(publish._log_model(run_id, folder).model_uri)

    # Every fifth: their features are equal for all (above), and the scorer is the same.
    some = slice(None, None, 5)
    frame = pd.DataFrame({field.name: raw[field.name][some] for field in RAW_FIELDS})
    numbers = [field.name for field in RAW_FIELDS if field.kind not in ("category", "icd9")]
    frame[numbers] = frame[numbers].astype(float)
    answer = loaded.predict(frame, params={"top": 0})
    by_id = pd.Series(answer["probability"].to_numpy(), index=raw["encounter_id"][some])

    scorer = Scorer(folder)
    rows = 0
    for split, of_split in encounters.items():
        expected = scorer.probabilities(of_split.matrix(scorer.encoder))
        asked = np.isin(of_split.ids, by_id.index)
        expected = expected[asked]
        found = by_id.loc[of_split.ids[asked]].to_numpy()
        assert np.abs(found - expected).max() <= 1e-9, split
        assert len(np.unique(found)) > 1000, split
        rows += len(found)
    assert rows > PUBLISHED / 6
