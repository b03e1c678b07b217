"""What callers get, as the OpenAPI document tells it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Prediction(BaseModel):
    """The risk of one encounter."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "prediction_id": "019a9c1e-5b60-7d53-9d3c-3f8a2f6f3b11",
                    "probability": 0.187,
                    "percentile": 87.4,
                    "alert": True,
                    "alert_rate": 0.2,
                    "threshold": 0.1525,
                    "excluded": None,
                    "model_version": "3",
                }
            ]
        },
    )

    prediction_id: str = Field(description="UUID (version 7) under which it is logged")
    probability: float | None = Field(
        description="Of a readmission within 30 days; null for an encounter that is excluded"
    )
    percentile: float | None = Field(
        description="Share of all patients with a lower risk, 0 to 100 (validation encounters)"
    )
    alert: bool | None = Field(description="Whether the probability reaches the threshold")
    alert_rate: float = Field(description="Share of encounters that become alerts")
    threshold: float = Field(description="Probability that belongs to the alert rate")
    excluded: str | None = Field(
        description="Why the patient can't come back (died, hospice); null otherwise"
    )
    model_version: str


class Predictions(BaseModel):
    """The risks of a batch, in the order of its encounters."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: str
    predictions: list[Prediction]


class Reason(BaseModel):
    """What one feature does to one encounter's risk."""

    feature: str = Field(description="Name in clean_data")
    label: str = Field(description="The same in plain words")
    value: str
    contribution: float = Field(description="Exact share (TreeSHAP) of the log odds")
    odds_ratio: float = Field(description="exp(contribution)")
    effect: Literal["raises", "lowers"]
    text: str = Field(description="One sentence")


class Explanation(Prediction):
    """The risk of one encounter and what it comes from; empty for an excluded one."""

    baseline: float | None = Field(description="Probability that every encounter starts from")
    reasons: list[Reason]
    others: float | None = Field(description="Log odds of all features that are not listed")


class ModelInfo(BaseModel):
    """Which model answers, how good it is, and what it learnt from."""

    name: str
    version: str
    alias: str
    candidate: str = Field(description="Kind of model")
    run_id: str
    created: str
    loaded_at: str
    source: Literal["registry", "cache"] = Field(description="cache: MLflow was away at the start")
    shadow_version: str | None = Field(description="Challenger that scores the same, unseen")
    is_synthetic: bool = Field(description="Whether it learnt from made-up encounters")
    feature_sha256: str = Field(description="Of the feature SQL and its lookups")
    git_commit: str
    environment_sha256: str = Field(description="Of the locked packages it was trained with")
    data: dict[str, Any] = Field(description="What it was trained on")
    thresholds: dict[str, float] = Field(description="Probability by alert rate")
    policy: dict[str, Any] = Field(description="Recall and precision of each alert rate, by split")
    metrics: dict[str, Any] = Field(description="Metrics with 95 % intervals, by split")


class FieldValue(BaseModel):
    """One value of a vocabulary."""

    value: str | int
    label: str = Field(description="What it means, in English")


class FieldInfo(BaseModel):
    """One field that a caller can send."""

    name: str
    kind: Literal["id", "count", "code", "category", "icd9"]
    meaning: str
    expected: str
    values: list[FieldValue] = Field(description="The vocabulary; empty for numbers and ICD-9")
    low: int | None
    high: int | None


class Fields(BaseModel):
    """What can be sent, from the file contract."""

    fields: list[FieldInfo]
    examples: list[dict[str, Any]] = Field(description="Raw encounters of the validation split")


class Health(BaseModel):
    """Whether the process lives, or is ready to predict."""

    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ok"]
    model_version: Annotated[str | None, Field(description="Only in /readyz")] = None
