"""The page's own logic; the API of these tests is a fake on the loopback address."""

from __future__ import annotations

import io
import json
import re
import string
from pathlib import Path
from typing import Any

import pytest

import ui
from ingestion import contract
from settings import Settings
from ui import batch, charts, form, model, parts
from ui.__main__ import arguments
from ui.words import LANGUAGES, Words, words

ENGLISH, SPANISH = words("en"), words("es")
BY_NAME = {one.name: one for one in contract.FIELDS}
FIELDS = {
    one.name: {
        "name": one.name,
        "kind": one.kind,
        "values": [
            {"value": int(value) if one.kind == "code" else value, "label": value}
            for value in one.values
        ],
        "low": one.low,
        "high": one.high,
    }
    for one in contract.FIELDS
}


class TestWords:
    def test_languages_say_the_same_things(self) -> None:
        def keys(node: Any, path: str = "") -> set[str]:
            if not isinstance(node, dict):
                return {path}
            return {key for name in node for key in keys(node[name], f"{path}/{name}")}

        assert keys(ENGLISH.all) == keys(SPANISH.all)

    def test_gaps_are_the_same_in_each_language(self) -> None:
        def gaps(text: str) -> set[str | None]:
            return {name for _, name, _, _ in string.Formatter().parse(text) if name}

        for key, text in ENGLISH.all["texts"].items():
            assert gaps(text) == gaps(SPANISH.all["texts"][key]), key

    @pytest.mark.parametrize("language", LANGUAGES)
    @pytest.mark.parametrize("name", BY_NAME)
    def test_every_field_and_value_has_a_label(self, language: str, name: str) -> None:
        known = words(language)
        assert name in known.all["fields"]
        groups = known.all["values"]
        for value in BY_NAME[name].values:
            assert value in groups.get(name, {}) or value in groups["any"]

    @pytest.mark.parametrize("language", LANGUAGES)
    @pytest.mark.parametrize("name", BY_NAME)
    def test_no_two_values_of_a_field_share_a_label(self, language: str, name: str) -> None:
        # The browser sends a choice by its label.
        labels = form.options(FIELDS[name], words(language))
        assert len(set(labels.values())) == len(labels)
        assert set(labels) == set(BY_NAME[name].values) - {contract.MISSING}

    def test_what_the_pages_say_exists(self) -> None:
        folder = Path(ui.__file__).parent
        used = {
            key
            for file in folder.glob("*.py")
            for key in re.findall(
                r"\b(?:words|said|text|text\(\))\(\s*\"([a-z_.]+)\"", file.read_text()
            )
        }
        assert len(used) > 50
        assert used <= ENGLISH.all["texts"].keys()

    def test_unknown_language_is_english(self) -> None:
        assert words("xx").language == "en"

    @pytest.mark.parametrize(("known", "expected"), [(ENGLISH, "1,234.5"), (SPANISH, "1.234,5")])
    def test_numbers(self, known: Words, expected: str) -> None:
        assert known.number(1234.5, 1) == expected

    def test_percent_and_nothing(self) -> None:
        assert SPANISH.percent(0.1234) == "12,3\N{NBSP}%"
        assert ENGLISH.percent(None) == ENGLISH.number(None) == "\N{EN DASH}"

    def test_value_that_is_newer_than_the_page(self) -> None:
        assert ENGLISH.value("race", "Martian") == "Martian"
        assert ENGLISH.value("admission_type_id", 99, "New label") == "New label"


class TestForm:
    def test_form_asks_for_every_field_but_ids_and_outcome(self) -> None:
        grouped = [name for names in form.GROUPS.values() for name in names]
        assert len(grouped) == len(set(grouped))
        assert {*grouped, *form.others(FIELDS)} == set(BY_NAME) - form.NOT_ASKED
        assert set(form.drugs(FIELDS)) == set(contract.DRUGS)

    def test_nothing_known_is_an_empty_request(self) -> None:
        assert form.encounter_of(FIELDS, dict.fromkeys(BY_NAME)) == {}
        assert form.encounter_of(FIELDS, {"diag_1": " ", "race": "?"}) == {}

    def test_request_holds_what_is_known_by_its_type(self) -> None:
        held = {"age": "[70-80)", "admission_type_id": "3", "number_inpatient": 0, "weight": None}
        assert form.encounter_of(FIELDS, held) == {
            "age": "[70-80)",
            "admission_type_id": 3,
            "number_inpatient": 0,
        }

    @pytest.mark.parametrize(("typed", "sent"), [(" v45", "V45"), ("250,83", "250.83")])
    def test_diagnoses_are_tidied(self, typed: str, sent: str) -> None:
        assert form.encounter_of(FIELDS, {"diag_2": typed}) == {"diag_2": sent}

    @pytest.mark.parametrize("name", ["low", "middle", "high"])
    def test_examples_are_valid(self, name: str) -> None:
        request = form.encounter_of(FIELDS, form.filled(FIELDS, form.examples()[name]))
        assert request.keys() >= form.examples()[name].keys()
        for key, value in request.items():
            assert re.fullmatch(BY_NAME[key].pattern, str(value)), key

    def test_start_is_valid_and_knows_no_patient(self) -> None:
        request = form.encounter_of(FIELDS, form.filled(FIELDS))
        assert not {"age", "gender", "race", "diag_1"} & request.keys()
        for key, value in request.items():
            assert re.fullmatch(BY_NAME[key].pattern, str(value)), key

    def test_bands_are_in_the_order_of_their_numbers(self) -> None:
        assert list(form.options(FIELDS["age"], ENGLISH))[:2] == ["[0-10)", "[10-20)"]
        assert list(form.options(FIELDS["weight"], ENGLISH))[-1] == ">200"
        assert list(form.options(FIELDS["A1Cresult"], ENGLISH)) == ["None", "Norm", ">7", ">8"]

    def test_complaints_are_in_words(self) -> None:
        assert "250.83" in form.complaint(FIELDS["diag_1"], SPANISH)
        assert "14" in form.complaint(FIELDS["time_in_hospital"], ENGLISH)
        assert form.complaint(FIELDS["race"], ENGLISH) == ENGLISH("invalid.value")


