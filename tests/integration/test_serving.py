"""The prediction API as a process of its own, on a real registry and a real PostgreSQL."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from ingestion.contract import HEADER
from services.mlflow_server import client_environment
from serving.records import ACCEPTED
from settings import PROJECT_ROOT
from tests.served import WARNINGS, Api, Registered, as_json, running_api, synthetic, wait_until
from training.inference import Scorer

pytestmark = WARNINGS

ENCOUNTER = {"age": "[70-80)", "number_inpatient": 2, "time_in_hospital": 5}
CSV = {"content-type": "text/csv"}
DIED, HOSPICE, HOME = 11, 13, 1
DISPOSITION = HEADER.index("discharge_disposition_id")


@pytest.fixture(scope="module")
def shadowed(registered: Registered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API that lets the other version score the same, unseen."""
    client = registered.client
    client.set_registered_model_alias("diabetes_readmission", "challenger", registered.other)
    state = tmp_path_factory.mktemp("shadowed")
    with running_api(state, registered, DIABETES_API_SHADOW="true") as running:
        wait_until(lambda: running.get("/v1/model").json()["shadow_version"])
        yield running
    client.delete_registered_model_alias("diabetes_readmission", "challenger")


def as_csv(rows: list[list[str]], header: tuple[str, ...] = HEADER) -> bytes:
    return "\r\n".join([",".join(header), *map(",".join, rows), ""]).encode()


def upload(api: Api, body: bytes) -> list[dict[str, str]]:
    answer = api.post("/v1/predict/batch", data=body, headers=CSV)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/csv")
    return list(csv.DictReader(io.StringIO(answer.text)))


def logged(api: Api, registered: Registered, where: str, *arguments: Any) -> list[Any]:
    """What the log holds once the spool is empty."""
    wait_until(lambda: spool_is_empty(api))
    query = "select prediction_id::text, model_version, role, source, encounter_hash, "
    query += "patient_hash, probability, features from inference.predictions where "
    return registered.database.rows(query + where + " order by prediction_id", *arguments)


def spool_is_empty(api: Api) -> bool:
    return not [*(api.state / "serving" / "spool").glob("*-*")]


def by_ids(api: Api, registered: Registered, ids: list[str]) -> list[Any]:
    return logged(api, registered, "prediction_id = any(%s::uuid[])", ids)


def challenged(api: Api, registered: Registered, patient: int) -> list[Any]:
    return logged(api, registered, "patient_hash = %s and role = 'challenger'", hashed(patient))


def hashed(identifier: object) -> str:
    return blake2b(str(identifier).encode(), key=b"only for tests", digest_size=16).hexdigest()


def model_folder(api: Api, version: str) -> Path:
    return api.state / "serving" / "models" / version / "readmission"


def test_single_batch_and_csv_give_the_same_risk(api: Api) -> None:
    rows = [row for row in synthetic(40) if row[DISPOSITION] == str(HOME)][:12]
    encounters = [as_json(row) for row in rows]
    single = [api.post("/v1/predict", json=each).json() for each in encounters]
    batch = api.post("/v1/predict/batch", json={"encounters": encounters}).json()
    lines = upload(api, as_csv(rows))
    assert len({answer["probability"] for answer in single}) > 6
    for alone, together, line in zip(single, batch["predictions"], lines, strict=True):
        for name in ("probability", "percentile", "alert", "threshold", "model_version"):
            assert together[name] == alone[name]
        assert float(line["probability"]) == pytest.approx(alone["probability"], abs=5e-7)
        assert line["alert"] == str(alone["alert"]).lower()
    identities = [answer["prediction_id"] for answer in [*single, *batch["predictions"], *lines]]
    assert len(set(identities)) == 36


