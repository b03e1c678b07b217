"""What a person does beside training: compare, promote, roll back, freeze."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from settings import Settings
from training import data, gates
from training.errors import TrainingError
from training.pipeline import EXPERIMENT, Training
from training.publish import gates_as_tags
from training.registry import CHALLENGER, CHAMPION, MODEL, Registry
from training.tracking import Tracker, download

SHOWN = ("validation_auroc", "validation_auprc", "validation_log_loss", "test_auroc")


def open_training(chosen: Settings, *, dsn: str = "", decided_by: str = "") -> Training:
    """A training on the database and the MLflow server of these settings.

    Args:
        chosen: the settings.
        dsn: another data database than theirs.
        decided_by: for the promotion log.
    """
    tracker = open_tracker(chosen.mlflow_tracking_uri, chosen.state_dir)
    return Training(dsn or chosen.dsn, tracker, decided_by=decided_by)


def open_tracker(uri: str, state: Path) -> Tracker:
    """The tracker of our experiment; runs it can't send are kept below the state folder.

    Raises:
        TrainingError: no server is named.
    """
    if not uri:
        raise TrainingError(
            "MLFLOW_TRACKING_URI is not set: source .run/env.sh after make up, or name a server"
        )
    folder = state / "training"
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(uri, folder, EXPERIMENT)


def compare_runs(training: Training) -> str:
    """The candidates' runs of the experiment as a table, the lowest log loss first."""
    client = training.tracker.client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise TrainingError("there are no runs yet: python -m training run")
    # The plan stands with parents and candidates; trials would fill the answer otherwise.
    runs = client.search_runs(
        [experiment.experiment_id],
        "tags.candidate LIKE '%' AND tags.plan LIKE '%'",
        max_results=1000,
    )
    aliases = {
        found.run_id: f"{alias} (version {found.number})"
        for alias in (CHALLENGER, CHAMPION)
        if (found := Registry(client, training.dsn).version(alias))
    }

    def loss(run: Any) -> float:
        found = run.data.metrics
        uncalibrated = found.get("validation_log_loss_uncalibrated", 9.0)
        return float(found.get("validation_log_loss", uncalibrated))

    lines = [
        f"{'run':<32}  {'candidate':<20} {'data':<9}"
        f"{'val AUROC':>10}{'val AUPRC':>10}{'log loss':>10}{'test AUROC':>11}  alias"
    ]
    for run in sorted(runs, key=loss):
        found = run.data.metrics
        values = []
        for name in SHOWN:
            value = found.get(name, found.get(f"{name}_uncalibrated"))
            values.append("" if value is None else f"{value:.4f}")
        lines.append(
            f"{run.info.run_id:<32}  {run.data.tags['candidate']:<20} "
            f"{run.data.tags['data_sha'][:8]:<9}"
            f"{values[0]:>10}{values[1]:>10}{values[2]:>10}{values[3]:>11}  "
            f"{aliases.get(run.info.run_id, '')}".rstrip()
        )
    return "\n".join(lines)


def promote(training: Training, number: str, override_leak: bool) -> dict[str, Any]:
    """Make a version the champion if it passes the gates against the present one.

    A version that the gates stopped before has not seen test rows: it is judged anew from its
    run, which makes a new version.

    Raises:
        TrainingError: a gate is not passed, or there is no such version.
    """
    client = training.tracker.client()
    registry = Registry(client, training.dsn)
    version = registry.require(number)
    champion = registry.version(CHAMPION)
    if champion and champion.number == version.number:
        raise TrainingError(f"version {number} of {MODEL} is the champion already")
    with tempfile.TemporaryDirectory(prefix="diabetes-promote-") as name:
        folder = Path(name)
        stored = json.loads(
            download(client, version.run_id, "evaluation.json", folder).read_text("utf-8")
        )
        if stored["test"] is None:
            if override_leak:
                training.override_by = training.decided_by
            client.set_tag(version.run_id, "judged", "")
            answer = training.register(version.run_id)
            if not answer["promoted"]:
                raise TrainingError(
                    f"version {answer['version']} (made anew from version {number}) was not "
                    f"promoted: {answer['reason']}"
                )
            return answer
        synthetic = version.tags["is_synthetic"]
        scorer = registry.scorer(version, folder / "challenger")
        comparison = registry.against(
            champion, scorer, synthetic == "True", int(stored["seed"]), folder / "champion"
        )
    judged = gates.judge(
        stored["validation"],
        stored["behaviour"],
        comparison,
        leak_override=training.decided_by if override_leak else "",
        replaces_real=gates.replaces_real(synthetic, champion.tags if champion else {}),
    )
    promoted, reason = gates.verdict(judged)
    action = "promoted" if promoted else "blocked"
    if promoted:
        registry.crown(version)
    registry.tag(
        version,
        gates_as_tags([gate.as_dict() for gate in judged])
        | {"decision": action, "decision_reason": reason},
    )
    registry.log(
        action,
        version,
        champion_before=champion.number if champion else None,
        decided_by=training.decided_by,
        reason=reason,
        gates=judged,
        validation=stored["validation"],
        test=stored["test"],
    )
    if not promoted:
        raise TrainingError(f"version {number} was not promoted: {reason}")
    return {"version": number, "promoted": True, "reason": reason}


def rollback(training: Training, to: str, reason: str) -> dict[str, Any]:
    """Make a former champion the champion again, without asking the gates.

    Raises:
        TrainingError: there is no such version, or none was champion before.
    """
    registry = Registry(training.tracker.client(), training.dsn)
    champion = registry.version(CHAMPION)
    target = to or registry.former_champion()
    if not target:
        raise TrainingError(f"{MODEL} has had no champion before; name a version with --to")
    version = registry.require(target)
    if champion and champion.number == version.number:
        raise TrainingError(f"version {target} of {MODEL} is the champion already")
    registry.crown(version)
    registry.tag(version, {"decision": "rolled back", "decision_reason": reason})
    registry.log(
        "rolled back",
        version,
        champion_before=champion.number if champion else None,
        decided_by=training.decided_by,
        reason=reason,
    )
    return {"version": version.number, "replaced": champion.number if champion else None}


def freeze(training: Training) -> dict[str, Any]:
    """Freeze the present validation encounters for comparisons to come."""
    registry = Registry(training.tracker.client(), training.dsn)
    return {"encounters": registry.freeze(data.facts(training.dsn).is_synthetic)}
