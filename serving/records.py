"""What callers send: request models and CSV, both made from the file contract of ingestion."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import islice
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, ConfigDict, JsonValue, TypeAdapter, ValidationError
from pydantic import Field as Constraint
from typing_extensions import TypedDict

from ingestion.contract import FIELDS, MISSING, Field

MOST_ENCOUNTERS = 10_000
"""In one JSON batch; whoever has more sends a CSV."""

OUTCOME = "readmitted"
IDENTIFIERS = tuple(field.name for field in FIELDS if field.kind == "id")
ACCEPTED: Mapping[str, Field] = {field.name: field for field in FIELDS if field.name != OUTCOME}
"""What a caller may send, by name: the publisher's header without the outcome."""

FieldFault = tuple[str, str]
"""Name of a field and what is wrong with it."""

_SHOWN = 40
_MOST_FAULTS = 100
"""That are told: a caller could make up any number, and hints take their time."""


def _plain_number(value: Any) -> Any:
    # JSON knows one kind of number: 2.0 is the integer 2. To Python true is one as well.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, bool) else value


def _type(field: Field) -> Any:
    description = Constraint(description=f"{field.meaning}. Left out, null or ?: missing.")
    if field.kind in ("id", "count"):
        low, high = (1, 10**18 - 1) if field.kind == "id" else (field.low, field.high)
        number = Annotated[int, Constraint(ge=low, le=high, strict=True)]
        return Annotated[
            number | Literal["?"] | None,
            BeforeValidator(_plain_number),
            description,
        ]
    if field.kind == "icd9":
        return Annotated[
            Annotated[str, Constraint(pattern=_ascii(field), max_length=7)] | None,
            description,
        ]
    values: tuple[Any, ...] = tuple(value for value in field.values if value != MISSING)
    if field.kind == "code":
        values = tuple(int(value) for value in values)
    known = Literal[(*values, MISSING)]  # type: ignore[valid-type]
    if field.kind == "code":
        return Annotated[known | None, BeforeValidator(_plain_number), description]
    return Annotated[known | None, description]


def _ascii(field: Field) -> str:
    """The field's pattern, in which other scripts' digits are none."""
    return f"^(?:{field.pattern})$".replace(r"\d", "[0-9]")


_EXAMPLE: dict[str, JsonValue] = {
    "race": "Caucasian",
    "gender": "Female",
    "age": "[70-80)",
    "admission_type_id": 1,
    "discharge_disposition_id": 1,
    "admission_source_id": 7,
    "time_in_hospital": 5,
    "num_lab_procedures": 45,
    "num_medications": 16,
    "number_inpatient": 2,
    "number_diagnoses": 9,
    "diag_1": "428",
    "diag_2": "250.02",
    "diag_3": "401",
    "A1Cresult": ">8",
    "metformin": "Steady",
    "insulin": "Up",
    "change": "Ch",
    "diabetesMed": "Yes",
}

Encounter = TypedDict(  # type: ignore[misc]
    "Encounter", {name: NotRequired[_type(field)] for name, field in ACCEPTED.items()}
)
"""One encounter by the names of the publisher's header."""
Encounter.__doc__ = (
    "One hospital stay, named as in the publisher's CSV; what is left out is missing."
)
Encounter.__pydantic_config__ = ConfigDict(  # type: ignore[attr-defined]
    extra="forbid", json_schema_extra={"examples": [_EXAMPLE]}
)


class Batch(TypedDict):
    """Encounters that are scored together."""

    encounters: Annotated[list[Encounter], Constraint(max_length=MOST_ENCOUNTERS, min_length=1)]


Batch.__pydantic_config__ = ConfigDict(  # type: ignore[attr-defined]
    extra="forbid", json_schema_extra={"examples": [{"encounters": [_EXAMPLE]}]}
)


@cache
def batch_adapter() -> TypeAdapter[Batch]:
    """What reads a JSON batch; made once, at first use."""
    return TypeAdapter(Batch)


class RecordsError(ValueError):
    """What was sent can't be read; `faults` names the fields.

    Args:
        message: for the whole of it.
        faults: of single fields.
    """

    def __init__(self, message: str, faults: Sequence[FieldFault] = ()) -> None:
        super().__init__(message)
        self.faults = faults


def read_batch(body: bytes) -> Sequence[Mapping[str, Any]]:
    """Encounters of a JSON batch.

    Raises:
        RecordsError: it breaks the contract.
    """
    try:
        return batch_adapter().validate_json(body)["encounters"]
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        if found[0]["type"] == "json_invalid":
            raise RecordsError("the body is no JSON") from None
        named = faults(found)
        raise RecordsError(summary(named), named) from None