def test_the_model_of_the_folder_says_the_same(api: Api, registered: Registered) -> None:
    scorer = Scorer(model_folder(api, registered.champion))
    rows = [row for row in synthetic(60, seed=8) if row[DISPOSITION] == str(HOME)]
    encounters = [{k: v for k, v in as_json(row).items() if "_nbr" not in k} for row in rows]
    answers = api.post("/v1/predict/batch", json={"encounters": encounters}).json()
    columns = {name: [each.get(name) for each in encounters] for name in ACCEPTED}
    features = scorer.features({n: v for n, v in columns.items() if "_nbr" not in n}, len(rows))
    expected = scorer.probabilities(scorer.matrix(features)).tolist()
    got = [answer["probability"] for answer in answers["predictions"]]
    assert got == pytest.approx(expected, abs=1e-12)
    alerts = [answer["alert"] for answer in answers["predictions"]]
    assert alerts == [p >= scorer.threshold(0.2) for p in expected]
    assert answers["model_version"] == registered.champion


def test_what_is_left_out_is_what_is_sent_as_missing(api: Api) -> None:
    nothing = dict.fromkeys(ACCEPTED)
    marks = dict.fromkeys(ACCEPTED, "?")
    for name, field in ACCEPTED.items():
        if field.kind == "category" and "?" not in field.values:
            assert api.post("/v1/predict", json={name: "?"}).status_code == 200
    risks = [
        api.post("/v1/predict", json=sent).json()["probability"] for sent in ({}, nothing, marks)
    ]
    assert risks[0] == risks[1] == risks[2]
    assert risks[0] != api.post("/v1/predict", json=ENCOUNTER).json()["probability"]


def test_who_died_or_went_to_a_hospice_gets_no_probability_and_is_not_logged(
    api: Api, registered: Registered
) -> None:
    went = [DIED, HOME, HOSPICE]
    ids = [9_400_000_001 + place for place in range(3)]
    encounters = [
        {**ENCOUNTER, "encounter_id": number, "discharge_disposition_id": code}
        for number, code in zip(ids, went, strict=True)
    ]
    single = [api.post("/v1/predict", json=each).json() for each in encounters]
    batch = api.post("/v1/predict/batch", json={"encounters": encounters}).json()["predictions"]
    header = ("encounter_id", "discharge_disposition_id")
    rows = [[str(number), str(code)] for number, code in zip(ids, went, strict=True)]
    lines = upload(api, as_csv(rows, header))
    for answers in (single, batch):
        assert [each["probability"] is None for each in answers] == [True, False, True]
        assert [each["alert"] is None for each in answers] == [True, False, True]
        assert [each["percentile"] is None for each in answers] == [True, False, True]
        assert answers[0]["excluded"]
        assert answers[1]["excluded"] is None
        assert answers[2]["excluded"] != answers[0]["excluded"]
    for line, answer in zip(lines, single, strict=True):
        assert line["excluded"] == (answer["excluded"] or "")
        assert bool(line["probability"]) == bool(line["prediction_id"]) == (not line["excluded"])
    explained = api.post("/v1/explain", json=encounters[0]).json()
    assert (explained["probability"], explained["reasons"]) == (None, [])
    hashes = [hashed(number) for number in ids]
    found = logged(api, registered, "encounter_hash = any(%s)", hashes)
    assert {row[4] for row in found} == {hashes[1]}
    assert sorted(row[3] for row in found) == ["batch", "csv", "single"]


