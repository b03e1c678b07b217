"""Each gate can be failed alone, by what it is there for and by nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from training import evaluate
from training.gates import Gate, judge, replaces_real, worst_gap_growth

BEHAVIOUR = (
    "invariance: encounter and patient ids",
    "direction: more inpatient visits never lower the mean risk",
    "minimum: known easy cases",
)


def passing() -> dict[str, Any]:
    """Arguments of `judge` for a model that passes all."""
    values = {"auroc": 0.675, "auprc": 0.23, "lift_top_decile": 2.5, "ece": 0.008}
    values["calibration_slope"] = 1.02
    return {
        "report": {"metrics": {name: {"value": value} for name, value in values.items()}},
        "behaviour": [{"name": name, "passed": True, "detail": "x"} for name in BEHAVIOUR],
        "comparison": {
            "version": "3",
            "auroc": {"value": 0.001, "low": -0.002, "high": 0.004},
            "log_loss": {"challenger": 0.32, "champion": 0.321},
            "worst_gap_growth": {"growth": 0.01, "slice": "race Asian"},
        },
    }


def judged(arguments: dict[str, Any]) -> list[Gate]:
    given = copy.deepcopy(arguments)
    report, behaviour, comparison = (
        given.pop(name) for name in ("report", "behaviour", "comparison")
    )
    return judge(report, behaviour, comparison, **given)


def failed(arguments: dict[str, Any]) -> list[str]:
    return [gate.name for gate in judged(arguments) if not gate.passed]


def metric(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["report"]["metrics"][name]["value"] = value

    return change


def behaves_badly(at: int) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["behaviour"][at]["passed"] = False

    return change


def compared(part: str, **values: float) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["comparison"][part] |= values

    return change


BROKEN: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("auroc", metric("auroc", 0.6599)),
    ("auroc", metric("auroc", float("nan"))),
    ("auprc", metric("auprc", 0.2199)),
    ("lift_top_decile", metric("lift_top_decile", 2.29)),
    ("ece", metric("ece", 0.0151)),
    ("calibration_slope", metric("calibration_slope", 0.849)),
    ("calibration_slope", metric("calibration_slope", 1.151)),
    ("calibration_slope", metric("calibration_slope", float("nan"))),
    *((name, behaves_badly(at)) for at, name in enumerate(BEHAVIOUR)),
    ("no suspected leak", metric("auroc", 0.7201)),
    ("real encounters", lambda arguments: arguments.update(replaces_real=True)),
    ("AUROC against the champion", compared("auroc", low=-0.0031)),
    ("AUROC against the champion", compared("auroc", low=float("nan"))),
    ("log loss against the champion", compared("log_loss", challenger=0.32101)),
    ("slice gaps against the champion", compared("worst_gap_growth", growth=0.0501)),
]

AT_THE_BOUND = [
    metric("auroc", 0.66),
    metric("auroc", 0.72),
    metric("auprc", 0.22),
    metric("lift_top_decile", 2.3),
    metric("ece", 0.015),
    metric("calibration_slope", 0.85),
    metric("calibration_slope", 1.15),
    compared("auroc", low=-0.003),
    compared("log_loss", challenger=0.321),
    compared("worst_gap_growth", growth=0.05),
]


def test_a_good_model_passes_every_gate() -> None:
    assert failed(passing()) == []


@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_one_fault_fails_its_gate_only(name: str, broken: Callable[[dict[str, Any]], None]) -> None:
    arguments = passing()
    broken(arguments)
    assert failed(arguments) == [name]


@pytest.mark.parametrize("change", AT_THE_BOUND)
def test_the_bound_itself_passes(change: Callable[[dict[str, Any]], None]) -> None:
    arguments = passing()
    change(arguments)
    assert failed(arguments) == []


def test_no_gate_cannot_fail() -> None:
    arguments = passing() | {"replaces_real": True}
    assert {gate.name for gate in judged(arguments)} == {name for name, _ in BROKEN}


def test_every_gate_says_what_it_asked_for_and_found() -> None:
    for gate in judged(passing()):
        assert gate.required
        assert (gate.value is None) == (gate.name in BEHAVIOUR)
        assert gate.as_dict() == {
            "name": gate.name,
            "required": gate.required,
            "value": gate.value,
            "passed": True,
            "detail": gate.detail,
        }


def gate_of(arguments: dict[str, Any], name: str) -> Gate:
    return next(gate for gate in judged(arguments) if gate.name == name)


def test_suspected_leak_passes_where_somebody_answers_for_it_by_name() -> None:
    arguments = passing()
    metric("auroc", 0.9)(arguments)
    assert "suspected leakage" in gate_of(arguments, "no suspected leak").detail
    arguments["leak_override"] = "Ada"
    assert failed(arguments) == []
    assert gate_of(arguments, "no suspected leak").detail == "overridden by Ada"


def test_override_opens_no_other_gate_and_is_silent_without_a_leak() -> None:
    arguments = passing() | {"leak_override": "Ada"}
    assert gate_of(arguments, "no suspected leak").detail == ""
    metric("auroc", 0.5)(arguments)
    assert failed(arguments) == ["auroc"]


def test_first_model_has_no_champion_to_beat() -> None:
    gates = judged(passing() | {"comparison": None})
    against = [gate for gate in gates if gate.name.endswith("against the champion")]
    assert len(against) == 3
    assert {(gate.passed, gate.value, gate.detail) for gate in against} == {
        (True, None, "no champion to compare with")
    }


def test_the_champion_itself_passes() -> None:
    arguments = passing()
    compared("auroc", value=0.0, low=0.0, high=0.0)(arguments)
    compared("log_loss", challenger=0.321 + 1e-12)(arguments)
    compared("worst_gap_growth", growth=0.0)(arguments)
    assert failed(arguments) == []


@pytest.mark.parametrize(
    ("is_synthetic", "champion", "replaces"),
    [
        ("True", {"is_synthetic": "False"}, True),
        ("True", {"is_synthetic": "True"}, False),
        ("True", {}, False),
        ("False", {"is_synthetic": "False"}, False),
        ("False", {"is_synthetic": "True"}, False),
    ],
)
def test_synthetic_never_replaces_real(
    is_synthetic: str, champion: dict[str, str], replaces: bool
) -> None:
    assert replaces_real(is_synthetic, champion) is replaces


def one(value: str, gap: float | None, judged: bool = True) -> dict[str, Any]:
    return {"dimension": "race", "value": value, "tpr_gap": gap, "judged": judged}


@pytest.mark.parametrize(
    ("challenger", "champion", "growth"),
    [
        (-0.08, -0.02, 0.06),
        (0.08, -0.02, 0.06),
        (-0.02, -0.08, -0.06),
        (-0.03, 0.03, 0.0),
        (-0.08, 0.0, 0.08),
    ],
)
def test_growth_of_a_gap_is_that_of_its_size(
    challenger: float, champion: float, growth: float
) -> None:
    before = [one("Caucasian", 0.0), one("Asian", champion)]
    after = [one("Caucasian", 0.0), one("Asian", challenger)]
    found = worst_gap_growth(after, before)
    assert found == {"growth": pytest.approx(growth), "slice": "race Asian"}


def test_the_worst_slice_counts() -> None:
    before = [one("a", 0.0), one("b", 0.01), one("c", -0.05)]
    after = [one("a", 0.0), one("b", 0.02), one("c", -0.12)]
    assert worst_gap_growth(after, before) == {"growth": pytest.approx(0.07), "slice": "race c"}


@pytest.mark.parametrize(
    ("challenger", "champion"),
    [
        (one("Asian", -0.5, judged=False), one("Asian", 0.01)),
        (one("Asian", -0.5), one("Asian", 0.01, judged=False)),
        (one("Asian", None, judged=False), one("Asian", None, judged=False)),
        (one("Asian", -0.5), one("Other", 0.01)),
    ],
)
def test_slices_that_are_not_judged_do_not_count(
    challenger: dict[str, Any], champion: dict[str, Any]
) -> None:
    found = worst_gap_growth([challenger], [champion])
    assert found == {"growth": 0.0, "slice": "no slice judged"}


@pytest.mark.parametrize(("positives", "fails"), [(49, False), (50, True)])
def test_slices_are_judged_from_fifty_readmissions_on(positives: int, fails: bool) -> None:
    groups = {"race": np.array(["A"] * 200 + ["B"] * 120, object)}
    target = np.array([1] * 100 + [0] * 100 + [1] * positives + [0] * (120 - positives), np.int8)
    found_all = np.where(target == 1, 0.9, 0.0)
    found_no_b = np.where(groups["race"] == "A", found_all, 0.0)
    before, after = (
        evaluate.slices(groups, target, probability, {"0.2": 0.5})
        for probability in (found_all, found_no_b)
    )
    arguments = passing()
    arguments["comparison"]["worst_gap_growth"] = worst_gap_growth(after, before)
    assert failed(arguments) == (["slice gaps against the champion"] if fails else [])
