"""From clean_data to a registered champion, through a real MLflow server and a real PostgreSQL."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import requests

from services import processes
from services.mlflow_server import MlflowServer, client_environment
from settings import settings
from tests.warehouse import Database, new_database
from training import data, evaluate, features, gates, publish
from training.__main__ import main
from training.errors import TrainingError
from training.features import RAW_FIELDS
from training.inference import Scorer
from training.pipeline import EXPERIMENT, Training
from training.plan import Spec
from training.registry import Registry, Version
from training.tracking import Tracker

# mlflow warns of its own use of pandas and of type hints in itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Operation with range:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*Any type hint is inferred"),
]

SPEC = Spec(candidates=("lightgbm", "logistic_regression"), trials=4, threads=1)
QUICK = ("--candidates", "logistic_regression", "--trials", "1", "--no-learning-curve")
OPEN = tuple((name, None, None) for name, *_ in gates._BOUNDS)
"""Bounds that any model passes: a thousand synthetic encounters are too few for the real ones."""
SHUT = (("auroc", 0.99, None),)

LOG_CARD = publish._log_card


@dataclass(slots=True)
class Lab:
    """A database of its own, a registered model of its own, and the command line on both."""

    database: Database
    uri: str
    folder: Path
    model: str
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str] | None = None

    def enter(self) -> None:
        for name, value in {
            **client_environment(self.uri),
            **self.database.environment,
            "DIABETES_STATE_DIR": str(self.folder),
            "DIABETES_TRAINING_THREADS": "1",
        }.items():
            self.monkeypatch.setenv(name, value)
        settings.cache_clear()
        for name, module in list(sys.modules.items()):
            if name.startswith("training.") and hasattr(module, "MODEL"):
                self.monkeypatch.setattr(module, "MODEL", self.model)

    def at(self, uri: str) -> None:
        """From now on with this MLflow server."""
        self.uri = uri
        self.enter()

    def gates(self, bounds: Sequence[Any] = OPEN, leak: float = 1.0) -> None:
        self.monkeypatch.setattr(gates, "_BOUNDS", bounds)
        self.monkeypatch.setattr(gates, "LEAK_AUROC", leak)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @property
    def runs_folder(self) -> Path:
        return self.folder / "training"

    def training(self) -> Training:
        self.runs_folder.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(self.uri, self.runs_folder, EXPERIMENT)
        return Training(self.database.dsn, tracker, decided_by="a test")

    @property
    def registry(self) -> Registry:
        return Registry(self.client, self.database.dsn)

    def versions(self) -> list[str]:
        found = self.client.search_model_versions(f"name = '{self.model}'")
        return sorted(version.version for version in found)

    def alias(self, alias: str) -> str | None:
        found = self.registry.version(alias)
        return found.number if found else None

    def runs(self, query: str) -> list[Any]:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        found = experiment and self.client.search_runs([experiment.experiment_id], query)
        return sorted(found or [], key=lambda run: str(run.info.run_name))

    def log(self) -> list[dict[str, Any]]:
        rows = self.database.rows("select to_jsonb(l) from ml.promotion_log l order by decision_id")
        return [row for (row,) in rows]  # type: ignore[misc]

    def scorer(self, number: str) -> Scorer:
        target = self.folder / uuid.uuid4().hex
        return self.registry.scorer(self.registry.require(number), target)

    def main(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of `python -m training`."""
        assert self.capsys is not None
        self.capsys.readouterr()
        code = main(list(arguments))
        out, err = self.capsys.readouterr()
        return code, out, err

    def answer(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self.main(*arguments)
        assert code == 0, err
        # mlflow's own lines about runs come first.
        answer: dict[str, Any] = json.loads(out[out.index("{\n") :])
        return answer

    def error(self, *arguments: str) -> str:
        """The one message of a command that fails."""
        code, out, err = self.main(*arguments)
        assert code == 1
        assert "{\n" not in out
        messages = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, err
        assert "Traceback" not in err
        return messages[0].removeprefix("error: ")

    def adopt(self, run_id: str, original: Version, champion: bool = True) -> Version:
        """Register another lab's model here too, as champion, without judging it again."""
        source = self.client.get_model_version(original.tags["lab"], original.number).source
        model_id = source.removeprefix("models:/")
        version = self.registry.add(source, model_id, run_id, original.tags, "")
        if champion:
            before = self.alias("champion")
            self.registry.crown(version)
            self.registry.log(
                "promoted", version, champion_before=before, decided_by="a test", reason="adopted"
            )
        return version


@contextmanager
def made_lab(built: Database, definition: dict[str, Any], uri: str, folder: Path) -> Iterator[Lab]:
    name = f"lab_{uuid.uuid4().hex[:8]}"
    with (
        new_database(built.port, name, template=built.name) as database,
        pytest.MonkeyPatch.context() as monkeypatch,
    ):
        # dbt says the same of every copy, and takes seconds.
        monkeypatch.setattr(features, "read", lambda dsn: definition)
        monkeypatch.setattr(evaluate, "report", partial(evaluate.report, resamples=100))
        lab = Lab(database, uri, folder, name, monkeypatch)
        lab.enter()
        lab.gates()
        yield lab
    settings.cache_clear()


@pytest.fixture
def lab(
    built: Database,
    definition: dict[str, Any],
    mlflow_server: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Lab]:
    """A fresh copy of the built database and no registered model yet."""
    with made_lab(built, definition, mlflow_server, tmp_path) as made:
        # Drawing a card takes half of a judgement; that of the first training is drawn.
        made.monkeypatch.setattr(publish, "_log_card", lambda *_: None)
        made.capsys = capsys
        caplog.set_level(logging.INFO)
        yield made


@dataclass(frozen=True, slots=True)
class Trained:
    """A training that went through, as it left things."""

    lab: Lab
    answer: dict[str, Any]
    parent: Any
    splits_read: tuple[str, ...]

    @property
    def run(self) -> Any:
        return self.lab.client.get_run(self.answer["run_id"])

    @property
    def version(self) -> Version:
        found = self.lab.client.get_model_version(self.lab.model, self.answer["version"])
        tags = {**found.tags, "lab": self.lab.model}
        return Version(str(found.version), found.run_id, tags)

    def children(self, run_id: str) -> list[Any]:
        return self.lab.runs(f"tags.mlflow.parentRunId = '{run_id}'")

    def artifact(self, path: str, target: Path) -> Path:
        return Path(self.lab.client.download_artifacts(self.answer["run_id"], path, str(target)))


def train(lab: Lab, spec: Spec, learning_curve: bool = False) -> Trained:
    read: list[str] = []
    real_read = data.read

    def noted(dsn: str, split: Any, *arguments: Any) -> Any:
        read.append(split)
        return real_read(dsn, split, *arguments)

    with lab.monkeypatch.context() as patched:
        patched.setattr(data, "read", noted)
        answer = lab.training().run(spec, learning_curve=learning_curve)
    client = lab.client
    run = client.get_run(answer["run_id"])
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    return Trained(lab, answer, parent, tuple(read))


@pytest.fixture(scope="module")
def story(
    built: Database,
    definition: dict[str, Any],
    mlflow_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("story")
    with made_lab(built, definition, mlflow_server, folder) as made:
        yield made


@pytest.fixture(scope="module")
def blocked(story: Lab) -> Trained:
    """The first training, which a gate stops."""
    story.gates(SHUT)
    try:
        return train(story, SPEC, learning_curve=True)
    finally:
        story.gates()


@pytest.fixture(scope="module")
def promoted(story: Lab, blocked: Trained) -> Trained:
    """The same training again, by force, which every gate lets pass."""
    with story.monkeypatch.context() as patched:
        patched.setattr(publish, "_log_card", lambda *_: None)
        return train(story, replace(SPEC, force=True))


def raw_frame(database: Database, rows: int = 200) -> pd.DataFrame:
    """Raw encounters as a caller has them: the publisher's names, no ids, `?` where unknown."""
    columns = ", ".join(f'{field.column} as "{field.name}"' for field in RAW_FIELDS)
    query = f"select {columns} from raw_data.diabetes order by encounter_id limit %s"
    found = database.rows(query, rows)
    frame = pd.DataFrame(found, columns=[field.name for field in RAW_FIELDS])
    numbers = [field.name for field in RAW_FIELDS if field.kind not in ("category", "icd9")]
    frame[numbers] = frame[numbers].astype(float)
    return frame


# --- one training --------------------------------------------------------------------------------


def test_runs_are_nested_and_say_what_they_came_from(
    blocked: Trained, definition: dict[str, Any]
) -> None:
    facts = data.facts(blocked.lab.database.dsn)
    assert (facts.batches, facts.is_synthetic) == (3, True)
    assert blocked.parent.info.status == "FINISHED"
    assert blocked.parent.data.params["trials"] == "4"
    assert blocked.parent.data.params["seed"] == "130"
    candidates = blocked.children(blocked.parent.info.run_id)
    assert [run.info.run_name for run in candidates] == ["lightgbm", "logistic_regression"]
    for run in (blocked.parent, *candidates):
        tags = run.data.tags
        assert tags["data_sha"] == facts.sha
        assert tags["feature_sha256"] == definition["sha256"]
        assert len(tags["environment_sha256"]) == 64
        assert len(tags["git_commit"].removesuffix("+changes")) == 40
        assert tags["is_synthetic"] == "True"
        (used,) = run.inputs.dataset_inputs
        assert used.dataset.name == "clean_data.diabetes_train"
        assert used.dataset.digest == facts.train_hash
        assert json.loads(used.dataset.profile)["train_rows"] == facts.train_rows
    for run in candidates:
        trials = blocked.children(run.info.run_id)
        names = [trial.info.run_name for trial in trials]
        assert names == [f"{run.info.run_name} {number}" for number in (0, 1)]
        assert trials[0].data.params != trials[1].data.params
        for trial in trials:
            took = trial.info.end_time - trial.info.start_time
            assert took >= 1000 * trial.data.metrics["fit_seconds"] - 2  # both in whole ms
        ended = [trial for trial in trials if trial.data.tags["pruned"] == "False"]
        losses = [trial.data.metrics["validation_log_loss_uncalibrated"] for trial in ended]
        assert run.data.metrics["validation_log_loss_uncalibrated"] == min(losses)
        assert run.info.status == "FINISHED"
    assert candidates[0].data.params["num_leaves"] == "31"
    history = blocked.lab.client.get_metric_history(
        blocked.children(candidates[0].info.run_id)[0].info.run_id, "validation_loss_by_iteration"
    )
    assert len(history) > 5
    assert [point.step for point in history] == sorted(point.step for point in history)


def test_the_candidate_with_the_lowest_log_loss_is_judged(blocked: Trained) -> None:
    losses = {
        run.info.run_name: run.data.metrics["validation_log_loss_uncalibrated"]
        for run in blocked.children(blocked.parent.info.run_id)
    }
    assert blocked.answer["candidate"] == min(losses, key=lambda name: float(losses[name]))


def test_run_holds_model_evaluation_card_and_figures(blocked: Trained, tmp_path: Path) -> None:
    card = blocked.artifact("card", tmp_path)
    assert (card / "model_card.md").read_text().startswith("#")
    figures = {file.stem for file in (card / "figures").iterdir()}
    assert figures >= {"calibration", "roc", "precision_recall", "shap_summary", "learning_curve"}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in (card / "figures").iterdir())
    candidate = blocked.artifact("candidate", tmp_path)
    assert {file.name for file in candidate.iterdir()} == {
        "candidate.py", "encoder.json", "parameters.json", "fitted",
    }  # fmt: skip
    evaluation = json.loads(blocked.artifact("evaluation.json", tmp_path).read_text())
    assert evaluation["validation"]["metrics"] == blocked.answer["validation"]
    for metric, found in blocked.answer["validation"].items():
        assert found["low"] <= found["high"], metric
        assert blocked.run.data.metrics[f"validation_{metric}"] == found["value"]
    assert [point["batches"] for point in evaluation["learning_curve"]] == [1, 2, 3]


def test_card_is_linked_and_served(blocked: Trained, tmp_path: Path) -> None:
    url = blocked.answer["card_url"]
    version = blocked.lab.client.get_model_version(blocked.lab.model, blocked.answer["version"])
    assert f"]({url})" in version.description
    assert "synthetic" in version.description
    run_id = blocked.answer["run_id"]
    # MLflow's page reads what stands behind the # and shows the artifact.
    assert url.endswith(f"/runs/{run_id}/artifacts/card/model_card.html")
    shown = requests.get(url, timeout=30)
    assert shown.status_code == 200
    assert "text/html" in shown.headers["Content-Type"]
    page = requests.get(
        f"{blocked.lab.uri}/get-artifact",
        params={"path": "card/model_card.html", "run_uuid": run_id},
        timeout=30,
    )
    assert page.status_code == 200
    assert page.content == blocked.artifact("card/model_card.html", tmp_path).read_bytes()
    assert "Model card" in page.text
    assert blocked.answer["reason"] in page.text


def test_learning_curve_has_a_point_a_batch(blocked: Trained, tmp_path: Path) -> None:
    client, parent = blocked.lab.client, blocked.parent.info.run_id
    curve = client.get_metric_history(parent, "curve_auroc")
    assert [point.step for point in curve] == [1, 2, 3]
    stored = json.loads(
        Path(client.download_artifacts(parent, "learning_curve.json", str(tmp_path))).read_text()
    )["points"]
    facts = data.facts(blocked.lab.database.dsn)
    assert [point["rows"] for point in stored] == [3_000, 6_000, facts.train_rows]
    assert all(point["auroc_low"] <= point["auroc_high"] for point in stored)
    # On all batches the curve stands where the search did.
    found = blocked.run.data.metrics["validation_auroc_uncalibrated"]
    assert stored[-1]["auroc"] == pytest.approx(found, abs=1e-6)


def test_blocked_version_is_challenger_and_no_test_row_was_read(blocked: Trained) -> None:
    answer = blocked.answer
    assert (answer["promoted"], answer["test"]) == (False, None)
    assert answer["reason"] == "gates not passed: auroc"
    assert set(blocked.splits_read) == {"train", "validation"}
    tags = blocked.version.tags
    assert tags["decision"] == "blocked"
    assert tags["gate_auroc"].startswith("FAILED")
    assert tags["candidate"] == answer["candidate"]
    entry = blocked.lab.log()[0]
    assert entry["action"] == "blocked"
    assert (entry["version"], entry["run_id"]) == (answer["version"], answer["run_id"])
    assert (entry["test"], entry["champion_before"]) == (None, None)
    assert entry["decided_by"] == "a test"
    judged = {gate["name"]: gate["passed"] for gate in entry["gates"]}
    assert [name for name, passed in judged.items() if not passed] == ["auroc"]
    assert len(judged) == 8


def test_same_seed_and_data_give_the_same(blocked: Trained, promoted: Trained) -> None:
    assert promoted.answer["candidate"] == blocked.answer["candidate"]
    assert promoted.answer["run_id"] != blocked.answer["run_id"]
    for metric, found in blocked.answer["validation"].items():
        for bound, value in found.items():
            again = promoted.answer["validation"][metric][bound]
            assert again == pytest.approx(value, abs=1e-6), (metric, bound)
    raw = blocked.lab.registry.frozen_validation(is_synthetic=True)
    first, second = (
        scorer.probabilities(scorer.matrix(scorer.features(raw.columns, len(raw))))
        for scorer in (
            blocked.lab.scorer(blocked.answer["version"]),
            blocked.lab.scorer(promoted.answer["version"]),
        )
    )
    assert len(np.unique(first)) > 100
    assert np.abs(first - second).max() <= 1e-6


def test_promoted_version_is_champion_and_was_tested(promoted: Trained) -> None:
    lab, answer = promoted.lab, promoted.answer
    assert (answer["promoted"], answer["reason"]) == (True, "every gate was passed")
    assert promoted.splits_read.count("test") == 1
    assert lab.alias("champion") == answer["version"]
    assert lab.alias("challenger") != answer["version"]
    metrics = promoted.run.data.metrics
    assert metrics["test_auroc"] == answer["test"]["auroc"]["value"]
    assert promoted.version.tags["decision"] == "promoted"
    entry = lab.log()[1]
    assert entry["action"] == "promoted"
    assert entry["test"]["metrics"]["auroc"] == answer["test"]["auroc"]
    assert all(gate["passed"] for gate in entry["gates"])


def test_nothing_to_do_the_second_time(promoted: Trained) -> None:
    before = promoted.lab.versions()
    answer = promoted.lab.training().run(SPEC)
    assert answer["promoted"] is False
    assert f"champion version {promoted.answer['version']}" in answer["reason"]
    assert promoted.lab.versions() == before
    # Another seed is another training; it is not run here, only planned.
    plan = promoted.lab.training().prepare(replace(SPEC, seed=7))
    assert plan["nothing_to_do"] == ""
    promoted.lab.client.set_terminated(plan["parent"], "KILLED")


# --- the model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(blocked: Trained) -> Any:
    import mlflow

    mlflow.set_tracking_uri(blocked.lab.uri)
    return mlflow.pyfunc.load_model(f"models:/{blocked.lab.model}/{blocked.answer['version']}")


def test_model_answers_raw_fields(model: Any, blocked: Trained) -> None:
    frame = raw_frame(blocked.lab.database)
    frame.index = pd.RangeIndex(7, 7 + len(frame))
    answer = model.predict(frame)
    assert list(answer.columns) == ["probability", "decision", "contributions"]
    assert list(answer.index) == list(frame.index)
    assert answer["probability"].between(0, 1, inclusive="neither").all()
    scorer = blocked.lab.scorer(blocked.answer["version"])
    for rate in (0.1, 0.2):
        decided = model.predict(frame, params={"alert_rate": rate, "top": 0})
        alerts = answer["probability"] >= scorer.threshold(rate)
        assert (decided["decision"] == np.where(alerts, "alert", "no alert")).all()
        assert 0 < alerts.sum() < len(frame)
        assert not any(decided["contributions"])
    assert all(len(reasons) == 5 for reasons in answer["contributions"])
    three = model.predict(frame, params={"top": 3})["contributions"]
    assert [reasons[:3] for reasons in answer["contributions"]] == three.tolist()
    strengths = [abs(reason["contribution"]) for reason in answer["contributions"].iloc[0]]
    assert strengths == sorted(strengths, reverse=True)
    with pytest.raises(Exception, match=r"no threshold for an alert rate of 0\.3; known are 0\.1"):
        model.predict(frame, params={"alert_rate": 0.3})


def test_all_contributions_add_up_to_the_log_odds(model: Any, blocked: Trained) -> None:
    frame = raw_frame(blocked.lab.database, 20)
    answer = model.predict(frame, params={"top": 64})
    sums = [sum(reason["contribution"] for reason in row) for row in answer["contributions"]]
    log_odds = np.log(answer["probability"] / (1 - answer["probability"]))
    assert np.ptp(log_odds - sums) < 1e-6  # what every encounter starts from
    named = {reason["feature"] for reason in answer["contributions"].iloc[0]}
    assert named == set(blocked.lab.scorer(blocked.answer["version"]).feature_names)


def test_missing_fields_are_written_in_many_ways(model: Any, blocked: Trained) -> None:
    frame = raw_frame(blocked.lab.database)
    columns = ["race", "payer_code", "medical_specialty", "weight", "diag_3", "time_in_hospital"]
    texts = columns[:-1]
    absent = model.predict(frame.drop(columns=columns), params={"top": 0})
    nones = frame.copy()
    nones[texts] = None
    nones["time_in_hospital"] = np.nan
    marks = nones.copy()
    marks[texts] = "?"
    for other in (nones, marks):
        found = model.predict(other, params={"top": 0})
        assert (found["probability"] == absent["probability"]).all()
    asked = model.predict(frame, params={"top": 0})
    assert (asked["probability"] != absent["probability"]).any()
    # One field is enough for an answer, and no encounter for none.
    one = model.predict(pd.DataFrame({"number_inpatient": [0.0, 9.0]}))
    assert one["probability"].is_monotonic_increasing
    assert model.predict(frame.iloc[:0]).empty


def test_columns_in_another_order_change_nothing(model: Any, blocked: Trained) -> None:
    frame = raw_frame(blocked.lab.database, 50)
    expected = model.predict(frame, params={"top": 0})["probability"]
    turned = model.predict(frame[frame.columns[::-1]], params={"top": 0})["probability"]
    assert (turned == expected).all()


def test_wrong_types_and_nonsense_are_refused(model: Any) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="time_in_hospital"):
        model.predict(pd.DataFrame({"time_in_hospital": ["three"]}))
    with pytest.raises(ValueError, match=r"row 0, field num_procedures: expected an integer"):
        model.predict(pd.DataFrame({"num_procedures": [1.5]}))


