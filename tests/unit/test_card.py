"""The model card says everything it was given, in both forms, and nothing else becomes markup."""

from __future__ import annotations

import base64
import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest

from training import card

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br", "hr", "link", "input"}
SECTIONS = [
    "Model details",
    "Intended use",
    "Factors",
    "Metrics",
    "Decision policy",
    "Training and evaluation data",
    "Quantitative analyses",
    "Behavioural tests",
    "Promotion gates and decision",
    "Ethical considerations",
    "Caveats and recommendations",
    "References",
]
NASTY = '<script>alert("x")</script> | **b** _i_ [l](javascript:alert(1)) `c` &lt; \\| <30\n# h'


class Page(HTMLParser):
    """What is in a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "a":
            self.links.append(dict(attrs)["href"] or "")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *header: str) -> list[list[str]]:
        """Rows of the first table whose header begins so."""
        for rows in self.tables:
            if tuple(rows[0][: len(header)]) == header:
                return rows[1:]
        raise AssertionError(f"no table {header}")


def report(split: str) -> dict[str, Any]:
    return {
        "split": split,
        "rows": 15_000,
        "patients": 10_800,
        "positives": 1_665,
        "metrics": {
            "auroc": {"value": 0.67451, "low": 0.66149, "high": 0.68651},
            "auprc": {"value": 0.22512, "low": 0.21, "high": 0.24},
            "brier": {"value": 0.09414, "low": 0.0911, "high": 0.0972},
            "log_loss": {"value": 0.32321, "low": 0.31, "high": 0.33},
            "ece": {"value": 0.00517, "low": 0.004, "high": 0.011},
            "lift_top_decile": {"value": 2.4567, "low": 2.3, "high": 2.6},
            "recall_top_decile": {"value": 0.24567, "low": 0.23, "high": 0.26},
            "calibration_slope": {"value": 1.0123, "low": None, "high": None},
        },
        "slices": [
            {
                "dimension": "race", "value": "Caucasian", "rows": 11_300, "positives": 1_243,
                "auroc": 0.67, "auroc_gap": 0.0, "tpr": 0.36, "tpr_gap": 0.0, "judged": True,
            },
            {
                "dimension": "race", "value": "Hispanic", "rows": 310, "positives": 51,
                "auroc": 0.6556, "auroc_gap": -0.0144, "tpr": 0.372, "tpr_gap": 0.012,
                "judged": True,
            },
            {
                "dimension": "gender", "value": "Unknown", "rows": 1, "positives": 0,
                "auroc": None, "auroc_gap": None, "tpr": None, "tpr_gap": None, "judged": False,
            },
        ],
        "policy": [
            {
                "alert_rate": 0.1, "threshold": 0.22561, "alerts_share": 0.1003,
                "recall": 0.2457, "precision": 0.272,
            }
        ],
    }  # fmt: skip


@pytest.fixture
def facts() -> dict[str, Any]:
    return {
        "name": "diabetes_readmission",
        "version": None,
        "candidate": "lightgbm",
        "created": "2026-01-02T03:04:05+00:00",
        "run_id": "4f1f7c2a9cf8",
        "run_url": "http://127.0.0.1:5000/#/experiments/1/runs/4f1f7c2a9cf8",
        "registry_url": "",
        "git_commit": "9da1856",
        "feature_sha256": "a" * 64,
        "environment_sha256": "b" * 64,
        "parameters": {"learning_rate": 0.0312345, "num_leaves": 31, "deterministic": True},
        "calibration": {"slope": 1.02134, "intercept": 0.01},
        "seed": 130,
        "data": {
            "batches": 5,
            "train_rows": 69_432,
            "validation_rows": 15_000,
            "load_id": 1,
            "source": "https://archive.ics.uci.edu/data.zip",
            "is_synthetic": False,
            "sha": "0123456789abcdef",
        },
        "validation": report("validation"),
        "test": report("test"),
        "learning_curve": [
            {
                "batches": 1, "rows": 15_000, "train_auroc": 0.75, "auroc": 0.66,
                "auroc_low": 0.65, "auroc_high": 0.67, "auprc": 0.2,
            }
        ],
        "behaviour": [
            {"name": "invariance: ids", "passed": True, "detail": "moves by at most 0"},
            {"name": "minimum: easy cases", "passed": False, "detail": "low 0.2, high 0.1"},
        ],
        "gates": [
            {
                "name": "auroc", "required": ">= 0.66", "value": 0.674512, "passed": True,
                "detail": "",
            },
            {
                "name": "AUROC against the champion", "required": ">= -0.003", "value": None,
                "passed": True, "detail": "no champion to compare with",
            },
            {"name": "ece", "required": "<= 0.015", "value": 0.02, "passed": False, "detail": ""},
        ],
        "decision": {"promoted": True, "reason": "every gate was passed", "by": "training"},
        "top_features": [{"feature": "number_inpatient", "mean_abs_contribution": 0.27171}],
    }  # fmt: skip


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Path]:
    names = ("calibration", "roc", "confusion_10", "slices", "shap_summary", "something new")
    paths = {name: tmp_path / f"{name}.png" for name in names}
    for path in paths.values():
        path.write_bytes(PNG)
    return paths


def stopped(facts: dict[str, Any]) -> dict[str, Any]:
    decision = {"promoted": False, "reason": "gates not passed: ece", "by": "training"}
    return facts | {"test": None, "decision": decision}


def test_sections_stand_in_both_forms(facts: dict[str, Any], figures: dict[str, Path]) -> None:
    markdown, page = card.render(facts, figures)
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == SECTIONS
    assert re.findall(r'<h2 id="[a-z-]+">(.*)</h2>', page) == SECTIONS
    anchors = [link[1:] for link in Page(page).links if link.startswith("#")]
    assert anchors == re.findall(r'<h2 id="([a-z-]+)">', page)
    assert "\n\n\n" not in markdown
    assert "None" not in markdown.replace("`None`", "")


def test_numbers_have_the_digits_that_mean_something(facts: dict[str, Any]) -> None:
    page = Page(card.render(facts, {})[1])
    metrics = page.table("Metric", "Validation", "Test")
    assert [row[0] for row in metrics] == [label for label, *_ in card._METRICS.values()]
    assert [row[1] for row in metrics] == [
        "0.675 (0.661 to 0.687)",
        "0.225 (0.210 to 0.240)",
        "0.0941 (0.0911 to 0.0972)",
        "0.3232 (0.3100 to 0.3300)",
        "0.0052 (0.0040 to 0.0110)",
        "2.46 (2.30 to 2.60)",
        "24.6 % (23.0 to 26.0)",
        "1.012",
    ]
    assert page.table("Parameter") == [
        ["deterministic", "yes"],
        ["learning_rate", "0.03123"],
        ["num_leaves", "31"],
    ]
    policy = page.table("Split", "Alert rate wanted")
    assert policy[1] == ["Test", "10.0 %", "0.2256", "10.0 %", "24.6 %", "27.2 %"]


def test_every_slice_appears_with_support_and_gap(facts: dict[str, Any]) -> None:
    page = Page(card.render(facts, {})[1])
    tables = [rows[1:] for rows in page.tables if rows[0][0] == "Dimension"]
    assert len(tables) == 2
    for rows in tables:
        assert rows == [
            ["race", "Caucasian", "11,300", "1,243", "0.670", "reference", "36.0 %", "reference",
             "yes"],
            ["race", "Hispanic", "310", "51", "0.656", "\N{MINUS SIGN}0.014", "37.2 %", "+1.2 pp",
             "yes"],
            ["gender", "Unknown", "1", "0", "\N{EN DASH}", "reference", "\N{EN DASH}", "reference",
             "no"],
        ]  # fmt: skip


def test_every_gate_and_behavioural_test_appears(facts: dict[str, Any]) -> None:
    page = Page(card.render(facts, {})[1])
    passed, failed = "\N{CHECK MARK} passed", "\N{BALLOT X} FAILED"
    assert page.table("Gate") == [
        ["auroc", ">= 0.66", "0.6745", passed, ""],
        ["AUROC against the champion", ">= -0.003", "\N{EN DASH}", passed,
         "no champion to compare with"],
        ["ece", "<= 0.015", "0.02", failed, ""],
    ]  # fmt: skip
    assert [row[1] for row in page.table("Test")] == [passed, failed]


def test_a_card_without_test_says_so(facts: dict[str, Any], figures: dict[str, Path]) -> None:
    markdown, page = card.render(stopped(facts), figures)
    assert "**The test split was not read.**" in markdown
    assert "Not promoted: gates not passed: ece." in markdown
    parsed = Page(page)
    assert [len(row) for row in parsed.table("Metric", "Validation")] == [2] * 8
    assert len([rows for rows in parsed.tables if rows[0][0] == "Dimension"]) == 1
    assert ["Test", "not read", *["\N{EN DASH}"] * 3] in parsed.table("Split", "Encounters")
    with_test = card.render(facts, figures)[0]
    assert "was not read" not in with_test
    assert "Promoted to champion: every gate was passed." in with_test


def test_synthetic_data_are_called_so_at_the_top(facts: dict[str, Any]) -> None:
    assert "synthetic data" not in card.render(facts, {})[0].lower()
    facts["data"]["is_synthetic"] = True
    markdown, page = card.render(facts, {})
    assert markdown.splitlines()[2].startswith("> **\N{WARNING SIGN} SYNTHETIC DATA.")
    assert page.index("SYNTHETIC DATA") < page.index("<h2")


def test_it_says_what_it_must_not_be_used_for(facts: dict[str, Any]) -> None:
    markdown, _ = card.render(facts, {})
    for words in ("no medical device", "must not be used for decisions about the care", "CC BY 4.0",
                  "Strack et al. 2014", "1999-2008", "one split only", "is no clock"):  # fmt: skip
        assert words in markdown


def test_the_page_holds_its_figures(facts: dict[str, Any], figures: dict[str, Path]) -> None:
    markdown, page = card.render(facts, figures)
    images = Page(page).images
    assert len(images) == len(figures)
    data = base64.b64encode(PNG).decode()
    for image in images:
        assert image["alt"]
        assert image["src"] == f"data:image/png;base64,{data}"
    links = re.findall(r"!\[[^\]]+\]\(figures/([^)]+)\.png\)", markdown)
    assert sorted(links) == sorted(name.replace(" ", "%20") for name in figures)
    # Nothing is fetched: neither a script nor a style sheet nor an image of elsewhere.
    assert not Page(page).tags & {"script", "link", "iframe", "object"}


def test_a_figure_that_is_not_there_is_an_error(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        card.render(facts, {"roc": tmp_path / "roc.png"})


def test_links_only_to_the_web(facts: dict[str, Any]) -> None:
    facts["registry_url"] = "javascript:alert(1)"
    markdown, page = card.render(facts, {})
    assert f"[4f1f7c2a9cf8]({facts['run_url']})" in markdown
    links = Page(page).links
    assert facts["run_url"] in links
    assert not any("javascript" in link for link in links)
    facts["run_url"] = "https://mlflow.example/a)b|c (d)\n<e>"
    links = Page(card.render(facts, {})[1]).links
    assert "https://mlflow.example/a%29b%7Cc%20%28d%29%0A%3Ce%3E" in links


def test_no_value_becomes_markup(facts: dict[str, Any]) -> None:
    """A value of every text of the facts, and of every key that is printed."""
    tidy = Page(card.render(facts, {})[1])
    nasty = spoiled(copy.deepcopy(facts))
    nasty["parameters"] = {NASTY: NASTY}
    nasty["validation"]["metrics"][NASTY] = {"value": 1.0, "low": None, "high": None}
    markdown, page = card.render(nasty, {})
    assert "<script" not in markdown
    assert "<script" not in page
    found = Page(page)
    assert found.tags == tidy.tags
    for rows in found.tables:
        assert len({len(row) for row in rows}) == 1
    shown = " ".join(NASTY.split())
    assert found.table("Parameter") == [[shown, shown]]
    assert [row[0] for row in found.table("Gate")] == [shown] * 3
    assert shown in [row[0] for row in found.table("Metric")]
    assert not any("javascript" in link for link in found.links)


def spoiled(value: Any) -> Any:
    """The same with every text replaced."""
    if isinstance(value, dict):
        return {key: spoiled(each) for key, each in value.items()}
    if isinstance(value, list):
        return [spoiled(each) for each in value]
    return NASTY if isinstance(value, str) else value


def test_names_stay_as_they_are_in_markdown(facts: dict[str, Any]) -> None:
    markdown, _ = card.render(facts, {})
    assert "| number_inpatient | 0.2717 |" in markdown
    assert "| ece | <= 0.015 | 0.02 |" in markdown


@pytest.mark.parametrize(
    "empty", ["parameters", "learning_curve", "behaviour", "gates", "top_features"]
)
def test_what_is_empty_is_said_to_be(facts: dict[str, Any], empty: str) -> None:
    facts[empty] = type(facts[empty])()
    Page(card.render(facts, {})[1])


def test_an_evaluation_without_slices_and_policy(facts: dict[str, Any]) -> None:
    for split in ("validation", "test"):
        facts[split] |= {"slices": [], "policy": []}
    markdown, _ = card.render(facts, {})
    assert "No slice was looked at." in markdown
    assert "No threshold was chosen." in markdown


def test_values_that_are_no_numbers_are_dashes(facts: dict[str, Any]) -> None:
    facts["validation"]["metrics"]["auroc"] = {"value": float("nan"), "low": None, "high": None}
    del facts["validation"]["metrics"]["ece"]
    rows = Page(card.render(facts, {})[1]).table("Metric")
    assert rows[0][1] == rows[4][1] == "\N{EN DASH}"


def test_three_classes(facts: dict[str, Any]) -> None:
    assert "one-against-rest" not in card.render(facts, {})[0]
    markdown, _ = card.render(facts | {"three_class_auroc": 0.61234}, {})
    assert "AUROCs on validation rows: 0.612." in markdown


def test_a_version_that_is_known_is_in_the_title(facts: dict[str, Any]) -> None:
    markdown, _ = card.render(facts | {"version": "7"}, {})
    assert markdown.startswith("# Model card: diabetes_readmission, version 7\n")


@pytest.mark.parametrize("fact", ["seed", "git_commit", "decision"])
def test_a_missing_fact_is_an_error(facts: dict[str, Any], fact: str) -> None:
    del facts[fact]
    with pytest.raises(jinja2.UndefinedError, match=fact):
        card.render(facts, {})


def test_the_same_facts_give_the_same_card(facts: dict[str, Any], figures: dict[str, Path]) -> None:
    assert card.render(facts, figures) == card.render(copy.deepcopy(facts), figures)
