"""The file contract: what a row of the Diabetes 130-US hospitals CSV looks like.

Declared once, here. The row pattern, the table definitions, the synthetic generator and
(later) the request models of the API are all derived from `FIELDS`.

Source of names, types and vocabularies: UCI Machine Learning Repository, data set 296, and
Strack et al., "Impact of HbA1c Measurement on Hospital Readmission Rates", BioMed Research
International 2014, table 1; bounds were read off the publisher's file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

MISSING = "?"
"""The publisher's mark for a missing value. The text `None` is another thing: "not measured"."""

SYNTHETIC_ID_FLOOR = 9_000_000_000
"""Encounter ids from here on belong to generated data. The publisher's end at 443,867,222, so a
table's origin can be told from its rows, whatever file or URL they came through."""

NOBODY = 10**18 - 1
"""Encounter and patient of every load test, the last id that the contract allows: no outcome
belongs to it, and its keyed hash tells a load test's predictions from all others."""

Kind = Literal["id", "count", "code", "category", "icd9"]

_ICD9 = r"\d{1,3}(?:\.\d{1,2})?|[VE]\d{1,3}(?:\.\d{1,2})?"


@dataclass(frozen=True, slots=True)
class Field:
    """One column of the CSV.

    `kind` is one of: `id` (positive integer up to 18 digits), `count` (integer from `low` to
    `high`), `code` (integer out of `values`), `category` (text out of `values`) and `icd9` (an
    ICD-9-CM code, V and E codes included). `values` are ordered by how common they are, so that
    a pattern tries the likeliest first.
    """

    name: str
    kind: Kind
    meaning: str
    values: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    nullable: bool = False

    @property
    def column(self) -> str:
        """Name of the column in `raw_data.diabetes`: lower case, hyphens as underscores."""
        return self.name.lower().replace("-", "_")

    @property
    def sql_type(self) -> str:
        """PostgreSQL type of the column; text stays exactly as the publisher wrote it."""
        return {"id": "bigint", "count": "integer", "code": "integer"}.get(self.kind, "text")

    @property
    def pattern(self) -> str:
        """Regular expression (no groups, no anchors) that a valid value matches as a whole."""
        if self.kind == "id":
            return r"[1-9]\d{0,17}"
        if self.kind == "count":
            return _integers(self.low, self.high)
        if self.kind == "icd9":
            return rf"{_ICD9}|\?"
        return "|".join(re.escape(value) for value in self.values)

    @property
    def expected(self) -> str:
        """What a value has to be, in words for a message."""
        if self.kind == "id":
            return "a positive integer of at most 18 digits"
        if self.kind == "count":
            return f"an integer from {self.low} to {self.high}"
        if self.kind == "icd9":
            return "an ICD-9 code such as 250.83, V45 or E849, or ?"
        if len(self.values) > 12:
            return f"one of {len(self.values)} known values such as {', '.join(self.values[:5])}"
        return f"one of {', '.join(self.values)}"


def _integers(low: int, high: int) -> str:
    """Pattern of the integers `low` to `high` in plain decimal; a wide range ends in nines."""
    if high < 20:
        return "|".join(str(n) for n in range(high, low - 1, -1))
    digits = len(str(high))
    if high != 10**digits - 1 or low not in (0, 1):
        raise ValueError(f"a wide count runs from 0 or 1 to 99, 999, ...; got {low} to {high}")
    return rf"[1-9]\d{{0,{digits - 1}}}" + ("|0" if low == 0 else "")


def _id(name: str, meaning: str) -> Field:
    return Field(name, "id", meaning)


def _count(name: str, low: int, high: int, meaning: str) -> Field:
    return Field(name, "count", meaning, low=low, high=high)


def _code(name: str, values: str, meaning: str) -> Field:
    return Field(name, "code", meaning, values=tuple(values.split()))


def _category(name: str, values: str, meaning: str) -> Field:
    parts = tuple(values.split("|")) if "|" in values else tuple(values.split())
    return Field(name, "category", meaning, values=parts, nullable=MISSING in parts)


def _drug(name: str) -> Field:
    return _category(name, "No Steady Up Down", f"{name}: not prescribed, or how the dose changed")


def _diagnosis(name: str, meaning: str) -> Field:
    return Field(name, "icd9", meaning, nullable=True)


SPECIALTIES = (
    "?|InternalMedicine|Emergency/Trauma|Family/GeneralPractice|Cardiology|Surgery-General|"
    "Nephrology|Orthopedics|Orthopedics-Reconstructive|Radiologist|Pulmonology|Psychiatry|"
    "Urology|ObstetricsandGynecology|Surgery-Cardiovascular/Thoracic|Gastroenterology|"
    "Surgery-Vascular|Surgery-Neuro|PhysicalMedicineandRehabilitation|Oncology|Pediatrics|"
    "Hematology/Oncology|Neurology|Pediatrics-Endocrinology|Otolaryngology|Endocrinology|"
    "Surgery-Thoracic|Psychology|Podiatry|Surgery-Cardiovascular|Pediatrics-CriticalCare|"
    "Hematology|Gynecology|Hospitalist|Radiology|Surgeon|Surgery-Plastic|Osteopath|"
    "Ophthalmology|InfectiousDiseases|SurgicalSpecialty|"
    "Obsterics&Gynecology-GynecologicOnco|Pediatrics-Pulmonology|Anesthesiology-Pediatric|"
    "Obstetrics|Rheumatology|Pathology|Anesthesiology|OutreachServices|"
    "Surgery-Colon&Rectal|Surgery-Maxillofacial|PhysicianNotFound|Pediatrics-Neurology|"
    "Surgery-Pediatric|Endocrinology-Metabolism|Psychiatry-Child/Adolescent|"
    "AllergyandImmunology|Cardiology-Pediatric|DCPTEAM|Pediatrics-Hematology-Oncology|"
    "Dentistry|Pediatrics-EmergencyMedicine|Pediatrics-AllergyandImmunology|Resident|"
    "Surgery-PlasticwithinHeadandNeck|Pediatrics-InfectiousDiseases|Psychiatry-Addictive|"
    "Proctology|Dermatology|SportsMedicine|Speech|Perinatology|Neurophysiology"
)

