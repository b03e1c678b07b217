"""Registered versions, their aliases, and the log of who became champion and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import psycopg2

from settings import REGISTERED_MODEL
from training import evaluate
from training.data import connect
from training.errors import TrainingError
from training.features import RAW_FIELDS
from training.gates import Gate, worst_gap_growth
from training.inference import Scorer
from training.metrics import Scores, paired_difference

MODEL = REGISTERED_MODEL
CHAMPION, CHALLENGER = "champion", "challenger"

_TABLES = """
create schema if not exists ml;
create table if not exists ml.promotion_log (
    decision_id bigint generated always as identity primary key,
    decided_at timestamptz not null default now(),
    action text not null check (action in ('promoted', 'blocked', 'rolled back')),
    model text not null,
    version text not null,
    champion_before text,
    decided_by text not null,
    reason text not null,
    candidate text not null,
    run_id text not null,
    data_sha text not null,
    feature_sha256 text not null,
    gates jsonb not null,
    validation jsonb not null,
    test jsonb
);
create table if not exists ml.frozen_validation (
    encounter_id bigint primary key,
    patient_nbr bigint not null,
    readmitted_within_30_days smallint not null,
    record jsonb not null,
    is_synthetic boolean not null,
    frozen_at timestamptz not null default now()
);
"""

_FREEZE = f"""
insert into ml.frozen_validation
    (encounter_id, patient_nbr, readmitted_within_30_days, record, is_synthetic)
select
    v.encounter_id,
    v.patient_nbr,
    v.readmitted_within_30_days,
    to_jsonb(r) - '{{encounter_id,patient_nbr,readmitted,first_load_id,last_load_id}}'::text[],
    %s
