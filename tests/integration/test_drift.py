"""Drift on real SQL and a real PostgreSQL: what is flagged, and what is not.

On the real file where DIABETES_SOURCE names it, else on synthetic encounters.
"""

from __future__ import annotations

import csv
import json
import os
import random
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psycopg2
import pytest
from psycopg2.extras import execute_values

from ingestion.contract import FIELDS
from ingestion.synthetic import write_csv
from monitoring import drift
from monitoring.champion import fetch
from monitoring.drift import Champion, Check, DriftError
from monitoring.report import EXPERIMENT, PAGE, publish
from serving.prediction_log import _TABLES as PREDICTION_LOG
from tests.conftest import Database
from tests.dbt.test_project import Dbt, ingest
from tests.integration.test_parity import made_database
from tests.served import WARNINGS, Registered
from training import data
from training.drift import reference as reference_of
from training.inference import sigmoid

SEEDS = 20
ROWS = 1_000
KEY = b"only for tests"
START = datetime(2025, 6, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
AGES = [f"[{start}-{start + 10})" for start in range(0, 100, 10)]


class Scorer:
    """Stands for a champion: a logistic regression on its counts, fitted by Newton's method."""

    def __init__(self, features: list[dict[str, Any]], train: data.Encounters) -> None:
        self.definition = {"features": features}
        self.feature_names = tuple(str(each["name"]) for each in features)
        self._used = [
            index for index, each in enumerate(features) if each["name"].startswith("num")
        ]
        used = train.features[[self.feature_names[index] for index in self._used]].to_numpy(float)
        self._center, self._scale = used.mean(0), used.std(0)
        matrix = self._scaled(used)
        self._weights = np.zeros(matrix.shape[1])
        for _ in range(8):
            p = sigmoid(matrix @ self._weights)
            hessian = matrix.T @ (matrix * (p * (1 - p))[:, None])
            self._weights += np.linalg.solve(hessian, matrix.T @ (train.target - p))

    def _scaled(self, used: Any) -> Any:
        return np.column_stack([np.ones(len(used)), (used - self._center) / self._scale])

    def matrix(self, rows: Sequence[tuple[Any, ...]]) -> Any:
        return np.array([[row[index] for index in self._used] for row in rows], float)

    def probabilities(self, matrix: Any) -> Any:
        return sigmoid(self._scaled(matrix) @ self._weights)


@dataclass
class Platform:
    """A database with data, features and a prediction log, and who is champion there."""

    database: Database
    dbt: Dbt
    champion: Champion
    held_out: list[tuple[int, list[Any]]]

    def find(self, check_id: str, window: str, where: str = "true") -> dict[str, dict[str, Any]]:
        """The rows of monitoring.drift by feature."""
        with closing(psycopg2.connect(self.database.dsn)) as connection:
            cursor = connection.cursor()
            cursor.execute(
                f"select * from monitoring.drift where check_id = %s and window_name = %s"
                f" and {where}",
                (check_id, window),
            )
            names = [column.name for column in cursor.description or ()]
            found = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        return {row["feature"]: row for row in found}

    def flagged(self, check_id: str, window: str) -> set[str]:
        return set(self.find(check_id, window, "drifted"))

    def check(self, check_id: str, window: str) -> dict[str, Any]:
        names = "rows, labelled_rows, calibration_error, drifted_features, enough_rows"
        ((*values,),) = self.database.rows(
            f"select {names} from monitoring.drift_checks where check_id = %s and window_name = %s",
            check_id,
            window,
        )
        return dict(zip(names.split(", "), values, strict=True))


def place(platform: Platform, name: str) -> int:
    return platform.champion.scorer.feature_names.index(name)


@pytest.fixture(scope="module")
def platform(server_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Everything is put into place and checked once; the tests look at what was found."""
    folder = tmp_path_factory.mktemp("drift")
    with made_database(server_port, f"drift_{os.getpid()}") as database:
        real = os.environ.get("DIABETES_SOURCE", "")
        source = Path(real) if real and Path(real).is_file() else folder / "synthetic.csv"
        if not source.exists():
            write_csv(source, rows=40_000)
        ingest(database, source)
        ingest(database, shifted_load(database, folder / "shifted.csv"))
        dbt = Dbt(database, folder / "target")
        dbt.build("--exclude-resource-type", "test")
        made = made_platform(database, dbt)
        with closing(psycopg2.connect(database.dsn)) as connection:
            with connection:
                connection.cursor().execute(PREDICTION_LOG)
                drift.begin(connection.cursor(), made.champion)
            write_checks(connection, made)
        done = dbt("build", "--select", "path:models/monitoring")
        assert done.returncode == 0, done.stdout
        yield made


def shifted_load(database: Database, path: Path) -> Path:
    """Encounters that are there already, under new ids, of older patients with another A1C."""
    columns = ", ".join(each.column for each in FIELDS)
    rows = database.rows(
        f"select {columns} from raw_data.diabetes order by md5(encounter_id::text) limit 1500"
    )
    names = [each.name for each in FIELDS]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for number, row in enumerate(rows):
            values = dict(zip(names, row, strict=True))
            values["encounter_id"] = int(str(values["encounter_id"])) + 10**9
            values["age"] = AGES[min(AGES.index(str(values["age"])) + 2, 9)]
            values["A1Cresult"] = ">8" if number % 2 else values["A1Cresult"]
            writer.writerow(values.values())
    return path


def made_platform(database: Database, dbt: Dbt) -> Platform:
    """A champion that learnt from load 1, with the reference that training makes of it."""
    nodes = json.loads((dbt.target / "manifest.json").read_text())["nodes"].values()
    (train,) = (node for node in nodes if node["name"] == "diabetes_train")
    features = [
        {
            "name": name,
            "type": column["data_type"],
            "nominal": column["data_type"] == "text" or column["config"]["meta"].get("nominal"),
        }
        for name, column in train["columns"].items()
        if column["config"]["meta"].get("role") == "feature"
    ]
    # The shifted load is left out of what it learns from.
    learnt = {
        encounter
        for (encounter,) in database.rows(
            "select encounter_id from clean_data.diabetes_train where first_load_id = 1"
        )
    }
    rows = data.read(database.dsn, "train", features)
    keep = np.isin(rows.ids, list(learnt))
    rows = data.Encounters(
        rows.features[keep], rows.target[keep], rows.readmitted[keep], rows.patients[keep],
        rows.ids[keep],
    )  # fmt: skip
    scorer = Scorer(features, rows)
    validation = data.read(database.dsn, "validation", features).features
    scores = scorer.probabilities(scorer.matrix(list(validation.itertuples(index=False))))
    names = ", ".join(scorer.feature_names)
    held_out = database.rows(
        f"select encounter_id, {names} from intermediate.int_encounters__features "
        "where split <> 'train' and exclusion_reason is null and first_load_id = 1 order by 1"
    )
    return Platform(
        database,
        dbt,
        Champion("1", 1, reference_of(rows.features, features, scores), scorer),
        [(int(str(row[0])), list(row[1:])) for row in held_out],
    )


def write_checks(connection: Any, platform: Platform) -> None:
    """Twenty checks of unshifted rows, and one for each thing that can go wrong."""
    cursor = connection.cursor()
    names = list(platform.champion.scorer.feature_names)
    with connection:
        cursor.execute("insert into inference.models values ('1', 'sha', %s)", (names,))
    pool = list(platform.held_out)
    for seed in range(SEEDS):
        drawn = random.Random(seed).sample(pool, ROWS)  # noqa: S311
        taken = {encounter for encounter, _ in drawn}
        # An encounter stands in one load only; of the predictions it may be asked again.
        pool = [row for row in pool if row[0] not in taken] if len(pool) > 2 * ROWS else pool
        with connection:
            cursor.execute(
                "update intermediate.int_encounters__features set last_load_id = %s "
                "where encounter_id = any(%s)",
                (100 + seed, list(taken)),
            )
            predict(cursor, platform, seed, [row for _, row in drawn])
            drift.add(cursor, check(f"seed {seed}", seed), platform.champion, 100 + seed)
    with connection:
        drift.add(cursor, check("shifted load", 90), platform.champion, 2)
    sample = random.Random(99).sample(platform.held_out, 4 * ROWS)  # noqa: S311
    few = [older(platform, row) for _, row in sample[:200]]
    special: dict[str, list[list[Any]]] = {
        "new category": [
            changed(platform, row, payer_code="QQ" if number % 10 == 0 else None)
            for number, (_, row) in enumerate(sample[:ROWS])
        ],
        "missing": [
            changed(platform, row, medical_specialty="Unknown" if number % 2 else None)
            for number, (_, row) in enumerate(sample[:ROWS])
        ],
        "older": [older(platform, row) for _, row in sample[:ROWS]],
        "few": few,
    }
    ids = [encounter for encounter, _ in sample]
    rows = [row for _, row in sample]
    for number, (name, written) in enumerate(special.items(), start=SEEDS):
        with connection:
            predict(cursor, platform, number, written)
            drift.add(cursor, check(name, number), platform.champion, None)
    for number, (name, moved) in enumerate((("calibrated", 0.0), ("too sure", 1.0)), start=50):
        with connection:
            predict(cursor, platform, number, rows, ids, moved)
            drift.add(cursor, check(name, number), platform.champion, None)


def check(name: str, hour: int) -> Check:
    return Check(name, START + (hour + 1) * HOUR, 1, KEY)


def older(platform: Platform, row: list[Any]) -> list[Any]:
    return changed(platform, row, age_midpoint=95)


def changed(platform: Platform, row: list[Any], **values: Any) -> list[Any]:
    made = list(row)
    for name, value in values.items():
        if value is not None:
            made[place(platform, name)] = value
    return made


def predict(
    cursor: Any,
    platform: Platform,
    hour: int,
    rows: Sequence[list[Any]],
    ids: Sequence[int] | None = None,
    moved: float = 0.0,
) -> None:
    """Write what the API would have, all in one hour; `moved` is added to the log odds."""
    scorer = platform.champion.scorer
    p = scorer.probabilities(scorer.matrix([tuple(row) for row in rows]))
    p = sigmoid(np.log(p / (1 - p)) + moved)
    execute_values(
        cursor,
        "insert into inference.predictions (prediction_id, predicted_at, model_version, role, "
        "source, encounter_hash, probability, features) values %s",
        [
            (
                str(uuid.UUID(int=hour * 10**9 + number)),
                START + hour * HOUR + timedelta(milliseconds=number),
                "1",
                "champion",
                "csv",
                drift.encounter_hash(KEY, ids[number]) if ids else None,
                float(p[number]),
                json.dumps(row),
            )
            for number, row in enumerate(rows)
        ],
        page_size=1000,
    )


@pytest.mark.parametrize("window", ["predictions", "load"])
def test_unshifted_rows_are_not_flagged_over_20_seeds(platform: Platform, window: str) -> None:
    checks = [platform.check(f"seed {seed}", window) for seed in range(SEEDS)]
    assert {each["rows"] for each in checks} == {ROWS}
    assert all(each["enough_rows"] for each in checks)
    assert [each["drifted_features"] for each in checks] == [0] * SEEDS
    ((worst,),) = platform.database.rows(
        "select max(psi) from monitoring.drift where check_id like 'seed %%' and window_name = %s",
        window,
    )
    # Not by a hair: the noise of features with 50 levels and more stays below half of the limit.
    assert 0 < float(str(worst)) < 0.1


def test_shifted_load_is_flagged_where_it_shifted(platform: Platform) -> None:
    assert platform.check("shifted load", "load")["enough_rows"]
    flagged = platform.flagged("shifted load", "load")
    assert {"age_midpoint", "a1c_result", "a1c_measured", "a1c_level", "a1c_response"} == flagged


def test_older_patients_are_flagged_among_predictions(platform: Platform) -> None:
    assert platform.flagged("older", "predictions") == {"age_midpoint"}


def test_window_of_200_rows_is_never_flagged(platform: Platform) -> None:
    found = platform.check("few", "predictions")
    assert (found["rows"], found["enough_rows"], found["drifted_features"]) == (200, False, 0)
    assert {row["psi"] for row in platform.find("few", "predictions").values()} == {None}


def test_window_without_rows_is_told_of(platform: Platform) -> None:
    found = platform.check("shifted load", "predictions")
    assert (found["rows"], found["enough_rows"], found["drifted_features"]) == (0, False, 0)
    assert {row["rows"] for row in platform.find("shifted load", "predictions").values()} == {0}


def test_category_that_the_champion_never_saw_is_seen(platform: Platform) -> None:
    found = platform.find("new category", "predictions")
    assert found["payer_code"]["new_category_share"] == pytest.approx(0.1)
    # The rarest of 700 diagnoses are counted in the reference's `other`, and are not new.
    assert found["diag_1_category"]["new_category_share"] < 0.005
    assert found["race"]["new_category_share"] == 0
    assert found["age_midpoint"]["new_category_share"] is None


def test_rise_of_missing_values_is_seen(platform: Platform) -> None:
    found = platform.find("missing", "predictions")["medical_specialty"]
    assert 0.3 < found["missing_share_reference"] < 0.6
    assert found["missing_share"] > found["missing_share_reference"] + 0.2
    before = platform.find("seed 0", "load")
    assert before["medical_specialty"]["missing_share"] == pytest.approx(
        before["medical_specialty"]["missing_share_reference"], abs=0.06
    )
    assert before["num_medications"]["missing_share"] is None


def test_calibration_is_held_against_outcomes(platform: Platform) -> None:
    good, bad = (platform.check(name, "predictions") for name in ("calibrated", "too sure"))
    assert good["labelled_rows"] == bad["labelled_rows"] == 4 * ROWS
    assert good["calibration_error"] < 0.03
    assert bad["calibration_error"] > 0.08
    rows = platform.database.rows(
        "select bin, rows, predicted, observed from monitoring.calibration "
        "where check_id = 'too sure' and window_name = 'predictions' order by bin"
    )
    assert sum(int(str(row[1])) for row in rows) == 4 * ROWS
    assert "(score)" in platform.flagged("too sure", "predictions")


def test_load_is_held_against_outcomes_that_the_champion_did_not_learn_from(
    platform: Platform,
) -> None:
    ((validation,),) = platform.database.rows(
        "select count(*) from intermediate.int_encounters__features "
        "where last_load_id = 100 and split = 'validation'"
    )
    found = platform.check("seed 0", "load")
    assert 0 < found["labelled_rows"] == validation < ROWS
    assert found["calibration_error"] is None  # too few of them
    # Of a load after its training, the champion knows no row but those of test are not touched.
    ((scorable,),) = platform.database.rows(
        "select count(*) from intermediate.int_encounters__features "
        "where last_load_id = 2 and split <> 'test' and exclusion_reason is null"
    )
    assert platform.check("shifted load", "load")["labelled_rows"] == scorable


def test_rerun_of_a_check_replaces_its_rows_and_no_other(platform: Platform) -> None:
    everything = "select * from monitoring.{} order by 1, 3, 2, 4, 5"
    tables = ("drift", "calibration", "drift_checks")

    def stored() -> list[list[tuple[object, ...]]]:
        return [platform.database.rows(everything.format(table)) for table in tables]

    before = stored()
    platform.database.rows("update monitoring.drift set psi = 9 where check_id = 'calibrated'")
    with closing(psycopg2.connect(platform.database.dsn)) as connection:
        with connection:
            drift.begin(connection.cursor(), platform.champion)
        with connection:
            again = check("calibrated", 50)
            drift.add(connection.cursor(), again, platform.champion, None)
    # A full refresh, by which earlier checks would be lost, is refused quietly.
    done = platform.dbt("run", "--full-refresh", "--select", "path:models/monitoring")
    assert done.returncode == 0, done.stdout
    for table, was, found in zip(tables, before, stored(), strict=True):
        assert found == was, table


def test_plain_build_leaves_monitoring_alone(platform: Platform) -> None:
    selected = platform.dbt("ls", "--output", "path").stdout.splitlines()
    assert len(selected) > 50
    assert not [path for path in selected if "models/monitoring" in path]


def test_every_column_of_monitoring_is_described(platform: Platform) -> None:
    manifest = json.loads((platform.dbt.target / "manifest.json").read_text())
    for schema, path in (("monitoring", "drift.sql"), ("intermediate", "int_drift__bins.sql")):
        assert any(
            node["schema"] == schema and node["path"].endswith(path)
            for node in manifest["nodes"].values()
        )
    described = {
        (node["schema"], node.get("identifier") or node["name"]): node["columns"]
        for node in (manifest["nodes"] | manifest["sources"]).values()
        if "models/monitoring" in node["original_file_path"] and node["resource_type"] != "test"
    }
    assert len(described) == 8
    for (schema, table), columns in described.items():
        there = platform.database.rows(
            "select column_name from information_schema.columns "
            "where table_schema = %s and table_name = %s",
            schema,
            table,
        )
        assert {name for (name,) in there} == set(columns), table
        assert all(column["description"] for column in columns.values()), table


def test_missing_features_are_one_clear_error(database: Database, platform: Platform) -> None:
    with pytest.raises(DriftError, match="run the DAG diabetes_data_processing"):
        drift.prepare(database.dsn, check("c", 0), platform.champion)


class TestOfARegisteredChampion:
    """From MLflow to the report, as the DAG's tasks do it."""

    pytestmark = WARNINGS

    def test_from_the_registry_to_the_report(self, registered: Registered, tmp_path: Path) -> None:
        database = registered.database
        assert fetch(registered.uri, "no-such-alias", tmp_path) is None
        champion = fetch(registered.uri, "champion", tmp_path)
        assert champion is not None
        assert (champion.version, champion.load_id) == (registered.champion, 1)
        known = check("end to end", 0)
        counts = drift.prepare(database.dsn, known, champion)
        assert counts["load"] > 10_000
        dbt = Dbt(database, tmp_path / "target")
        done = dbt("run", "--select", "path:models/monitoring")
        assert done.returncode == 0, done.stdout
        assert drift.drifted(database.dsn, known.check_id) == []
        ((rows, labelled, error),) = database.rows(
            "select rows, labelled_rows, calibration_error from monitoring.drift_checks "
            "where window_name = 'load' and check_id = %s",
            known.check_id,
        )
        assert rows == counts["load"]
        assert (
            labelled == database.rows("select count(*) from clean_data.diabetes_validation")[0][0]
        )
        assert 0 <= float(str(error)) < 0.1

        made = publish(database.dsn, registered.uri, known.check_id, 0.2)
        assert len(made) == 1  # nothing was predicted
        assert publish(database.dsn, registered.uri, known.check_id, 0.2) == made
        run = registered.client.get_run(made[0])
        assert run.data.tags["window"] == "load"
        assert run.data.tags["model_version"] == registered.champion
        assert run.data.metrics["rows"] == counts["load"]
        assert run.data.metrics["drifted_features"] == 0
        assert len([name for name in run.data.metrics if name.startswith("psi_")]) == 11
        assert run.info.status == "FINISHED"
        experiment = registered.client.get_experiment_by_name(EXPERIMENT)
        assert run.info.experiment_id == experiment.experiment_id
        page = registered.client.download_artifacts(made[0], PAGE, str(tmp_path))
        assert "age_midpoint" in Path(page).read_text(encoding="utf-8")
        with pytest.raises(DriftError, match="no check unheard of"):
            publish(database.dsn, registered.uri, "unheard of", 0.2)


def test_reference_is_what_training_made(platform: Platform) -> None:
    shares = platform.database.rows(
        "select feature, sum(share) from monitoring.reference where model_version = '1' group by 1"
    )
    assert len(shares) == len(platform.champion.scorer.feature_names) + 1
    assert all(float(str(share)) == pytest.approx(1) for _, share in shares)
    assert pd.Series([str(name) for name, _ in shares]).is_unique
