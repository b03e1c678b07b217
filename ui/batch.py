"""Page: a CSV of encounters, answered while it is sent."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, Final

import pandas as pd
import streamlit as st

from ui import charts, parts
from ui.api import ApiError

COLUMNS: Final = (
    "row",
    "encounter_id",
    "prediction_id",
    "probability",
    "percentile",
    "alert",
    "excluded",
    "error",
)
_STEPS = 20
_PREVIEW = 100
_ERRORS = 5
_RESULT = "batch_result"


class Summary:
    """What is told about the answers to a file, added up while they come in."""

    def __init__(self) -> None:
        self.rows = self.alerts = self.excluded = self.broken = 0
        self.risks = [0] * _STEPS
        self.errors: list[tuple[str, str]] = []
        self.first: list[dict[str, str]] = []
        self.problem: ApiError | None = None
        self._text = io.StringIO(newline="")
        self._writer = csv.DictWriter(
            self._text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n"
        )
        self._writer.writeheader()

    def add(self, answers: list[dict[str, str]]) -> None:
        """Count some answers and keep them for the download."""
        self._writer.writerows(answers)
        self.rows += len(answers)
        self.first += answers[: _PREVIEW - len(self.first)]
        for answer in answers:
            if answer.get("error"):
                self.broken += 1
                if len(self.errors) < _ERRORS:
                    self.errors.append((answer["row"], answer["error"]))
            elif answer.get("probability"):
                risk = float(answer["probability"])
                self.risks[min(int(risk * _STEPS), _STEPS - 1)] += 1
                self.alerts += answer.get("alert", "").lower() in ("true", "1")
            else:
                self.excluded += 1

    @property
    def csv(self) -> bytes:
        """All answers as a file."""
        return self._text.getvalue().encode()


def rows_of(text: io.TextIOBase) -> Iterator[list[str]]:
    """Header and rows of a CSV, without its empty lines."""
    header = text.readline()
    # With semicolons it comes from a spreadsheet whose decimals have a comma.
    delimiter = ";" if ";" in header and "," not in header else ","
    yield [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    for row in csv.reader(text, delimiter=delimiter):
        if row:
            yield row


def example_csv(described: dict[str, Any]) -> bytes:
    """The API's example records as a CSV with the publisher's columns."""
    names = [field["name"] for field in described["fields"] if field["name"] != "readmitted"]
    held = {name for record in described.get("examples", ()) for name in record}
    # Only the columns that the examples have: an id left empty would be wrong, one left out is not.
    names = [name for name in names if name in held]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="?", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(described.get("examples", ()))
    return text.getvalue().encode()


def show() -> None:
    """Show the page."""
    words = parts.text()
    described, model = parts.require("fields", "model")
    st.title(words("batch.title"), anchor=False)
    st.markdown(words("batch.lead"))
    parts.synthetic_warning(model)
    st.download_button(
        words("batch.example"),
        example_csv(described),
        "example.csv",
        "text/csv",
        key="example_csv",
        icon=":material/download:",
        on_click="ignore",
    )
    file = st.file_uploader(words("batch.file"), type="csv", key="batch_file")
    rate = parts.alert_rate(model)
    started = st.button(
        words("batch.start"),
        key="batch_start",
        type="primary",
        icon=":material/calculate:",
        disabled=file is None,
    )
    if file is None:
        st.session_state.pop(_RESULT, None)
        return
    asked = (file.file_id, rate)
    if started:
        st.session_state[_RESULT] = (asked, _answer(file, rate))
    held = st.session_state.get(_RESULT)
    if held and held[0] == asked and held[1] is not None:
        _show_summary(held[1])


def _answer(file: io.BytesIO, rate: float) -> Summary | None:
    words = parts.text()
    total = max(file.getvalue().count(b"\n") - 1, 1)
    summary = Summary()
    bar = st.progress(0.0, text=words("batch.progress", done=0, total=words.number(total)))
    file.seek(0)
    # A byte that is no UTF-8 is one broken value, not the end of the file.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    try:
        for answers in parts.client().predict_csv(rows_of(text), rate):
            summary.add(answers)
            total = max(total, summary.rows)
            done = words(
                "batch.progress", done=words.number(summary.rows), total=words.number(total)
            )
            bar.progress(summary.rows / total, text=done)
    except ApiError as problem:
        summary.problem = problem
    except csv.Error as error:
        st.error(words("batch.unreadable", detail=error), icon=":material/error:")
        return None
    finally:
        text.detach()  # closing it would close the upload
        bar.empty()
    return summary


def _show_summary(summary: Summary) -> None:
    words = parts.text()
    if summary.problem:
        parts.show_problem(summary.problem)
        if not summary.rows:
            return
        st.warning(words("batch.broke", done=words.number(summary.rows)))
    if not summary.rows:
        st.warning(words("batch.empty"), icon=":material/error:")
        return
    numbers = {name: getattr(summary, name) for name in ("rows", "alerts", "broken", "excluded")}
    for column, (name, number) in zip(st.columns(4), numbers.items(), strict=True):
        column.metric(words(f"batch.{name}"), words.number(number))
    st.download_button(
        words("batch.download"),
        summary.csv,
        "predictions.csv",
        "text/csv",
        key="batch_download",
        icon=":material/download:",
        on_click="ignore",
    )
    if summary.errors:
        with st.container(border=True):
            st.markdown(f"**{words('batch.errors')}**")
            for row, error in summary.errors:
                st.text(words("batch.row_error", row=row, error=error))
    if any(summary.risks):
        st.header(words("batch.histogram"), anchor=False)
        st.altair_chart(
            charts.risks(summary.risks, words), alt=words("batch.histogram.alt"), width="stretch"
        )
    st.header(words("batch.preview"), anchor=False)
    st.dataframe(_preview(summary.first), hide_index=True, width="stretch")


def _preview(answers: list[dict[str, str]]) -> pd.DataFrame:
    words = parts.text()
    shown = [name for name in COLUMNS if name != "prediction_id"]
    alerts = {"true": words("yes"), "false": words("no")}

    def cell(name: str, value: str) -> str:
        if name == "probability" and value:
            return words.percent(float(value))
        if name == "percentile" and value:
            return words.number(float(value))
        if name == "alert":
            return alerts.get(value.lower(), "")
        key = f"excluded.short.{value}"
        return words(key) if name == "excluded" and words.knows(key) else value

    return pd.DataFrame(
        [
            {words(f"column.{name}"): cell(name, answer.get(name) or "") for name in shown}
            for answer in answers
        ]
    )


if __name__ == "__main__":
    show()