from clean_data.diabetes_validation as v
inner join raw_data.diabetes as r on r.encounter_id = v.encounter_id
-- {len(RAW_FIELDS)} raw fields stay, in the database's names
"""


@dataclass(frozen=True, slots=True)
class RawEncounters:
    """Raw encounters with their outcome, in the order of their ids.

    Attributes:
        columns: values by field, named as in the publisher's header; ids included.
        target: (rows,) 1 where readmitted within 30 days.
        patients: (rows,) for grouping.
    """

    columns: dict[str, list[Any]]
    target: npt.NDArray[np.int8]
    patients: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.target)

    def records(self, count: int) -> list[dict[str, Any]]:
        """The first `count` encounters, one mapping each."""
        names = list(self.columns)
        rows = zip(*(values[:count] for values in self.columns.values()), strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]


@dataclass(frozen=True, slots=True)
class Version:
    """One registered version.

    Attributes:
        number: its version.
        run_id: of the run that made it.
        tags: what was stored with it.
    """

    number: str
    run_id: str
    tags: Mapping[str, str]


def find_version(client: Any, alias_or_number: str) -> Version | None:
    """The version of our model with this alias or number; None where there is none.

    With logins and workspaces, MLflow (3.17) answers 403 for a model that does not exist, whatever
    the user's rights. Only the search tells that from a model that the user may not read.
    """
    from mlflow.exceptions import MlflowException

    get = (
        client.get_model_version if alias_or_number.isdigit() else client.get_model_version_by_alias
    )
    try:
        found = get(MODEL, alias_or_number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        if error.error_code == "PERMISSION_DENIED" and not _is_registered(client):
            return None
        raise
    return Version(str(found.version), found.run_id, dict(found.tags))


def _is_registered(client: Any) -> bool:
    """Whether the registry shows our model to this user."""
    return bool(client.search_registered_models(f"name = '{MODEL}'", max_results=1))


class Registry:
    """The registered model, and the tables of schema `ml`.

    Args:
        client: of MLflow.
        dsn: connection string (libpq) of the data database.
    """

    def __init__(self, client: Any, dsn: str) -> None:
        self._client = client
        self._dsn = dsn
        with closing(connect(dsn)) as connection, connection:
            # Two trainings that start at once must not both create.
            connection.cursor().execute("select pg_advisory_xact_lock(130)")
            connection.cursor().execute(_TABLES)

    def version(self, alias_or_number: str) -> Version | None:
        """The version with this alias or number; None where there is none."""
        return find_version(self._client, alias_or_number)

    def require(self, alias_or_number: str) -> Version:
        """The version with this alias or number.

        Raises:
            TrainingError: there is none.
        """
        found = self.version(alias_or_number)
        if found is None:
            raise TrainingError(f"{MODEL} has no version {alias_or_number}")
        return found

    def scorer(self, version: Version, target: Path) -> Scorer:
        """Download a version and load what it scores with."""
        import mlflow

        folder = mlflow.artifacts.download_artifacts(
            f"models:/{MODEL}/{version.number}", dst_path=str(target)
        )
        found = list(Path(folder).glob("artifacts/*/features.json"))
        if not found:
            raise TrainingError(f"version {version.number} of {MODEL} holds no features.json")
        return Scorer(found[0].parent)

    def add(
        self,
        model_uri: str,
        model_id: str,
        run_id: str,
        tags: Mapping[str, str],
        description: str,
    ) -> Version:
        """Register a logged model as a new version, whole or not at all, as the challenger."""
        if not _is_registered(self._client):
            self._client.create_registered_model(
                MODEL,
                description="Risk that a diabetic inpatient is readmitted within 30 days. The "
                "alias `champion` is served; `challenger` is the newest version.",
            )
        made = self._client.create_model_version(
            MODEL, model_uri, run_id, tags=dict(tags), description=description, model_id=model_id
        )
        version = Version(str(made.version), run_id, tags)
        self._client.set_registered_model_alias(MODEL, CHALLENGER, version.number)
        return version

    def against(
        self, champion: Version | None, scorer: Scorer, is_synthetic: bool, seed: int, folder: Path
    ) -> dict[str, Any] | None:
        """Compare a model with the champion on the frozen validation set, see `compare`.

        Args:
            champion: the present one.
            scorer: the model that would take its place.
            is_synthetic: whether that one learnt from synthetic encounters.
            seed: of the bootstrap.
            folder: where the champion is downloaded to.

        Returns:
            The comparison; None where there is no champion, or one of another kind of encounters.
        """
        if champion is None or champion.tags.get("is_synthetic") != str(is_synthetic):
            return None
        reigning = self.scorer(champion, folder)
        return compare(
            scorer, reigning, champion.number, self.frozen_validation(is_synthetic), seed
        )

    def crown(self, version: Version) -> None:
        """Make a version the champion; it is the challenger no longer."""
        self._client.set_registered_model_alias(MODEL, CHAMPION, version.number)
        challenger = self.version(CHALLENGER)
        if challenger and challenger.number == version.number:
            self._client.delete_registered_model_alias(MODEL, CHALLENGER)

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for name, value in tags.items():
            self._client.set_model_version_tag(MODEL, version.number, name, value)

    def log(
        self,
        action: str,
        version: Version,
        *,
        champion_before: str | None,
        decided_by: str,
        reason: str,
        gates: Sequence[Gate] = (),
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a decision with its figures to `ml.promotion_log`."""
        with closing(connect(self._dsn)) as connection, connection:
            connection.cursor().execute(
                "insert into ml.promotion_log (action, model, version, champion_before, "
                "decided_by, reason, candidate, run_id, data_sha, feature_sha256, gates, "
                "validation, test) values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    action,
                    MODEL,
                    version.number,
                    champion_before,
                    decided_by,
                    reason,
                    version.tags.get("candidate", ""),
                    version.run_id,
                    version.tags.get("data_sha", ""),
                    version.tags.get("feature_sha256", ""),
                    json.dumps([gate.as_dict() for gate in gates]),
                    json.dumps(validation or {}),
                    json.dumps(test) if test else None,
                ),
            )

    def former_champion(self) -> str | None:
        """The version that was champion before the present one came; None where none was.

        What was rolled back from does not count: rolling back twice goes back two champions.
        """
        with closing(connect(self._dsn)) as connection:
            cursor = connection.cursor()
            cursor.execute(
                "select action, version from ml.promotion_log where model = %s and action in "
                "('promoted', 'rolled back') order by decision_id",
                (MODEL,),
            )
            decisions = cursor.fetchall()
        reigns: list[str] = []
        for action, version in decisions:
            if action == "rolled back" and version in reigns:
                del reigns[reigns.index(version) :]
            reigns.append(version)
        return reigns[-2] if len(reigns) > 1 else None

    def frozen_validation(self, is_synthetic: bool) -> RawEncounters:
        """The validation encounters on which champion and challenger are compared.

        They are frozen when first asked for, as raw records, so that neither another data load
        nor other feature SQL changes what is compared. Where real encounters have replaced
        synthetic ones (or the reverse) they are frozen anew: nothing of the old could be used.
        """
        with closing(connect(self._dsn)) as connection, connection:
            cursor = connection.cursor()
            cursor.execute("lock table ml.frozen_validation in share row exclusive mode")
            cursor.execute("select bool_or(is_synthetic) from ml.frozen_validation")
            (frozen,) = cursor.fetchone() or (None,)
            if frozen is None or frozen != is_synthetic:
                self._freeze(cursor, is_synthetic)
            return _read_frozen(cursor)

    def freeze(self, is_synthetic: bool) -> int:
        """Freeze the present validation encounters anew and return how many there are."""
        with closing(connect(self._dsn)) as connection, connection:
            return self._freeze(connection.cursor(), is_synthetic)

    def _freeze(self, cursor: psycopg2.extensions.cursor, is_synthetic: bool) -> int:
        cursor.execute("delete from ml.frozen_validation")
        cursor.execute(_FREEZE, (is_synthetic,))
        return int(cursor.rowcount)


