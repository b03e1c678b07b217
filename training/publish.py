"""Putting a judged model into MLflow: figures, card and the pyfunc itself."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training import environment, figures
from training.features import RAW_FIELDS
from training.inference import Matrix
from training.tracking import experiment_url

CARD = "card"
"""Folder of the card among a run's artifacts."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is told of a model, in numbers and for the figures.

    Attributes:
        facts: as `training.card.render` takes them.
        target, probability: (rows,) of validation.
        contributions, matrix: (some rows, features) of validation, for the summary of reasons.
        names: of the features.
        thresholds: by alert rate.
    """

    facts: dict[str, Any]
    target: npt.NDArray[np.int8]
    probability: Matrix
    contributions: Matrix
    matrix: Matrix
    names: tuple[str, ...]
    thresholds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Published:
    """Where MLflow has it."""

    model_uri: str
    model_id: str
    card_url: str


def publish(client: Any, folder: Path, evaluation: Evaluation) -> Published:
    """Log metrics, figures, card and model to the run of the candidate.

    Args:
        client: of MLflow.
        folder: the model's, complete.
        evaluation: what to tell.
    """
    facts = evaluation.facts
    run_id = facts["run_id"]
    run = client.get_run(run_id)
    uri = client.tracking_uri
    facts["run_url"] = experiment_url(uri, run.info.experiment_id, run_id)
    facts["registry_url"] = (
        f"{uri.rstrip('/')}/#/models/{facts['name']}" if facts["run_url"] else ""
    )
    facts["created"] = _created(run.info.start_time)
    _log_numbers(client, run_id, facts)
    _log_card(client, run_id, evaluation)
    model = _log_model(run_id, folder)
    return Published(model.model_uri, model.model_id, card_url(facts))


def card_url(facts: Mapping[str, Any]) -> str:
    """Where MLflow's page shows the card (its download address would only save it)."""
    return f"{facts['run_url']}/artifacts/{CARD}/model_card.html" if facts["run_url"] else ""


def figures_as_tags(facts: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a decision as tags of a version, and the policy on test rows."""
    tags = {}
    for split in ("validation", "test"):
        report = facts[split]
        if report:
            for name, found in report["metrics"].items():
                tags[f"{split}_{name}"] = f"{found['value']:.6f}"
            tags[f"{split}_policy"] = json.dumps(report["policy"])
    return tags | gates_as_tags(facts["gates"])


def gates_as_tags(judged: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each gate said, as tags of a version."""
    tags = {}
    for gate in judged:
        value = "" if gate["value"] is None else f" ({gate['value']:.5f})"
        name = "".join(letter if letter.isalnum() else "_" for letter in gate["name"])
        tags[f"gate_{name}"] = f"{'passed' if gate['passed'] else 'FAILED'}{value}"
    return tags


def description(facts: Mapping[str, Any]) -> str:
    """What the registry's page says of a version."""
    split = "test" if facts["test"] else "validation"
    auroc = facts[split]["metrics"]["auroc"]
    lines = [
        f"{facts['candidate']}, {split} AUROC {auroc['value']:.3f} "
        f"[{auroc['low']:.3f}, {auroc['high']:.3f}]; {facts['decision']['reason']}.",
    ]
    if facts["data"]["is_synthetic"]:
        lines.insert(0, "**Learnt from synthetic encounters.**")
    if address := card_url(facts):
        lines.append(f"[Model card]({address})")
    return "\n\n".join(lines)


def _created(start: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(start / 1000, UTC).isoformat(timespec="seconds")


def _log_numbers(client: Any, run_id: str, facts: Mapping[str, Any]) -> None:
    for split in ("validation", "test"):
        if facts[split]:
            for name, found in facts[split]["metrics"].items():
                client.log_metric(run_id, f"{split}_{name}", found["value"])
                client.log_metric(run_id, f"{split}_{name}_low", found["low"])
                client.log_metric(run_id, f"{split}_{name}_high", found["high"])
    if "three_class_auroc" in facts:
        client.log_metric(run_id, "validation_three_class_auroc", facts["three_class_auroc"])
    client.log_dict(run_id, dict(facts), "evaluation.json")


def _log_card(client: Any, run_id: str, evaluation: Evaluation) -> None:
    from training import card

    target, probability = evaluation.target, evaluation.probability
    drawn = {
        "calibration": figures.calibration(target, probability),
        "roc": figures.roc(target, probability),
        "precision_recall": figures.precision_recall(target, probability),
        "gain": figures.gain(target, probability),
        "shap_summary": figures.shap_summary(
            evaluation.names, evaluation.contributions, evaluation.matrix
        ),
        "slices": figures.slices(evaluation.facts["validation"]["slices"]),
    }
    for rate, threshold in evaluation.thresholds.items():
        share = f"{float(rate):.0%}"
        drawn[f"confusion_{share.rstrip('%')}"] = figures.confusion(
            target, probability, threshold, f"Alerts for {share} of validation encounters"
        )
    if evaluation.facts["learning_curve"]:
        drawn["learning_curve"] = figures.learning_curve(evaluation.facts["learning_curve"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "figures").mkdir()
        files = {}
        for figure_name, figure in drawn.items():
            files[figure_name] = folder / "figures" / f"{figure_name}.png"
            figures.save(figure, files[figure_name])
        markdown, page = card.render(evaluation.facts, files)
        (folder / "model_card.md").write_text(markdown, encoding="utf-8")
        (folder / "model_card.html").write_text(page, encoding="utf-8")
        client.log_artifacts(run_id, str(folder), CARD)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Mlflow imports the model's code from where it is about to store it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _log_model(run_id: str, folder: Path) -> Any:
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array, DataType, Object, Property

    # Numbers may be missing, and pandas knows no missing integer: hence double.
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(
            DataType.string if field.kind in ("category", "icd9") else DataType.double,
            field.name,
            required=False,
        )
        for field in RAW_FIELDS
    ]
    reason = Object(
        [
            Property("feature", DataType.string),
            Property("value", DataType.string),
            Property("contribution", DataType.double),
        ]
    )
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.double, "probability"),
        ColSpec(DataType.string, "decision"),
    ]
    if (folder / "fitted_later").exists():
        outputs += [
            ColSpec(DataType.double, "probability_later"),
            ColSpec(DataType.double, "probability_no"),
        ]
    outputs.append(ColSpec(Array(reason), "contributions"))
    params = ParamSchema(
        [ParamSpec("alert_rate", DataType.double, 0.2), ParamSpec("top", DataType.long, 5)]
    )
    examples = json.loads((folder / "examples.json").read_text())["records"][:3]
    example = pd.DataFrame(examples)
    for column in inputs:
        if column.type == DataType.double:
            example[column.name] = example[column.name].astype(float)
    code = Path(__file__).with_name("model_code.py")
    with mlflow.start_run(run_id=run_id), _no_bytecode():
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(code),
            artifacts={"readmission": str(folder)},
            signature=ModelSignature(Schema(inputs), Schema(outputs), params),
            input_example=example,
            pip_requirements=environment.requirements(
                code, folder / "candidate.py", folder / "inference.py"
            ),
        )
