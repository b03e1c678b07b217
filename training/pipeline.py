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
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from training import candidates, data, drift, environment, evaluate, features, gates
from training.candidates import Table
from training.data import DataFacts, Encounters
from training.errors import TrackingLostError, TrainingError
from training.inference import Encoder, Scorer, sigmoid
from training.metrics import Scores, fit_line, with_intervals
from training.registry import CHAMPION, MODEL, RawEncounters, Registry, Version, compare
from training.search import Best, Trial, out_of_fold, search
from training.tracking import Run, Tracker, download, flat

log = logging.getLogger(__name__)

EXPERIMENT = "diabetes-readmission"
FOLDS = 3
CURVE_RESAMPLES = 200
BEHAVIOUR_RECORDS = 300
SHAP_ROWS = 2000
LOSS_POINTS = 40


@dataclass(frozen=True, slots=True)
class Spec:
    """What to train.

    Attributes:
        candidates: names of files in training/candidates; empty: all.
        trials: in all, shared out among the candidates.
        batches: of train, from the first on; 0: all.
        seed: of everything drawn.
        threads: of one training. Part of the result's identity: sums in another order round
            otherwise.
        classes: 2, or 3 to tell later readmission from none as well.
        force: train even where the champion was made from exactly this.
    """

    candidates: Sequence[str] = ()
    trials: int = 20
    batches: int = 0
    seed: int = 130
    threads: int = 2
    classes: int = 2
    force: bool = False

    def checked(self) -> Spec:
        """The same with candidates filled in.

        Raises:
            TrainingError: an unknown candidate, or fewer trials than candidates.
        """
        names = tuple(self.candidates) or tuple(candidates.names())
        for name in names:
            candidates.file(name)
        if self.trials < len(names):
            raise TrainingError(
                f"{self.trials} trials for {len(names)} candidates: one each at least"
            )
        if self.classes not in (2, 3):
            raise TrainingError(f"classes is {self.classes}, expected 2 or 3")
        return Spec(**{**asdict(self), "candidates": names})

    def trials_of(self, candidate: str) -> int:
        """Its share of the trials; what is left over goes to the first."""
        share, rest = divmod(self.trials, len(self.candidates))
        return share + (list(self.candidates).index(candidate) < rest)


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
        identity = _identity(spec, facts, definition)
        plan: dict[str, Any] = {
            "spec": asdict(spec),
            "facts": facts.as_dict(),
            "feature_sha256": definition["sha256"],
            "identity": identity,
            "nothing_to_do": "",
        }
        if not spec.force and (reason := self._made_already(identity)):
            return plan | {"nothing_to_do": reason, "parent": ""}
        parent = self.tracker.begin(
            f"training {facts.sha[:8]}, load {facts.load_id}",
            params=flat({**asdict(spec), "candidates": ", ".join(spec.candidates)}),
            tags=self._tags(plan),
            dataset=_dataset(facts),
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
            tags=self._tags(plan) | {"candidate": candidate},
            dataset=_dataset(_facts(plan)),
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
        for batches in range(1, _facts(plan).batches + 1):
            train = data.read(self.dsn, "train", wanted, batches)
            encoder = data.fit_encoder(train, wanted)
            learnt, judged = _table(train, encoder), _table(validation, encoder)
            model, _ = module.fit(learnt, judged, parameters, spec.seed, spec.threads, _unheard)
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
            judgement = _Judgement(self, plan, outcome, curve, Path(name))
            return judgement.run()

    def close(self, plan: Mapping[str, Any], succeeded: bool) -> None:
        """End the parent run."""
        if plan["parent"]:
            client = self.tracker.client()
            client.set_terminated(plan["parent"], "FINISHED" if succeeded else "FAILED")

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
            if self.tracker.answers():
                self.close(plan, succeeded)

    def register(self, run_id: str) -> dict[str, Any]:
        """Judge a run that a search left, e.g. one that was uploaded or that lost to another."""
        client = self.tracker.client()
        found = client.get_run(run_id)
        tags = found.data.tags
        if "candidate" not in tags or "plan" not in tags:
            raise TrainingError(f"run {run_id} holds no candidate; give the run of a candidate")
        plan = json.loads(tags["plan"])
        now = data.facts(self.dsn, plan["facts"]["batches"])
        if now.sha != plan["facts"]["sha"]:
            raise TrainingError(
                f"run {run_id} learnt from data {plan['facts']['sha']}, clean_data now holds "
                f"{now.sha}; train anew"
            )
        plan["parent"] = tags["mlflow.parentRunId"]
        return self.judge(plan, {"candidate": tags["candidate"], "run_id": run_id})

    # --- parts -------------------------------------------------------------------------------

    def _made_already(self, identity: str) -> str:
        try:
            registry = Registry(self.tracker.client(), self.dsn)
        except TrackingLostError:
            return ""
        champion = registry.version(CHAMPION)
        if champion and champion.tags.get("identity") == identity:
            return (
                f"champion version {champion.number} was made from exactly these data, features "
                "and settings (force trains anew)"
            )
        return ""

    def _tags(self, plan: Mapping[str, Any]) -> dict[str, str]:
        kept = {key: plan[key] for key in ("spec", "facts", "feature_sha256", "identity")}
        return {
            "plan": json.dumps(kept),
            "data_sha": plan["facts"]["sha"],
            "load_id": str(plan["facts"]["load_id"]),
            "feature_sha256": plan["feature_sha256"],
            "environment_sha256": environment.lock_sha256(),
            "git_commit": environment.git_commit(),
            "is_synthetic": str(plan["facts"]["is_synthetic"]),
        }

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
        return _table(train, encoder), _table(validation, encoder), encoder

    def _record_trial(self, run: Run, candidate: str, trial: Trial) -> None:
        made = self.tracker.begin(
            f"{candidate} {trial.number}",
            parent=run.id,
            params=trial.parameters,
            tags={"candidate": candidate, "pruned": str(trial.pruned)},
        )
        made.start -= int(trial.seconds * 1000)
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
        _write_json(
            folder / "encoder.json",
            {"names": encoder.names, "vocabularies": encoder.vocabularies},
        )
        _write_json(folder / "parameters.json", best.parameters)

    def _chosen(self, outcome: Mapping[str, Any]) -> tuple[candidates.Candidate, dict[str, Any]]:
        """The candidate as it was stored with its run, and its best parameters."""
        with tempfile.TemporaryDirectory() as name:
            folder = download(self.tracker.client(), outcome["run_id"], "candidate", Path(name))
            parameters = json.loads((folder / "parameters.json").read_text())
            return candidates.load(folder / "candidate.py"), parameters


class _Judgement:
    """From a candidate's run to a registered version; one object a judgement."""

    def __init__(
        self,
        training: Training,
        plan: Mapping[str, Any],
        outcome: Mapping[str, Any],
        curve: Sequence[Mapping[str, float]],
        folder: Path,
    ) -> None:
        self._training = training
        self._plan = plan
        self._spec = Spec(**plan["spec"])
        self._facts = _facts(plan)
        self._outcome = outcome
        self._curve = list(curve)
        self._folder = folder
        self._model = folder / "readmission"
        self._definition = training._definition(plan)
        self._client = training.tracker.client()
        self._registry = Registry(self._client, training.dsn)

    def run(self) -> dict[str, Any]:
        self._assemble()
        scorer = Scorer(self._model)
        matrix = self._validation.matrix(scorer.encoder)
        probability = scorer.probabilities(matrix)
        thresholds = evaluate.choose_thresholds(probability)
        self._write_scoring({**scorer.scoring, "thresholds": thresholds})
        scorer = Scorer(self._model)
        validation = evaluate.report(
            "validation", self._validation, probability, thresholds, self._spec.seed
        )
        raw = self._registry.frozen_validation(self._facts.is_synthetic)
        behaviour = evaluate.behaviour(
            lambda records: _predict(scorer, records),
            raw.records(BEHAVIOUR_RECORDS),
            float(raw.target.mean()),
        )
        champion = self._registry.version(CHAMPION)
        comparison = self._compare(scorer, champion, raw)
        judged = gates.judge(
            validation,
            behaviour,
            comparison,
            leak_override=self._training.override_by,
            replaces_real=gates.replaces_real(
                str(self._facts.is_synthetic), champion.tags if champion else {}
            ),
        )
        failed = [gate.name for gate in judged if not gate.passed]
        test = None if failed else self._test(scorer, thresholds)
        reason = f"gates not passed: {', '.join(failed)}" if failed else "every gate was passed"
        self._finish_model(scorer, probability, validation, test, raw)
        return self._register(
            scorer, matrix, probability, validation, test, behaviour, judged, champion, reason
        )

    @cached_property
    def _train(self) -> Encounters:
        return data.read(
            self._training.dsn, "train", self._definition["features"], self._spec.batches
        )

    @cached_property
    def _validation(self) -> Encounters:
        return data.read(self._training.dsn, "validation", self._definition["features"])

    def _assemble(self) -> None:
        """The model's folder, calibrated on training patients that each fold had not seen."""
        stored = download(self._client, self._outcome["run_id"], "candidate", self._folder)
        shutil.copytree(stored, self._model)
        shutil.copyfile(Path(__file__).with_name("inference.py"), self._model / "inference.py")
        _write_json(self._model / "features.json", self._definition)
        self._parameters = json.loads((self._model / "parameters.json").read_text())
        module = candidates.load(self._model / "candidate.py")
        encoder = Encoder(**json.loads((self._model / "encoder.json").read_text()))
        table = _table(self._train, encoder)
        options = {"seed": self._spec.seed, "threads": self._spec.threads}
        margins = out_of_fold(
            module, table, self._train.patients, self._parameters, folds=FOLDS, **options
        )
        slope, intercept = fit_line(margins, table.target)
        log.info("calibration: slope %.3f, intercept %.3f", slope, intercept)
        self._write_scoring({"slope": slope, "intercept": intercept, "thresholds": {}})
        if self._spec.classes == 3:
            self._fit_later(module, table)

    def _fit_later(self, module: candidates.Candidate, table: Table) -> None:
        """Later against never, among those who don't come back within 30 days.

        Nested dichotomies (Fox 1997): the three probabilities add up, and that of <30 stays what
        the calibrated model says.
        """
        rest = np.flatnonzero(table.target == 0)
        later = (self._train.readmitted[rest] == ">30").astype(np.int8)
        of_rest = Table(table.matrix[rest], later, table.names, table.nominal)
        model, _ = module.fit(
            of_rest, None, self._parameters, self._spec.seed, self._spec.threads,
            _unheard,
        )  # fmt: skip
        folder = self._model / "fitted_later"
        folder.mkdir()
        module.save(model, folder)

    def _write_scoring(self, scoring: Mapping[str, Any]) -> None:
        _write_json(self._model / "scoring.json", scoring)

    def _compare(
        self, scorer: Scorer, champion: Version | None, raw: RawEncounters
    ) -> dict[str, Any] | None:
        if champion is None or champion.tags.get("is_synthetic") != str(self._facts.is_synthetic):
            return None
        reigning = self._registry.scorer(champion, self._folder / "champion")
        return compare(scorer, reigning, champion.number, raw, self._spec.seed)

    def _test(self, scorer: Scorer, thresholds: Mapping[str, float]) -> dict[str, Any]:
        # Noted before it is done. One that breaks off may be repeated: it is the same model.
        self._client.set_tag(self._outcome["run_id"], "judged", "test rows read")
        test = data.read(self._training.dsn, "test", self._definition["features"])
        probability = scorer.probabilities(test.matrix(scorer.encoder))
        return evaluate.report("test", test, probability, thresholds, self._spec.seed)

    def _finish_model(
        self,
        scorer: Scorer,
        probability: Any,
        validation: Mapping[str, Any],
        test: Mapping[str, Any] | None,
        raw: RawEncounters,
    ) -> None:
        reference = drift.reference(self._train.features, self._definition["features"], probability)
        _write_json(self._model / "reference.json", reference)
        examples = [_without_ids(record) for record in raw.records(20)]
        _write_json(
            self._model / "examples.json",
            {"records": examples, "probabilities": _predict(scorer, examples).tolist()},
        )
        self._write_scoring(
            {
                **scorer.scoring,
                "policy": {
                    "validation": validation["policy"],
                    "test": test["policy"] if test else None,
                },
            }
        )

    def _register(
        self,
        scorer: Scorer,
        matrix: Any,
        probability: Any,
        validation: dict[str, Any],
        test: dict[str, Any] | None,
        behaviour: list[dict[str, Any]],
        judged: list[gates.Gate],
        champion: Version | None,
        reason: str,
    ) -> dict[str, Any]:
        from training import publish

        promoted = test is not None
        shares = scorer.contributions(matrix[:SHAP_ROWS])[:, :-1]
        facts = {
            "name": MODEL,
            "version": None,
            "candidate": self._outcome["candidate"],
            "run_id": self._outcome["run_id"],
            "git_commit": environment.git_commit(),
            "feature_sha256": self._definition["sha256"],
            "environment_sha256": environment.lock_sha256(),
            "parameters": self._parameters,
            "calibration": {key: scorer.scoring[key] for key in ("slope", "intercept")},
            "seed": self._spec.seed,
            "data": self._facts.as_dict(),
            "validation": validation,
            "test": test,
            "learning_curve": self._curve,
            "behaviour": behaviour,
            "gates": [gate.as_dict() for gate in judged],
            "decision": {
                "promoted": promoted,
                "reason": reason,
                "by": self._training.override_by or self._training.decided_by,
            },
            "top_features": evaluate.top_features(scorer.feature_names, shares),
        }
        if scorer.later(matrix[:1]) is not None:
            facts["three_class_auroc"] = self._three_class_auroc(scorer, matrix, probability)
        evaluation = publish.Evaluation(
            facts=facts,
            target=self._validation.target,
            probability=probability,
            contributions=shares,
            matrix=matrix[:SHAP_ROWS],
            names=scorer.feature_names,
            thresholds=scorer.thresholds,
        )
        tags = self._training._tags(self._plan) | {
            "candidate": self._outcome["candidate"],
            "identity": self._plan["identity"],
            "decision": "promoted" if promoted else "blocked",
            "decision_reason": reason,
        }
        published = publish.publish(self._client, self._model, evaluation)
        version = self._registry.add(
            published.model_uri,
            published.model_id,
            self._outcome["run_id"],
            tags | publish.figures_as_tags(facts),
            publish.description(facts),
        )
        if promoted:
            self._registry.crown(version)
        self._registry.log(
            "promoted" if promoted else "blocked",
            version,
            champion_before=champion.number if champion else None,
            decided_by=facts["decision"]["by"],
            reason=reason,
            gates=judged,
            validation=validation,
            test=test,
        )
        self._client.set_tag(self._outcome["run_id"], "judged", f"version {version.number}")
        log.info("version %s of %s: %s", version.number, MODEL, reason)
        return {
            "version": version.number,
            "promoted": promoted,
            "reason": reason,
            "candidate": self._outcome["candidate"],
            "run_id": self._outcome["run_id"],
            "card_url": published.card_url,
            "validation": validation["metrics"],
            "test": test["metrics"] if test else None,
        }

    def _three_class_auroc(self, scorer: Scorer, matrix: Any, probability: Any) -> float:
        later = scorer.later(matrix)
        assert later is not None  # noqa: S101  (asked for only where the model knows it)
        return evaluate.three_class_auroc(
            self._validation.readmitted,
            {"<30": probability, ">30": later, "NO": 1 - probability - later},
        )


def _unheard(_iteration: int, _loss: float) -> bool:
    """Nobody prunes this training."""
    return False


def _predict(scorer: Scorer, records: evaluate.Records) -> Any:
    names = {name for record in records for name in record}
    columns = {name: [record.get(name) for record in records] for name in names}
    return scorer.probabilities(scorer.matrix(scorer.features(columns, len(records))))


def _without_ids(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in record.items() if name not in ("encounter_id", "patient_nbr")
    }


def _table(encounters: Encounters, encoder: Encoder) -> Table:
    return Table(encounters.matrix(encoder), encounters.target, encoder.names, encoder.nominal)


def _facts(plan: Mapping[str, Any]) -> DataFacts:
    return DataFacts(**{key: value for key, value in plan["facts"].items() if key != "sha"})


def _dataset(facts: DataFacts) -> dict[str, Any]:
    return {
        "name": "clean_data.diabetes_train",
        "digest": facts.train_hash,
        "source": {"table": "clean_data.diabetes_train", "batches": facts.batches},
        "profile": facts.as_dict(),
    }


def _identity(spec: Spec, facts: DataFacts, definition: Mapping[str, Any]) -> str:
    """Everything that determines a training's result; equal means equal to the last digit."""
    code = [
        file.read_bytes().hex()
        for name in spec.candidates
        for file in (candidates.file(name), Path(__file__), Path(__file__).with_name("search.py"))
    ]
    parts = [
        {**asdict(spec), "force": False, "batches": facts.batches},
        facts.sha,
        definition["sha256"],
        definition["tables"]["int_statistics"],
        environment.lock_sha256(),
        code,
    ]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