@pytest.mark.parametrize("language", ["en", "es"])
def test_reasons_add_up_to_the_risk(api: Api, language: str) -> None:
    for encounter in (ENCOUNTER, {}, as_json(synthetic(1)[0])):
        answer = api.post(f"/v1/explain?top=5&language={language}", json=encounter).json()
        shares = [reason["contribution"] for reason in answer["reasons"]]
        total = log_odds(answer["baseline"]) + sum(shares) + answer["others"]
        assert total == pytest.approx(log_odds(answer["probability"]), abs=1e-6)
        assert len(shares) == 5
        assert [abs(share) for share in shares] == sorted(map(abs, shares), reverse=True)
        for reason in answer["reasons"]:
            assert reason["odds_ratio"] == pytest.approx(math.exp(reason["contribution"]))
            assert (reason["effect"] == "raises") == (reason["contribution"] > 0)
            assert reason["label"] in reason["text"]
            assert reason["value"] in reason["text"]
    whole = api.post("/v1/explain?top=64", json=ENCOUNTER).json()
    assert whole["others"] == pytest.approx(0, abs=1e-9)
    said = {"en": "the risk", "es": "el riesgo"}[language]
    assert said in answer["reasons"][0]["text"]


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_predict_sh_shows_the_risk_with_its_reasons(api: Api) -> None:
    done = subprocess.run(
        [PROJECT_ROOT / "scripts" / "predict.sh"],
        env={**os.environ, "DIABETES_API_URL": api.url},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert 0 < answer["probability"] < 1
    assert len(answer["reasons"]) == 5


def test_alerts_are_those_of_the_rate_that_was_asked_for(api: Api) -> None:
    known = api.get("/v1/model").json()["thresholds"]
    assert set(known) == {"0.1", "0.2"}
    rows = synthetic(300, seed=9)
    alerts = {}
    for rate in known:
        answers = api.post(
            f"/v1/predict/batch?alert_rate={rate}",
            json={"encounters": [as_json(row) for row in rows]},
        ).json()["predictions"]
        assert {answer["threshold"] for answer in answers} == {known[rate]}
        alerts[rate] = sum(bool(answer["alert"]) for answer in answers)
    assert 0 < alerts["0.1"] < alerts["0.2"]


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/explain", "/v1/predict/batch"])
@pytest.mark.parametrize("rate", ["0.15", "0", "1", "-0.2", "nan", "inf", "often"])
def test_a_rate_without_a_threshold_is_refused(api: Api, path: str, rate: str) -> None:
    body = {"encounters": [ENCOUNTER]} if path.endswith("batch") else ENCOUNTER
    answer = api.post(f"{path}?alert_rate={rate}", json=body)
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["field"].endswith("alert_rate")
    if rate == "0.15":
        assert "known are 0.1, 0.2" in answer.json()["detail"]


def test_a_large_csv_is_answered_in_order_and_logged_once(api: Api, registered: Registered) -> None:
    count = 20_000
    rows = synthetic(count, seed=10)
    broken = {0, 7, 1999, 2000, 11_111, count - 1}
    for place in broken:
        rows[place][HEADER.index("age")] = "[70-80"
    before = api.metric('prediction_rows_total{result="scored",source="csv"}')
    spooled = api.metric("prediction_log_spooled_rows_total")
    begin = datetime.now(UTC)
    lines = upload(api, as_csv(rows))
    assert [line["row"] for line in lines] == [str(row + 1) for row in range(count)]
    assert {place for place, line in enumerate(lines) if line["error"]} == broken
    assert "age: expected one of" in lines[0]["error"]
    for place, (row, line) in enumerate(zip(rows, lines, strict=True)):
        assert line["encounter_id"] == ("" if place in broken else row[0])
    excluded = [line for line in lines if line["excluded"]]
    assert excluded
    scored = [line for line in lines if line["prediction_id"]]
    assert len(scored) + len(excluded) + len(broken) == count
    after = api.metric('prediction_rows_total{result="scored",source="csv"}')
    assert after - before == len(scored)
    assert api.metric("prediction_log_spooled_rows_total") - spooled == len(scored)

    found = by_ids(api, registered, [line["prediction_id"] for line in scored])
    assert len(found) == len(scored)
    assert {(row[1], row[2], row[3]) for row in found} == {(registered.champion, "champion", "csv")}
    answered = {line["prediction_id"]: line for line in scored}
    for row in found:
        line = answered.pop(row[0])
        assert row[4] == hashed(line["encounter_id"])
        assert row[6] == pytest.approx(float(line["probability"]), abs=5e-7)
    # Nothing else of this upload was logged either.
    since = logged(api, registered, "source = 'csv' and predicted_at >= %s", begin)
    assert {row[0] for row in since} == {line["prediction_id"] for line in scored}


def test_the_log_knows_features_by_name(api: Api, registered: Registered) -> None:
    answer = api.post("/v1/predict", json=ENCOUNTER).json()
    by_ids(api, registered, [answer["prediction_id"]])
    found = registered.database.rows(
        "select feature, value from inference.prediction_features where prediction_id = %s",
        answer["prediction_id"],
    )
    features = {str(row[0]): row[1] for row in found}
    assert features["number_inpatient"] == "2"
    assert features["time_in_hospital"] == "5"
    scorer = Scorer(model_folder(api, registered.champion))
    assert list(features) == list(scorer.feature_names)


@pytest.mark.parametrize("rows", [3, 30_000])
def test_a_broken_header_is_one_clear_message(api: Api, rows: int) -> None:
    body = b"age,nmber_inpatient\n" + b"[70-80),2\n" * rows
    body += b" " * (0 if rows < 10 else 5_000_000)
    answer = api.post("/v1/predict/batch", data=body, headers=CSV)
    assert answer.status_code == 422
    assert "did you mean number_inpatient?" in answer.json()["detail"]
    assert [error["field"] for error in answer.json()["errors"]] == ["'nmber_inpatient'"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 422, "line 1 has to be a header"),
        (b"\r\n", 422, "line 1 has to be a header"),
        (b"age\r\n", 422, "has a header but no rows"),
        (b"age", 422, "has a header but no rows"),
        (b"age,age\n1,2\n", 422, "named twice"),
        (b"age\r1\r2\r", 422, "line 1"),
        (b"\xff\xfe\x00a\n", 422, "not UTF-8"),
        (b"PK" + bytes(100_000), 400, "does not end"),
        (b"age\n" + b"7" * 900_000, 400, "a line of more than 64 KiB"),
    ],
)
def test_what_is_no_csv_of_ours_is_refused(api: Api, body: bytes, status: int, said: str) -> None:
    answer = api.post("/v1/predict/batch", data=body, headers=CSV)
    assert (answer.status_code, answer.headers["content-type"]) == (
        status,
        "application/problem+json",
    )
    assert said in answer.json()["detail"]


