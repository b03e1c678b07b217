"""From a candidate's run to a judged, registered version."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training import candidates, data, drift, environment, evaluate, gates, publish
from training.candidates import Table, never_stop
from training.data import Encounters
from training.inference import Encoder, Matrix, Scorer
from training.metrics import fit_line
from training.plan import Spec, facts_of, tags
from training.registry import CHAMPION, MODEL, RawEncounters, Registry
from training.search import out_of_fold
from training.tracking import download, write_json

log = logging.getLogger(__name__)

FOLDS = 3
BEHAVIOUR_RECORDS = 300
EXAMPLES = 20
SHAP_ROWS = 2000


class Judgement:
    """Calibrates what a search left, judges it, and registers it with all that was found.

    Args:
        dsn: connection string (libpq) of the data database.
        client: of MLflow.
        plan: of the training.
        outcome: `candidate` and `run_id` of what to judge.
        definition: of the features, as the plan's parent run holds it.
        folder: an empty one to work in.
    """

    def __init__(
        self,
        dsn: str,
        client: Any,
        plan: Mapping[str, Any],
        outcome: Mapping[str, Any],
        *,
        definition: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self._dsn = dsn
        self._client = client
        self._plan = plan
        self._spec = Spec(**plan["spec"])
        self._facts = facts_of(plan)
        self._candidate = str(outcome["candidate"])
        self._run_id = str(outcome["run_id"])
        self._definition = definition
        self._folder = folder
        self._model = folder / "readmission"
        self._registry = Registry(client, dsn)
        self._champion = self._registry.version(CHAMPION)

    def run(
        self, curve: Sequence[Mapping[str, float]], decided_by: str, override_by: str
    ) -> dict[str, Any]:
        """Do all of it; nothing is registered before all of it is done.

        Args:
            curve: the learning curve, for the card.
            decided_by: who asked, for the promotion log.
            override_by: who answers for an AUROC that looks like a leak; empty: nobody.

        Returns:
            `version`, `promoted`, `reason`, `card_url` and the metrics.
        """
        self._assemble()
        scorer = self._with_thresholds()
        matrix = self._validation.matrix(scorer.encoder)
        probability = scorer.probabilities(matrix)
        validation = self._report("validation", self._validation, probability, scorer)
        raw = self._registry.frozen_validation(self._facts.is_synthetic)
        behaviour = self._behaviour(scorer, raw)
        judged = self._gates(scorer, validation, behaviour, override_by)
        promoted, reason = gates.verdict(judged)
        test = self._test(scorer) if promoted else None
        self._complete(scorer, probability, validation, test, raw)
        shares = scorer.contributions(matrix[:SHAP_ROWS])[:, :-1]
        facts = self._provenance(scorer) | {
            "validation": validation,
            "test": test,
            "learning_curve": list(curve),
            "behaviour": behaviour,
            "gates": [gate.as_dict() for gate in judged],
            "decision": {
                "promoted": promoted,
                "reason": reason,
                "by": override_by or decided_by,
            },
            "top_features": evaluate.top_features(scorer.feature_names, shares),
        }
        if (later := scorer.later(matrix)) is not None:
            facts["three_class_auroc"] = evaluate.three_class_auroc(
                self._validation.readmitted,
                {"<30": probability, ">30": later, "NO": 1 - probability - later},
            )
        evaluation = publish.Evaluation(
            facts=facts,
            target=self._validation.target,
            probability=probability,
            contributions=shares,
            matrix=matrix[:SHAP_ROWS],
            names=scorer.feature_names,
            thresholds=scorer.thresholds,
        )
        return self._register(evaluation, judged)

    @cached_property
    def _train(self) -> Encounters:
        return data.read(self._dsn, "train", self._definition["features"], self._spec.batches)

    @cached_property
    def _validation(self) -> Encounters:
        return data.read(self._dsn, "validation", self._definition["features"])

    def _assemble(self) -> None:
        """The model's folder, calibrated on training patients that each fold had not seen."""
        stored = download(self._client, self._run_id, "candidate", self._folder)
        shutil.copytree(stored, self._model)
        shutil.copyfile(Path(__file__).with_name("inference.py"), self._model / "inference.py")
        write_json(self._model / "features.json", self._definition)
        self._parameters = json.loads((self._model / "parameters.json").read_text())
        module = candidates.load(self._model / "candidate.py")
        encoder = Encoder(**json.loads((self._model / "encoder.json").read_text()))
        table = Table.of(self._train, encoder)
        margins = out_of_fold(
            module,
            table,
            self._train.patients,
            self._parameters,
            folds=FOLDS,
            seed=self._spec.seed,
            threads=self._spec.threads,
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
        seed, threads = self._spec.seed, self._spec.threads
        model, _ = module.fit(of_rest, None, self._parameters, seed, threads, never_stop)
        folder = self._model / "fitted_later"
        folder.mkdir()
        module.save(model, folder)

    def _write_scoring(self, scoring: Mapping[str, Any]) -> None:
        write_json(self._model / "scoring.json", scoring)

    def _with_thresholds(self) -> Scorer:
        scorer = Scorer(self._model)
        probability = scorer.probabilities(self._validation.matrix(scorer.encoder))
        thresholds = evaluate.choose_thresholds(probability)
        self._write_scoring({**scorer.scoring, "thresholds": thresholds})
        return Scorer(self._model)

    def _report(
        self, split: str, encounters: Encounters, probability: Matrix, scorer: Scorer
    ) -> dict[str, Any]:
        return evaluate.report(split, encounters, probability, scorer.thresholds, self._spec.seed)

    def _behaviour(self, scorer: Scorer, raw: RawEncounters) -> list[dict[str, Any]]:
        return evaluate.behaviour(
            lambda records: _predict(scorer, records),
            raw.records(BEHAVIOUR_RECORDS),
            float(raw.target.mean()),
        )

    def _gates(
        self,
        scorer: Scorer,
        validation: Mapping[str, Any],
        behaviour: Sequence[Mapping[str, Any]],
        override_by: str,
    ) -> list[gates.Gate]:
        champion, synthetic = self._champion, self._facts.is_synthetic
        comparison = self._registry.against(
            champion, scorer, synthetic, self._spec.seed, self._folder / "champion"
        )
        return gates.judge(
            validation,
            behaviour,
            comparison,
            leak_override=override_by,
            replaces_real=gates.replaces_real(str(synthetic), champion.tags if champion else {}),
        )

    def _test(self, scorer: Scorer) -> dict[str, Any]:
        # Noted before it is done. One that breaks off may be repeated: it is the same model.
        self._client.set_tag(self._run_id, "judged", "test rows read")
        test = data.read(self._dsn, "test", self._definition["features"])
        return self._report("test", test, scorer.probabilities(test.matrix(scorer.encoder)), scorer)

    def _complete(
        self,
        scorer: Scorer,
        probability: Matrix,
        validation: Mapping[str, Any],
        test: Mapping[str, Any] | None,
        raw: RawEncounters,
    ) -> None:
        """What goes with the model: drift reference, examples for a self-test, decision policy."""
        reference = drift.reference(self._train.features, self._definition["features"], probability)
        write_json(self._model / "reference.json", reference)
        examples = [_without_ids(record) for record in raw.records(EXAMPLES)]
        write_json(
            self._model / "examples.json",
            {"records": examples, "probabilities": _predict(scorer, examples).tolist()},
        )
        policy = {"validation": validation["policy"], "test": test["policy"] if test else None}
        self._write_scoring({**scorer.scoring, "policy": policy})

    def _provenance(self, scorer: Scorer) -> dict[str, Any]:
        return {
            "name": MODEL,
            "version": None,
            "candidate": self._candidate,
            "run_id": self._run_id,
            "git_commit": environment.git_commit(),
            "feature_sha256": self._definition["sha256"],
            "environment_sha256": environment.lock_sha256(),
            "parameters": self._parameters,
            "calibration": {key: scorer.scoring[key] for key in ("slope", "intercept")},
            "seed": self._spec.seed,
            "data": self._facts.as_dict(),
        }

    def _register(
        self, evaluation: publish.Evaluation, judged: Sequence[gates.Gate]
    ) -> dict[str, Any]:
        facts = evaluation.facts
        decision = facts["decision"]
        action = "promoted" if decision["promoted"] else "blocked"
        published = publish.publish(self._client, self._model, evaluation)
        version = self._registry.add(
            published.model_uri,
            published.model_id,
            self._run_id,
            tags(self._plan)
            | publish.figures_as_tags(facts)
            | {
                "candidate": self._candidate,
                "decision": action,
                "decision_reason": decision["reason"],
            },
            publish.description(facts),
        )
        if decision["promoted"]:
            self._registry.crown(version)
        self._registry.log(
            action,
            version,
            champion_before=self._champion.number if self._champion else None,
            decided_by=decision["by"],
            reason=decision["reason"],
            gates=judged,
            validation=facts["validation"],
            test=facts["test"],
        )
        self._client.set_tag(self._run_id, "judged", f"version {version.number}")
        log.info("version %s of %s: %s", version.number, MODEL, decision["reason"])
        return {
            "version": version.number,
            "promoted": decision["promoted"],
            "reason": decision["reason"],
            "candidate": self._candidate,
            "run_id": self._run_id,
            "card_url": published.card_url,
            "validation": facts["validation"]["metrics"],
            "test": facts["test"]["metrics"] if facts["test"] else None,
        }


def _predict(scorer: Scorer, records: evaluate.Records) -> Matrix:
    names = {name for record in records for name in record}
    columns = {name: [record.get(name) for record in records] for name in names}
    return scorer.probabilities(scorer.matrix(scorer.features(columns, len(records))))


def _without_ids(record: Mapping[str, Any]) -> dict[str, Any]:
    ids = ("encounter_id", "patient_nbr")
    return {name: value for name, value in record.items() if name not in ids}