DRUGS = (
    "metformin",
    "repaglinide",
    "nateglinide",
    "chlorpropamide",
    "glimepiride",
    "acetohexamide",
    "glipizide",
    "glyburide",
    "tolbutamide",
    "pioglitazone",
    "rosiglitazone",
    "acarbose",
    "miglitol",
    "troglitazone",
    "tolazamide",
    "examide",
    "citoglipton",
    "insulin",
    "glyburide-metformin",
    "glipizide-metformin",
    "glimepiride-pioglitazone",
    "metformin-rosiglitazone",
    "metformin-pioglitazone",
)

FIELDS: tuple[Field, ...] = (
    _id("encounter_id", "Identifier of the encounter (one hospital stay); unique in the file"),
    _id("patient_nbr", "Identifier of the patient; one patient can have several encounters"),
    _category("race", "Caucasian AfricanAmerican ? Hispanic Other Asian", "Race, as recorded"),
    _category("gender", "Female Male Unknown/Invalid", "Gender, as recorded"),
    _category(
        "age",
        "[70-80) [60-70) [50-60) [80-90) [40-50) [30-40) [90-100) [20-30) [10-20) [0-10)",
        "Age in ten-year bands",
    ),
    _category(
        "weight",
        "? [75-100) [50-75) [100-125) [125-150) [25-50) [0-25) [150-175) [175-200) >200",
        "Weight in pounds, in bands; missing in 97 % of the encounters",
    ),
    _code("admission_type_id", "1 3 2 6 5 8 7 4", "Kind of admission, see seed admission_types"),
    _code(
        "discharge_disposition_id",
        "1 3 6 18 2 22 11 5 25 4 7 23 13 14 28 8 15 24 9 17 16 19 10 27 12 20 21 26 29 30",
        "Where the patient went, see seed discharge_dispositions",
    ),
    _code(
        "admission_source_id",
        "7 1 17 4 6 2 5 3 20 9 8 22 10 14 11 25 13 12 15 18 19 21 23 24 26",
        "Where the patient came from, see seed admission_sources",
    ),
    _count("time_in_hospital", 1, 14, "Days between admission and discharge"),
    _category(
        "payer_code",
        "? MC HM SP BC MD CP UN CM OG PO DM CH WC OT MP SI FR",
        "Who pays: Medicare (MC), Medicaid (MD), self-pay (SP), insurers",
    ),
    _category("medical_specialty", SPECIALTIES, "Specialty of the admitting physician"),
    _count("num_lab_procedures", 1, 999, "Lab tests done during the encounter"),
    _count("num_procedures", 0, 99, "Procedures other than lab tests during the encounter"),
    _count("num_medications", 1, 999, "Distinct generic medicines given during the encounter"),
    _count("number_outpatient", 0, 999, "Outpatient visits in the year before the encounter"),
    _count("number_emergency", 0, 999, "Emergency visits in the year before the encounter"),
    _count("number_inpatient", 0, 999, "Inpatient visits in the year before the encounter"),
    _diagnosis("diag_1", "Primary diagnosis, ICD-9-CM"),
    _diagnosis("diag_2", "Second diagnosis, ICD-9-CM"),
    _diagnosis("diag_3", "Third diagnosis, ICD-9-CM"),
    _count("number_diagnoses", 1, 99, "Diagnoses entered for the encounter"),
    _category("max_glu_serum", "None Norm >200 >300", "Glucose serum test; None: not measured"),
    _category("A1Cresult", "None >8 Norm >7", "HbA1c test; None: not measured"),
    *(_drug(name) for name in DRUGS),
    _category("change", "No Ch", "Whether any diabetic medication changed (Ch)"),
    _category("diabetesMed", "Yes No", "Whether any diabetic medication was prescribed"),
    _category(
        "readmitted",
        "NO >30 <30",
        "The outcome: readmitted within 30 days, later, or not on record",
    ),
)

HEADER: tuple[str, ...] = tuple(field.name for field in FIELDS)
COLUMNS: tuple[str, ...] = tuple(field.column for field in FIELDS)


@cache
def row_pattern() -> re.Pattern[bytes]:
    """Compiled pattern that an unquoted, valid line (without its line end) matches as a whole.

    One call of the regular-expression engine checks field count, types and vocabularies, which
    is what lets ingestion check every row while it streams at the speed of `COPY`.
    """
    return re.compile(",".join(f"(?:{field.pattern})" for field in FIELDS).encode("ascii"))


@cache
def _value_patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(field.pattern, re.ASCII) for field in FIELDS)


def violations(values: list[str]) -> list[str]:
    """Say what is wrong with one parsed row.

    Args:
        values: the row's fields as text, in the order of `FIELDS`.

    Returns:
        One sentence a broken field (empty list: the row is valid); a wrong number of fields is
        the only sentence when it applies.
    """
    if len(values) != len(FIELDS):
        return [f"{len(values)} fields, expected {len(FIELDS)}"]
    return [
        f"{field.name} is {_short(value)}, expected {field.expected}"
        for field, value, pattern in zip(FIELDS, values, _value_patterns(), strict=True)
        if not pattern.fullmatch(value)
    ]


def _short(value: str) -> str:
    if not value:
        return "empty"
    return repr(value if len(value) <= 40 else value[:37] + "...")
