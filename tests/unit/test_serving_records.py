"""What callers may send: JSON and CSV by the same contract, and what they hear of a fault."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from ingestion.contract import FIELDS, HEADER, Field
from serving import records
from serving.records import ACCEPTED, CsvReader, Header, RecordsError, read_batch
from tests.served import as_json, synthetic

ONE: TypeAdapter[Any] = TypeAdapter(records.Encounter)
SCHEMA = ONE.json_schema()
PUBLISHED = Draft202012Validator(SCHEMA)
KINDS = ("id", "count", "code", "category", "icd9")


def by_kind(kind: str) -> Field:
    """One field of a kind."""
    return next(field for field in ACCEPTED.values() if field.kind == kind)


def accepts(name: str, value: Any) -> bool:
    """What pydantic and the published schema say of a value; they have to agree."""
    try:
        ONE.validate_json(json.dumps({name: value}))
    except ValidationError:
        found = False
    else:
        found = True
    published = PUBLISHED.is_valid({name: value})
    assert published == found, f"{name}: {value!r} is {found}, by the schema {published}"
    return found


def test_every_field_but_the_outcome_can_be_sent() -> None:
    assert set(ACCEPTED) == set(HEADER) - {"readmitted"}
    assert set(SCHEMA["properties"]) == set(ACCEPTED)
    assert {field.kind for field in ACCEPTED.values()} == set(KINDS)
    for name in ACCEPTED:
        assert accepts(name, None)
        assert accepts(name, "?")
    assert ONE.validate_json("{}") == {}


@pytest.mark.parametrize("field", FIELDS[:-1], ids=lambda field: field.name)
def test_every_value_of_a_vocabulary_is_accepted_and_no_other(field: Field) -> None:
    for value in field.values:
        if value != "?":
            assert accepts(field.name, int(value) if field.kind == "code" else value)
    wrongs: list[Any] = [[], {}, True, "", " ", "no such", -1, 2.5, 1e300]
    for wrong in wrongs:
        assert not accepts(field.name, wrong), wrong


def test_integers_have_bounds() -> None:
    for field in ACCEPTED.values():
        if field.kind in ("id", "count"):
            low, high = (1, 10**18 - 1) if field.kind == "id" else (field.low, field.high)
            assert accepts(field.name, low)
            assert accepts(field.name, high)
            assert not accepts(field.name, low - 1)
            assert not accepts(field.name, high + 1)


@pytest.mark.parametrize("kind", ["id", "count", "code"])
@pytest.mark.parametrize(
    ("value", "right"), [(3, True), (3.0, True), ("3", False), (3.5, False), (True, False)]
)
def test_integers_may_be_written_as_json_writes_numbers(kind: str, value: Any, right: bool) -> None:
    assert accepts(by_kind(kind).name, value) is right


def test_not_even_python_may_send_what_is_no_number() -> None:
    for value in (math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(ValidationError):
            ONE.validate_python({"number_inpatient": value})


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("250.83", True),
        ("7", True),
        ("V45", True),
        ("E849", True),
        ("428.", False),
        ("v45", False),
        ("4280", False),
        ("250.835", False),
        (" 428", False),
        ("428\n", False),
        ("٤٢٨", False),
        (428, False),
    ],
)
def test_diagnoses_are_icd9_codes(value: Any, right: bool) -> None:
    assert accepts("diag_1", value) is right
    if isinstance(value, str) and "\n" not in value:  # a line holds no line end
        _, broken = CsvReader(Header(("diag_1",))).read([value])
        assert (not broken) is right


def fault(encounter: dict[str, Any]) -> tuple[str, str]:
    """The only fault of an encounter."""
    with pytest.raises(RecordsError) as caught:
        read_batch(json.dumps({"encounters": [{}, encounter]}).encode())
    ((name, message),) = caught.value.faults
    assert str(caught.value) == f"{name}: {message}"
    return name, message


def test_faults_are_told_in_the_contracts_words() -> None:
    assert fault({"time_in_hospital": 15}) == (
        "encounters[1].time_in_hospital",
        "expected an integer from 1 to 14, got 15",
    )
    assert fault({"age": 71})[1] == f"expected {ACCEPTED['age'].expected}, got 71"
    assert fault({"race": "x" * 99})[1].endswith("...")
    assert fault({"diag_1": "x"})[1].startswith("expected an ICD-9 code such as 250.83")
    assert fault({"nmber_inpatient": 1}) == (
        "encounters[1].nmber_inpatient",
        "unknown field; did you mean number_inpatient?",
    )
    assert fault({"zzz": 1})[1] == "unknown field; /v1/fields lists what is known"
    assert fault({"readmitted": "NO"})[1].startswith("this is the outcome")
    assert len(fault({"x" * 9999: 1})[0]) < 150


def test_each_field_is_named_once_and_all_are_counted() -> None:
    encounter = {"age": 1, "race": 1, "gender": 1, "weight": 1, "insulin": 1}
    with pytest.raises(RecordsError, match=r"\(and 2 more\)$") as caught:
        read_batch(json.dumps({"encounters": [encounter]}).encode())
    names = [name for name, _ in caught.value.faults]
    assert sorted(names) == sorted(f"encounters[0].{name}" for name in encounter)


def test_the_bound_of_faults_is_said() -> None:
    encounters = [{"age": 1, f"unknown {place}": 1} for place in range(9_000)]
    with pytest.raises(RecordsError, match=r"more\)$") as caught:
        read_batch(json.dumps({"encounters": encounters}).encode())
    assert len(caught.value.faults) <= 100


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "body: "),
        (b"{}", "encounters: "),
        (b'{"encounters": []}', "encounters: "),
        (b'{"encounters": {}}', "encounters: "),
        (b'{"encounters": [1]}', r"encounters\[0\]: "),
        (b'{"encounters": [{}], "more": 1}', "more: unknown field"),
    ],
)
def test_what_is_no_batch_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(RecordsError, match=said):
        read_batch(body)


def test_random_encounters_are_accepted_as_json_and_as_csv() -> None:
    rows = synthetic(2_000, seed=3)
    encounters = [as_json(row) for row in rows]
    assert read_batch(json.dumps({"encounters": encounters}).encode()) == encounters

    assert all(PUBLISHED.is_valid(encounter) for encounter in encounters)
    columns, broken = CsvReader(Header(HEADER)).read([",".join(row) for row in rows])
    assert broken == {}
    assert "readmitted" not in columns
    for place, name in enumerate(HEADER[:-1]):
        assert columns[name] == [row[place] for row in rows]


def test_columns_hold_every_field() -> None:
    found = records.columns([{"encounter_id": 1, "age": "?"}, {"patient_nbr": 2, "race": "Asian"}])
    assert found.keys() == records.ACCEPTED.keys()
    assert (found["age"], found["race"]) == (["?", None], [None, "Asian"])
    assert (found["encounter_id"], found["weight"]) == ([1, None], [None, None])


@pytest.mark.parametrize(
    "line",
    [
        b"age,race\r\n",
        b"age,race\n",
        b"age,race",
        b"\xef\xbb\xbfage,race\r\n",
        b'"age","race"\n',
        b'\xef\xbb\xbf"age",race\n',
    ],
)
def test_headers_are_read_as_programs_write_them(line: bytes) -> None:
    assert Header.read(line).names == ("age", "race")


def test_any_columns_in_any_order() -> None:
    backwards = ",".join(reversed(HEADER)).encode()
    assert Header.read(backwards).names == tuple(reversed(HEADER))
    columns, broken = CsvReader(Header.read(b"insulin,readmitted,age")).read(["Up,whatever,?"])
    assert (columns, broken) == ({"insulin": ["Up"], "age": ["?"]}, {})


@pytest.mark.parametrize(
    ("line", "said", "named"),
    [
        (b"", "it is empty", []),
        (b"\n", "it is empty", []),
        (b"age,Race\n", "did you mean race?", ["'Race'"]),
        (b"age,,race\n", "unknown field", ["''"]),
        (b"age;race\n", "unknown field", ["'age;race'"]),
        (b"age,race,age\n", "age: named twice", ["age"]),
        (b"1,2,3\n", "unknown field", ["'1'", "'2'", "'3'"]),
        (b"\xff\n", "not UTF-8", []),
        (b"age\rrace\n", "line 1", []),
        (b'"age\n', "line 1", []),
    ],
)
def test_other_headers_are_refused(line: bytes, said: str, named: list[str]) -> None:
    with pytest.raises(RecordsError) as caught:
        Header.read(line)
    assert said in str(caught.value)
    if named:
        assert [name for name, _ in caught.value.faults] == named


LINES = {
    "[70-80),3": "",
    '"[70-80)","3"': "",
    ",": "",
    "?,?": "",
    "": "0 fields, expected 2",
    "[70-80)": "1 fields, expected 2",
    "[70-80),3,": "3 fields, expected 2",
    "[70-80),٣": "num_medications: expected an integer from 1 to 999",
    "[70-80), 3": "num_medications: expected an integer from 1 to 999",
    "[70-80),03": "num_medications: expected an integer from 1 to 999",
    "x,1000": "age: expected one of",
    '"[70-80),3': "not readable as CSV",
    "[70-80)\r,3": "not readable as CSV",
    "a\x00,3": "age: expected one of",
}


def test_broken_rows_keep_their_places() -> None:
    columns, broken = CsvReader(Header(("age", "num_medications"))).read([*LINES])
    assert broken.keys() == {place for place, said in enumerate(LINES.values()) if said}
    for place, said in enumerate(LINES.values()):
        assert said in broken.get(place, "")
    assert columns == {
        "age": ["[70-80)", "[70-80)", "", "?"],
        "num_medications": ["3", "3", "", "?"],
    }


def test_no_rows_give_no_columns() -> None:
    columns, broken = CsvReader(Header(("age", "readmitted"))).read(["x,y"])
    assert columns == {"age": []}
    assert list(broken) == [0]
