"""The worked example of docs/experiments.md: features from a patient's earlier encounters.

`python -m bench.history_leak` trains LightGBM with its defaults on train and looks at validation
rows: without history, with it, with it on patients whose ids run backwards left out, and with the
bare encounter_id. Test rows are not read.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

from settings import settings
from training import candidates, data, features
from training.candidates import Table, never_stop
from training.data import Encounters
from training.inference import Encoder, Matrix, sigmoid
from training.metrics import Scores

HISTORY = ("earlier_encounters", "earlier_within_30_days", "last_outcome")
_OUTCOMES = {"NO": 0.0, ">30": 1.0, "<30": 2.0}


def history(encounters: Encounters) -> Matrix:
    """What the rows with a smaller encounter_id of the same patient say, (rows, 3).

    It takes the id for a clock. That is the mistake.
    """
    frame = pd.DataFrame(
        {
            "patient": encounters.patients,
            "id": encounters.ids,
            "soon": encounters.target,
            "outcome": [_OUTCOMES[str(outcome)] for outcome in encounters.readmitted],
        }
    ).sort_values(["patient", "id"])
    groups = frame.groupby("patient")
    frame["earlier"] = groups.cumcount()
    frame["earlier_soon"] = groups["soon"].cumsum() - frame["soon"]
    frame["last"] = groups["outcome"].shift(1)
    found = frame.sort_index()[["earlier", "earlier_soon", "last"]]
    return found.to_numpy(float)


def backwards(encounters: Encounters) -> tuple[int, int, set[int]]:
    """Rows that follow, by id, an encounter of the same patient that was never followed by another.

    Returns:
        How many there are, how many of them are themselves followed within 30 days, and the
        patients. A clock would leave none: whoever was not readmitted has no later encounter.
    """
    last = history(encounters)[:, 2]
    impossible = last == _OUTCOMES["NO"]
    soon = int(encounters.target[impossible].sum())
    return int(impossible.sum()), soon, set(encounters.patients[impossible].tolist())


def _auroc(
    train: Encounters, validation: Encounters, encoder: Encoder, extra: tuple[Matrix, Matrix] | None
) -> Matrix:
    module = candidates.load(candidates.file("lightgbm"))
    names = encoder.names
    learnt, judged = train.matrix(encoder), validation.matrix(encoder)
    if extra is not None:
        names += tuple(f"extra_{index}" for index in range(extra[0].shape[1]))
        learnt, judged = np.hstack([learnt, extra[0]]), np.hstack([judged, extra[1]])
    model, _ = module.fit(
        Table(learnt, train.target, names, encoder.nominal),
        Table(judged, validation.target, names, encoder.nominal),
        module.DEFAULTS,
        settings().training_seed,
        settings().training_threads,
        never_stop,
    )
    return sigmoid(module.margin(model, judged))


def main() -> int:
    """Print the table."""
    dsn = settings().dsn
    wanted = features.read(dsn)["features"]
    train = data.read(dsn, "train", wanted)
    validation = data.read(dsn, "validation", wanted)
    encoder = data.fit_encoder(train, wanted)
    follow, soon, patients = backwards(train)
    _, _, patients_of_validation = backwards(validation)
    kept = ~np.isin(validation.patients, list(patients_of_validation))
    without = _auroc(train, validation, encoder, None)
    with_history = _auroc(train, validation, encoder, (history(train), history(validation)))
    ids = (train.ids[:, None].astype(float), validation.ids[:, None].astype(float))
    with_id = _auroc(train, validation, encoder, ids)

    def auroc(probability: Matrix, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
        weights = np.ones(int(rows.sum()))
        return Scores(validation.target[rows], probability[rows]).auroc(weights)

    every = np.ones(len(validation), bool)
    print(f"{'AUROC on validation rows':<48}{'all':>8}{'clock holds':>14}")
    for name, probability in (
        ("features of dbt", without),
        (f"+ history ({', '.join(HISTORY)})", with_history),
        ("+ encounter_id as a number", with_id),
    ):
        print(f"{name:<48.48}{auroc(probability, every):>8.4f}{auroc(probability, kept):>14.4f}")
    print(
        f"\nOf {follow:,} training rows that follow, by encounter_id, an encounter whose patient "
        f"was never readmitted,\n{soon:,} ({soon / max(follow, 1):.0%}) are labelled <30: "
        f"encounter_id is no clock ({len(patients):,} patients)."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
