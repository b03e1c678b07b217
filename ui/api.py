"""Client of the prediction API: the one way in which the page gets to know anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import requests

from ui.words import Words

_CONNECT = 3.0
_ANSWER = 30.0
_BATCH_ANSWER = 300.0
_PIECE = 1_000
"""Rows of a CSV sent at once. The API answers a file when it has all of it, so that in pieces there
is progress to show."""

Kind = Literal["away", "unready", "busy", "key", "input", "failed"]
Encounter = dict[str, Any]


@dataclass
class ApiError(Exception):
    """The API did not do what it was asked for.

    Attributes:
        kind: what has happened, as the page's words know it.
        detail: what the API says about it, in English; empty where it says nothing.
        fields: what is wrong, by the name of the field.
    """

    kind: Kind
    detail: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.detail or self.kind

    def message(self, words: Words, url: str = "") -> str:
        """One message for the user: what has happened, why, and what to do."""
        parts = [words(f"problem.{self.kind}")]
        if self.detail and self.kind not in ("away", "key"):
            parts.append(words("problem.said", detail=self.detail))
        parts.append(words(f"problem.{self.kind}.do", url=url))
        return " ".join(parts)


class Api:
    """The prediction API at an address.

    Args:
        url: its base URL.
        key: what it knows the page by; empty where it asks for none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        # The API stands beside the page: no proxy is between them, and .netrc has no say in it.
        self._session.trust_env = False
        if key:
            self._session.headers["X-API-Key"] = key

    def fields(self) -> dict[str, Any]:
        """The fields of an encounter with their values, and example records."""
        return self._json("GET", "/v1/fields")

    def model(self) -> dict[str, Any]:
        """The model that answers."""
        return self._json("GET", "/v1/model")

    def evaluation(self) -> dict[str, Any]:
        """How the model was judged: every fact of its card."""
        return self._json("GET", "/v1/model/evaluation")

    def card(self) -> str:
        """The model card as one HTML page."""
        response = self._send("GET", "/v1/model/card")
        return response.content.decode("utf-8", errors="replace")

    def explain(
        self, encounter: Encounter, alert_rate: float, language: str, top: int = 8
    ) -> dict[str, Any]:
        """Risk of one encounter, and what moved it."""
        query = {"alert_rate": alert_rate, "language": language, "top": top}
        return self._json("POST", "/v1/explain", params=query, json=encounter)

    def predict_csv(
        self, rows: Iterable[list[str]], alert_rate: float
    ) -> Iterator[list[dict[str, str]]]:
        """Risk of every row, in the order of the rows, some at a time.

        Args:
            rows: the header, then the rows; a row is numbered from 1, whatever piece it is in.
            alert_rate: share of encounters that get an alert.

        Raises:
            ApiError: the API did not take a piece; those before it have been answered.
        """
        remaining = iter(rows)
        header = next(remaining, [])
        sent = 0
        while piece := list(islice(remaining, _PIECE)):
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows([header, *piece])
            response = self._send(
                "POST",
                "/v1/predict/batch",
                timeout=_BATCH_ANSWER,
                params={"alert_rate": alert_rate},
                data=text.getvalue().encode(),
                headers={"Content-Type": "text/csv", "Accept": "text/csv"},
            )
            answers = list(csv.DictReader(io.StringIO(response.content.decode(), newline="")))
            for answer in answers:
                answer["row"] = str(int(answer["row"]) + sent)
            yield answers
            sent += len(piece)

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._send(method, path, **arguments)
        try:
            answer = response.json()
        except requests.JSONDecodeError as error:
            raise ApiError("failed", "the answer is not JSON") from error
        if not isinstance(answer, dict):
            raise ApiError("failed", "the answer is not a JSON object")
        return answer

    def _send(
        self, method: str, path: str, timeout: float = _ANSWER, **arguments: Any
    ) -> requests.Response:
        try:
            response = self._session.request(
                method, self.url + path, timeout=(_CONNECT, timeout), **arguments
            )
        except requests.RequestException as error:
            raise ApiError("away") from error
        if not response.ok:
            raise self._problem(response)
        return response

    def _problem(self, response: requests.Response) -> ApiError:
        problem = _said(response)
        if response.status_code == requests.codes.service_unavailable and self._is_ready():
            problem.kind = "busy"
        return problem

    def _is_ready(self) -> bool:
        """Whether a 503 was a matter of load: of a missing model this address knows as well."""
        try:
            return self._session.get(f"{self.url}/readyz", timeout=_CONNECT).ok
        except requests.RequestException:
            return False


def _said(response: requests.Response) -> ApiError:
    try:
        said = response.json()
    except requests.JSONDecodeError:
        said = {}
    if not isinstance(said, Mapping):
        said = {}
    detail = str(said.get("detail") or said.get("title") or "")
    fields = {
        str(error.get("field", "")): str(error.get("message", ""))
        for error in said.get("errors") or []
        if isinstance(error, Mapping)
    }
    return ApiError(_kind(response.status_code), detail, fields)


def _kind(status: int) -> Kind:
    if status in (requests.codes.unauthorized, requests.codes.forbidden):
        return "key"
    if status == requests.codes.too_many_requests:
        return "busy"
    if status == requests.codes.service_unavailable:
        return "unready"
    return "input" if status < requests.codes.server_error else "failed"
