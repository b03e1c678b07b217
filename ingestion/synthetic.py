"""Seeded synthetic encounters: the columns, vocabularies and about the marginals of the real file.

For scale tests and for work without the publisher's data. The marginals are counts of the real
file in `synthetic_marginals.json`, written by `scripts/fit_marginals.py`. Columns are drawn
independently but for what belongs together: the diabetic drugs of an encounter, the number of
diagnoses and which are missing, the encounters of a patient, the outcome and its risk factors.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ingestion.contract import DRUGS, HEADER, MISSING, SYNTHETIC_ID_FLOOR

DEFAULT_ROWS = 101_766
"""Rows of the publisher's file."""

DEFAULT_SEED = 130

MAX_ROWS = 100_000_000

BLOCK_ROWS = 10_000
"""Rows drawn at once, from a random stream of their own; another size gives other data."""

_SCATTER_ROWS = 1_000
"""Between the encounters of one patient lie up to about so many rows of others."""

MARGINALS_PATH = Path(__file__).with_name("synthetic_marginals.json")

DIAGNOSES = ("diag_1", "diag_2", "diag_3")

DRUG_LETTERS = dict(zip(ascii_lowercase, DRUGS, strict=False))
DOSES = {"S": "Steady", "U": "Up", "D": "Down"}
"""With `DRUG_LETTERS` the code of a regimen: `aSrU` is metformin Steady and insulin Up."""

_OUTCOMES = ("NO", ">30", "<30")

_THRESHOLDS = (1.383, 3.512)
"""Risk plus logistic noise is NO below the first and <30 above the second. Calibrated on ten
million draws to the real rates; the test of the rates tells when they have to move."""

_DISCHARGE = {
    "2": 0.3, "3": 0.3, "5": 0.6, "6": 0.25, "9": 0.8, "12": 0.8, "15": 1.0, "22": 0.7, "28": 1.0,
} | dict.fromkeys(("11", "13", "14", "19", "20", "21"), -math.inf)  # fmt: skip
"""By disposition; who died or went to a hospice does not come back."""

_AGE = {"[0-10)": -1.2, "[10-20)": -0.4, "[50-60)": -0.05, "[70-80)": 0.05, "[90-100)": -0.15}

_DIAGNOSIS = {
    "786": -0.4, "435": -0.4, "414": -0.3, "682": -0.3, "486": -0.3, "493": -0.2, "427": -0.2,
    "574": -0.2, "562": -0.2, "780": -0.2, "715": -0.1, "996": 0.1, "V57": 0.1, "250": 0.1,
    "577": 0.2, "276": 0.2, "584": 0.3, "428": 0.3, "820": 0.3, "434": 0.4,
}  # fmt: skip
_SPECIALTY = {
    "Orthopedics-Reconstructive": -0.5, "Cardiology": -0.4, "Radiologist": -0.4,
    "Family/GeneralPractice": 0.1, "Nephrology": 0.4,
}  # fmt: skip
_PAYER = {"CP": -0.3, "BC": -0.2, "UN": -0.2, "CM": -0.1, "OG": 0.2}

_EFFECTS: Mapping[str, Callable[[str], float]] = {
    "number_inpatient": lambda value: 0.9 * math.log1p(int(value)),
    "number_emergency": lambda value: 0.4 * math.log1p(int(value)),
    "number_diagnoses": lambda value: 0.09 * min(int(value), 9),
    "time_in_hospital": lambda value: 0.02 * min(int(value), 10),
    "discharge_disposition_id": lambda value: _DISCHARGE.get(value, 0.0),
    "age": lambda value: _AGE.get(value, 0.0),
    "insulin": lambda value: {"Up": 0.15, "Down": 0.2}.get(value, 0.0),
    "diabetesMed": lambda value: {"Yes": 0.2}.get(value, 0.0),
    "diag_1": lambda value: 2 * _DIAGNOSIS.get(value.split(".")[0], 0.0),
    "medical_specialty": lambda value: 2 * _SPECIALTY.get(value, 0.0),
    "payer_code": lambda value: 2 * _PAYER.get(value, 0.0),
}
"""Log odds, set by hand after the real readmission rates by each of these columns. Those of the
last three are doubled: they stand for all columns that have no effect here, so that the outcome
can be learnt about as well as the real one and training finds a champion in synthetic data too."""

