"""Count the publisher's CSV into the marginals that synthetic data is drawn from.

    python scripts/fit_marginals.py diabetic_data.csv

Writes `ingestion/synthetic_marginals.json`: only counts, no rows and no ids. The same CSV gives
the same bytes. Silent on success; exits with 2 when the CSV cannot be read or breaks the contract.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

# Run as a file, Python looks for modules in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ingestion.contract import FIELDS, HEADER, MISSING, row_pattern
from ingestion.synthetic import DIAGNOSES, DOSES, DRUG_LETTERS, MARGINALS_PATH

SOURCE = (
    "Counts of 'Diabetes 130-US Hospitals for Years 1999-2008' by J. Clore, K. Cios, J. DeShazo "
    "and B. Strack, UCI Machine Learning Repository, data set 296, "
    "https://doi.org/10.24432/C5230J, licence CC BY 4.0. Written by scripts/fit_marginals.py."
)
NOTES = {
    "columns": "rows by value",
    "diagnoses": "rows by number_diagnoses and which of diag_1, diag_2, diag_3 are missing (1)",
    "encounters_per_patient": "patients by number of rows",
    "regimens": "rows by prescribed drugs: a letter for the drug (a is the first drug column), "
    "then S, U or D for Steady, Up or Down",
}

Counts = dict[str, int]


def fit(lines: Iterable[bytes]) -> dict[str, object]:
    """Count the lines of a CSV.

    Args:
        lines: header and rows as the publisher writes them, with or without line ends.

    Returns:
        What `synthetic_marginals.json` holds: every part maps a text key to a number of rows (of
        patients in `encounters_per_patient`), keys sorted (numbers by size), no zero counts.

    Raises:
        ValueError: naming the first line that breaks the contract, or an input without rows.
    """
    columns: dict[str, Counter[str]] = {field.name: Counter() for field in FIELDS}
    diagnoses: Counter[str] = Counter()
    regimens: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        line = line.rstrip(b"\r\n")
        if number == 1:
            if line != ",".join(HEADER).encode("ascii"):
                raise ValueError("line 1 is not the publisher's header")
            continue
        if not row_pattern().fullmatch(line):
            raise ValueError(f"line {number} breaks the contract of ingestion/contract.py")
        row = dict(zip(HEADER, line.decode("ascii").split(","), strict=True))
        for name, value in row.items():
            columns[name][value] += 1
        diagnoses[f"{row['number_diagnoses']}:{_missing(row)}"] += 1
        regimens[_regimen_code(row)] += 1
    if not regimens:
        raise ValueError("there are no rows")
    del columns["encounter_id"]
    patients = columns.pop("patient_nbr")
    return {
        "source": SOURCE,
        "notes": NOTES,
        "encounters_per_patient": _sorted(Counter(map(str, patients.values()))),
        "columns": {name: _sorted(counts) for name, counts in columns.items()},
        "diagnoses": _sorted(diagnoses),
        "regimens": _sorted(regimens),
    }


def render(marginals: Mapping[str, object]) -> str:
    """The JSON text: compact, with a line per part and per column so that a change shows."""
    parts = []
    for name, part in marginals.items():
        if name in ("columns", "notes") and isinstance(part, dict):
            inner = ",\n".join(f"{_json(key)}:{_json(value)}" for key, value in part.items())
            parts.append(f"{_json(name)}:{{\n{inner}\n}}")
        else:
            parts.append(f"{_json(name)}:{_json(part)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the tool.

    Args:
        arguments: the command line without the program's name; by default this process's.

    Raises:
        SystemExit: with 2 and one message for a bad command line or a bad CSV.
    """
    parser = argparse.ArgumentParser(
        description="Count the publisher's CSV into the marginals of the synthetic data."
    )
    parser.add_argument("csv", type=Path, metavar="CSV", help="the publisher's diabetic_data.csv")
    parser.add_argument(
        "--output", type=Path, default=MARGINALS_PATH, help="JSON to write (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        with options.csv.open("rb") as lines:
            text = render(fit(lines))
        options.output.write_text(text, encoding="ascii")
    except (OSError, ValueError) as error:
        parser.error(f"{options.csv}: {error}")


def _missing(row: Mapping[str, str]) -> str:
    return "".join("1" if row[name] == MISSING else "0" for name in DIAGNOSES)


def _regimen_code(row: Mapping[str, str]) -> str:
    letters = {dose: letter for letter, dose in DOSES.items()}
    return "".join(
        letter + letters[row[drug]] for letter, drug in DRUG_LETTERS.items() if row[drug] != "No"
    )


def _sorted(counts: Mapping[str, int]) -> Counts:
    def by_size(key: str) -> tuple[int, str]:
        return (int(key) if key.isdecimal() else 0, key)

    return {key: counts[key] for key in sorted(counts, key=by_size)}


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    main()
