"""The steps from clean_data to a registered champion, as the DAG and the command line call them.

Steps hand each other plain values; what is larger goes through the artifacts of MLflow's runs, so
that each step may run in another process or on another machine.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import candidates, data, environment, features
from training.candidates import Table, never_stop
from training.errors import TrackingLostError, TrainingError
from training.inference import Encoder, sigmoid
from training.judgement import Judgement
from training.metrics import Scores, with_intervals
from training.plan import Spec, dataset, facts_of, identity, tags
from training.registry import CHALLENGER, CHAMPION, Registry
from training.search import Best, Trial, search
from training.tracking import Run, Tracker, download, flat, write_json

log = logging.getLogger(__name__)

EXPERIMENT = "diabetes-readmission"
CURVE_RESAMPLES = 200
LOSS_POINTS = 40


@dataclass(slots=True)
class Training:
    """One training's surroundings.

    Args:
        dsn: connection string (libpq) of the data database.
        tracker: where runs go.
        override_by: who answers for an AUROC that looks like a leak; empty: nobody.
        decided_by: who asked for the training, for the promotion log.
    """

    dsn: str
    tracker: Tracker
    override_by: str = ""
    decided_by: str = "training"
    _definitions: dict[str, dict[str, Any]] = field(default_factory=dict)

    # --- steps -------------------------------------------------------------------------------

    def prepare(self, spec: Spec) -> dict[str, Any]:
        """Check the data, take the feature SQL from dbt, and open the parent run.

        Returns:
            The plan that the other steps take; `nothing_to_do` says why there is none, where the
            champion was made from exactly this.

        Raises:
            TrainingError: data, project or spec can't be trained on.
        """
        spec = spec.checked()
        facts = data.facts(self.dsn, spec.batches)
        definition = features.read(self.dsn)
        plan: dict[str, Any] = {
            "spec": asdict(spec),
            "facts": facts.as_dict(),
            "feature_sha256": definition["sha256"],
            "identity": identity(spec, facts, definition),
            "nothing_to_do": "",
        }
        if not spec.force and (reason := self._made_already(plan["identity"])):
            return plan | {"nothing_to_do": reason, "parent": ""}
        parent = self.tracker.begin(
            f"training {facts.sha[:8]}, load {facts.load_id}",
            params=flat({**asdict(spec), "candidates": ", ".join(spec.candidates)}),
            tags=tags(plan),
            dataset=dataset(facts),
        )
        (parent.artifacts / "features.json").write_text(json.dumps(definition, indent=1))
        (parent.artifacts / "environment.txt").write_text(environment.lock())
        self.tracker.finish(parent, "RUNNING")
        self._definitions[parent.id] = definition
        log.info(
            "%s training rows in %d batches, %s validation rows, %d features",
            f"{facts.train_rows:,}", facts.batches, f"{facts.validation_rows:,}",
            len(definition["features"]),
        )  # fmt: skip
        return plan | {"parent": parent.id}

    def search(self, plan: Mapping[str, Any], candidate: str) -> dict[str, Any]:
        """Search the hyper-parameters of one candidate and store its best model with its run.

        Returns:
            `candidate`, `run_id`, and the validation `log_loss` and `auroc` (not calibrated).
        """
        spec = Spec(**plan["spec"])
        definition = self._definition(plan)
        train, validation, encoder = self._tables(definition, spec)
        source = candidates.file(candidate)
        module = candidates.load(source)
        run = self.tracker.begin(
            candidate,
            parent=plan["parent"],
            tags=tags(plan) | {"candidate": candidate},
            dataset=dataset(facts_of(plan)),
        )

        def on_trial(trial: Trial) -> None:
            self._record_trial(run, candidate, trial)

        best = search(
            module,
            train,
            validation,
            trials=spec.trials_of(candidate),
            seed=spec.seed,
            threads=spec.threads,
            on_trial=on_trial,
        )
        self._store_candidate(run, source, encoder, best)
        run.params = {key: str(value) for key, value in best.parameters.items()}
        for name, value in best.trial.metrics.items():
            run.metric(f"validation_{name}_uncalibrated", value)
        run.metric("fit_seconds", best.trial.seconds)
        self.tracker.finish(run)
        return {
            "candidate": candidate,
            "run_id": run.id,
            "log_loss": best.trial.metrics["log_loss"],
            "auroc": best.trial.metrics["auroc"],
        }

    def choose(self, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The candidate with the lowest log loss on validation rows.

        Raises:
            TrackingLostError: MLflow was lost; the runs are kept.
        """
        self.tracker.require_all_sent()
        best = min(outcomes, key=lambda outcome: (outcome["log_loss"], outcome["candidate"]))
        for outcome in sorted(outcomes, key=lambda outcome: float(outcome["log_loss"])):
            log.info(
                "%-20s log loss %.5f, AUROC %.4f%s", outcome["candidate"], outcome["log_loss"],
                outcome["auroc"], "  <- chosen" if outcome is best else "",
            )  # fmt: skip
        return dict(best)

    def learning_curve(
        self, plan: Mapping[str, Any], outcome: Mapping[str, Any]
    ) -> list[dict[str, float]]:
        """Train the chosen candidate on 1, 2, ... batches; log values and figure to the parent.

        Returns:
            A point a batch: `batches`, `rows`, `train_auroc`, and `auroc` with its interval and
            `auprc` on validation rows.
        """
        from training import figures

        spec = Spec(**plan["spec"])
        wanted = self._definition(plan)["features"]
        validation = data.read(self.dsn, "validation", wanted)
        module, parameters = self._chosen(outcome)
        for name in ("trees", "iterations"):
            # Fewer rows want fewer trees: validation decides, as it did for all batches.
            parameters.pop(name, None)
        points = []
        for batches in range(1, facts_of(plan).batches + 1):
            train = data.read(self.dsn, "train", wanted, batches)
            encoder = data.fit_encoder(train, wanted)
            learnt, judged = Table.of(train, encoder), Table.of(validation, encoder)
            model, _ = module.fit(learnt, judged, parameters, spec.seed, spec.threads, never_stop)
            scores = Scores(judged.target, sigmoid(module.margin(model, judged.matrix)))
            found = with_intervals(scores, validation.patients, spec.seed, CURVE_RESAMPLES)
            own = Scores(learnt.target, sigmoid(module.margin(model, learnt.matrix)))
            points.append(
                {
                    "batches": batches,
                    "rows": len(train),
                    "train_auroc": own.auroc(np.ones(len(train))),
                    "auroc": found["auroc"]["value"],
                    "auroc_low": found["auroc"]["low"],
                    "auroc_high": found["auroc"]["high"],
                    "auprc": found["auprc"]["value"],
                }
            )
            log.info("batches 1 to %d: AUROC %.4f", batches, points[-1]["auroc"])
        client = self.tracker.client()
        for point in points:
            for name in ("train_auroc", "auroc", "auprc"):
                client.log_metric(
                    plan["parent"], f"curve_{name}", point[name], step=int(point["batches"])
                )
        client.log_figure(plan["parent"], figures.learning_curve(points), "learning_curve.png")
        client.log_dict(plan["parent"], {"points": points}, "learning_curve.json")
        return points

    def judge(
        self,
        plan: Mapping[str, Any],
        outcome: Mapping[str, Any],
        curve: Sequence[Mapping[str, float]] = (),
    ) -> dict[str, Any]:
        """Calibrate, evaluate, register as challenger, and promote where every gate is passed.

        The test split is read once a run, and only when all gates on validation rows are passed.

        Returns:
            `version`, `promoted`, `reason`, `card_url` and the reports.

        Raises:
            TrainingError: the run has been judged already, or MLflow or the database fails; no
                version is registered then.
        """
        client = self.tracker.client()
        run_id = outcome["run_id"]
        if client.get_run(run_id).data.tags.get("judged", "").startswith("version"):
            raise TrainingError(
                f"run {run_id} has been judged already, and its test rows are read once only; "
                "promote its version, or train anew"
            )
        with tempfile.TemporaryDirectory(prefix="diabetes-model-") as name:
            judgement = Judgement(
                self.dsn,
                client,
                plan,
                outcome,
                definition=self._definition(plan),
                folder=Path(name),
            )
            return judgement.run(curve, self.decided_by, self.override_by)

    def close(self, plan: Mapping[str, Any], succeeded: bool) -> None:
        """End the parent run; where MLflow is away, keep a note to do so."""
        self.tracker.close(plan["parent"], "FINISHED" if succeeded else "FAILED")

    def run(self, spec: Spec, *, learning_curve: bool = True) -> dict[str, Any]:
        """All steps in this process; see `judge` for what is returned."""
        plan = self.prepare(spec)
        if plan["nothing_to_do"]:
            return {"promoted": False, "reason": plan["nothing_to_do"]}
        succeeded = False
        try:
            names = plan["spec"]["candidates"]
            outcome = self.choose([self.search(plan, name) for name in names])
            curve = self.learning_curve(plan, outcome) if learning_curve else []
            answer = self.judge(plan, outcome, curve)
            succeeded = True
            return answer
        finally:
            self.close(plan, succeeded)

    def register(self, run_id: str) -> dict[str, Any]:
        """Judge a run that a search left, e.g. one that was uploaded or that lost to another."""
        from mlflow.exceptions import MlflowException

        client = self.tracker.client()
        try:
            stored = client.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise TrainingError(f"MLflow has no run {run_id}") from error
        if "candidate" not in stored or "plan" not in stored:
            raise TrainingError(f"run {run_id} holds no candidate; give the run of a candidate")
        plan = json.loads(stored["plan"])
        now = data.facts(self.dsn, plan["facts"]["batches"])
        if now.sha != plan["facts"]["sha"]:
            raise TrainingError(
                f"run {run_id} learnt from data {plan['facts']['sha']}, clean_data now holds "
                f"{now.sha}; train anew"
            )
        plan["parent"] = stored["mlflow.parentRunId"]
        return self.judge(plan, {"candidate": stored["candidate"], "run_id": run_id})

    # --- parts -------------------------------------------------------------------------------

    def _made_already(self, identity: str) -> str:
        try:
            registry = Registry(self.tracker.client(), self.dsn)
        except TrackingLostError:
            return ""
        for alias in (CHAMPION, CHALLENGER):
            version = registry.version(alias)
            if version and version.tags.get("identity") == identity:
                return (
                    f"{alias} version {version.number} was made from exactly these data, features "
                    f"and settings: {version.tags['decision_reason']} (force trains anew)"
                )
        return ""

    def _definition(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """The feature SQL as `prepare` found it."""
        parent = plan["parent"]
        if parent not in self._definitions:
            with tempfile.TemporaryDirectory() as folder:
                file = download(self.tracker.client(), parent, "features.json", Path(folder))
                self._definitions[parent] = json.loads(file.read_text())
        return self._definitions[parent]

    def _tables(self, definition: Mapping[str, Any], spec: Spec) -> tuple[Table, Table, Encoder]:
        train = data.read(self.dsn, "train", definition["features"], spec.batches)
        validation = data.read(self.dsn, "validation", definition["features"])
        encoder = data.fit_encoder(train, definition["features"])
        return Table.of(train, encoder), Table.of(validation, encoder), encoder

    def _record_trial(self, run: Run, candidate: str, trial: Trial) -> None:
        made = self.tracker.begin(
            f"{candidate} {trial.number}",
            parent=run.id,
            params=trial.parameters,
            tags={"candidate": candidate, "pruned": str(trial.pruned)},
            seconds_ago=trial.seconds,
        )
        every = max(1, len(trial.losses) // LOSS_POINTS)
        for iteration, loss in trial.losses[::every]:
            made.metric("validation_loss_by_iteration", loss, iteration)
        for name, value in trial.metrics.items():
            made.metric(f"validation_{name}_uncalibrated", value)
        made.metric("fit_seconds", trial.seconds)
        self.tracker.finish(made, "KILLED" if trial.pruned else "FINISHED")
        log.info(
            "%s %d: %s in %.1f s", candidate, trial.number,
            f"log loss {trial.metrics['log_loss']:.5f}" if trial.metrics else "pruned",
            trial.seconds,
        )  # fmt: skip

    def _store_candidate(self, run: Run, source: Path, encoder: Encoder, best: Best) -> None:
        folder = run.artifacts / "candidate"
        (folder / "fitted").mkdir(parents=True)
        shutil.copyfile(source, folder / "candidate.py")
        candidates.load(source).save(best.model, folder / "fitted")
        write_json(
            folder / "encoder.json",
            {"names": encoder.names, "vocabularies": encoder.vocabularies},
        )
        write_json(folder / "parameters.json", best.parameters)

    def _chosen(self, outcome: Mapping[str, Any]) -> tuple[candidates.Candidate, dict[str, Any]]:
        """The candidate as it was stored with its run, and its best parameters."""
        with tempfile.TemporaryDirectory() as name:
            folder = download(self.tracker.client(), outcome["run_id"], "candidate", Path(name))
            parameters = json.loads((folder / "parameters.json").read_text())
            return candidates.load(folder / "candidate.py"), parameters