def test_every_line_of_a_csv_gets_one_line(api: Api) -> None:
    body = b"\xef\xbb\xbfage,num_medications\n" + b"\n".join(
        [b"[70-80),3", b"", b'"[70-80)","4"', b"x,y", b"[70-80)", b'"', b"\xff,1", b",", b"?,7"]
    )
    lines = upload(api, body)
    assert [line["row"] for line in lines] == [str(row) for row in range(1, 10)]
    ok = [place for place, line in enumerate(lines) if not line["error"]]
    assert ok == [0, 2, 7, 8]
    assert all(lines[place]["probability"] for place in ok)
    assert lines[3]["error"].count("expected") == 2


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "", "multipart/form-data"])
def test_other_kinds_of_content_are_refused(api: Api, kind: str) -> None:
    answer = api.post("/v1/predict/batch", data=b"age\n?\n", headers={"content-type": kind})
    assert answer.status_code == 415
    assert "text/csv" in answer.json()["detail"]


def test_a_csv_may_name_its_charset(api: Api) -> None:
    answer = api.post(
        "/v1/predict/batch", data=b"age\n?\n", headers={"content-type": "Text/CSV; charset=utf-8"}
    )
    assert answer.status_code == 200


def test_ten_thousand_json_encounters_are_the_bound(api: Api) -> None:
    most = api.post("/v1/predict/batch", json={"encounters": [{}] * 10_000})
    assert most.status_code == 200
    assert len(most.json()["predictions"]) == 10_000
    wrong: list[list[dict[str, Any]]] = [[], [{}] * 10_001]
    for encounters in wrong:
        answer = api.post("/v1/predict/batch", json={"encounters": encounters})
        assert answer.status_code == 422
        assert "encounters" in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"null", b"\xff", b'{"a":' * 5000])
