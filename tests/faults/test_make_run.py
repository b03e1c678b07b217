"""A user's day with `make run` in which things go wrong: interrupted, broken files, failing tests.

One platform serves the module; the tests run in the order of the file.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from services import processes
from settings import PROJECT_ROOT
from tests.local_platform import LocalPlatform

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def platform(reachable_tmp: Path) -> Iterator[LocalPlatform]:
    platform = LocalPlatform(reachable_tmp / "platform")
    yield platform
    platform.run("down")


def test_interrupt_while_starting_leaves_nothing_that_down_cannot_stop(
    platform: LocalPlatform,
) -> None:
    for seconds in (0.5, 3, 10):
        process = platform.command("run", source="synthetic:2000")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert platform.run("down")[0] == 0
        assert processes.find(platform.state) == []


def test_run_brings_synthetic_data_to_clean_data(platform: LocalPlatform) -> None:
    code, output = platform.run("run")
    assert code == 0, output
    assert "SYNTHETIC DATA" in output
    assert re.search(r"train +all +1,\d{3}", output)
    assert "dbt_docs_index.html" in output
    ((split_rows, raw_rows),) = platform.rows(
        """select (select count(*) from clean_data.diabetes_train)
            + (select count(*) from clean_data.diabetes_validation)
            + (select count(*) from clean_data.diabetes_test)
            + (select count(*) from clean_data.diabetes_excluded),
            (select count(*) from raw_data.diabetes)"""
    )
    assert split_rows == raw_rows == 2000
    ((source, synthetic, run_id),) = platform.rows(
        "select source, is_synthetic, run_id from raw_data.ingestion_log"
    )
    assert (source, synthetic) == ("synthetic:2000", True)
    assert str(run_id).startswith("manual__")
    assert list((platform.state / "work").iterdir()) == []
    # Three hundred validation rows make no champion, and that is said.
    assert re.search(r"search \[lightgbm\] +[\d.]+ s +ok", output)
    assert "diabetes_readmission has no champion: gates not passed" in output
    assert re.search(r"API +http\S+/docs \(waits for a champion\)", output)


def test_dbt_works_by_hand(platform: LocalPlatform, tmp_path: Path) -> None:
    before = platform.contents()
    for command in (["build"], ["test"], ["docs", "generate"], ["source", "freshness"]):
        subprocess.run(
            [
                "dbt",
                "--quiet",
                "--log-path",
                str(tmp_path),
                *command,
                "--target-path",
                str(tmp_path),
            ],
            cwd=PROJECT_ROOT / "dbt_diabetes",
            env=platform.environment(),
            check=True,
        )
    assert platform.contents() == before


def test_second_run_changes_nothing(platform: LocalPlatform) -> None:
    before = platform.contents()
    services = platform.services()
    assert len(services) >= 8
    code, output = platform.run("run")
    assert code == 0, output
    assert "0 new, 0 changed, 2,000 unchanged" in output
    assert platform.contents() == before
    assert re.search(r"prepare +[\d.]+ s +SKIPPED", output)
    assert platform.services() == services  # none was started again


def test_added_load_fills_the_last_batch_and_leaves_the_splits(platform: LocalPlatform) -> None:
    splits = "select encounter_id, split from intermediate.int_encounters__features"
    before = dict(platform.rows(splits))
    code, output = platform.run("run", source="synthetic:2500")
    assert code == 0, output
    assert "500 new, 0 changed, 2,000 unchanged" in output
    after = dict(platform.rows(splits))
    assert before.items() <= after.items()
    assert len(after) == 2500


def test_broken_file_fails_the_run_with_its_reason(platform: LocalPlatform, tmp_path: Path) -> None:
    before = platform.contents()
    broken = tmp_path / "broken.csv"
    broken.write_text("encounter_id,patient_nbr\n1,2\n")
    code, output = platform.run("run", source=str(broken))
    assert code == 1
    assert "ingest.validate failed" in output
    assert "wrong header" in output
    assert platform.contents() == before
    assert list((platform.state / "work").iterdir()) == []


def test_failing_dbt_test_publishes_nothing(platform: LocalPlatform) -> None:
    before = platform.contents()
    assets = platform.asset_events()
    platform.rows(
        """create temp table broken as select * from raw_data.diabetes limit 1;
        update broken set encounter_id = 9999999999, max_glu_serum = 'bogus';
        insert into raw_data.diabetes select * from broken"""
    )
    code, output = platform.run("run", source="synthetic:2500")
    assert code == 1, output
    assert re.search(r"transform\.\w+\.test +[\d.]+ s +FAILED", output)
    assert platform.contents() == before
    assert platform.asset_events() == assets
    platform.rows("delete from raw_data.diabetes where encounter_id = 9999999999")


def test_missing_source_is_one_clear_message(platform: LocalPlatform) -> None:
    code, output = platform.run("run", source="/no/such/file.zip")
    assert code == 1
    assert output.strip().splitlines()[-1].startswith("error: /no/such/file.zip: no such file")


def test_down_stops_everything_and_can_be_repeated(platform: LocalPlatform) -> None:
    url = platform.environment()["AIRFLOW__API__BASE_URL"]
    for _ in range(2):
        assert platform.run("down")[0] == 0
        assert processes.find(platform.state) == []
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)
