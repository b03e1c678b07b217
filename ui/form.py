"""The form of one encounter: what it asks, what it starts with, and what is sent of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from ui import parts
from ui.words import Words

NOT_ASKED = frozenset({"encounter_id", "patient_nbr", "readmitted"})
MISSING = "?"

COMMON_DRUGS = (
    "insulin",
    "metformin",
    "glipizide",
    "glyburide",
    "glimepiride",
    "pioglitazone",
    "rosiglitazone",
    "repaglinide",
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "patient": (
        *("age", "gender", "race", "weight", "payer_code"),
        *("number_inpatient", "number_emergency", "number_outpatient"),
    ),
    "admission": (
        *("admission_type_id", "admission_source_id", "medical_specialty"),
        *("discharge_disposition_id", "time_in_hospital", "num_medications", "num_procedures"),
    ),
    "diagnoses": ("diag_1", "diag_2", "diag_3", "number_diagnoses"),
    "labs": ("A1Cresult", "max_glu_serum", "num_lab_procedures"),
    "medicines": (*COMMON_DRUGS, "change", "diabetesMed"),
}
"""As a clinician thinks; what the API has beyond these are the medicines that are rarely given."""

_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(("number_inpatient", "number_emergency", "number_outpatient"), 0),
    **dict.fromkeys(("A1Cresult", "max_glu_serum"), "None"),
    **dict.fromkeys(("change", "diabetesMed"), "No"),
}
_BY_NUMBER = ("age", "weight", "A1Cresult", "max_glu_serum")
_BY_LABEL = ("medical_specialty",)
_EXAMPLES = Path(__file__).with_name("examples.json")

Fields = Mapping[str, Mapping[str, Any]]


def examples() -> dict[str, dict[str, Any]]:
    """Made-up patients by the name of their example."""
    loaded: dict[str, dict[str, Any]] = json.loads(_EXAMPLES.read_text(encoding="utf-8"))
    return loaded


def asked(fields: Fields) -> list[str]:
    """Fields that the form asks for."""
    return [name for name in fields if name not in NOT_ASKED]


def others(fields: Fields) -> list[str]:
    """Fields that no group names: the medicines that are rarely given."""
    grouped = {name for names in GROUPS.values() for name in names}
    return [name for name in asked(fields) if name not in grouped]


def drugs(fields: Fields) -> list[str]:
    """All medicines."""
    return [*COMMON_DRUGS, *others(fields)]


def filled(fields: Fields, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What every widget holds for an encounter, or (None) at the start; None: not known."""
    usual = dict.fromkeys(drugs(fields), "No")
    values = usual | (dict(_DEFAULTS) if known is None else dict(known))
    return {name: _held(fields[name], values.get(name)) for name in asked(fields)}


def encounter_of(fields: Fields, held: Mapping[str, Any]) -> dict[str, Any]:
    """The request for what the widgets hold; what is not known is left out."""
    encounter: dict[str, Any] = {}
    for name in asked(fields):
        value = held.get(name)
        if isinstance(value, str):
            value = value.strip()
        if value is None or value in ("", MISSING):
            continue
        kind = fields[name]["kind"]
        if kind == "icd9":
            # Written as doctors do in half of the world, or as they do in a hurry.
            value = str(value).upper().replace(",", ".")
        encounter[name] = int(value) if kind in ("count", "code") else value
    return encounter


def in_form(fields: Fields) -> dict[str, Any]:
    """What the widgets of this session hold."""
    return {name: st.session_state.get(parts.FIELD + name) for name in asked(fields)}


def fill(values: Mapping[str, Any]) -> None:
    """Put values into the widgets of this session."""
    for name, value in values.items():
        st.session_state[parts.FIELD + name] = value


def show(fields: Fields, wrong: Mapping[str, str]) -> None:
    """The form, with what is wrong beside the field that it is wrong in."""
    words = parts.text()
    for group, names in GROUPS.items():
        with st.container(border=True):
            st.header(words(f"group.{group}"), anchor=False)
            if group == "medicines":
                st.caption(words("hint.medicines"))
            _grid(fields, [name for name in names if name in fields], wrong)
            if group == "medicines" and (rest := others(fields)):
                with st.expander(words("group.others"), expanded=bool(set(rest) & set(wrong))):
                    _grid(fields, rest, wrong)


def complaint(field: Mapping[str, Any], words: Words) -> str:
    """What a value of this field has to be like."""
    if field["kind"] == "icd9":
        return words("invalid.icd9")
    if field["kind"] == "count":
        return words("invalid.count", low=field["low"], high=field["high"])
    return words("invalid.value")


def options(field: Mapping[str, Any], words: Words) -> dict[str, str]:
    """Labels of a field's values by value, in the order in which a reader looks for them."""
    name = str(field["name"])
    labels = {
        str(option["value"]): words.value(name, option["value"], str(option.get("label") or ""))
        for option in field.get("values", ())
        if str(option["value"]) != MISSING
    }
    if name in _BY_NUMBER:
        return dict(sorted(labels.items(), key=lambda item: _first_number(item[0])))
    if name in _BY_LABEL:
        return dict(sorted(labels.items(), key=lambda item: item[1]))
    return labels


def _first_number(value: str) -> float:
    found = re.search(r"\d+", value)
    # Of the tests, "None" and "Norm" come before any number.
    return float(found.group()) if found else -2.0 + (value == "Norm")


def _held(field: Mapping[str, Any], value: Any) -> Any:
    if value is None or value == MISSING:
        return "" if field["kind"] == "icd9" else None
    return int(value) if field["kind"] == "count" else str(value)


def _grid(fields: Fields, names: list[str], wrong: Mapping[str, str]) -> None:
    # Row by row, so that on a phone, where columns stack, the order stays.
    for start in range(0, len(names), 2):
        for column, name in zip(st.columns(2), names[start : start + 2], strict=False):
            with column:
                _input(fields, name)
                if name in wrong:
                    words = parts.text()
                    st.error(f"**{words.field(name)}:** {complaint(fields[name], words)}")


def _input(fields: Fields, name: str) -> None:
    words, field, key = parts.text(), fields[name], parts.FIELD + name
    label = words.field(name)
    if field["kind"] == "count":
        st.number_input(
            label,
            min_value=int(field["low"]),
            max_value=int(field["high"]),
            value=None,
            step=1,
            key=key,
            placeholder=words("unknown"),
            on_change="ignore",
            persist_state="session",
        )
    elif field["kind"] == "icd9":
        st.text_input(
            label,
            key=key,
            max_chars=8,
            placeholder=words("unknown"),
            help=words("hint.icd9"),
            autocomplete="off",
            on_change="ignore",
            persist_state="session",
        )
    else:
        labels = options(field, words)
        medicine = name in drugs(fields)
        st.selectbox(
            label,
            list(labels),
            index=None,
            format_func=lambda value: labels.get(str(value), str(value)),
            key=key,
            placeholder=words("unknown"),
            on_change=_follow_medicines if medicine else "ignore",
            args=(drugs(fields),) if medicine else None,
            persist_state="session",
        )


def _follow_medicines(names: list[str]) -> None:
    """Two fields sum the medicines up; nobody should have to say it twice."""
    given = {st.session_state.get(parts.FIELD + name) for name in names} - {None, "No"}
    st.session_state[f"{parts.FIELD}diabetesMed"] = "Yes" if given else "No"
    st.session_state[f"{parts.FIELD}change"] = "Ch" if given & {"Up", "Down"} else "No"