@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch"])
def test_what_is_no_json_is_refused(api: Api, path: str, body: bytes) -> None:
    answer = api.post(path, data=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"]


def test_names_that_no_text_can_hold_are_refused(api: Api) -> None:
    for body in (b'{"\\ud800": 1}', b'{"age": "\\ud800"}', b'{"encounters": [{"\\ud800": 1}]}'):
        path = "/v1/predict/batch" if b"encounters" in body else "/v1/predict"
        answer = api.post(path, data=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


def test_a_thousand_unknown_fields_do_not_hold_up_others(api: Api) -> None:
    names = {f"number_inpatien{place}": 1 for place in range(2_000)}
    header = ",".join(f"time_in_hospita{place}" for place in range(3_000)).encode()
    asked: list[dict[str, Any]] = [
        {"json": names},
        {"data": header + b"\n", "headers": CSV},
        {"json": {"encounters": [names] * 30}},
    ]
    for arguments in asked:
        path = "/v1/predict" if arguments.get("json") is names else "/v1/predict/batch"
        begin = time.monotonic()
        answer = api.post(path, **arguments)
        assert answer.status_code == 422
        # Not minutes, in which nobody else would be answered.
        assert time.monotonic() - begin < 5
        assert len(answer.content) < 50_000
        assert "more)" in answer.json()["detail"]


def test_broken_encounters_are_named_and_nothing_of_the_batch_is_scored(
    api: Api, registered: Registered
) -> None:
    encounters: list[dict[str, Any]] = [{"encounter_id": 9_400_001_000}, {"age": 71, "oops": 1}]
    answer = api.post("/v1/predict/batch", json={"encounters": encounters})
    assert answer.status_code == 422
    found = {error["field"] for error in answer.json()["errors"]}
    assert found == {"encounters[1].age", "encounters[1].oops"}
    assert logged(api, registered, "encounter_hash = %s", hashed(9_400_001_000)) == []


def test_identifiers_are_only_in_the_database_and_only_as_keyed_hashes(
    api: Api, registered: Registered
) -> None:
    encounter, patient, wrong = 987_650_012_345, 987_650_067_890, 987_650_099_999
    body = {**ENCOUNTER, "encounter_id": encounter, "patient_nbr": patient}
    single = api.post("/v1/predict", json=body).json()
    api.post("/v1/explain", json=body)
    api.post("/v1/predict/batch", json={"encounters": [body]})
    upload(api, f"encounter_id,patient_nbr\n{encounter},{patient}\n{wrong}x,1\n".encode())
    api.post("/v1/predict", json={**body, "age": wrong})
    api.post("/v1/predict", json={"patient_nbr": f"{wrong}"})
    api.get(f"/v1/{wrong}")
    (row,) = by_ids(api, registered, [single["prediction_id"]])
    assert row[4:6] == (hashed(encounter), hashed(patient))
    assert len(logged(api, registered, "patient_hash = %s", hashed(patient))) == 4
    assert hashed(encounter) != blake2b(str(encounter).encode(), digest_size=16).hexdigest()
    with closing(psycopg2.connect(registered.database.dsn)) as connection:
        copied = io.StringIO()
        connection.cursor().copy_expert("copy inference.predictions to stdout", copied)
    for text in (api.log.read_text(), api.get("/metrics").text, copied.getvalue()):
        for secret in (encounter, patient, wrong):
            assert str(secret) not in text
    assert hashed(encounter) in copied.getvalue()


def test_only_who_has_a_key_is_answered(registered: Registered, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serving", "key", "ward 3"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    key, entry = made.splitlines()[0].split()[1], made.splitlines()[1].split(maxsplit=1)[1]
    assert entry == f"ward 3:{sha256(key.encode()).hexdigest()}"
    hashes = f"other:{sha256(b'another').hexdigest()}, {entry}"
    with running_api(tmp_path, registered, DIABETES_API_KEY_HASHES=hashes) as api:
        for headers in ({}, {"X-API-Key": "wrong"}, {"X-API-Key": entry.rpartition(":")[2]}):
            answer = api.post("/v1/predict", json=ENCOUNTER, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "ApiKey"
            assert api.get("/v1/model", headers=headers).status_code == 401
        for right in (key, "another"):
            headers = {"X-API-Key": right}
            assert api.post("/v1/predict", json=ENCOUNTER, headers=headers).status_code == 200
        assert api.get("/livez").status_code == api.get("/metrics").status_code == 200
        assert api.get("/openapi.json").json()["security"] == [{"key": []}]
        assert key not in api.log.read_text()


def test_ready_names_the_champion_and_ends_cleanly(registered: Registered, tmp_path: Path) -> None:
    with running_api(tmp_path, registered, empty_cache=True) as api:
        assert api.get("/readyz").json() == {"status": "ok", "model_version": registered.champion}
        assert api.stop() == 0


def test_not_ready_says_why(registered: Registered, tmp_path: Path) -> None:
    alias = {"DIABETES_API_ALIAS": "nobody"}
    with running_api(tmp_path, registered, wait=False, **alias) as api:
        wait_until(lambda: "has the alias nobody" in api.readiness())
        assert api.get("/livez").status_code == 200
        lines = api.get("/metrics").text.splitlines()
        # Rules see the first case of each, too.
        for result in ("swapped", "refused", "failed"):
            assert f'model_loads_total{{alias="nobody",result="{result}"}} 0.0' in lines
        found = {line for line in lines if line.startswith('http_requests_total{method="POST"')}
        document = api.get("/openapi.json").json()
        routes = [path for path, methods in document["paths"].items() if "post" in methods]
        assert found == {
            f'http_requests_total{{method="POST",route="{route}",status="{status}"}} 0.0'
            for route in routes
            for status in (200, 500, 503)
        }
        answer = api.post("/v1/predict", json=ENCOUNTER)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_second_service_on_the_same_state_ends_with_one_message(
    api: Api, registered: Registered
) -> None:
    environment = {
        **os.environ,
        **client_environment(registered.uri),
        **registered.database.environment,
        "DIABETES_STATE_DIR": str(api.state),
        "DIABETES_API_PORT": "0",
        "DIABETES_PREDICTION_LOG_KEY": "only for tests",
    }
    done = subprocess.run(
        [sys.executable, "-m", "serving"],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: another prediction API uses")
    assert api.get("/readyz").ok


def test_a_key_hash_that_is_none_ends_the_service(registered: Registered, tmp_path: Path) -> None:
    with running_api(tmp_path, registered, wait=False, DIABETES_API_KEY_HASHES="plain") as api:
        assert api.process.wait(30) == 1
        assert "DIABETES_API_KEY_HASHES: expected name:sha256" in api.log.read_text()


def test_what_the_model_is_and_what_can_be_sent(api: Api, registered: Registered) -> None:
    about = api.get("/v1/model").json()
    assert (about["version"], about["alias"], about["source"]) == (
        registered.champion,
        "champion",
        "registry",
    )
    assert about["is_synthetic"] is True
    stored = json.loads((model_folder(api, about["version"]) / "features.json").read_text())
    assert about["feature_sha256"] == stored["sha256"]
    assert api.get("/v1/model/evaluation").json()["run_id"] == about["run_id"]
    card = api.get("/v1/model/card")
    assert card.headers["content-type"].startswith("text/html")
    assert "script" not in card.headers["content-security-policy"]

    found = api.get("/v1/fields").json()
    fields = {field["name"]: field for field in found["fields"]}
    assert list(fields) == list(ACCEPTED)
    codes = {v["value"]: v["label"] for v in fields["discharge_disposition_id"]["values"]}
    assert codes[DIED] == "Expired"
    assert (fields["time_in_hospital"]["low"], fields["time_in_hospital"]["high"]) == (1, 14)
    for example in found["examples"]:
        assert api.post("/v1/predict", json=example).status_code == 200


def test_both_versions_are_logged_and_only_the_champion_answers(
    shadowed: Api, registered: Registered
) -> None:
    champion, challenger = registered.champion, registered.other
    patient = 9_400_002_000
    body = {**ENCOUNTER, "encounter_id": 9_400_002_001, "patient_nbr": patient}
    plain = shadowed.post("/v1/predict", json=ENCOUNTER).json()["probability"]
    scorer = Scorer(model_folder(shadowed, challenger))
    columns = {name: [value] for name, value in ENCOUNTER.items()}
    expected = scorer.probabilities(scorer.matrix(scorer.features(columns, 1)))[0]
    assert expected != plain

    single = shadowed.post("/v1/predict", json=body).json()
    batch = shadowed.post("/v1/predict/batch", json={"encounters": [body]}).json()["predictions"][0]
    header = tuple(body)
    (line,) = upload(shadowed, as_csv([[str(value) for value in body.values()]], header))
    wait_until(lambda: len(challenged(shadowed, registered, patient)) == 3)
    assert single["model_version"] == batch["model_version"] == champion
    assert single["probability"] == batch["probability"] == plain
    answered = [single["prediction_id"], batch["prediction_id"], line["prediction_id"]]
    found = logged(shadowed, registered, "patient_hash = %s", hashed(patient))
    assert len(found) == 6
    for row in found:
        assert (row[1], row[2]) == (
            (champion, "champion") if row[0] in answered else (challenger, "challenger")
        )
        assert row[6] == pytest.approx(plain if row[0] in answered else expected, abs=1e-9)
    sources = sorted((row[2], row[3]) for row in found)
    assert sources == [
        (role, source)
        for role in ("challenger", "champion")
        for source in ("batch", "csv", "single")
    ]
    names = registered.database.rows("select model_version from inference.models")
    assert {(champion,), (challenger,)} <= set(names)
    spooled = shadowed.metric("prediction_log_spooled_rows_total")
    assert spooled >= 6
    wait_until(lambda: shadowed.metric("prediction_log_rows_total") == spooled)


def test_what_waits_in_the_shadow_is_scored_before_the_service_ends(
    registered: Registered, tmp_path: Path
) -> None:
    client = registered.client
    client.set_registered_model_alias("diabetes_readmission", "challenger", registered.other)
    with running_api(tmp_path, registered, DIABETES_API_SHADOW="true") as api:
        wait_until(lambda: api.get("/v1/model").json()["shadow_version"])
        patient = 9_400_003_000
        for _ in range(20):
            assert api.post("/v1/predict", json={"patient_nbr": patient}).status_code == 200
        assert api.stop() == 0
        found = challenged(api, registered, patient)
    assert len(found) == 20


def test_nothing_is_logged_where_the_log_is_off(registered: Registered, tmp_path: Path) -> None:
    with running_api(tmp_path, registered, DIABETES_PREDICTION_LOG="false") as api:
        answer = api.post("/v1/predict", json=ENCOUNTER).json()
        (line,) = upload(api, b"age\n?\n")
        assert api.stop() == 0
        assert answer["probability"]
        assert line["probability"]
        assert not (tmp_path / "serving" / "spool").exists()


def test_another_registrys_version_in_the_cache_is_fetched_anew(
    registered: Registered, tmp_path: Path
) -> None:
    with running_api(tmp_path, registered) as api:
        folder = tmp_path / "serving" / "models" / registered.champion
        about = json.loads((folder / "version.json").read_text())
        assert api.stop() == 0
    (folder / "version.json").write_text(json.dumps(about | {"run_id": "0" * 32}))
    with running_api(tmp_path, registered) as api:
        assert api.get("/v1/model").json()["run_id"] == about["run_id"]
        assert "is another registry's" in api.log.read_text()
