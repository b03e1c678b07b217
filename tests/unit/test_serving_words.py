"""Reasons in plain words: every feature has one in both languages, and values are told rightly."""

from __future__ import annotations

import csv
import json
import re
from typing import Any, get_args

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

from serving import words
from serving.words import Language
from training.features import PROJECT, TRAIN_MODEL

LANGUAGES: tuple[Language, ...] = get_args(Language)


def features() -> dict[str, dict[str, Any]]:
    """Columns of clean_data that dbt calls features."""
    text = (PROJECT / "models" / "_features__models.yml").read_text()
    models = {model["name"]: model for model in yaml.safe_load(text)["models"]}
    return {
        column["name"]: column
        for column in models[TRAIN_MODEL]["columns"]
        if column.get("config", {}).get("meta", {}).get("role") == "feature"
    }


def test_dbt_has_as_many_features_as_we_think() -> None:
    assert len(features()) == 64


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_feature_has_a_label_and_no_label_is_superfluous(language: Language) -> None:
    labels = words.words(language)["features"]
    assert set(labels) == set(features())
    assert all(label and label == label.strip() for label in labels.values())
    assert len(set(labels.values())) == len(labels)


def test_both_languages_say_the_same_things() -> None:
    english, spanish = (words.words(language) for language in LANGUAGES)
    assert english.keys() == spanish.keys() == {"features", "values", "texts"}
    assert english["texts"].keys() == spanish["texts"].keys()
    told = {name: set(values) for name, values in spanish["values"].items()}
    # What codes mean stands in the seeds, in English alone.
    codes = {name: told.pop(name) for name in words._SEEDS}
    assert {name: set(values) for name, values in english["values"].items()} == told
    assert set(told) - {"*"} <= set(features())
    for feature, (seed, key) in words._SEEDS.items():
        with (PROJECT / "seeds" / f"{seed}.csv").open() as file:
            assert {row[key] for row in csv.DictReader(file)} == codes[feature]
    for effect in ("raises", "lowers"):
        names = [set(re.findall(r"{(\w+)}", w["texts"][effect])) for w in (english, spanish)]
        assert names[0] == names[1] == {"label", "value", "odds"}
        assert english["texts"][effect] != spanish["texts"][effect]


def said(name: str, value: Any, language: Language = "en", labels: Any = None) -> str:
    """How the value of a feature is told."""
    (reason,) = words.reasons([name], [value], np.array([0.5]), labels or {}, 1, language)
    assert reason["value"] in reason["text"]
    assert reason["label"] in reason["text"]
    return str(reason["value"])


def test_flags_are_yes_or_no() -> None:
    flags = {name for name in features() if said(name, 1) == "yes"}
    assert flags >= {"is_female", "takes_metformin", "insulin_up", "a1c_measured"}
    assert all(features()[name]["data_type"] == "integer" for name in flags)
    for name in flags:
        assert (said(name, 0), said(name, 1, "es"), said(name, 0, "es")) == ("no", "sí", "no")
    # What counts is not a flag.
    counts = {"number_inpatient", "time_in_hospital", "doses_raised", "diabetes_medications"}
    assert counts.isdisjoint(flags)
    assert [said(name, 1) for name in counts] == ["1"] * 4


def test_numbers_have_the_languages_point() -> None:
    assert (said("age_midpoint", 5.5), said("age_midpoint", 5.5, "es")) == ("5.50", "5,50")
    assert (said("age_midpoint", 75.4), said("age_midpoint", 75.4, "es")) == ("75", "75")
    (reason,) = words.reasons(["number_inpatient"], [2], np.array([0.25]), {}, 1, "es")
    assert "1,28" in reason["text"]
    assert "1.28" not in reason["text"]


def test_codes_are_told_by_what_they_mean() -> None:
    tables = {
        name: {"columns": [key, "description", "more"], "rows": [[code, text, None]]}
        for name, key, code, text in (
            ("admission_types", "admission_type_id", 3, "Elective"),
            ("admission_sources", "admission_source_id", 7, "Emergency Room"),
            ("discharge_dispositions", "discharge_disposition_id", 6, "Home health"),
        )
    }
    labels = words.code_labels(tables)
    assert said("admission_type_code", 3, labels=labels) == "Elective"
    assert said("admission_source_code", 7, labels=labels) == "Emergency Room"
    assert said("discharge_code", 6, labels=labels) == "Home health"
    assert said("discharge_code", 6, "es", labels) == "Domicilio con atención domiciliaria"
    assert said("discharge_code", 99, labels=labels) == "99"
    assert set(labels) <= set(features())


def test_texts_are_translated_where_there_are_words_for_them() -> None:
    assert said("medical_specialty", "Cardiology") == said("medical_specialty", "Cardiology")
    assert (said("insulin", "Up"), said("insulin", "Up", "es")) == ("raised", "aumentada")
    assert said("diag_1_category", "428") == "428"
    assert said("race", "Unknown") == "not known"


def test_the_strongest_come_first_and_say_what_they_do() -> None:
    names = ["race", "insulin", "number_inpatient"]
    found = words.reasons(names, ["Asian", "Up", 3], np.array([0.1, -0.7, 0.4]), {}, 2, "en")
    assert [reason["feature"] for reason in found] == ["insulin", "number_inpatient"]
    assert [reason["effect"] for reason in found] == ["lowers", "raises"]
    assert found[0]["odds_ratio"] == pytest.approx(np.exp(-0.7))
    assert (
        found[0]["text"]
        == "insulin: raised. It lowers the risk (odds \N{MULTIPLICATION SIGN} 0.50)."
    )
    json.dumps(found)
    assert len(words.reasons(names, ["Asian", "Up", 3], np.zeros(3), {}, 64, "en")) == 3
