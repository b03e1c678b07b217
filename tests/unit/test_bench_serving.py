"""The benchmark of the API: its parser, clients, figures and pages, without a service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.load import (
    Answer,
    Load,
    Parser,
    percentile,
    request,
)
from bench.report import Context
from bench.serving import (
    Line,
    Results,
    as_markdown,
    as_text,
    bodies,
    json_batch,
    number,
    read_csv_answer,
    write,
)

BODY = b'{"probability":0.1}'
WIRE = b"HTTP/1.1 200 OK\r\nServer: x\r\nCONTENT-LENGTH: %d\r\n\r\n%b" % (len(BODY), BODY)

MISSED = Line("start", "s", (9.0, 12.0, 11.0), at_most=10)
MET = Line("CSV", "encounters/s", (31_234.5,), at_least=20_000)
PLAIN = Line("p50", "ms", (1.234,))


@pytest.mark.parametrize("cut", range(1, len(WIRE)))
def test_a_response_is_put_together_wherever_it_is_cut(cut: int) -> None:
    parser = Parser()
    assert parser.feed(WIRE[:cut]) is None
    assert parser.feed(WIRE[cut:]) == Answer(200, BODY)
    assert parser.feed(WIRE) == Answer(200, BODY)


def test_a_response_byte_by_byte_and_one_without_body() -> None:
    parser = Parser()
    found = [parser.feed(WIRE[place : place + 1]) for place in range(len(WIRE))]
    assert found == [None] * (len(WIRE) - 1) + [Answer(200, BODY)]
    empty = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    assert parser.feed(empty) == Answer(503, b"")


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"SSH-2.0-x\r\nContent-Length: 3\r\n\r\nabc",
        WIRE + b"more",
    ],
)
def test_what_is_no_such_response_is_refused(wire: bytes) -> None:
    with pytest.raises(BenchError):
        Parser().feed(wire)


def test_a_request_says_how_long_it_is() -> None:
    assert request("/livez").startswith(b"GET /livez HTTP/1.1\r\n")
    assert b"Content-Length: 3\r\n\r\nabc" in request("/v1/predict", b"abc")


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0, 1, 50, 95, 99, 100)] == [1, 1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7
    assert percentile([1.0, 2.0], 50) == 1
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_load_of_failures_alone_has_no_rate() -> None:
    summary = Load([0.001, 0.002], 1).summary(2.0)
    assert summary["per_second"] == 1
    assert summary["p99"] == 2
    with pytest.raises(BenchError, match="7 failed"):
        Load([], 7).summary(1.0)


def test_the_answer_to_a_csv_has_one_outcome_a_row() -> None:
    header = "row,encounter_id,prediction_id,probability,percentile,alert,excluded,error\n"
    lines = ["1,7,id-1,0.1,50,false,,\n", "2,8,,,,,died,\n", '3,,,,,,,"age: ""x"", no"\n']
    answer = read_csv_answer((header + "".join(lines)).encode(), 3)
    assert (answer.ids, answer.excluded, answer.broken) == ({"id-1"}, 1, 1)
    for wrong, rows in (
        (lines, 4),
        ([lines[1], lines[0]], 2),
        (["1,7,id-1,0.1,50,false,died,\n"], 1),
        ([lines[0], lines[0].replace("1,7", "2,7", 1)], 2),
    ):
        with pytest.raises(BenchError):
            read_csv_answer((header + "".join(wrong)).encode(), rows)


def test_numbers_go_to_mlflow_as_doubles() -> None:
    ours, theirs = bodies([{"age": "[70-80)", "number_inpatient": 2, "diag_1": "250"}])
    assert json.loads(ours[0])["number_inpatient"] == 2
    assert b'"number_inpatient": 2.0' in theirs[0]
    assert json.loads(theirs[0])["params"] == {"top": 0}


def test_a_json_batch_is_the_beginning_of_the_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("encounter_id,race,time_in_hospital,diag_1,readmitted\n" + "1,?,3,250,NO\n" * 5)
    body, count = json_batch(file, 2)
    encounter = {"encounter_id": 1, "race": "?", "time_in_hospital": 3, "diag_1": "250"}
    assert json.loads(body) == {"encounters": [encounter] * 2}
    assert count == 2


def test_a_limit_is_held_against_the_median() -> None:
    assert (MISSED.value, MISSED.word, MISSED.limit) == (11, "MISSED", "<= 10")
    assert (MET.word, MET.limit, PLAIN.word, PLAIN.limit) == ("ok", ">= 20,000", "", "")
    assert Line("failures", "requests", (0.0,), at_most=0).word == "ok"
    assert Line("x", "x", (4.99,), at_least=5).word == "MISSED"
    assert [number(value) for value in (0.0, 1.234, 23.46, 101_766.4)] == [
        "0",
        "1.23",
        "23.5",
        "101,766",
    ]


def test_table_page_and_json_tell_a_missed_limit(tmp_path: Path) -> None:
    lines = as_text([MISSED, MET, PLAIN]).splitlines()
    assert lines[1].split() == ["start", "s", "11", "(9-12)", "<=", "10", "MISSED"]
    assert lines[2].endswith("ok")
    about = Context(
        date="2026-01-01 00:00 UTC",
        command="python -m bench.serving",
        commit="abc",
        cpu_model="a processor",
        cores=2,
        memory_gib=8.0,
        load_before=0.1,
        system="Linux 6",
        python="3.11.7",
        postgresql="18.1",
        data="the publisher's file",
        data_rows=101_766,
        data_bytes=19_159_383,
        data_sha256="0",
    )
    model = {"name": "m", "version": "3", "candidate": "catboost", "challenger": ""}
    results = Results(about, model, {"mlflow": "3.17.2"}, ["It was checked."], [MISSED, MET])
    page = as_markdown(results)
    assert "| start | 11 (9-12) s | <= 10 | **MISSED** |" in page
    assert "| CSV | 31,234 encounters/s | >= 20,000 | ok |" in page
    write(tmp_path / "new", results)
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [line["verdict"] for line in found["lines"]] == ["MISSED", "ok"]
    assert found["lines"][0]["median"] == 11
    assert (tmp_path / "new" / "results.md").read_text() == page
