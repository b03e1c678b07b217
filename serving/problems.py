"""Errors as problem details (RFC 9457): one clear message, and one for each field at fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from serving import records
from serving.prediction_log import LogFullError

MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str = Field(description="Name of the field; in a batch led by its encounter's index")
    message: str = Field(description="What was expected, and what came")


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field("about:blank", description="Kind of problem; about:blank: see the status")
    title: str
    status: int
    detail: str
    errors: list[FieldError] = Field([], description="The fields at fault, if there are such")


RESPONSES: Mapping[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status in (400, 401, 408, 413, 415, 422, 500, 503)
}
"""What every operation can answer beside its own."""


class ProblemError(HTTPException):
    """An answer other than the one asked for.

    Args:
        status: of HTTP.
        detail: what was expected and what to do.
        errors: of single fields.
        headers: beside it.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[records.FieldFault] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, headers)
        self.errors = errors


def response(
    status: int,
    detail: str,
    errors: Sequence[records.FieldFault] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem as an HTTP response."""
    content = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "errors": [{"field": field, "message": message} for field, message in errors],
    }
    return Response(orjson.dumps(content), status, dict(headers or {}), MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let the application answer every error as a problem."""

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  (registered for it below)
        errors = getattr(error, "errors", ())
        return response(error.status_code, str(error.detail), errors, error.headers)

    async def of_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        return invalid(error.errors())

    async def of_log(_: Request, error: Exception) -> Response:
        return response(503, str(error), headers={"Retry-After": "30"})

    async def of_us(_: Request, error: Exception) -> Response:
        return response(500, "the service failed; its log tells more to those who run it")

    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(LogFullError, of_log)
    app.add_exception_handler(Exception, of_us)


def invalid(errors: Sequence[Mapping[str, Any]]) -> Response:
    """What pydantic found, in the words of the contract."""
    for error in errors:
        if error["type"] in ("json_invalid", "model_attributes_type"):
            return response(400, "the body is no JSON object: send one encounter, or a batch")
    faults = records.faults(errors)
    return response(422, records.summary(faults), faults)
