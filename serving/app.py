"""The prediction API: its routes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import Body, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ingestion.contract import MISSING
from serving import answers, batch, problems, records, words
from serving.guard import BATCH, CARD, JSON_BATCH_LIMIT, Guard, read_keys
from serving.problems import ProblemError
from serving.service import Service
from serving.upload import Upload
from settings import Settings


def create_app(chosen: Settings) -> Guard:
    """The API as an ASGI application.

    Args:
        chosen: the settings.

    Raises:
        ServingError: the settings or the spool can't be used.
    """
    keys = read_keys(chosen.api_key_hashes)
    service = Service(chosen)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Diabetes readmission",
        summary="Which patient comes back within 30 days?",
        description="Risk of readmission within 30 days of a diabetic inpatient, from the raw "
        "fields of the Diabetes 130-US hospitals data. No medical device.",
        version="1",
        lifespan=lifespan,
        responses=dict(problems.RESPONSES),
        redoc_url=None,
    )
    problems.install(app)
    _add_health(app, service)
    _add_predictions(app, service)
    _add_model(app, service)
    _describe(app, with_keys=bool(keys))
    return Guard(
        app,
        service.telemetry,
        keys,
        chosen.api_most_requests,
        # The largest for each worker: who waits does so for seconds, not minutes.
        chosen.api_batch_workers * JSON_BATCH_LIMIT,
        chosen.api_timeout,
        chosen.api_csv_limit_mib << 20,
    )


AlertRate = Annotated[
    float | None,
    Query(
        gt=0,
        lt=1,
        description="Share of encounters that become alerts; a rate that the model has a "
        "threshold for (see /v1/model)",
        examples=[0.2],
    ),
]


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/livez", tags=["health"])
    async def livez() -> answers.Health:
        """Whether the process lives."""
        return answers.Health(status="ok")

    @app.get("/readyz", tags=["health"])
    async def readyz() -> answers.Health:
        """Whether a model that passed its self-test is there to answer."""
        return answers.Health(status="ok", model_version=service.model().version)

    @app.get(
        "/metrics",
        tags=["health"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(
            generate_latest(service.telemetry.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4
        )


def _add_predictions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/predict", tags=["predictions"], response_model=answers.Prediction)
    async def predict(
        encounter: Annotated[records.Encounter, Body()], alert_rate: AlertRate = None
    ) -> Response:
        """The risk of one encounter."""
        return _json(service.predict(dict(encounter), alert_rate, "single")[2])

    @app.post("/v1/explain", tags=["predictions"], response_model=answers.Explanation)
    async def explain(
        encounter: Annotated[records.Encounter, Body()],
        alert_rate: AlertRate = None,
        top: Annotated[int, Query(ge=1, le=64, description="How many reasons")] = 8,
        language: Annotated[words.Language, Query(description="Of the texts")] = "en",
    ) -> Response:
        """The risk of one encounter and its reasons in plain words, the strongest first."""
        model, scored, answer = service.predict(dict(encounter), alert_rate, "explain")
        if scored.excluded:
            return _json(answer | {"baseline": None, "reasons": [], "others": None})
        # Ten times the work of a prediction, and none of it Python's: others go on meanwhile.
        shares = (await asyncio.to_thread(model.shares, scored.rows))[0]
        found = words.reasons(
            model.feature_names,
            scored.rows[0],
            shares[:-1],
            words.code_labels(model.scorer.definition["tables"]),
            top,
            language,
        )
        listed = sum(reason["contribution"] for reason in found)
        return _json(
            answer
            | {
                "baseline": 1 / (1 + math.exp(-float(shares[-1]))),
                "reasons": found,
                "others": float(shares[:-1].sum()) - listed,
            }
        )

    @app.post(
        BATCH,
        tags=["predictions"],
        response_model=answers.Predictions,
        responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Batch"}},
                    "text/csv": {
                        "schema": {"type": "string"},
                        "example": "encounter_id,age,number_inpatient\n1,[70-80),2\n",
                    },
                },
            }
        },
    )
    async def predict_batch(request: Request, alert_rate: AlertRate = None) -> Response:
        """The risks of many encounters: up to 10,000 as JSON, any number as CSV.

        The CSV's header names any of the publisher's columns, in any order (`readmitted` is
        ignored). The answer is a CSV with one line a row: what breaks the contract gets an
        `error` instead of a probability.
        """
        model = service.model()
        rate = service.alert_rate(model, alert_rate)
        service.check_log()
        job = service.job(model, rate)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "text/csv":
            count = partial(service.count_batch, "csv")
            upload = Upload(service.workers, job, service.check_log, count)
            return StreamingResponse(await upload.receive(request.stream()), media_type="text/csv")
        if kind != "application/json":
            raise ProblemError(415, "send application/json (up to 10,000 encounters) or text/csv")
        try:
            result = await service.workers.run(batch.score_json, job, await request.body())
        except records.RecordsError as error:
            status = 422 if error.faults else 400
            raise ProblemError(status, str(error), error.faults) from None
        service.count_batch("batch", result)
        return Response(result.content, media_type="application/json")


def _json(content: Any) -> Response:
    """An answer that is known to be right: checking each against its model costs more than it."""
    return Response(orjson.dumps(content), media_type="application/json")


def _add_model(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model", tags=["model"])
    async def model() -> answers.ModelInfo:
        """Which model answers, how good it is, and what it learnt from."""
        found = service.model()
        facts = found.facts
        challenger = service.challenger.model if service.challenger else None
        splits = ("validation", "test")
        return answers.ModelInfo(
            name=found.about["name"],
            version=found.version,
            alias=service.champion.alias,
            candidate=facts["candidate"],
            run_id=found.about["run_id"],
            created=facts["created"],
            loaded_at=datetime.fromtimestamp(service.champion.loaded_at, UTC).isoformat(),
            source=service.champion.source,
            shadow_version=challenger.version if challenger else None,
            is_synthetic=bool(facts["data"]["is_synthetic"]),
            feature_sha256=found.feature_sha256,
            git_commit=facts["git_commit"],
            environment_sha256=facts["environment_sha256"],
            data=facts["data"],
            thresholds=found.scorer.thresholds,
            policy=found.scorer.scoring["policy"],
            metrics={split: facts[split]["metrics"] if facts[split] else None for split in splits},
        )

    @app.get("/v1/model/evaluation", tags=["model"])
    async def evaluation() -> dict[str, Any]:
        """All figures of the model card: slices, calibration, gates, learning curve."""
        return service.model().facts

    @app.get(CARD, tags=["model"], response_class=HTMLResponse)
    async def card() -> HTMLResponse:
        """The model card as one page."""
        page = service.model().folder / "model_card.html"
        return HTMLResponse(page.read_text(encoding="utf-8"))

    @app.get("/v1/fields", tags=["model"])
    async def fields() -> answers.Fields:
        """What can be sent: types, ranges, vocabularies and what codes mean; and examples."""
        found = service.model()
        labels = words.code_labels(found.scorer.definition["tables"])
        return answers.Fields(
            fields=[_field(name, labels) for name in records.ACCEPTED],
            examples=found.examples["records"],
        )


_LABELS = {
    "admission_type_id": "admission_type_code",
    "admission_source_id": "admission_source_code",
    "discharge_disposition_id": "discharge_code",
}


def _field(name: str, labels: dict[str, dict[str, str]]) -> answers.FieldInfo:
    field = records.ACCEPTED[name]
    meanings = labels.get(_LABELS.get(name, ""), {})
    values: Sequence[str] = [value for value in field.values if value != MISSING]
    if field.kind == "code":
        values = sorted(values, key=int)
    return answers.FieldInfo(
        name=name,
        kind=field.kind,
        meaning=field.meaning,
        expected=field.expected,
        values=[
            answers.FieldValue(
                value=int(value) if field.kind == "code" else value,
                label=meanings.get(value, value),
            )
            for value in values
        ],
        low=field.low if field.kind == "count" else None,
        high=field.high if field.kind == "count" else None,
    )


def _describe(app: FastAPI, *, with_keys: bool) -> None:
    """Complete the OpenAPI document with what FastAPI can't see."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            schemas = document["components"]["schemas"]
            place = "#/components/schemas/{model}"
            for name, made in (
                ("Problem", problems.Problem.model_json_schema(ref_template=place)),
                ("Batch", records.batch_adapter().json_schema(ref_template=place)),
            ):
                schemas.update(made.pop("$defs", {}))
                schemas[name] = made
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            if with_keys:
                document["components"]["securitySchemes"] = {
                    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}
                }
                document["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
