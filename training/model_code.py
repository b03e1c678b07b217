"""The MLflow pyfunc of a registered model; stored as this text ("models from code"), no pickle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ReadmissionModel(PythonModel):
    """Raw encounter fields, as in the publisher's CSV, to risk, decision and reasons."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the scorer that was stored with this model, not the one of some checkout."""
        folder = Path(context.artifacts["readmission"])
        spec = importlib.util.spec_from_file_location(
            f"readmission_inference_{abs(hash(folder))}", folder / "inference.py"
        )
        assert spec is not None  # noqa: S101  (the file is part of the model)
        assert spec.loader is not None  # noqa: S101
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.scorer = module.Scorer(folder)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Score encounters.

        Args:
            context: not used; MLflow gives it.
            model_input: DataFrame of raw fields; a column that is left out means missing.
            params: `alert_rate` (0.1 or 0.2) of the decision and `top`, the number of reasons
                (0: none).

        Returns:
            DataFrame with `probability`, `decision` (`alert` or `no alert`) and `contributions`;
            with three classes also `probability_later` and `probability_no`.
        """
        settings: dict[str, Any] = {"alert_rate": 0.2, "top": 5, **(params or {})}
        scorer = self.scorer
        threshold = scorer.threshold(settings["alert_rate"])
        # pandas has several ways to say "missing"; the scorer knows None.
        known = model_input.astype(object).where(model_input.notna(), None)
        columns = {str(name): known[name].tolist() for name in known.columns}
        rows = scorer.features(columns, len(model_input))
        matrix = scorer.matrix(rows)
        probability = scorer.probabilities(matrix)
        answer = pd.DataFrame({"probability": probability}, index=model_input.index)
        answer["decision"] = ["alert" if p >= threshold else "no alert" for p in probability]
        later = scorer.later(matrix)
        if later is not None:
            answer["probability_later"] = later
            answer["probability_no"] = 1 - probability - later
        answer["contributions"] = scorer.reasons(rows, matrix, settings["top"])
        return answer


mlflow.models.set_model(ReadmissionModel())