_NEAR_EDGE = 0.2
"""Share of patients who would stand at the edge of an age band; set so that 2 % of all patients
show two bands, as in the real file."""

_REGIMEN = "regimen"
_LAYOUT = (*HEADER[: HEADER.index(DRUGS[0])], _REGIMEN, "readmitted")
"""The columns of a line, with those of the drugs, `change` and `diabetesMed` in one piece."""

_Codes = npt.NDArray[np.intp]
_Texts = npt.NDArray[np.object_]


def csv_blocks(rows: int = DEFAULT_ROWS, seed: int = DEFAULT_SEED) -> Iterator[bytes]:
    """Stream a synthetic CSV written as the publisher's: header, CRLF line ends, no quotes.

    The same arguments give the same bytes (on one version of numpy), and fewer rows give a
    prefix of more. Encounter and patient ids start at `SYNTHETIC_ID_FLOOR`. The encounters of a
    patient lie scattered over about a thousand rows, so a file of a few hundred has fewer
    returning patients. Memory does not grow with `rows`.

    Args:
        rows: encounters to generate, 1 to 100,000,000; the header comes on top.
        seed: any integer from 0.

    Returns:
        Blocks of at most 10,000 whole lines (about 2 MB), the first led by the header.

    Raises:
        ValueError: at the call, for `rows` or `seed` out of range.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"rows must be from 1 to {MAX_ROWS:,}, got {rows:,}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return _blocks(rows, seed)


def write_csv(path: Path, rows: int = DEFAULT_ROWS, seed: int = DEFAULT_SEED) -> None:
    """Write a synthetic CSV, replacing what is at `path` only once the new file is complete.

    Args:
        path: the file to write; missing parent folders are created.
        rows: see `csv_blocks`.
        seed: see `csv_blocks`.

    Raises:
        ValueError: for `rows` or `seed` out of range.
        OSError: when the file cannot be written; nothing half-written is left.
    """
    blocks = csv_blocks(rows, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.writelines(blocks)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def risk(record: Mapping[str, str]) -> float:
    """The true score behind the outcome of a synthetic record.

    No model can be expected to rank synthetic records better, so this bounds what a test may ask.

    Args:
        record: the text values of an encounter by their names in the header; columns that are
            absent add nothing.

    Returns:
        Log odds up to a constant; minus infinity for who cannot be readmitted.
    """
    return sum((effect(record[name]) for name, effect in _EFFECTS.items() if name in record), 0.0)


def _blocks(rows: int, seed: int) -> Iterator[bytes]:
    lead = ",".join(HEADER) + "\r\n"
    for index, start in enumerate(range(0, rows, BLOCK_ROWS)):
        lines = islice(_lines(index, seed), rows - start)
        yield (lead + "\r\n".join(lines) + "\r\n").encode("ascii")
        lead = ""


def _lines(index: int, seed: int) -> Iterator[str]:
    """The lines of a block. It is always drawn whole, so that a short file begins a long one."""
    rng = np.random.default_rng([seed, index])
    first_id = SYNTHETIC_ID_FLOOR + index * BLOCK_ROWS
    ids = _texts(str(first_id + row) for row in range(BLOCK_ROWS))
    tables, patients, missing = _marginals()

    patient = _patient_of_row(rng, patients)
    codes = {name: table.draw(rng) for name, table in tables.items()}
    codes["race"] = codes["race"][patient]
    codes["gender"] = codes["gender"][patient]
    codes["age"] = _age_of_row(rng, tables["age"], patient)

    columns = {"encounter_id": ids.tolist(), "patient_nbr": ids[patient].tolist()}
    score = rng.logistic(size=BLOCK_ROWS)
    for name, table in tables.items():
        columns[name] = table.values[codes[name]].tolist()
        score += table.effects[codes[name]]
    columns["readmitted"] = _texts(_OUTCOMES)[np.searchsorted(_THRESHOLDS, score)].tolist()

    for row, which in np.argwhere(missing[codes["number_diagnoses"]]).tolist():
        columns[DIAGNOSES[which]][row] = MISSING
    return map(",".join, zip(*(columns[name] for name in _LAYOUT), strict=True))


def _patient_of_row(rng: np.random.Generator, patients: _Table) -> _Codes:
    """Number of the patient (from 0) for each row; the last one is cut at the end of the block.

    Scattered over a window and not the whole block, so that a block cut short has returning
    patients too.
    """
    encounters = patients.values[patients.draw(rng)].astype(np.intp)
    patient = np.repeat(np.arange(BLOCK_ROWS), encounters)[:BLOCK_ROWS]
    return patient[np.argsort(np.arange(BLOCK_ROWS) + _SCATTER_ROWS * rng.random(BLOCK_ROWS))]


def _age_of_row(rng: np.random.Generator, ages: _Table, patient: _Codes) -> _Codes:
    """A band for each patient; of those near its edge, half the encounters in the next band.

    Counts are sorted, so the next code is the next band. Steps into a rarer band are taken as
    often as the ratio of the two says (Metropolis), which leaves the marginal as it is.
    """
    share = np.diff(ages.cumulative, prepend=0.0)
    band = ages.draw(rng)
    other = np.clip(band + rng.choice((-1, 1), BLOCK_ROWS), 0, len(share) - 1)
    near = rng.random(BLOCK_ROWS) < _NEAR_EDGE * np.minimum(1.0, share[other] / share[band])
    crossed = near[patient] & (rng.random(BLOCK_ROWS) < 0.5)
    return np.where(crossed, other[patient], band[patient])


@dataclass(frozen=True, slots=True)
class _Table:
    """A distribution over texts, each with its cumulative share and what it adds to the risk."""

    values: _Texts
    cumulative: npt.NDArray[np.float64]
    effects: npt.NDArray[np.float64]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, str]], counts: Iterable[int]) -> _Table:
        """From parts of a record (one or some neighbouring columns) and how often each occurs."""
        records = list(records)
        total = np.cumsum(np.fromiter(counts, np.float64))
        return cls(
            _texts(",".join(record.values()) for record in records),
            total / total[-1],
            np.array([risk(record) for record in records]),
        )

    def draw(self, rng: np.random.Generator) -> _Codes:
        """Positions in `values`, one for each row of a block."""
        return self.cumulative.searchsorted(rng.random(BLOCK_ROWS), side="right")


class _Marginals(NamedTuple):
    """What to draw from.

    `missing` has a row of three flags (`DIAGNOSES`) for each entry of the table of
    `number_diagnoses`, where a number stands once for each pattern of flags it was seen with.
    """

    tables: Mapping[str, _Table]
    patients: _Table
    missing: npt.NDArray[np.bool_]


@cache
def _marginals() -> _Marginals:
    fitted = json.loads(MARGINALS_PATH.read_text(encoding="ascii"))
    tables = {}
    for name in _LAYOUT[2:-1]:
        counts: dict[str, int]
        if name == _REGIMEN:
            counts = fitted["regimens"]
            records = [_regimen(code) for code in counts]
        elif name == "number_diagnoses":
            counts = fitted["diagnoses"]
            records = [{name: key.partition(":")[0]} for key in counts]
        else:
            counts = fitted["columns"][name]
            if name in DIAGNOSES:
                counts.pop(MISSING, None)
            records = [{name: value} for value in counts]
        tables[name] = _Table.of(records, counts.values())
    encounters: dict[str, int] = fitted["encounters_per_patient"]
    return _Marginals(
        tables,
        _Table.of(({"encounters": number} for number in encounters), encounters.values()),
        np.array([[flag == "1" for flag in key.partition(":")[2]] for key in fitted["diagnoses"]]),
    )


def _regimen(code: str) -> dict[str, str]:
    """The drug columns, `change` and `diabetesMed` of a regimen's code.

    `change` follows the real file's rule, which has no exception there: more than one drug, or a
    dose that went up or down.
    """
    doses = {DRUG_LETTERS[code[at]]: DOSES[code[at + 1]] for at in range(0, len(code), 2)}
    changed = len(doses) > 1 or not {"Up", "Down"}.isdisjoint(doses.values())
    return {drug: doses.get(drug, "No") for drug in DRUGS} | {
        "change": "Ch" if changed else "No",
        "diabetesMed": "Yes" if doses else "No",
    }


def _texts(values: Iterable[str]) -> _Texts:
    return np.array(list(values), dtype=object)
