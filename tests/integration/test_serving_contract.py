"""The API against its own OpenAPI document, by requests that schemathesis makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

from ingestion.contract import HEADER
from tests.served import WARNINGS, Api, synthetic

pytestmark = WARNINGS

CHECKS: list[Any] = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.positive_data_acceptance,
    checks.missing_required_header,
    checks.unsupported_method,
    checks.allow_header_conformance,
]
"""Left out are those that have nothing to look at here: nothing is created that could be used after
it was deleted or that belongs to somebody (`use_after_free`, `ensure_resource_availability`,
`object_level_authorization`), and without keys there is no login to ignore (`ignored_auth`; keys
have a test of their own in test_serving.py)."""

POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE

LINES = [",".join(row) for row in synthetic(20, seed=30)]


QUIET = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


def as_csv(lines: list[str]) -> bytes:
    return "\n".join([",".join(HEADER), *lines]).encode()


# To the document a CSV is a string; what is in it it can't say.
schemathesis.openapi.media_type(
    "text/csv", st.lists(st.sampled_from(LINES), min_size=1, max_size=5).map(as_csv)
)


def probe(
    api: Api, document: dict[str, Any], path: str, method: str, mode: GenerationMode, count: int
) -> list[int]:
    """Send requests to one operation and check the answers; their statuses.

    Raises:
        FailureGroup: an answer that the document does not promise.
    """
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses = []

    @settings(QUIET, max_examples=count)
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        # A CSV can't be made wrong by the document: such a case is positive in either mode.
        positive = case.meta.generation.mode is POSITIVE
        if positive and (case.query or {}).get("alert_rate") is not None:
            # Which rates there are is the model's to say, and the model can change any time.
            case.query["alert_rate"] = 0.1 if case.query["alert_rate"] < 0.5 else 0.2
        answer = case.call_and_validate(base_url=api.url, checks=CHECKS, session=api.session)
        statuses.append(answer.status_code)

    send()
    return statuses


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = api.get("/openapi.json").json()
    return found


PROBED = {
    ("/livez", "GET"): 2,
    ("/readyz", "GET"): 2,
    ("/metrics", "GET"): 2,
    ("/v1/model", "GET"): 2,
    ("/v1/model/evaluation", "GET"): 2,
    ("/v1/model/card", "GET"): 2,
    ("/v1/fields", "GET"): 2,
    ("/v1/predict", "POST"): 40,
    ("/v1/explain", "POST"): 40,
    ("/v1/predict/batch", "POST"): 40,
}


def test_every_operation_is_probed(document: dict[str, Any]) -> None:
    found = {(path, m.upper()) for path, methods in document["paths"].items() for m in methods}
    assert found == set(PROBED)


@pytest.mark.parametrize(("path", "method"), PROBED)
def test_what_the_document_allows_is_answered_as_it_says(
    api: Api, document: dict[str, Any], path: str, method: str
) -> None:
    assert set(probe(api, document, path, method, POSITIVE, PROBED[path, method])) == {200}


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/explain", "/v1/predict/batch"])
def test_what_the_document_forbids_is_refused_as_it_says(
    api: Api, document: dict[str, Any], path: str
) -> None:
    statuses = probe(api, document, path, "POST", NEGATIVE, 60)
    # Some are answered: unknown names in a query are let pass, as everywhere.
    refused = [status for status in statuses if status in (400, 413, 415, 422)]
    assert 422 in refused
    assert len(refused) > len(statuses) / 2


def promise_a_number(document: dict[str, Any]) -> None:
    document["components"]["schemas"]["Prediction"]["properties"]["model_version"] = {
        "type": "integer"
    }


def promise_another_type(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/predict"]["post"]["responses"]["200"]["content"]
    content["application/xml"] = content.pop("application/json")


def hide_a_status(document: dict[str, Any]) -> None:
    for status in ("400", "422"):
        del document["paths"]["/v1/predict"]["post"]["responses"][status]


def allow_a_value(document: dict[str, Any]) -> None:
    encounter = document["components"]["schemas"]["Encounter"]
    encounter["properties"] = {"age": {"type": "string", "enum": ["seventy"]}}
    encounter["required"] = ["age"]


@pytest.mark.parametrize(
    ("spoil", "mode", "said"),
    [
        (promise_a_number, POSITIVE, "violates schema"),
        (promise_another_type, POSITIVE, "Undocumented Content-Type"),
        (hide_a_status, NEGATIVE, "Undocumented status code"),
        (allow_a_value, POSITIVE, "Schema-valid request rejected"),
    ],
)
def test_a_document_that_promises_something_else_fails(
    api: Api,
    document: dict[str, Any],
    spoil: Callable[[dict[str, Any]], None],
    mode: GenerationMode,
    said: str,
) -> None:
    spoil(document)
    with pytest.raises(FailureGroup) as caught:
        probe(api, document, "/v1/predict", "POST", mode, 60)
    titles = {failure.title for failure in caught.value.exceptions}
    assert any(said in title for title in titles), titles


def test_a_service_that_accepts_everything_fails(api: Api, document: dict[str, Any]) -> None:
    operation = schemathesis.openapi.from_dict(document)["/v1/predict"]["POST"]
    answer = api.post("/v1/predict", json={})

    @settings(QUIET, max_examples=30)
    @given(case=operation.as_strategy(generation_mode=NEGATIVE))
    def judge(case: Any) -> None:
        case.validate_response(answer, checks=CHECKS)

    with pytest.raises(FailureGroup) as caught:
        judge()
    assert "Invalid data should have been rejected" in str(caught.value.exceptions)
