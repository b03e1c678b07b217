"""What a training is asked to do and what it found before it began, as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from training import candidates, environment
from training.data import DataFacts
from training.errors import TrainingError

_CODE = (
    "candidates/__init__.py",
    "data.py",
    "evaluate.py",
    "gates.py",
    "inference.py",
    "judgement.py",
    "metrics.py",
    "pipeline.py",
    "search.py",
)


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
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise TrainingError(f"candidate {', '.join(twice)} is named twice")
        if self.batches < 0:
            raise TrainingError(f"batches is {self.batches}, expected 0 (all) or more")
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


def facts_of(plan: Mapping[str, Any]) -> DataFacts:
    """The data of a plan."""
    return DataFacts(**{key: value for key, value in plan["facts"].items() if key != "sha"})


def tags(plan: Mapping[str, Any]) -> dict[str, str]:
    """What every run and version tells of where it came from."""
    kept = {key: plan[key] for key in ("spec", "facts", "feature_sha256", "identity")}
    return {
        "plan": json.dumps(kept),
        "data_sha": plan["facts"]["sha"],
        "load_id": str(plan["facts"]["load_id"]),
        "feature_sha256": plan["feature_sha256"],
        "environment_sha256": environment.lock_sha256(),
        "git_commit": environment.git_commit(),
        "is_synthetic": str(plan["facts"]["is_synthetic"]),
        "identity": plan["identity"],
    }


def dataset(facts: DataFacts) -> dict[str, Any]:
    """The data as MLflow's data set: table, content hash and where it was loaded from."""
    return {
        "name": "clean_data.diabetes_train",
        "digest": facts.train_hash,
        "source": {"table": "clean_data.diabetes_train", "batches": facts.batches},
        "profile": facts.as_dict(),
    }


def identity(spec: Spec, facts: DataFacts, definition: Mapping[str, Any]) -> str:
    """Everything that determines a training's result; equal means equal to the last digit."""
    files = [candidates.file(name) for name in spec.candidates]
    files += [Path(__file__).parent / name for name in _CODE]
    parts = [
        {**asdict(spec), "force": False, "batches": facts.batches},
        facts.sha,
        definition["sha256"],
        definition["tables"]["int_statistics"],
        environment.lock_sha256(),
        [sha256(file.read_bytes()).hexdigest() for file in files],
    ]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
