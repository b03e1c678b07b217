"""Drift on real SQL and a real PostgreSQL: what is flagged, and what is not.

On the real file where DIABETES_SOURCE names it, else on synthetic encounters.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psycopg2
import pytest
from psycopg2.extras import execute_values

from ingestion.contract import NOBODY
from ingestion.source import open_csv
from ingestion.synthetic import csv_blocks
from monitoring import drift
from monitoring.champion import fetch
from monitoring.drift import Champion, Check, DriftError, Found, Loads
from monitoring.report import EXPERIMENT, PAGE, publish
from serving.prediction_log import _TABLES as PREDICTION_LOG
from tests.conftest import SHARED_DATA
from tests.served import WARNINGS, Registered
from tests.warehouse import Database, Dbt, ingest, new_database
from training import data, features
from training.drift import reference as reference_of
from training.inference import FeatureQuery, sigmoid

SEEDS = 5
"""tests/faults/test_drift_seeds.py repeats the statistical tests with twenty."""
ROWS = 1_000
LOAD_ROWS = 1_300
"""Of which a thousand and more are scored: those of test are not."""

KEY = b"only for tests"
START = datetime(2025, 6, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
AGES = [f"[{start}-{start + 10})" for start in range(0, 100, 10)]
CONSEQUENCES = {"age_midpoint", "a1c_result", "a1c_measured", "a1c_level", "a1c_response"}
"""Features that the shift is made of."""


class Scorer:
    """Stands for a champion: dbt's features, and a logistic regression on its counts, fitted by
    Newton's method.
    """

    def __init__(self, definition: dict[str, Any], train: data.Encounters) -> None:
        self.definition = definition
        self._query = FeatureQuery(definition)
        self.feature_names = self._query.names
        self._used = [
            index for index, name in enumerate(self.feature_names) if name.startswith("num")
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

    def features(self, columns: Mapping[str, Sequence[Any]], count: int) -> list[tuple[Any, ...]]:
        return self._query.rows(columns, count)

    def matrix(self, rows: Sequence[tuple[Any, ...]]) -> Any:
        return np.array([[row[index] for index in self._used] for row in rows], float)

    def probabilities(self, matrix: Any) -> Any:
        return sigmoid(self._scaled(matrix) @ self._weights)


@dataclass
class Platform:
    """A database with data, features and a prediction log, and who is champion there.

    Attributes:
        database: all of it.
        dbt: on it.
        champion: which learnt from load 1.
        held_out: id and features of encounters of load 1 that are in validation.
        learnt: the same of encounters that the champion learnt from.
        seeds: how many loads come as they are, and how many are shifted.
    """

    database: Database
    dbt: Dbt
    champion: Champion
    held_out: list[tuple[int, list[Any]]]
    learnt: list[tuple[int, list[Any]]]
    seeds: int

    @property
    def unshifted(self) -> range:
        """Loads of encounters as they come; load 1 is what the champion learnt from."""
        return range(2, 2 + self.seeds)

    @property
    def shifted(self) -> range:
        """Loads of older patients with another A1C."""
        return range(self.unshifted.stop, self.unshifted.stop + self.seeds)

    @property
    def small(self) -> int:
        """The newest load: 200 encounters, and corrections of some that were there."""
        return self.shifted.stop

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
        names = (
            "rows, labelled_rows, calibration_error, drifted_features, enough_rows, loads_after, "
            "load_id, drift_limit"
        )
        ((*values,),) = self.database.rows(
            f"select {names} from monitoring.drift_checks where check_id = %s and window_name = %s",
            check_id,
            window,
        )
        return dict(zip(names.split(", "), values, strict=True))

    def count(self, where: str) -> int:
        """Published encounters of which something holds."""
        tables = " union all ".join(
            f"select encounter_id, first_load_id, '{split}' as split "
            f"from clean_data.diabetes_{split}"
            for split in ("train", "validation", "test")
        )
        ((number,),) = self.database.rows(f"select count(*) from ({tables}) as t where {where}")
        return int(str(number))


def place(platform: Platform, name: str) -> int:
    return platform.champion.scorer.feature_names.index(name)


@pytest.fixture(scope="module")
def platform(server_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Everything is put into place and checked once; the tests look at what was found."""
    with checked_platform(server_port, tmp_path_factory.mktemp("drift"), SEEDS) as made:
        yield made