def _read_frozen(cursor: psycopg2.extensions.cursor) -> RawEncounters:
    cursor.execute(
        "select encounter_id, patient_nbr, readmitted_within_30_days, record "
        "from ml.frozen_validation order by encounter_id"
    )
    rows = cursor.fetchall()
    columns: dict[str, list[Any]] = {
        "encounter_id": [row[0] for row in rows],
        "patient_nbr": [row[1] for row in rows],
    }
    for field in RAW_FIELDS:
        columns[field.name] = [row[3].get(field.column) for row in rows]
    return RawEncounters(
        columns,
        np.array([row[2] for row in rows], np.int8),
        np.array([row[1] for row in rows], np.int64),
    )


def compare(
    challenger: Scorer, champion: Scorer, version: str, frozen: RawEncounters, seed: int
) -> dict[str, Any]:
    """Compare two models on the same raw encounters, each with its own feature SQL.

    Returns:
        `version` of the champion, the paired difference of `auroc`, both `log_loss`es and
        `worst_gap_growth` of the slices' TPR.
    """
    scores, slices = {}, {}
    for name, scorer in (("challenger", challenger), ("champion", champion)):
        rows = scorer.features(frozen.columns, len(frozen))
        probability = scorer.probabilities(scorer.matrix(rows))
        scores[name] = Scores(frozen.target, probability)
        frame = pd.DataFrame(rows, columns=list(scorer.feature_names))
        slices[name] = evaluate.slices(
            evaluate.dimensions(frame), frozen.target, probability, scorer.thresholds
        )
    ones = np.ones(len(frozen))
    return {
        "version": version,
        "auroc": paired_difference(scores["challenger"], scores["champion"], frozen.patients, seed),
        "log_loss": {name: each.log_loss(ones) for name, each in scores.items()},
        "worst_gap_growth": worst_gap_growth(slices["challenger"], slices["champion"]),
    }
