"""Reasons in plain words, in English and Spanish."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from serving.model import Floats

Language = Literal["en", "es"]

_SEEDS = {
    "admission_type_code": ("admission_types", "admission_type_id"),
    "admission_source_code": ("admission_sources", "admission_source_id"),
    "discharge_code": ("discharge_dispositions", "discharge_disposition_id"),
}


@cache
def words(language: Language) -> dict[str, Any]:
    """Texts of a language: `features` (labels), `values` by feature, and `texts`."""
    file = Path(__file__).parent / "words" / f"{language}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def code_labels(tables: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What the codes of admissions and discharges mean, from the seeds that the model carries."""
    found = {}
    for feature, (table, key) in _SEEDS.items():
        columns = tables[table]["columns"]
        code, text = columns.index(key), columns.index("description")
        found[feature] = {str(row[code]): row[text] for row in tables[table]["rows"]}
    return found


def reasons(
    names: Sequence[str],
    row: Sequence[Any],
    shares: Floats,
    labels: Mapping[str, Mapping[str, str]],
    top: int,
    language: Language,
) -> list[dict[str, Any]]:
    """The features that move one encounter most, the strongest first.

    Args:
        names: of the features.
        row: their values.
        shares: (features,) of the log odds.
        labels: what codes mean, see `code_labels`.
        top: how many.
        language: of the texts.
    """
    order = sorted(range(len(names)), key=lambda index: -abs(shares[index]))[:top]
    found = []
    for index in order:
        name, share = names[index], float(shares[index])
        known = words(language)
        label = known["features"].get(name, name)
        value = _value(name, row[index], known, labels)
        effect = "raises" if share > 0 else "lowers"
        odds = math.exp(share)
        found.append(
            {
                "feature": name,
                "label": label,
                "value": value,
                "contribution": share,
                "odds_ratio": odds,
                "effect": effect,
                "text": known["texts"][effect].format(
                    label=label, value=value, odds=_number(odds, known)
                ),
            }
        )
    return found


def _value(
    name: str, value: Any, known: Mapping[str, Any], labels: Mapping[str, Mapping[str, str]]
) -> str:
    if name.startswith(("is_", "has_", "takes_", "insulin_")) or name.endswith(
        ("_measured", "_changed")
    ):
        return str(known["texts"]["yes" if value else "no"])
    text = str(value)
    if (said := known["values"].get(name, {}).get(text)) is not None:
        return str(said)
    if text in labels.get(name, {}):
        return labels[name][text]
    if isinstance(value, float):
        return _number(value, known)
    return str(known["values"]["*"].get(text, text))


def _number(value: float, known: Mapping[str, Any]) -> str:
    text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return text.replace(".", known["texts"]["decimal_point"])