@contextmanager
def checked_platform(server_port: int, folder: Path, seeds: int) -> Iterator[Platform]:
    """Loads, a champion, and a check of each load."""
    with new_database(server_port, f"drift_{os.getpid()}") as database:
        load_all(database, folder, seeds)
        dbt = Dbt(database, folder / "target")
        dbt.build("--exclude-resource-type", "test")
        made = made_platform(database, dbt, seeds)
        with closing(psycopg2.connect(database.dsn)) as connection:
            with connection:
                connection.cursor().execute(PREDICTION_LOG)
                drift.begin(connection.cursor(), made.champion)
            write_checks(connection, made)
        done = dbt("build", "--select", "path:models/monitoring")
        assert done.returncode == 0, done.stdout
        yield made


def encounters() -> list[list[str]]:
    """Header and rows of the real file, or of a synthetic one where it is not at hand."""
    named = os.environ.get("DIABETES_SOURCE", "")
    source = Path(named) if named and Path(named).is_file() else SHARED_DATA
    if source.is_file():
        with open_csv(source) as lines:
            text = lines.read()
    else:
        text = b"".join(csv_blocks(101_766, 130))
    return list(csv.reader(io.StringIO(text.decode())))


def load_all(database: Database, folder: Path, seeds: int) -> None:
    """What the champion learns from, then loads as they come, as many shifted, a small one."""
    header, *rows = encounters()
    random.Random(0).shuffle(rows)  # noqa: S311

    def load(made: list[list[str]]) -> None:
        file = folder / "load.csv"
        with file.open("w", newline="") as lines:
            csv.writer(lines).writerows([header, *made])
        ingest(database, file)

    small, rows = rows[:200], rows[200:]
    later = [rows[begin : begin + LOAD_ROWS] for begin in range(0, seeds * LOAD_ROWS, LOAD_ROWS)]
    first = rows[seeds * LOAD_ROWS :]
    for made in (first, *later):
        load(made)
    for begin in range(0, seeds * LOAD_ROWS, LOAD_ROWS):
        load(shifted(header, first[begin : begin + LOAD_ROWS]))
    place = header.index("readmitted")
    corrected = [[*row[:place], "<30", *row[place + 1 :]] for row in first[:500]]
    load(small + corrected)


