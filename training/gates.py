"""What a model has to show before it may become champion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SLICE_GAP_GROWTH = 0.05
LEAK_AUROC = 0.72
"""Nobody has honestly beaten 0.70 on these data; see docs/experiments.md for what passes it."""

_BOUNDS: tuple[tuple[str, float | None, float | None], ...] = (
    ("auroc", 0.66, None),
    ("auprc", 0.22, None),
    ("lift_top_decile", 2.3, None),
    ("ece", None, 0.015),
    ("calibration_slope", 0.85, 1.15),
)

_AUROC_DIFFERENCE = -0.003


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition, what it asked for and what it found.

    Attributes:
        name: of the condition.
        required: in words.
        value: found; None where there was nothing to compare.
        passed: whether the model may pass.
        detail: more about it.
    """

    name: str
    required: str
    value: float | None
    passed: bool
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def judge(
    report: Mapping[str, Any],
    behaviour: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
    *,
    leak_override: str = "",
    replaces_real: bool = False,
) -> list[Gate]:
    """Judge a model by its validation report.

    Args:
        report: of `training.evaluate.report` on validation rows.
        behaviour: of `training.evaluate.behaviour`.
        comparison: with the champion on the frozen validation set (`compare`), None where there
            is no champion that it could be compared with.
        leak_override: who answers for an AUROC that looks like a leak; empty: nobody.
        replaces_real: whether it learnt from synthetic encounters and the champion from real ones.
    """
    gates = []
    for metric, low, high in _BOUNDS:
        value = float(report["metrics"][metric]["value"])
        passed = (low is None or value >= low) and (high is None or value <= high)
        gates.append(Gate(metric, _words(low, high), value, passed))
    for test in behaviour:
        gates.append(Gate(test["name"], "passes", None, bool(test["passed"]), test["detail"]))
    gates.append(_leak(float(report["metrics"]["auroc"]["value"]), leak_override))
    if replaces_real:
        required = "a model of synthetic encounters replaces none of real ones"
        gates.append(Gate("real encounters", required, None, False))
    return gates + _against_champion(comparison)


def verdict(judged: Sequence[Gate]) -> tuple[bool, str]:
    """Whether every gate was passed, and what to say of it."""
    failed = [gate.name for gate in judged if not gate.passed]
    return (
        not failed,
        f"gates not passed: {', '.join(failed)}" if failed else "every gate was passed",
    )


def replaces_real(is_synthetic: str, champion_tags: Mapping[str, str]) -> bool:
    """Whether a model of synthetic encounters would take the place of one of real ones.

    Args:
        is_synthetic: the tag of the new version, `True` or `False`.
        champion_tags: of the present champion; empty where there is none.
    """
    return is_synthetic == "True" and champion_tags.get("is_synthetic") == "False"


def _words(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f">= {low}" if low is not None else f"<= {high}"


def _leak(auroc: float, override: str) -> Gate:
    detail = ""
    suspected = auroc > LEAK_AUROC
    if suspected:
        detail = (
            f"overridden by {override}"
            if override
            else "suspected leakage: see docs/experiments.md"
        )
    return Gate(
        "no suspected leak",
        f"AUROC <= {LEAK_AUROC}",
        auroc,
        not suspected or bool(override),
        detail,
    )


def _against_champion(comparison: Mapping[str, Any] | None) -> list[Gate]:
    if comparison is None:
        nothing = "no champion to compare with"
        return [
            Gate("AUROC against the champion", _required_difference(), None, True, nothing),
            Gate("log loss against the champion", "no worse", None, True, nothing),
            Gate("slice gaps against the champion", _required_gap(), None, True, nothing),
        ]
    auroc, losses = comparison["auroc"], comparison["log_loss"]
    worst = comparison["worst_gap_growth"]
    return [
        Gate(
            "AUROC against the champion",
            _required_difference(),
            auroc["low"],
            auroc["low"] >= _AUROC_DIFFERENCE,
            f"difference {auroc['value']:+.4f} [{auroc['low']:+.4f}, {auroc['high']:+.4f}] against "
            f"version {comparison['version']}",
        ),
        Gate(
            "log loss against the champion",
            "no worse",
            losses["challenger"] - losses["champion"],
            # The same model again is no worse: rounding of a different sum must not say so.
            losses["challenger"] <= losses["champion"] + 1e-9,
            f"{losses['challenger']:.5f} against {losses['champion']:.5f}",
        ),
        Gate(
            "slice gaps against the champion",
            _required_gap(),
            worst["growth"],
            worst["growth"] <= SLICE_GAP_GROWTH,
            worst["slice"],
        ),
    ]


def _required_difference() -> str:
    return f"lower bound of the difference >= {_AUROC_DIFFERENCE}"


def _required_gap() -> str:
    return f"no TPR gap grows by more than {SLICE_GAP_GROWTH}"


def worst_gap_growth(
    challenger: Sequence[Mapping[str, Any]], champion: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """By how much the TPR gap of a judged slice grew most (below 0: every gap shrank)."""
    before = {(one["dimension"], one["value"]): one for one in champion}
    worst: dict[str, Any] = {"growth": 0.0, "slice": "no slice judged"}
    grown = []
    for one in challenger:
        other = before.get((one["dimension"], one["value"]))
        if other and one["judged"] and other["judged"] and one["tpr_gap"] not in (None, 0.0):
            growth = abs(one["tpr_gap"]) - abs(other["tpr_gap"] or 0.0)
            grown.append({"growth": growth, "slice": f"{one['dimension']} {one['value']}"})
    return max(grown, key=lambda entry: float(entry["growth"]), default=worst)