class TestBatch:
    @pytest.mark.parametrize(
        "text", ["age,gender\r\n[70-80),Male\r\n\r\n", "age;gender\n[70-80);Male\n"]
    )
    def test_rows(self, text: str) -> None:
        rows = list(batch.rows_of(io.StringIO(text, newline="")))
        assert rows == [["age", "gender"], ["[70-80)", "Male"]]

    def test_summary(self) -> None:
        summary = batch.Summary()
        summary.add(
            [
                {"row": "1", "probability": "0.31", "alert": "true"},
                {"row": "2", "probability": "0.04", "alert": "false"},
                {"row": "3", "excluded": "died"},
                {"row": "4", "error": "age: unknown"},
            ]
        )
        assert (summary.rows, summary.alerts, summary.excluded, summary.broken) == (4, 1, 1, 1)
        assert summary.errors == [("4", "age: unknown")]
        assert (summary.risks[0], summary.risks[6]) == (1, 1)
        assert summary.csv.decode().splitlines()[1] == "1,,,0.31,,true,,"

    def test_certain_risk_is_in_the_last_step(self) -> None:
        summary = batch.Summary()
        summary.add([{"row": "1", "probability": "1.0", "alert": "true"}])
        assert summary.risks[-1] == 1

    def test_example_has_only_columns_that_the_examples_fill(self) -> None:
        described = {"fields": list(FIELDS.values()), "examples": [{"age": "[70-80)", "race": "?"}]}
        assert batch.example_csv(described).decode() == "race,age\n?,[70-80)\n"


class TestModel:
    def test_metrics_with_and_without_test_rows(self) -> None:
        metric = {"value": 0.251, "low": 0.232, "high": 0.2729}
        facts = {"validation": {"metrics": {"recall_top_decile": metric, "auroc": metric}}}
        rows = model.metric_rows(facts, SPANISH)
        assert rows[0]["Validación"] == "25,1\N{NBSP}% (23,2\N{NBSP}% a 27,3\N{NBSP}%)"
        assert rows[1]["Validación"] == "0,251 (0,232 a 0,273)"
        assert {row["Prueba"] for row in rows} == {"\N{EN DASH}"}

    def test_facts_that_are_absent(self) -> None:
        assert model.metric_rows({}, ENGLISH) == model.policy_rows({}, ENGLISH) == []


class TestCharts:
    def test_reasons_say_in_text_what_the_colour_says(self) -> None:
        found = [
            {"label": "visits", "value": "2", "contribution": 0.4, "effect": "raises"},
            {"label": "age", "value": "45.0", "contribution": -0.2, "effect": "lowers"},
        ]
        drawn = json.dumps(charts.reasons(found, SPANISH).to_dict(), ensure_ascii=False)
        assert "\N{BLACK UP-POINTING TRIANGLE}\N{MULTIPLICATION SIGN}1,49" in drawn
        assert "\N{BLACK DOWN-POINTING TRIANGLE}\N{MULTIPLICATION SIGN}0,82" in drawn
        assert "age: 45" in drawn

    def test_charts_of_little(self) -> None:
        charts.risks([0] * 20, ENGLISH).to_dict()
        charts.slices(
            [{"dimension": "age", "value": "under 30", "tpr": 0.0, "judged": False}], ENGLISH
        ).to_dict()


def test_text_of_the_api_is_no_markup() -> None:
    assert parts.plain("[a](b) <i> $x$") == r"\[a\](b) \<i\> \$x\$"


def test_start_listens_where_the_settings_say_and_sends_nothing_home() -> None:
    flags = arguments(Settings(ui_host="127.0.0.1", ui_port=8600))
    assert flags[:2] == ["run", str(Path(ui.__file__).with_name("app.py"))]
    assert {"--server.port=8600", "--browser.gatherUsageStats=false"} <= set(flags)