def shifted(header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """Encounters that are there already, under new ids, of older patients with another A1C."""
    made = []
    for number, row in enumerate(rows):
        values = dict(zip(header, row, strict=True))
        values["encounter_id"] = str(int(values["encounter_id"]) + 10**9)
        values["age"] = AGES[min(AGES.index(values["age"]) + 2, 9)]
        values["A1Cresult"] = ">8" if number % 2 else values["A1Cresult"]
        made.append(list(values.values()))
    return made


def made_platform(database: Database, dbt: Dbt, seeds: int) -> Platform:
    """A champion that learnt from load 1, with the reference that training makes of it."""
    definition = features.read(database.dsn)
    listed = definition["features"]

    def of_load_1(split: str) -> data.Encounters:
        ids = database.rows(
            f"select encounter_id from clean_data.diabetes_{split} where first_load_id = 1"
        )
        rows = data.read(database.dsn, split, listed)
        keep = np.isin(rows.ids, [encounter for (encounter,) in ids])
        return data.Encounters(
            rows.features[keep], rows.target[keep], rows.readmitted[keep], rows.patients[keep],
            rows.ids[keep],
        )  # fmt: skip

    train, validation = of_load_1("train"), of_load_1("validation")
    scorer = Scorer(definition, train)
    scores = scorer.probabilities(scorer.matrix(list(validation.features.itertuples(index=False))))
    names = ", ".join(scorer.feature_names)

    def rows_of(split: str) -> list[tuple[int, list[Any]]]:
        found = database.rows(
            f"select encounter_id, {names} from clean_data.diabetes_{split} "
            "where first_load_id = 1 order by 1"
        )
        return [(int(str(row[0])), list(row[1:])) for row in found]

    return Platform(
        database,
        dbt,
        Champion("1", 1, reference_of(train.features, listed, scores), scorer),
        rows_of("validation"),
        rows_of("train"),
        seeds,
    )


def write_checks(connection: Any, platform: Platform) -> None:
    """A check of each load, and one for each thing that can go wrong."""
    cursor = connection.cursor()
    names = list(platform.champion.scorer.feature_names)
    same = platform.champion.scorer.definition["sha256"]
    with connection:
        for version, sha in (("1", same), ("0", same), ("of old", "other SQL")):
            cursor.execute(
                "insert into inference.models values (%s, %s, %s)", (version, sha, names)
            )

    def made(
        name: str,
        moment: datetime,
        rows: Sequence[list[Any]] = (),
        loads: Loads = Loads(None, None),  # noqa: B008
        asked: timedelta = timedelta(0),
        **options: Any,
    ) -> None:
        with connection:
            predict(cursor, platform, moment - asked, rows, **options)
            drift.add(cursor, check(name, moment), platform.champion, loads)

    held_out = [row for _, row in platform.held_out]
    for seed, load in enumerate(platform.unshifted):
        drawn = random.Random(seed).sample(held_out, ROWS)  # noqa: S311
        made(f"seed {seed}", START + seed * HOUR, drawn, Loads(load - 1, load))
    for seed, load in enumerate(platform.shifted):
        drawn = random.Random(seed).sample(held_out, ROWS)  # noqa: S311
        moment = START + 2 * DAY + seed * HOUR
        rows = [older(platform, row) for row in drawn]
        made(f"shifted {seed}", moment, rows, Loads(load - 1, load))
    made("small", START + 4 * DAY, loads=Loads(platform.small - 1, platform.small))
    sample = random.Random(99).sample(platform.held_out, 4 * ROWS)  # noqa: S311
    rows, ids = [row for _, row in sample], [encounter for encounter, _ in sample]
    special = {
        "new category": [
            changed(platform, row, payer_code="QQ" if number % 10 == 0 else None)
            for number, row in enumerate(rows[:ROWS])
        ],
        "missing": [
            changed(platform, row, medical_specialty="Unknown" if number % 2 else None)
            for number, row in enumerate(rows[:ROWS])
        ],
        "few": [older(platform, row) for row in rows[:200]],
    }
    for day, (name, written) in enumerate(special.items(), start=5):
        made(name, START + day * DAY, written)
    made("calibrated", START + 10 * DAY, rows, ids=ids)
    made("too sure", START + 20 * DAY, rows, ids=ids, moved=1.0)
    # Their outcomes were not known when they were asked, and the day's window does not hold them.
    made("arrived", START + 100 * DAY, rows, ids=ids, asked=40 * DAY)
    trained = platform.learnt[:ROWS]
    made(
        "learnt",
        START + 200 * DAY,
        [row for _, row in trained],
        ids=[encounter for encounter, _ in trained],
    )
    made("load test", START + 250 * DAY, rows[:ROWS], ids=[NOBODY] * ROWS)
    moment = START + 300 * DAY
    with connection:
        predict(cursor, platform, moment - HOUR, rows[:600], version="0")
        predict(cursor, platform, moment - HOUR, rows[:600], version="of old")
    made("swapped", moment, rows[:600])


def check(name: str, moment: datetime) -> Check:
    """A check that was due half an hour after a moment, of the hour before."""
    return Check(
        name, moment + HOUR / 2, hours=1 if name != "swapped" else 2, outcome_days=45, key=KEY
    )


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
    moment: datetime,
    rows: Sequence[list[Any]],
    *,
    ids: Sequence[int] | None = None,
    moved: float = 0.0,
    version: str = "1",
) -> None:
    """Write what the API would have, all at a moment; `moved` is added to the log odds."""
    if not rows:
        return
    scorer = platform.champion.scorer
    p = scorer.probabilities(scorer.matrix([tuple(row) for row in rows]))
    p = sigmoid(np.log(p / (1 - p)) + moved)
    execute_values(
        cursor,
        "insert into inference.predictions (prediction_id, predicted_at, model_version, role, "
        "source, encounter_hash, probability, features) values %s",
        [
            (
                str(uuid.uuid4()),
                moment + timedelta(milliseconds=number),
                version,
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
def test_unshifted_rows_are_not_flagged_whatever_the_seed(platform: Platform, window: str) -> None:
    checks = [platform.check(f"seed {seed}", window) for seed in range(platform.seeds)]
    assert all(each["rows"] >= ROWS and each["enough_rows"] for each in checks)
    assert [each["drifted_features"] for each in checks] == [0] * platform.seeds
    judged = platform.database.rows(
        "select max(psi), count(*) filter (where feature = '(score)' and psi is not null) "
        "from monitoring.drift where check_id like 'seed %%' and window_name = %s",
        window,
    )
    ((worst, scores),) = judged
    assert scores == platform.seeds
    # Not by a hair: the noise of features with 50 levels and more stays below half of the limit.
    assert 0 < float(str(worst)) < 0.1


@pytest.mark.parametrize(
    ("window", "features_of_it"), [("load", CONSEQUENCES), ("predictions", {"age_midpoint"})]
)
def test_shifted_rows_are_flagged_where_they_shifted_whatever_the_seed(
    platform: Platform, window: str, features_of_it: set[str]
) -> None:
    checks = [f"shifted {seed}" for seed in range(platform.seeds)]
    assert all(platform.check(name, window)["enough_rows"] for name in checks)
    assert [platform.flagged(name, window) for name in checks] == [features_of_it] * platform.seeds


def test_load_has_the_features_that_were_published(platform: Platform) -> None:
    """Though they are computed by the champion's own SQL from raw rows."""
    names = ", ".join(platform.champion.scorer.feature_names)
    expected = {
        str(encounter): row
        for split in ("train", "validation", "test")
        for encounter, *row in platform.database.rows(
            f"select encounter_id, {names} from clean_data.diabetes_{split} where first_load_id = 2"
        )
    }
    found = platform.database.rows(
        "select row_id, features from monitoring.window_rows "
        "where check_id = 'seed 0' and window_name = 'load'"
    )
    assert {row_id for row_id, _ in found} == expected.keys()
    for row_id, row in found:
        assert row == pytest.approx(expected[str(row_id)], abs=1e-9), row_id


def test_window_of_200_rows_is_never_flagged(platform: Platform) -> None:
    found = platform.check("few", "predictions")
    assert (found["rows"], found["enough_rows"], found["drifted_features"]) == (200, False, 0)
    assert {row["psi"] for row in platform.find("few", "predictions").values()} == {None}


def test_window_without_rows_is_told_of(platform: Platform) -> None:
    found = platform.check("small", "predictions")
    assert (found["rows"], found["enough_rows"], found["drifted_features"]) == (0, False, 0)
    assert {row["rows"] for row in platform.find("small", "predictions").values()} == {0}


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


def test_outcomes_that_arrive_later_find_their_prediction(platform: Platform) -> None:
    found = platform.check("arrived", "predictions")
    assert (found["rows"], found["labelled_rows"]) == (0, 4 * ROWS)
    assert found["calibration_error"] < 0.03


def test_predictions_for_what_the_champion_learnt_from_prove_nothing(platform: Platform) -> None:
    found = platform.check("learnt", "predictions")
    assert (found["rows"], found["labelled_rows"]) == (ROWS, 0)


def test_what_a_load_test_asked_is_left_out(platform: Platform) -> None:
    assert platform.check("load test", "predictions")["rows"] == 0


def test_load_is_held_against_outcomes_that_the_champion_did_not_learn_from(
    platform: Platform,
) -> None:
    # Of a load after its training, the champion knows no row, but those of test are not touched.
    found = platform.check("seed 0", "load")
    assert found["labelled_rows"] == platform.count("first_load_id = 2 and split <> 'test'")
    assert found["calibration_error"] < 0.05
    # Of what it learnt from, those of validation are left.
    with closing(psycopg2.connect(platform.database.dsn)) as connection:
        cursor = connection.cursor()
        drift.begin(cursor, platform.champion)
        counts = drift.add(cursor, check("c", START), platform.champion, Loads(0, 1))
        cursor.execute("select count(*) from monitoring.window_outcomes")
        assert cursor.fetchone() == (len(platform.held_out),)
        connection.rollback()
    assert counts["load"] == platform.count("first_load_id = 1")


def test_predictions_of_the_version_before_count_where_its_features_are_the_same(
    platform: Platform,
) -> None:
    found = platform.find("swapped", "predictions")
    assert {found[name]["rows"] for name in ("age_midpoint", "race")} == {1200}
    # Scores are of one version: six hundred are too few.
    assert (found["(score)"]["rows"], found["(score)"]["psi"]) == (600, None)


def test_corrections_are_no_sample_of_patients(platform: Platform) -> None:
    found = platform.check("small", "load")
    assert found["rows"] == platform.count(f"first_load_id = {platform.small}") <= 200


def test_small_loads_wait_for_one_another_and_none_is_passed_over(platform: Platform) -> None:
    with closing(psycopg2.connect(platform.database.dsn)) as connection:
        cursor = connection.cursor()
        judged = "select loads_after, load_id from monitoring.drift_checks where check_id = %s"
        cursor.execute(f"{judged} and window_name = 'load'", ("seed 3",))
        assert cursor.fetchone() == (platform.unshifted[2], platform.unshifted[3])
        # What came since the last load that was judged.
        assert drift.loads_of(cursor, "next", 1) == (platform.small - 1, platform.small)
        # What this check looked at, whatever came since.
        assert drift.loads_of(cursor, "seed 3", 1) == (platform.unshifted[2], platform.unshifted[3])
        cursor.execute(
            "update monitoring.drift_checks set enough_rows = true, loads_after = 7 "
            "where check_id = 'small' and window_name = 'load'"
        )
        # Nothing new: the same again.
        assert drift.loads_of(cursor, "next", 1) == (7, platform.small)
        cursor.execute("delete from monitoring.drift_checks")
        # What the champion did not learn from; the newest, where it learnt from all.
        assert drift.loads_of(cursor, "next", 1) == (1, platform.small)
        assert drift.loads_of(cursor, "next", platform.small) == (
            platform.small - 1,
            platform.small,
        )
        connection.rollback()


def test_rerun_of_a_check_replaces_its_rows_and_no_other(platform: Platform) -> None:
    everything = "select * from monitoring.{} where check_id <> 'arrived' order by 1, 3, 2, 4, 5"
    tables = ("drift", "calibration", "drift_checks")

    def stored() -> list[list[tuple[object, ...]]]:
        return [platform.database.rows(everything.format(table)) for table in tables]

    before = stored()
    platform.database.rows("update monitoring.drift set psi = 9 where check_id = 'calibrated'")
    with closing(psycopg2.connect(platform.database.dsn)) as connection:
        with connection:
            drift.begin(connection.cursor(), platform.champion)
        again = check("calibrated", START + 10 * DAY)
        none = replace(check("arrived", START + 100 * DAY), outcome_days=1)
        for repeated in (again, none):
            with connection:
                cursor = connection.cursor()
                drift.add(cursor, repeated, platform.champion, Loads(None, None))
    # A full refresh, by which earlier checks would be lost, is refused quietly.
    done = platform.dbt("run", "--full-refresh", "--select", "path:models/monitoring")
    assert done.returncode == 0, done.stdout
    for table, was, found in zip(tables, before, stored(), strict=True):
        assert found == was, table
    # Nothing takes the place of outcomes that were found before, and they are gone all the same.
    assert platform.check("arrived", "predictions")["labelled_rows"] == 0
    assert drift.version_of(platform.database.dsn, "arrived") == "1"
    assert drift.version_of(platform.database.dsn, "unheard of") is None


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
    assert len(described) == 9
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
        drift.prepare(database.dsn, check("c", START), platform.champion)


class TestOfARegisteredChampion:
    """From MLflow to the report, as the DAG's tasks do it."""

    pytestmark = WARNINGS

    def test_from_the_registry_to_the_report(
        self, registered: Registered, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        database = registered.database
        assert fetch(registered.uri, "no-such-alias", tmp_path) is None
        champion = fetch(registered.uri, "champion", tmp_path)
        assert champion is not None
        assert (champion.version, champion.load_id) == (registered.champion, 1)
        known = check("end to end", START)
        counts = drift.prepare(database.dsn, known, champion)
        assert counts["load"] > 10_000
        dbt = Dbt(database, tmp_path / "target")
        done = dbt("run", "--select", "path:models/monitoring")
        assert done.returncode == 0, done.stdout
        assert drift.found(database.dsn, known.check_id) == [
            Found("load", counts["load"], True, {}),
            Found("predictions", 0, False, {}),
        ]
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

        before = publish(database.dsn, registered.uri, known.check_id, 0.2)
        made = publish(database.dsn, registered.uri, known.check_id, 0.2)
        assert len(before) == len(made) == 1  # nothing was predicted
        assert registered.client.get_run(before[0]).info.lifecycle_stage == "deleted"
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
        with pytest.raises(DriftError, match="no check unheard of"):
            drift.found(database.dsn, "unheard of")
        # Of what it learnt from nothing is left: no drawing of a load beside itself.
        database.rows("update monitoring.windows set learnt_load_id = 0")
        assert publish(database.dsn, registered.uri, known.check_id, 0.2) == []
        assert "none is left" in caplog.text


def test_reference_is_what_training_made(platform: Platform) -> None:
    shares = platform.database.rows(
        "select feature, sum(share) from monitoring.reference where model_version = '1' group by 1"
    )
    assert len(shares) == len(platform.champion.scorer.feature_names) + 1
    assert all(float(str(share)) == pytest.approx(1) for _, share in shares)
    assert pd.Series([str(name) for name, _ in shares]).is_unique
