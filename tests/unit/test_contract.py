"""The contract says what a value is: to the row pattern, to the messages, to the dbt project."""

from __future__ import annotations

import csv
import json
import random
import re

import pytest

from ingestion.contract import (
    COLUMNS,
    DRUGS,
    FIELDS,
    HEADER,
    MISSING,
    Field,
    _integers,
    row_pattern,
    violations,
)
from ingestion.synthetic import MARGINALS_PATH, csv_blocks
from settings import PROJECT_ROOT

PUBLISHER_HEADER = (
    "encounter_id,patient_nbr,race,gender,age,weight,admission_type_id,discharge_disposition_id,"
    "admission_source_id,time_in_hospital,payer_code,medical_specialty,num_lab_procedures,"
    "num_procedures,num_medications,number_outpatient,number_emergency,number_inpatient,diag_1,"
    "diag_2,diag_3,number_diagnoses,max_glu_serum,A1Cresult,metformin,repaglinide,nateglinide,"
    "chlorpropamide,glimepiride,acetohexamide,glipizide,glyburide,tolbutamide,pioglitazone,"
    "rosiglitazone,acarbose,miglitol,troglitazone,tolazamide,examide,citoglipton,insulin,"
    "glyburide-metformin,glipizide-metformin,glimepiride-pioglitazone,metformin-rosiglitazone,"
    "metformin-pioglitazone,change,diabetesMed,readmitted"
)
DBT = PROJECT_ROOT / "dbt_diabetes"
REAL_COUNTS: dict[str, dict[str, int]] = json.loads(MARGINALS_PATH.read_text("ascii"))["columns"]
ROWS = [
    line.split(",") for line in b"".join(csv_blocks(500)).decode("ascii").split("\r\n")[1:] if line
]
EACH_FIELD = pytest.mark.parametrize("field", FIELDS, ids=HEADER)


def valid_values(field: Field) -> list[str]:
    if field.kind == "id":
        return ["1", "12522", "443867222", "9" * 18]
    if field.kind == "count":
        return [str(number) for number in range(field.low, field.high + 1)]
    if field.kind == "icd9":
        return ["1", "38", "250", "250.8", "250.83", "V45", "V45.81", "E849", "E849.7", "V1", "?"]
    return list(field.values)


def near_misses(field: Field) -> list[str]:
    value = valid_values(field)[0]
    misses = ["", " ", f" {value}", f"{value} ", f"{value}\n", f"{value}\r", f'"{value}"', "NULL"]
    if field.kind in ("id", "count", "code"):
        misses += ["-1", "1.0", "+1", "1e1", "01", "1\N{FULLWIDTH DIGIT ONE}", "9" * 19]
    if field.kind == "id":
        misses.append("0")
    if field.kind == "count":
        misses += [str(field.low - 1), str(field.high + 1)]
    if field.kind == "code":
        misses += ["0", "99", "".join(field.values[:3])]
    if field.kind == "category":
        misses += [value.swapcase(), value * 2, value[:-1]]
    if field.kind == "icd9":
        misses += [
            "1234",
            "250.",
            "250.834",
            ".83",
            "v45",
            "V",
            "E1234",
            "X12",
            "25O",
            "??",
            "25\N{FULLWIDTH DIGIT ONE}",
        ]
    return [miss for miss in misses if miss not in valid_values(field)]


def matches(values: list[str]) -> bool:
    return bool(row_pattern().fullmatch(",".join(values).encode()))


def row_with(field: Field, value: str) -> list[str]:
    return [value if other is field else ROWS[0][at] for at, other in enumerate(FIELDS)]


@EACH_FIELD
def test_field_accepts_its_values_and_those_of_the_real_file(field: Field) -> None:
    for value in {*valid_values(field), *REAL_COUNTS.get(field.name, ())}:
        assert re.fullmatch(field.pattern, value), value
        assert violations(row_with(field, value)) == []
        assert matches(row_with(field, value))


@EACH_FIELD
def test_near_miss_is_one_violation_that_names_the_field(field: Field) -> None:
    assert near_misses(field)
    for value in near_misses(field):
        reasons = violations(row_with(field, value))
        assert len(reasons) == 1, value
        assert reasons[0].startswith(f"{field.name} is ")
        assert reasons[0].endswith(f", expected {field.expected}")
        assert not matches(row_with(field, value)), value


def test_synthetic_rows_agree_with_pattern_and_violations() -> None:
    for values in ROWS:
        assert matches(values)
        assert violations(values) == []


