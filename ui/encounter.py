"""Page: one encounter, its risk, and what moved the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from ui import charts, form, parts
from ui.api import ApiError
from ui.words import Words

_ANSWER = "answer"
_PROBLEM = "problem"
_SIGNS = {
    "raises": "\N{BLACK UP-POINTING TRIANGLE}",
    "lowers": "\N{BLACK DOWN-POINTING TRIANGLE}",
}


def show() -> None:
    """Show the page."""
    words = parts.text()
    described, model = parts.require("fields", "model")
    fields: form.Fields = {field["name"]: field for field in described["fields"]}
    if "started" not in st.session_state:
        st.session_state["started"] = True
        form.fill(form.filled(fields))
    st.title(words("encounter.title"), anchor=False)
    st.markdown(words("encounter.lead"))
    parts.synthetic_warning(model)
    _examples(fields)
    left, right = st.columns([3, 2], gap="medium")
    problem: ApiError | None = st.session_state.get(_PROBLEM)
    with left:
        form.show(fields, problem.fields if problem else {})
    with right, st.container(key="answer"):
        rate = parts.alert_rate(model)
        st.button(
            words("estimate"),
            key="estimate",
            type="primary",
            icon=":material/calculate:",
            width="stretch",
            on_click=_ask,
            args=(fields,),
        )
        _again_where_asked_otherwise(rate)
        _result(fields, model)


def _examples(fields: form.Fields) -> None:
    words = parts.text()
    offered = {name: form.filled(fields, known) for name, known in form.examples().items()}
    offered["empty"] = form.filled(fields)
    st.markdown(f"**{words('examples')}**")
    with st.container(horizontal=True):
        for name, values in offered.items():
            st.button(
                words(f"example.{name}"), key=f"example_{name}", on_click=_use, args=(values,)
            )


def _use(values: Mapping[str, Any]) -> None:
    form.fill(values)
    st.session_state.pop(_ANSWER, None)
    st.session_state.pop(_PROBLEM, None)


def _ask(fields: form.Fields) -> None:
    encounter = form.encounter_of(fields, form.in_form(fields))
    _explain(encounter, float(st.session_state[parts.ALERT_RATE]))


def _explain(encounter: dict[str, Any], rate: float) -> None:
    language = parts.text().language
    st.session_state.pop(_ANSWER, None)
    st.session_state.pop(_PROBLEM, None)
    try:
        answer = parts.client().explain(encounter, rate, language)
    except ApiError as problem:
        st.session_state[_PROBLEM] = problem
        return
    st.session_state[_ANSWER] = {
        "encounter": encounter,
        "rate": rate,
        "language": language,
        "answer": answer,
    }


def _again_where_asked_otherwise(rate: float) -> None:
    """The reasons come in one language and the alert for one rate."""
    held = st.session_state.get(_ANSWER)
    if held and (held["rate"], held["language"]) != (rate, parts.text().language):
        _explain(held["encounter"], rate)


def _result(fields: form.Fields, model: dict[str, Any]) -> None:
    words = parts.text()
    problem: ApiError | None = st.session_state.get(_PROBLEM)
    if problem and set(problem.fields) & set(form.asked(fields)):
        st.error(words("invalid.form"), icon=":material/error:")
        return
    if problem:
        parts.show_problem(problem)
        return
    held = st.session_state.get(_ANSWER)
    if not held:
        st.info(words("result.none"), icon=":material/info:")
        return
    if held["encounter"] != form.encounter_of(fields, form.in_form(fields)):
        st.warning(words("stale"), icon=":material/edit:")
    answer = held["answer"]
    if answer.get("excluded"):
        reason = str(answer["excluded"])
        key = f"excluded.{reason if reason in ('died', 'hospice') else 'other'}"
        st.warning(words(key, reason=reason), icon=":material/block:")
    elif answer.get("probability") is None:
        st.error(words("answer.empty"))
    else:
        _risk(answer, model, words)
        _reasons(answer, words)
    st.caption(
        words(
            "answered_by",
            version=answer.get("model_version", ""),
            prediction=str(answer.get("prediction_id", ""))[:8],
        )
    )


def _risk(answer: dict[str, Any], model: dict[str, Any], words: Words) -> None:
    with st.container(key="risk"):
        st.metric(words("result.risk"), words.percent(answer["probability"]))
    if (percentile := answer.get("percentile")) is not None:
        # Rounded down: no one is higher than all.
        place = words("result.place", percentile=int(percentile))
        st.progress(min(max(float(percentile) / 100, 0.0), 1.0), text=place)
    threshold = words.percent(answer.get("threshold"))
    meaning = _policy(model, float(answer["alert_rate"]), words)
    if answer.get("alert"):
        said = f"{words('result.alert', threshold=threshold)} {meaning}"
        st.warning(said, icon=":material/notifications_active:")
    else:
        said = f"{words('result.no_alert', threshold=threshold)} {meaning}"
        st.info(said, icon=":material/notifications_off:")


def _policy(model: dict[str, Any], rate: float, words: Words) -> str:
    """What alerts at this rate were worth on patients that the model had not seen."""
    policy = model.get("policy") or {}
    for row in policy.get("test") or policy.get("validation") or ():
        if abs(float(row["alert_rate"]) - rate) < 1e-9:
            return words(
                "result.policy",
                share=words.percent(row["alerts_share"], 0),
                precision=words.number(100 * row["precision"]),
                recall=words.number(100 * row["recall"]),
            )
    return ""


def _reasons(answer: dict[str, Any], words: Words) -> None:
    reasons = answer.get("reasons") or []
    if not reasons:
        return
    st.header(words("reasons"), anchor=False)
    st.caption(words("reasons.lead", baseline=words.percent(answer.get("baseline"))))
    st.altair_chart(charts.reasons(reasons, words), alt=words("reasons.alt"), width="stretch")
    with st.expander(words("reasons.words"), expanded=True):
        st.markdown(
            "\n".join(
                f"- {_SIGNS[reason['effect']]} {parts.plain(reason['text'])}" for reason in reasons
            )
        )
    st.caption(words("reasons.note"))


if __name__ == "__main__":
    show()