def test_model_holds_no_pickle_and_its_python_is_text(blocked: Trained, tmp_path: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(blocked.lab.uri)
    folder = Path(
        mlflow.artifacts.download_artifacts(
            f"models:/{blocked.lab.model}/{blocked.answer['version']}", dst_path=str(tmp_path)
        )
    )
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".joblib", ".pyc"))]
    for name in files:  # a pickle by another name
        assert not (folder / name).read_bytes().startswith(b"\x80"), name
    assert "model_code.py" in files
    stored = {f"artifacts/readmission/{name}" for name in (
        "inference.py", "candidate.py", "features.json", "encoder.json", "scoring.json",
        "reference.json", "examples.json", "fitted/lightgbm.txt",
    )}  # fmt: skip
    assert stored <= files
    wanted = (folder / "requirements.txt").read_text()
    assert "mlflow==" in wanted
    assert "lightgbm==" in wanted
    assert "sqlglot" not in wanted


ALONE = """
import json, sys, warnings
import mlflow, pandas as pd
for name in ("training", "settings", "ingestion", "services"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported: the model would not be alone")
model = mlflow.pyfunc.load_model(sys.argv[1])
frame = pd.read_json(sys.argv[2], orient="split", dtype=False, convert_axes=False)
numbers = frame.select_dtypes("number").columns
frame[numbers] = frame[numbers].astype(float)
print(json.dumps(model.predict(frame)["probability"].tolist()))
"""