def test_pattern_agrees_with_violations_wherever_a_row_breaks() -> None:
    draw = random.Random(130)  # noqa: S311
    for _ in range(500):
        broken = set(draw.sample(range(len(FIELDS)), draw.randint(0, 4)))
        mutated = [
            draw.choice(near_misses(field) if at in broken else valid_values(field))
            for at, field in enumerate(FIELDS)
        ]
        named = [reason.split(" is ", 1)[0] for reason in violations(mutated)]
        assert named == [HEADER[at] for at in sorted(broken)]
        assert matches(mutated) == (not broken)


@pytest.mark.parametrize("count", [0, 1, 49, 51])
def test_wrong_number_of_fields_is_the_only_violation(count: int) -> None:
    values = ["bad"] * count
    assert violations(values) == [f"{count} fields, expected 50"]
    assert not matches(values)


def test_fields_may_not_swap_places() -> None:
    swapped = [ROWS[0][1], *ROWS[0][:1], *ROWS[0][3:1:-1], *ROWS[0][4:]]
    assert not matches(swapped)
    assert [reason.split(" ")[0] for reason in violations(swapped)] == ["race", "gender"]


def test_violation_of_a_long_value_stays_short() -> None:
    (reason,) = violations(row_with(FIELDS[2], "x" * 10_000))
    assert f"race is '{'x' * 37}...', expected one of Caucasian" in reason
    assert len(reason) < 200


def test_violation_lists_a_long_vocabulary_by_example_only() -> None:
    (reason,) = violations(row_with(FIELDS[HEADER.index("medical_specialty")], "Astrology"))
    assert reason.endswith("expected one of 73 known values such as ?, InternalMedicine, "
                           "Emergency/Trauma, Family/GeneralPractice, Cardiology")  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(0, 98), (2, 99), (0, 100)])
def test_wide_count_that_has_no_simple_pattern_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"got {low} to {high}"):
        _integers(low, high)


def test_header_is_the_publishers() -> None:
    assert ",".join(HEADER) == PUBLISHER_HEADER


def test_commonest_value_is_tried_first() -> None:
    for field in FIELDS:
        if field.values:
            counts = REAL_COUNTS[field.name]
            assert counts[field.values[0]] == max(counts.values()), field.name


def test_columns_are_plain_sql_names() -> None:
    assert [name for name in COLUMNS if not re.fullmatch(r"[a-z][a-z0-9_]*", name)] == []
    assert len(set(COLUMNS)) == 50


def test_numbers_are_stored_as_numbers_and_the_rest_as_text() -> None:
    types = {field.kind: field.sql_type for field in FIELDS}
    assert types == {
        "id": "bigint",
        "count": "integer",
        "code": "integer",
        "category": "text",
        "icd9": "text",
    }


def test_nullable_fields_are_those_with_missing_values_in_the_real_file() -> None:
    missing = {name for name, counts in REAL_COUNTS.items() if MISSING in counts}
    assert {field.name for field in FIELDS if field.nullable} == missing


def test_drugs_are_those_of_the_dbt_project() -> None:
    assert dbt_list("drugs") == [drug.replace("-", "_") for drug in DRUGS]


def test_counts_are_the_numeric_features_of_the_dbt_project() -> None:
    assert dbt_list("numeric_features") == [f.column for f in FIELDS if f.kind == "count"]


@pytest.mark.parametrize(
    ("name", "seed", "key"),
    [
        ("admission_type_id", "admission_types", "admission_type_id"),
        ("admission_source_id", "admission_sources", "admission_source_id"),
        ("discharge_disposition_id", "discharge_dispositions", "discharge_disposition_id"),
        ("age", "age_midpoints", "age_band"),
        ("medical_specialty", "specialty_groups", "medical_specialty"),
    ],
)
def test_every_value_is_in_the_seed_that_explains_it(name: str, seed: str, key: str) -> None:
    with (DBT / "seeds" / f"{seed}.csv").open(newline="", encoding="utf-8") as file:
        known = {row[key] for row in csv.DictReader(file)}
    values = set(FIELDS[HEADER.index(name)].values)
    assert values - known <= {MISSING}


def dbt_list(macro: str) -> list[str]:
    """The names that a macro of features.sql returns as one list."""
    text = (DBT / "macros" / "features.sql").read_text(encoding="utf-8")
    body = re.search(rf"macro {macro}\(\).*?return\(\[(.*?)\]\)", text, re.DOTALL)
    assert body
    return re.findall(r"'([^']*)'", body[1])
