"""The served version, from MLflow: its reference, and what it scores with."""

from __future__ import annotations

import json
from pathlib import Path

from monitoring.drift import Champion, DriftError
from training.inference import load_module
from training.registry import MODEL, find_version


def fetch(uri: str, alias: str, folder: Path) -> Champion | None:
    """Download a version.

    Args:
        uri: of MLflow.
        alias: under which it is served, or its number.
        folder: where it is put; what it scores with is read from there as long as it is used.

    Returns:
        The version; None where there is none.

    Raises:
        DriftError: no server is named, or the version has no reference.
    """
    import mlflow

    if not uri:
        raise DriftError("MLFLOW_TRACKING_URI is not set: name the MLflow server")
    mlflow.set_tracking_uri(uri)
    version = find_version(mlflow.MlflowClient(uri), alias)
    if version is None:
        return None
    model = mlflow.artifacts.download_artifacts(
        f"models:/{MODEL}/{version.number}", dst_path=str(folder)
    )
    found = next(Path(model).glob("artifacts/*/reference.json"), None)
    if found is None:
        raise DriftError(
            f"version {version.number} of {MODEL} holds no reference.json; train a new version"
        )
    # Its own code, not that of this checkout, as the API does: it scores what it scored.
    return Champion(
        version=version.number,
        load_id=int(version.tags.get("load_id", "0")),
        reference=json.loads(found.read_text(encoding="utf-8")),
        scorer=load_module(found.parent / "inference.py").Scorer(found.parent),
    )