def test_model_stands_alone(model: Any, blocked: Trained, tmp_path: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(blocked.lab.uri)
    folder = mlflow.artifacts.download_artifacts(
        f"models:/{blocked.lab.model}/{blocked.answer['version']}", dst_path=str(tmp_path)
    )
    frame = raw_frame(blocked.lab.database, 100)
    records = tmp_path / "records.json"
    records.write_text(frame.to_json(orient="split"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, folder, str(records)],
        cwd="/tmp",  # noqa: S108
        env={
            **{name: value for name, value in os.environ.items() if "MLFLOW" not in name},
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout.splitlines()[-1])
    assert alone == model.predict(frame)["probability"].tolist()


def test_third_class_leaves_the_risk_as_it_is(lab: Lab, blocked: Trained, tmp_path: Path) -> None:
    assert blocked.answer["candidate"] == "lightgbm"
    lab.monkeypatch.setattr(publish, "_log_card", LOG_CARD)
    three = train(lab, replace(SPEC, candidates=("lightgbm",), trials=2, classes=3))
    import mlflow

    mlflow.set_tracking_uri(lab.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{lab.model}/{three.answer['version']}")
    frame = raw_frame(lab.database)
    found = loaded.predict(frame, params={"top": 0})
    parts = found[["probability", "probability_later", "probability_no"]]
    assert parts.sum(axis=1).to_numpy() == pytest.approx(np.ones(len(frame)), abs=1e-12)
    assert ((parts > 0) & (parts < 1)).all(axis=None)
    assert "validation_three_class_auroc" in three.run.data.metrics
    assert "three one-against-rest" in three.artifact("card/model_card.md", tmp_path).read_text()
    two = blocked.lab.scorer(blocked.answer["version"])
    columns = {name: frame[name].tolist() for name in frame}
    expected = two.probabilities(two.matrix(two.features(columns, len(frame))))
    assert np.abs(found["probability"].to_numpy() - expected).max() <= 1e-9


# --- who is champion -----------------------------------------------------------------------------


def test_blocked_challenger_leaves_the_champion(lab: Lab, promoted: Trained) -> None:
    champion = lab.adopt(promoted.answer["run_id"], promoted.version)
    lab.gates(SHUT)
    answer = lab.answer("run", *QUICK, "--decided-by", "Ada")
    assert answer["promoted"] is False
    assert (lab.alias("champion"), lab.alias("challenger")) == (champion.number, answer["version"])
    entry = lab.log()[-1]
    assert (entry["action"], entry["decided_by"]) == ("blocked", "Ada")
    assert entry["champion_before"] == champion.number
    (compared,) = (gate for gate in entry["gates"] if gate["name"] == "AUROC against the champion")
    assert f"against version {champion.number}" in compared["detail"]
    assert compared["value"] is not None
    # What a gate stopped is not tried again for nothing.
    again = lab.answer("run", *QUICK)
    assert "gates not passed" in again["reason"]
    assert lab.versions() == [champion.number, answer["version"]]


def test_rollback_returns_to_the_former_champion_and_is_logged(lab: Lab, promoted: Trained) -> None:
    nobody = ("rollback", "--decided-by", "Ada", "--reason", "complaints")
    assert "has had no champion before" in lab.error(*nobody)
    first = lab.adopt(promoted.answer["run_id"], promoted.version).number
    assert "has had no champion before" in lab.error(*nobody)
    second = lab.adopt(promoted.answer["run_id"], promoted.version).number
    assert lab.answer(*nobody) == {"version": first, "replaced": second}
    assert lab.alias("champion") == first
    tags = lab.registry.require(first).tags
    assert (tags["decision"], tags["decision_reason"]) == ("rolled back", "complaints")
    entry = lab.log()[-1]
    assert (entry["action"], entry["version"], entry["champion_before"], entry["reason"]) == (
        "rolled back", first, second, "complaints",
    )  # fmt: skip
    # Once more would go further back, not forth to the version that drew complaints.
    assert "has had no champion before" in lab.error(*nobody)
    assert "is the champion already" in lab.error(*nobody, "--to", first)
    assert "has no version 99" in lab.error(*nobody, "--to", "99")
    assert lab.answer(*nobody, "--to", second)["version"] == second
    assert [row["action"] for row in lab.log()] == ["promoted"] * 2 + ["rolled back"] * 2


def test_promote_asks_the_gates_against_the_champion(lab: Lab, promoted: Trained) -> None:
    first = lab.adopt(promoted.answer["run_id"], promoted.version).number
    second = lab.adopt(promoted.answer["run_id"], promoted.version).number
    lab.gates(leak=0.5)
    message = lab.error("promote", first, "--decided-by", "Ada")
    assert message == f"version {first} was not promoted: gates not passed: no suspected leak"
    assert lab.alias("champion") == second
    assert lab.log()[-1]["action"] == "blocked"
    tags = lab.registry.require(first).tags
    assert tags["decision"] == "blocked"
    assert tags["gate_no_suspected_leak"].startswith("FAILED")
    answer = lab.answer("promote", first, "--decided-by", "Ada", "--override-leak")
    assert answer == {"version": first, "promoted": True, "reason": "every gate was passed"}
    assert lab.alias("champion") == first
    entry = lab.log()[-1]
    assert (entry["action"], entry["champion_before"]) == ("promoted", second)
    leak = next(gate for gate in entry["gates"] if gate["name"] == "no suspected leak")
    assert leak["detail"] == "overridden by Ada"
    against = [gate for gate in entry["gates"] if "against the champion" in gate["name"]]
    # The same model on the same rows is no better and no worse.
    assert [gate["value"] for gate in against[:2]] == [0.0, 0.0]
    assert "is the champion already" in lab.error("promote", first, "--decided-by", "Ada")
    assert "has no version 99" in lab.error("promote", "99", "--decided-by", "Ada")


def test_suspected_leak_is_promoted_only_by_name(lab: Lab) -> None:
    lab.gates(leak=0.5)
    answer = lab.answer("run", *QUICK)
    assert answer["reason"] == "gates not passed: no suspected leak"
    assert answer["test"] is None
    with pytest.raises(SystemExit):
        lab.main("promote", answer["version"], "--override-leak")
    assert "--decided-by" in lab.capsys.readouterr().err  # type: ignore[union-attr]
    message = lab.error("promote", answer["version"], "--decided-by", "Ada")
    assert message.endswith("was not promoted: gates not passed: no suspected leak")
    assert lab.alias("champion") is None
    made = lab.answer("promote", answer["version"], "--decided-by", "Ada", "--override-leak")
    assert made["promoted"]
    assert made["test"]["auroc"]["value"] > 0.5
    assert lab.alias("champion") == made["version"]
    entry = lab.log()[-1]
    assert (entry["action"], entry["decided_by"]) == ("promoted", "Ada")
    leak = next(gate for gate in entry["gates"] if gate["name"] == "no suspected leak")
    assert leak["detail"] == "overridden by Ada"
    assert [row["action"] for row in lab.log()] == ["blocked", "blocked", "promoted"]


def test_test_rows_of_a_run_are_read_once(lab: Lab) -> None:
    answer = lab.answer("run", *QUICK)
    assert answer["promoted"]
    assert "has been judged already" in lab.error("register", answer["run_id"])
    assert lab.versions() == [answer["version"]]


def test_frozen_set_outlives_other_loads_and_other_feature_sql(
    lab: Lab, promoted: Trained, definition: dict[str, Any]
) -> None:
    champion = lab.adopt(promoted.answer["run_id"], promoted.version)
    frozen = lab.registry.frozen_validation(is_synthetic=True)
    hashed = "select md5(string_agg(f::text, '' order by encounter_id)) from ml.frozen_validation f"
    before = lab.database.rows(hashed)
    # What another load would do: encounters come, go and are corrected.
    lab.database.rows("delete from clean_data.diabetes_validation where encounter_id % 3 = 0")
    lab.database.rows("update clean_data.diabetes_validation set number_inpatient = 3")
    lab.database.rows("update raw_data.diabetes set number_inpatient = 3, race = '?'")
    # Other feature SQL: a feature fewer, another one computed otherwise.
    kept = [feature for feature in definition["features"] if feature["name"] != "payer_code"]
    names = [feature["name"] for feature in kept]
    inner = definition["query"].removesuffix("ORDER BY encounter_id")
    shown = ["2 * age_midpoint" if name == "age_midpoint" else name for name in names]
    other = {
        **definition,
        "features": kept,
        "query": f"select encounter_id, {', '.join(shown)} from ({inner}) order by encounter_id",
        "sha256": "0" * 64,
    }
    lab.monkeypatch.setattr(features, "read", lambda dsn: other)
    answer = lab.answer("run", *QUICK)
    made = lab.registry.require(answer["version"])
    assert made.tags["feature_sha256"] == "0" * 64
    assert made.tags["data_sha"] != champion.tags["data_sha"]
    assert len(lab.scorer(made.number).feature_names) == 63
    entry = lab.log()[-1]
    compared = next(gate for gate in entry["gates"] if gate["name"].startswith("AUROC against"))
    assert f"against version {champion.number}" in compared["detail"]
    # Each with its own SQL on the same raw encounters: the champion's loss is what it was.
    scorer = lab.scorer(champion.number)
    probability = scorer.probabilities(scorer.matrix(scorer.features(frozen.columns, len(frozen))))
    target = frozen.target == 1
    loss = -np.where(target, np.log(probability), np.log1p(-probability)).mean()
    losses = next(gate for gate in entry["gates"] if gate["name"].startswith("log loss against"))
    assert losses["detail"].endswith(f"against {loss:.5f}")
    assert lab.database.rows(hashed) == before
    with pytest.raises(SystemExit):
        lab.main("freeze")
    ((left,),) = lab.database.rows("select count(*) from clean_data.diabetes_validation")
    assert lab.answer("freeze", "--yes") == {"encounters": left}
    assert left < len(frozen)


def test_synthetic_encounters_never_replace_real_ones(lab: Lab, promoted: Trained) -> None:
    synthetic = lab.adopt(promoted.answer["run_id"], promoted.version)
    real = lab.adopt(promoted.answer["run_id"], promoted.version)
    lab.client.set_model_version_tag(lab.model, real.number, "is_synthetic", "False")
    reason = "gates not passed: real encounters"
    message = lab.error("promote", synthetic.number, "--decided-by", "Ada", "--override-leak")
    assert message.endswith(reason)
    answer = lab.answer("run", *QUICK)
    assert (answer["promoted"], answer["reason"], answer["test"]) == (False, reason, None)
    assert lab.alias("champion") == real.number
    assert [row["action"] for row in lab.log()[-2:]] == ["blocked", "blocked"]


def test_compare_lists_runs_and_versions_best_first(lab: Lab, promoted: Trained) -> None:
    version = lab.adopt(promoted.answer["run_id"], promoted.version)
    code, out, _ = lab.main("compare")
    assert code == 0
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("run "))
    table = {line.split()[0]: line for line in lines[start + 1 :]}
    auroc = promoted.answer["validation"]["auroc"]["value"]
    line = table[promoted.answer["run_id"]]
    assert f"{auroc:.4f}" in line
    assert line.endswith(f"champion (version {version.number})")
    assert {line.split()[1] for line in table.values()} >= {"lightgbm", "logistic_regression"}
    assert not [line for line in table.values() if line.split()[1].isdigit()]


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (
            "drop table clean_data.diabetes_train cascade", (),
            "clean_data.diabetes_train does not exist; run the DAG diabetes_data_processing",
        ),
        (
            "drop table clean_data.batch_info", (),
            'relation "clean_data.batch_info" does not exist; run the DAG',
        ),
        (
            "delete from clean_data.batch_info; delete from clean_data.diabetes_train", (),
            "clean_data.diabetes_train is empty; run the DAG",
        ),
        (
            "delete from clean_data.diabetes_validation", (),
            "clean_data.diabetes_validation is empty; run the DAG",
        ),
        (
            "update clean_data.diabetes_train set readmitted_within_30_days = 0", (),
            "clean_data.diabetes_train holds one class only (readmitted_within_30_days is 0 in all",
        ),
        (
            "delete from clean_data.diabetes_validation where readmitted_within_30_days = 0", (),
            "clean_data.diabetes_validation holds one class only (readmitted_within_30_days is 1",
        ),
        (
            "alter table clean_data.diabetes_train drop column payer_code cascade", (),
            "clean_data.diabetes_train has no column payer_code, which dbt_diabetes declares",
        ),
        (
            "alter table clean_data.diabetes_validation drop column insulin cascade", (),
            "clean_data.diabetes_validation has no column insulin",
        ),
        ("select 1", ("--batches", "9"), "9 batches asked for, clean_data.batch_info knows 3"),
        ("select 1", ("--candidates", "oracle"), "no candidate oracle; known are catboost, "),
        ("select 1", ("--candidates", "../tasks"), "no candidate ../tasks; known are "),
        ("select 1", ("--trials", "0"), "0 trials for 1 candidates: one each at least"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_no_version(
    lab: Lab, damage: str, arguments: tuple[str, ...], message: str
) -> None:
    lab.database.rows(damage)
    assert lab.error("run", *QUICK, *arguments).startswith(message)
    assert lab.versions() == []
    assert list(lab.runs_folder.glob("local-*")) == []
    assert lab.runs("status = 'RUNNING'") == []


def test_failing_dbt_is_one_message(lab: Lab) -> None:
    def fails(dsn: str) -> Any:
        raise TrainingError("dbt can't compile the features:\nCompilation Error")

    lab.monkeypatch.setattr(features, "read", fails)
    assert lab.error("run", *QUICK).startswith("dbt can't compile")
    assert lab.versions() == []


def test_unknown_run_is_one_message(lab: Lab, blocked: Trained) -> None:
    nonsense = uuid.uuid4().hex
    assert lab.error("register", nonsense) == f"MLflow has no run {nonsense}"
    parent = blocked.parent.info.run_id
    assert "holds no candidate" in lab.error("register", parent)


def test_run_of_other_data_is_not_registered(lab: Lab) -> None:
    lab.gates(SHUT)
    answer = lab.answer("run", *QUICK)
    lab.gates()
    lab.database.rows("delete from clean_data.diabetes_validation where encounter_id % 2 = 0")
    for _ in range(2):  # the first refusal must not spoil the second
        message = lab.error("promote", answer["version"], "--decided-by", "Ada")
        assert "clean_data now holds" in message
        assert "train anew" in message
    assert lab.versions() == [answer["version"]]


def test_no_server_named_is_one_message(lab: Lab) -> None:
    lab.at("")
    assert lab.error("run", *QUICK).startswith("MLFLOW_TRACKING_URI is not set")


NOBODY = "http://127.0.0.1:1"


def test_server_that_is_away_costs_no_run(lab: Lab) -> None:
    alive = lab.uri
    lab.at(NOBODY)
    message = lab.error("run", *QUICK, "--trials", "2")
    assert message.startswith(f"MLflow at {NOBODY} does not answer; 4 runs are kept in ")
    assert "python -m training upload, then python -m training register RUN" in message
    assert f"MLflow at {NOBODY} does not answer" in lab.error("upload")
    for command in (("compare",), ("promote", "1", "--decided-by", "Ada")):
        assert f"MLflow at {NOBODY} does not answer" in lab.error(*command)
    lab.at(alive)
    assert lab.versions() == []
    sent = lab.answer("upload")["sent"]
    assert len(sent) == 4
    assert lab.answer("upload") == {"sent": []}
    parent, candidate, *trials = (lab.client.get_run(run_id) for run_id in sent)
    assert candidate.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {candidate.info.run_id}
    assert parent.info.status == "FAILED"
    assert candidate.info.status == "FINISHED"
    assert candidate.data.metrics["validation_auroc_uncalibrated"] > 0.5
    (used,) = candidate.inputs.dataset_inputs
    assert used.dataset.digest == data.facts(lab.database.dsn).train_hash
    answer = lab.answer("register", candidate.info.run_id, "--decided-by", "Ada")
    assert lab.versions() == [answer["version"]]
    assert lab.alias("champion") == answer["version"]


def test_server_that_comes_back_too_late_is_one_message(lab: Lab) -> None:
    alive = lab.uri
    real_choose = Training.choose

    def back(training: Training, outcomes: Sequence[Any]) -> Any:
        training.tracker.uri = alive
        return real_choose(training, outcomes)

    lab.at(NOBODY)
    lab.monkeypatch.setattr(Training, "choose", back)
    assert "3 runs are kept in " in lab.error("run", *QUICK)
    lab.at(alive)
    parent, *_ = lab.answer("upload")["sent"]
    assert lab.client.get_run(parent).info.status == "FAILED"


def test_judgement_that_broke_off_can_be_repeated(lab: Lab) -> None:
    with lab.monkeypatch.context() as patched:
        patched.setattr(publish, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lab.main("run", *QUICK, "--seed", "4711")
    assert lab.versions() == []
    (parent,) = lab.runs("params.seed = '4711'")
    assert parent.info.status == "FAILED"
    (candidate,) = lab.runs(f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    # Gates were passed, so test rows were read; it is the same model that reads them again.
    assert candidate.data.tags["judged"] == "test rows read"
    answer = lab.answer("register", candidate.info.run_id)
    assert answer["promoted"]
    assert lab.versions() == [answer["version"]]


@pytest.fixture
def own_server(
    database: Database, reachable_tmp: Path
) -> Iterator[tuple[MlflowServer, Callable[[], None]]]:
    """An MLflow server that may be killed, and how."""
    state = reachable_tmp / f"mlflow-{uuid.uuid4().hex[:8]}"
    state.mkdir()
    login = f"postgres:{database.environment['DIABETES_DB_PASSWORD']}"
    url = f"postgresql+psycopg2://{login}@127.0.0.1:{database.port}/{database.name}"
    server = MlflowServer(state, url)

    def kill() -> None:
        for process in processes.find(state):
            process.kill()
            process.wait(10)

    yield server, kill
    processes.stop(state)


def test_server_lost_on_the_way_costs_no_run(
    lab: Lab, database: Database, own_server: tuple[MlflowServer, Callable[[], None]]
) -> None:
    server, kill = own_server
    uri = server.start(56600)
    port = server.wait_until_ready()
    lab.at(uri)
    lab.monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    real_record, real_publish = Training._record_trial, publish.publish

    def lost_after_first(training: Training, *arguments: Any) -> None:
        real_record(training, *arguments)
        kill()

    with lab.monkeypatch.context() as patched:
        patched.setattr(Training, "_record_trial", lost_after_first)
        message = lab.error("run", *QUICK, "--trials", "3")
    # Parent and first trial had arrived; two trials and the candidate wait.
    assert message.startswith(f"MLflow at {uri} does not answer; ")
    assert " runs are kept in " in message
    assert server.start(port) == uri
    server.wait_until_ready()
    assert lab.versions() == []
    sent = [lab.client.get_run(run_id) for run_id in lab.answer("upload")["sent"]]
    (candidate,) = (run for run in sent if "plan" in run.data.tags and "candidate" in run.data.tags)
    trials = lab.runs(f"tags.mlflow.parentRunId = '{candidate.info.run_id}'")
    assert len(trials) == 3
    assert {run.info.status for run in (candidate, *trials)} == {"FINISHED"}
    parent = lab.client.get_run(candidate.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FAILED"

    def lost(*arguments: Any) -> Any:
        kill()
        return real_publish(*arguments)

    # Lost again while the model is judged: nothing is registered.
    with lab.monkeypatch.context() as patched:
        patched.setattr(publish, "publish", lost)
        message = lab.error("register", candidate.info.run_id)
    assert message.startswith(f"MLflow at {uri} was lost")
    assert database.rows("select count(*) from model_versions") == [(0,)]
    assert lab.database.rows("select count(*) from ml.promotion_log") == [(0,)]