def columns(encounters: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Encounters by field, every accepted one; None where an encounter lacks it."""
    return {name: [encounter.get(name) for encounter in encounters] for name in ACCEPTED}


def faults(errors: Iterable[Mapping[str, Any]]) -> list[FieldFault]:
    """Pydantic's errors by field, in the contract's words, each field once, up to a bound."""
    found: dict[str, str] = {}
    for error in errors:
        if len(found) == _MOST_FAULTS:
            break
        place = [part for part in error["loc"] if part != "body"]
        at = next((i for i, part in enumerate(place) if part in ACCEPTED), None)
        if error["type"] == "extra_forbidden":
            found.setdefault(_path(place), _unknown(str(place[-1])))
        elif at is None:
            found.setdefault(_path(place) or "body", str(error["msg"]))
        else:
            expected = ACCEPTED[str(place[at])].expected
            got = _short(error.get("input"))
            found.setdefault(_path(place[: at + 1]), f"expected {expected}, got {got}")
    return list(found.items())


def _unknown(name: str) -> str:
    if name == OUTCOME:
        return "this is the outcome, which is predicted; leave it out"
    close = get_close_matches(name, ACCEPTED, n=1)
    hint = f"did you mean {close[0]}?" if close else "/v1/fields lists what is known"
    return f"unknown field; {hint}"


def summary(found: Sequence[FieldFault]) -> str:
    """The first faults as one message."""
    said = "; ".join(f"{field}: {message}" for field, message in found[:3])
    at_least = "at least " if len(found) == _MOST_FAULTS else ""
    more = f" (and {at_least}{len(found) - 3} more)" if len(found) > 3 else ""
    return f"{said}{more}"


def _path(parts: Sequence[Any]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    # A name of the caller's own choice may be of any length.
    return text if len(text) <= 3 * _SHOWN else text[: 3 * _SHOWN] + "..."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a CSV: any of the publisher's columns, in any order.

    Attributes:
        names: of the columns.
    """

    names: tuple[str, ...]

    @classmethod
    def read(cls, line: bytes) -> Header:
        """Read and check the first line.

        Raises:
            RecordsError: it is no header of ours.
        """
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip("\r\n")
        except UnicodeDecodeError:
            raise RecordsError("line 1 is not UTF-8; convert the file") from None
        try:
            names = tuple(next(csv.reader([text], strict=True), []))
        except csv.Error as error:
            raise RecordsError(f"line 1 is not readable as CSV: {error}") from None
        known = {*ACCEPTED, OUTCOME}
        strangers = (name for name in names if name not in known)
        unknown = [(_short(name), _unknown(name)) for name in islice(strangers, _MOST_FAULTS)]
        counted = Counter(names)
        twice = [(name, "named twice") for name in sorted(known) if counted[name] > 1]
        if not names or unknown or twice:
            raise RecordsError(
                "line 1 has to be a header of columns of the publisher's diabetic_data.csv "
                f"(any of them, in any order); {summary([*unknown, *twice]) or 'it is empty'}",
                [*unknown, *twice][:_MOST_FAULTS],
            )
        return cls(names)


class CsvReader:
    """Rows of a CSV, checked against the contract.

    Args:
        header: of the file.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._fields = [ACCEPTED.get(name) for name in header.names]
        patterns = [_pattern(field) for field in self._fields]
        self._line = re.compile(",".join(patterns), re.ASCII)
        self._values = [re.compile(pattern, re.ASCII) for pattern in patterns]

    def read(self, lines: Sequence[str]) -> tuple[dict[str, list[str]], dict[int, str]]:
        """Columns of the valid rows, and what is wrong with each of the others.

        Args:
            lines: of the file, without their line ends.

        Returns:
            Values by column (identifiers included, the outcome not), and messages by the place of
            their line in `lines`. An empty line is a row at fault.
        """
        matches = self._line.fullmatch
        valid: list[str] = []
        broken: dict[int, str] = {}
        for place, line in enumerate(lines):
            if matches(line):
                valid.append(line)
            elif values := self._parse(line, place, broken):
                valid.append(",".join(values))
        # All values in one list, and every so manieth of them is a column: no list for each row.
        values = ",".join(valid).split(",") if valid else []
        width = len(self._fields)
        return {
            name: values[place::width]
            for place, name in enumerate(self._header.names)
            if name != OUTCOME
        }, broken

    def _parse(self, line: str, place: int, broken: dict[int, str]) -> list[str]:
        """A line that the fast pattern refused: fine after unquoting, or at fault."""
        try:
            values = next(csv.reader([line], strict=True), [])
        except csv.Error as error:
            broken[place] = f"not readable as CSV: {error}"
            return []
        if len(values) != len(self._fields):
            broken[place] = f"{len(values)} fields, expected {len(self._fields)}"
            return []
        wrong = [
            (name, f"expected {field.expected}, got {_short(value)}")
            for name, field, pattern, value in zip(
                self._header.names, self._fields, self._values, values, strict=True
            )
            if field and not pattern.fullmatch(value)
        ]
        if wrong:
            broken[place] = summary(wrong)
            return []
        # The outcome is nobody's business here, and alone could hold a comma.
        return [value if field else "" for field, value in zip(self._fields, values, strict=True)]


def _pattern(field: Field | None) -> str:
    """What a value in a CSV has to match; nothing and `?` mean missing."""
    return rf"(?:{field.pattern}|\?)?" if field else "[^,]*"
