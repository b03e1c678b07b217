"""Page: the model that answers, and how it was judged."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import streamlit as st

from ui import charts, parts
from ui.words import Words

_DIGITS: Mapping[str, int] = {"brier": 4, "log_loss": 4, "ece": 4, "lift_top_decile": 2}
_SHARES = frozenset({"recall_top_decile"})
_SPLITS = ("validation", "test")

Facts = Mapping[str, Any]


def show() -> None:
    """Show the page."""
    words = parts.text()
    model, facts = parts.require("model", "evaluation")
    st.title(words("model.title"), anchor=False)
    parts.synthetic_warning(model)
    _head(model, facts, words)
    st.header(words("model.metrics"), anchor=False)
    parts.table(metric_rows(facts, words), words("model.metrics"))
    st.caption(words("model.metrics.note"))
    if not facts.get("test"):
        st.info(words("untested"))
    st.header(words("model.policy"), anchor=False)
    parts.table(policy_rows(facts, words), words("model.policy"))
    st.caption(words("model.policy.note"))
    left, right = st.columns(2, gap="medium")
    with left:
        _calibration(facts, words)
    with right:
        _features(facts, words)
    _slices(facts, words)
    if gates := facts.get("gates"):
        st.header(words("model.gates"), anchor=False)
        parts.table([_gate(gate, words) for gate in gates], words("model.gates"))
    _card(words)


def metric_rows(facts: Facts, words: Words) -> list[dict[str, str]]:
    """One row a metric, with its interval on each split."""
    judged = {split: (facts.get(split) or {}).get("metrics") or {} for split in _SPLITS}
    names = dict.fromkeys(name for metrics in judged.values() for name in metrics)
    return [
        {
            words("model.metric"): words.metric(name),
            **{words(split): _interval(name, judged[split].get(name), words) for split in _SPLITS},
        }
        for name in names
    ]


def policy_rows(facts: Facts, words: Words) -> list[dict[str, str]]:
    """One row an alert rate and split."""
    return [
        {
            words("split"): words(split),
            words("policy.rate"): words.percent(row["alert_rate"], 0),
            words("policy.threshold"): words.percent(row["threshold"]),
            words("policy.share"): words.percent(row["alerts_share"]),
            words("policy.recall"): words.percent(row["recall"]),
            words("policy.precision"): words.percent(row["precision"]),
        }
        for split in _SPLITS
        for row in (facts.get(split) or {}).get("policy") or ()
    ]


def _head(model: Facts, facts: Facts, words: Words) -> None:
    data = facts.get("data") or model.get("data") or {}
    rows = data.get("train_rows")
    for column, (name, value) in zip(
        st.columns(4),
        {
            "version": str(model.get("version", "")),
            "candidate": str(model.get("candidate", "")),
            "rows": words.number(rows),
            "created": str(model.get("created", ""))[:10],
        }.items(),
        strict=True,
    ):
        column.metric(words(f"model.{name}"), value)
    source = str(data.get("source") or "")
    details = {
        "model.name": f"{model.get('name', '')} ({model.get('alias', '')})",
        # Where a folder lies is no one's business; what the file is called says enough.
        "model.source": source if "://" in source else source.rpartition("/")[2],
        "model.synthetic": words("yes" if model.get("is_synthetic") else "no"),
        "model.run": str(model.get("run_id", "")),
        "model.loaded": str(model.get("loaded_at", "")).replace("T", " ")[:16],
        "model.from": _where(str(model.get("source", "")), words),
        "model.shadow": str(model.get("shadow_version") or words("none")),
    }
    with st.expander(words("model.details")):
        shown = [
            {words("model.item"): words(key), words("model.value"): value}
            for key, value in details.items()
        ]
        parts.table(shown, words("model.details"))


def _where(source: str, words: Words) -> str:
    key = f"model.from.{source}"
    return words(key) if words.knows(key) else source


def _interval(name: str, metric: Facts | None, words: Words) -> str:
    if not metric:
        return words("none")

    def written(value: float | None) -> str:
        if name in _SHARES:
            return words.percent(value)
        return words.number(value, _DIGITS.get(name, 3))

    value = written(metric.get("value"))
    if metric.get("low") is None or metric.get("high") is None:
        return value
    low, high = written(metric["low"]), written(metric["high"])
    return words("interval", value=value, low=low, high=high)


def _calibration(facts: Facts, words: Words) -> None:
    st.header(words("model.calibration"), anchor=False)
    points = (facts.get("validation") or {}).get("calibration")
    if not points:
        st.info(words("model.calibration.none"))
        return
    st.altair_chart(
        charts.calibration(points, words), alt=words("model.calibration.alt"), width="stretch"
    )
    st.caption(words("model.calibration.note"))


def _features(facts: Facts, words: Words) -> None:
    if not (found := facts.get("top_features")):
        return
    st.header(words("model.features"), anchor=False)
    st.altair_chart(
        charts.features(found[:12], words), alt=words("model.features.alt"), width="stretch"
    )
    st.caption(words("model.features.note"))


def _slices(facts: Facts, words: Words) -> None:
    split = "test" if facts.get("test") else "validation"
    groups = [
        group
        for group in (facts.get(split) or {}).get("slices") or ()
        if group.get("tpr") is not None
    ]
    if not groups:
        return
    st.header(f"{words('model.slices')} ({words(split).lower()})", anchor=False)
    st.altair_chart(charts.slices(groups, words), alt=words("model.slices.alt"), width="stretch")
    st.caption(words("model.slices.note"))
    with st.expander(words("slice.table")):
        parts.table([_group(group, words) for group in groups], words("slice.table"))


def _group(group: Facts, words: Words) -> dict[str, str]:
    dimension = str(group["dimension"])
    return {
        words("slice.group"): f"{words('dimension.' + dimension)}: "
        f"{words.slice(dimension, str(group['value']))}",
        words("slice.rows"): words.number(group["rows"]),
        words("slice.positives"): words.number(group["positives"]),
        "AUROC": words.number(group.get("auroc"), 3),
        words("axis.recall"): words.percent(group.get("tpr")),
        words("slice.judged"): words("yes" if group.get("judged") else "no"),
    }


def _gate(gate: Facts, words: Words) -> dict[str, str]:
    value = gate.get("value")
    return {
        words("gate.name"): words.gate(str(gate["name"])),
        words("gate.required"): words.required(str(gate.get("required", ""))),
        words("gate.value"): words.number(value, 4 if value is not None and value < 0.1 else 3),
        words("gate.passed"): words("gate.yes" if gate.get("passed") else "gate.no"),
    }


def _card(words: Words) -> None:
    st.header(words("model.card"), anchor=False)
    (card,) = parts.require("card")
    st.download_button(
        words("model.card.download"),
        card,
        "model_card.html",
        "text/html",
        key="card_download",
        icon=":material/download:",
        on_click="ignore",
    )
    with st.expander(words("model.card.show")):
        # A data URL gives the card an origin of its own: nothing in it can reach this page.
        encoded = base64.b64encode(card.encode()).decode()
        st.iframe(f"data:text/html;base64,{encoded}", height=700, alt=words("model.card"))


if __name__ == "__main__":
    show()
