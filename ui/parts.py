"""What the pages share: the client, what it may remember, and how a problem is shown."""

from __future__ import annotations

import re
from typing import Any

import streamlit as st

from settings import settings
from ui.api import Api, ApiError
from ui.words import Words, words

_REMEMBER = 60
"""Seconds for what the API says about itself. About encounters nothing is remembered."""

_MARKDOWN = re.compile(r"[\\`*_\[\]$<>~|#]")

ALERT_RATE = "alert_rate"
FIELD = "field_"
"""Keys of the widgets; the same in every language, so that a value outlives a change of it."""


def text() -> Words:
    """The words of the language that the user has chosen."""
    return words(str(st.session_state.get("language", "")))


def client() -> Api:
    """A client of the API that the settings name."""
    chosen = settings()
    return Api(chosen.api_url, chosen.api_key.get_secret_value())


@st.cache_data(ttl=_REMEMBER, show_spinner=False)
def _about(url: str, what: str) -> Any:
    """What the API at `url` says about itself; an error is not remembered."""
    return getattr(client(), what)()


def about(what: str) -> Any:
    """What the API says about its `fields`, `model`, `evaluation` or `card`."""
    return _about(settings().api_url, what)


def keep_values() -> None:
    """Carry what was chosen over to the other language.

    The browser sends a choice by its label. Read here, before the labels change, it is turned into
    its value; set here, it comes back with its new label.
    """
    for key in list(st.session_state.keys()):
        if isinstance(key, str) and (key.startswith(FIELD) or key == ALERT_RATE):
            st.session_state[key] = st.session_state[key]


def show_problem(problem: ApiError) -> None:
    """Say what is wrong and offer another try."""
    said = text()
    st.error(plain(problem.message(said, settings().api_url)), icon=":material/error:")
    if st.button(said("retry"), key="retry", icon=":material/refresh:"):
        _about.clear()
        st.rerun()


def require(*names: str) -> list[Any]:
    """What the API says about each of these; without an answer the page ends with a message."""
    try:
        return [about(name) for name in names]
    except ApiError as problem:
        show_problem(problem)
        st.stop()


def alert_rate(model: dict[str, Any]) -> float:
    """Let the user choose out of the alert rates that the model has thresholds for."""
    said = text()
    rates = sorted(float(rate) for rate in model.get("thresholds", {})) or [0.1, 0.2]
    if st.session_state.get(ALERT_RATE) not in rates:
        st.session_state[ALERT_RATE] = rates[-1]
    return float(
        st.radio(
            said("alert_rate"),
            rates,
            format_func=lambda rate: said.percent(rate, 0),
            key=ALERT_RATE,
            horizontal=True,
            persist_state="session",
        )
    )


def plain(said: str) -> str:
    """A text of the API for a place that reads Markdown: what it says and nothing more."""
    return _MARKDOWN.sub(r"\\\g<0>", said)


def synthetic_warning(model: dict[str, Any]) -> None:
    """Say on every page that a model knows generated data only."""
    if model.get("is_synthetic"):
        st.warning(text()("synthetic"), icon=":material/science:")


def table(rows: list[dict[str, str]], label: str) -> None:
    """A small table that a screen reader can read."""
    st.table(rows, border="horizontal", hide_index=True, alt=label)
