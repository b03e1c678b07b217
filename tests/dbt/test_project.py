"""The dbt project against a real PostgreSQL: what it builds, what it refuses, what it documents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warehouse import SPLITS, Database, Dbt, ingest_synthetic, new_database


@pytest.fixture
def dbt(database: Database, tmp_path: Path) -> Dbt:
    return Dbt(database, tmp_path / "target")


@pytest.fixture(scope="module")
def small(server_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dbt]:
    """Five hundred encounters, built."""
    folder = tmp_path_factory.mktemp("small")
    with new_database(server_port, f"small_{os.getpid()}") as database:
        ingest_synthetic(database, folder, 500)
        dbt = Dbt(database, folder / "target")
        dbt.build("--exclude-resource-type", "test")
        yield dbt


def test_everything_passes_on_synthetic_data(dbt: Dbt, tmp_path: Path) -> None:
    ingest_synthetic(dbt.database, tmp_path, 2_000)
    dbt.build()
    done = dbt("build")
    assert done.returncode == 0, done.stdout
    results = json.loads((dbt.target / "run_results.json").read_text())["results"]
    assert sum(one["unique_id"].startswith("unit_test.") for one in results) >= 20
    assert not [one for one in results if one["status"] in ("warn", "skipped")]
    ((placed, raw),) = dbt.database.rows(
        f"select {' + '.join(f'(select count(*) from clean_data.{name})' for name in SPLITS)},"
        " (select count(*) from raw_data.diabetes)"
    )
    assert placed == raw == 2_000


def test_every_column_is_described_and_no_test_name_is_too_long(small: Dbt) -> None:
    assert small("docs", "generate").returncode == 0
    manifest = json.loads((small.target / "manifest.json").read_text())
    catalog = json.loads((small.target / "catalog.json").read_text())
    described = manifest["nodes"] | manifest["sources"]
    missing = [
        f"{name}.{column}"
        for name, table in (catalog["nodes"] | catalog["sources"]).items()
        for column in table["columns"]
        if not described[name]["columns"].get(column, {}).get("description")
    ]
    assert missing == []
    assert len(catalog["nodes"]) >= 20
    unnamed = ("test", "operation")  # the hook that stores results is an operation
    assert all(
        node["description"] for node in described.values() if node["resource_type"] not in unnamed
    )
    # Cosmos makes XCom keys of the names, and Airflow keeps 512 characters of a key.
    assert max(len(name) for name in manifest["nodes"]) < 200


def test_added_load_changes_no_full_batch(dbt: Dbt, tmp_path: Path) -> None:
    batches = "select batch_id, rows, is_full, content_hash from clean_data.batch_info order by 1"
    ingest_synthetic(dbt.database, tmp_path, 2_000)
    dbt.build(batch_size=300)
    before = dbt.database.rows(batches)
    ingest_synthetic(dbt.database, tmp_path, 3_000)
    dbt.build(batch_size=300)
    after = dbt.database.rows(batches)
    full = [batch for batch in before if batch[2]]
    assert len(full) >= 3
    assert after[: len(full)] == full
    assert len(after) > len(before)
    # The batch that was open is filled up before a new one is begun.
    assert all(rows == 300 for _, rows, _, _ in after[:-1])


def test_statistics_stay_with_added_loads_and_move_with_a_full_refresh(
    dbt: Dbt, tmp_path: Path
) -> None:
    statistics = "select fitted_through_load_id, fitted_rows from intermediate.int_statistics"
    ingest_synthetic(dbt.database, tmp_path, 1_000)
    dbt.build()
    before = dbt.database.rows(statistics)
    ingest_synthetic(dbt.database, tmp_path, 2_000)
    dbt.build()
    assert dbt.database.rows(statistics) == before
    dbt.build("--full-refresh")
    ((load_id, rows),) = dbt.database.rows(statistics)
    assert load_id == 2
    assert rows == dbt.database.rows("select count(*) from clean_data.diabetes_train")[0][0]


def test_split_of_a_patient_never_moves(dbt: Dbt, tmp_path: Path) -> None:
    splits = "select distinct patient_nbr, split from intermediate.int_encounters__features"
    ingest_synthetic(dbt.database, tmp_path, 1_000)
    dbt.build()
    before = dbt.database.rows(splits)
    ingest_synthetic(dbt.database, tmp_path, 2_000)
    dbt.build("--full-refresh")
    after = dbt.database.rows(splits)
    assert set(before) <= set(after)
    assert len({patient for patient, _ in after}) == len(after)


@pytest.mark.parametrize(
    ("damage", "gate"),
    [
        ("update raw_data.diabetes set max_glu_serum = 'bogus'", "features_hold_only"),
        ("update raw_data.diabetes set age = '[200-300)'", "lookups_are_total"),
        ("update raw_data.diabetes set discharge_disposition_id = 99", "lookups_are_total"),
        ("update raw_data.diabetes set readmitted = 'PERHAPS'", "labels_follow_readmitted"),
        ("update raw_data.diabetes set a1cresult = null", "not_null"),
    ],
)
def test_broken_raw_row_fails_before_anything_is_published(
    small: Dbt, tmp_path: Path, damage: str, gate: str
) -> None:
    built = small.database
    with new_database(built.port, f"{built.name}_copy", built.name) as database:
        dbt = Dbt(database, tmp_path / "target")
        before = dbt.published()
        database.rows("alter table raw_data.diabetes alter column a1cresult drop not null")
        one = "select min(encounter_id) from raw_data.diabetes"
        database.rows(f"{damage} where encounter_id = ({one})")
        assert dbt("build", "--exclude-resource-type", "unit_test").returncode != 0
        assert any(name.startswith(gate) for name in dbt.broken_nodes()), dbt.broken_nodes()
        assert dbt.published() == before


def test_empty_database_is_one_clear_error(dbt: Dbt) -> None:
    done = dbt("build", "--exclude-resource-type", "unit_test")
    assert done.returncode != 0
    assert 'relation "raw_data.diabetes" does not exist' in done.stdout


def test_known_answers_on_the_real_file(real: Database) -> None:
    facts = """select count(*), count(distinct patient_nbr), sum({positive})
        from clean_data.{table}"""
    known = {
        "diabetes_train": (69_794, 49_175, 7_937),
        "diabetes_validation": (14_778, 10_439, 1_761),
        "diabetes_test": (14_771, 10_376, 1_616),
    }
    for table, answer in known.items():
        query = facts.format(table=table, positive="readmitted_within_30_days")
        assert real.rows(query) == [answer], table
    excluded = "select split, count(*) from clean_data.diabetes_excluded group by 1 order by 1"
    assert real.rows(excluded) == [("test", 361), ("train", 1_691), ("validation", 371)]
    batches = real.rows("select rows from clean_data.batch_info order by batch_id")
    assert batches == [(15_000,)] * 4 + [(9_794,)]
