"""Runs reach MLflow with all that belongs to them, or stay on disk until they can."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training.errors import TrackingLostError, TrainingError
from training.tracking import Run, Tracker, download, experiment_url, flat

# MLflow declares its tables so, on import.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking URI without a server; artifacts go to the present folder."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # The tracker sets both for the whole process.
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "true")
        import mlflow

        yield uri
        mlflow.set_tracking_uri("")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """Address at which no server answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def tracker(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> Tracker:
    return Tracker(store, tmp_path / "kept", request.node.name)


@pytest.fixture
def lost(nobody: str, tmp_path: Path, request: pytest.FixtureRequest) -> Tracker:
    """A tracker whose server is away, with the folder and experiment of `tracker`."""
    return Tracker(nobody, tmp_path / "kept", request.node.name)


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "kept").iterdir() if path.is_dir())


def all_runs(tracker: Tracker) -> list[Any]:
    client = tracker.client()
    experiment = client.get_experiment_by_name(tracker._experiment)
    return list(client.search_runs([experiment.experiment_id]))


def parent_of(client: Any, run_id: str) -> str | None:
    found: str | None = client.get_run(run_id).data.tags.get("mlflow.parentRunId")
    return found


def test_run_arrives_whole(tracker: Tracker, tmp_path: Path) -> None:
    dataset = {"name": "train", "digest": "abc", "source": {"table": "t"}, "profile": {"rows": 3}}
    run = tracker.begin("a run", params={"depth": 6}, tags={"load_id": 7}, dataset=dataset)
    client = tracker.client()
    begun = client.get_run(run.id)
    assert (begun.info.status, begun.info.run_name) == ("RUNNING", "a run")
    run.metric("loss", 0.5, 0)
    run.metric("loss", 0.25, 1)
    run.metric("auroc", 1)
    run.params["late"] = "yes"
    (run.artifacts / "sub").mkdir()
    (run.artifacts / "sub" / "file.txt").write_text("text")
    tracker.finish(run)

    found = client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.info.start_time == run.start <= found.info.end_time == run.end
    assert found.data.params == {"depth": "6", "late": "yes"}
    assert found.data.metrics == {"loss": 0.25, "auroc": 1.0}
    history = client.get_metric_history(run.id, "loss")
    assert [(one.step, one.value) for one in history] == [(0, 0.5), (1, 0.25)]
    assert found.data.tags["load_id"] == "7"
    assert "mlflow.parentRunId" not in found.data.tags
    (used,) = found.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("train", "abc")
    assert json.loads(used.dataset.profile) == {"rows": 3}
    file = download(client, run.id, "sub/file.txt", tmp_path / "back")
    assert file.read_text() == "text"
    assert folders(tmp_path) == []
    assert client.get_experiment(found.info.experiment_id).name == "test_run_arrives_whole"


def test_runs_are_nested(tracker: Tracker) -> None:
    top = tracker.begin("training")
    middle = tracker.begin("lightgbm", parent=top.id)
    bottom = tracker.begin("lightgbm 0", parent=middle.id)
    for run, status in ((bottom, "KILLED"), (middle, "FAILED"), (top, "RUNNING")):
        tracker.finish(run, status)
    client = tracker.client()
    assert [parent_of(client, run.id) for run in (top, middle, bottom)] == [None, top.id, middle.id]
    statuses = [client.get_run(run.id).info.status for run in (bottom, middle, top)]
    assert statuses == ["KILLED", "FAILED", "RUNNING"]
    assert tracker.kept() == []
    tracker.require_all_sent()


def test_more_metrics_than_mlflow_takes_at_once(tracker: Tracker) -> None:
    run = tracker.begin("long", params={"a": 1})
    for step in range(1700):
        run.metric("loss", step, step)
    tracker.finish(run)
    history = tracker.client().get_metric_history(run.id, "loss")
    assert [one.step for one in history] == list(range(1700))


def test_missing_artifact_is_named(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.begin("empty")
    tracker.finish(run)
    with pytest.raises(TrainingError, match=f"run {run.id} has no artifact features.json"):
        download(tracker.client(), run.id, "features.json", tmp_path / "back")


def test_what_mlflow_refuses_is_an_error_and_not_a_lost_server(
    tracker: Tracker, tmp_path: Path
) -> None:
    run = tracker.begin("refused")
    run.metric("a\nbad name", 1)
    with pytest.raises(TrainingError, match="MLflow refused run refused") as caught:
        tracker.finish(run)
    assert not isinstance(caught.value, TrackingLostError)
    assert folders(tmp_path) == [run.folder.name]


def test_run_comes_back_from_its_folder(lost: Tracker) -> None:
    run = lost.begin("a", parent="p", params={"x": 1}, tags={"y": 2}, dataset={"name": "d"})
    run.metric("m", 0.1, 3)
    run.metric("nothing", float("inf"))
    lost.finish(run)
    assert Run.read(run.folder) == run


def test_lost_server_is_said_with_number_folder_and_command(
    lost: Tracker, nobody: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost.require_all_sent()  # nothing has been tried yet
    with caplog.at_level(logging.WARNING):
        top = lost.begin("training")
        for number in range(2):
            lost.finish(lost.begin(f"{number}", parent=top.id))
        lost.finish(top)
    assert len(caplog.messages) == 1  # said once
    assert len(folders(tmp_path)) == 3
    assert not lost.answers()
    with pytest.raises(TrackingLostError) as caught:
        lost.require_all_sent()
    assert str(caught.value) == (
        f"MLflow at {nobody} does not answer; 3 runs are kept in {tmp_path / 'kept'}, nothing was "
        "registered. When it is back: python -m training upload, then python -m training register "
        "RUN"
    )
    with pytest.raises(TrackingLostError, match="does not answer"):
        lost.client()
    with pytest.raises(TrackingLostError, match="3 runs are kept"):
        Tracker(nobody, tmp_path / "kept", "x").upload()
    assert len(folders(tmp_path)) == 3


def test_kept_runs_are_sent_later_parents_first(
    lost: Tracker, tracker: Tracker, tmp_path: Path
) -> None:
    top = lost.begin("training", tags={"data_sha": "x"})
    (top.artifacts / "features.json").write_text("{}")
    middle = lost.begin("lightgbm", parent=top.id)
    bottom = [lost.begin(f"lightgbm {number}", parent=middle.id) for number in range(4)]
    # All in one millisecond, and the trials' begin is noted afterwards, so that it may be earlier.
    middle.start = top.start
    for number, run in enumerate(bottom):
        run.start = top.start - 1
        run.metric("loss", number, 1)
        lost.finish(run, "KILLED" if number == 3 else "FINISHED")
    lost.finish(middle)
    lost.finish(top, "RUNNING")

    sent = tracker.upload()
    client = tracker.client()
    runs = [client.get_run(run_id) for run_id in sent]
    names = [run.info.run_name for run in runs]
    assert names[:2] == ["training", "lightgbm"]
    assert sorted(names[2:]) == [f"lightgbm {number}" for number in range(4)]
    parents = [run.data.tags.get("mlflow.parentRunId") for run in runs]
    assert parents == [None, sent[0]] + [sent[1]] * 4
    by_name = dict(zip(names, runs, strict=True))
    assert by_name["lightgbm 2"].data.metrics == {"loss": 2.0}
    assert by_name["lightgbm 3"].info.status == "KILLED"
    assert by_name["training"].data.tags["data_sha"] == "x"
    assert by_name["training"].info.start_time == top.start
    assert download(client, sent[0], "features.json", tmp_path / "back").read_text() == "{}"

    assert folders(tmp_path) == []
    tracker.require_all_sent()
    assert tracker.upload() == []
    assert len(all_runs(tracker)) == 6


def test_server_lost_in_the_middle_leaves_one_run_not_two(
    tracker: Tracker, store: str, nobody: str, tmp_path: Path
) -> None:
    top = tracker.begin("training")
    tracker.uri = nobody
    child = tracker.begin("lightgbm", parent=top.id)
    child.metric("loss", 1)
    tracker.finish(child)
    top.metric("done", 1)
    tracker.finish(top)
    with pytest.raises(TrackingLostError, match="2 runs are kept"):
        tracker.require_all_sent()

    later = Tracker(store, tmp_path / "kept", tracker._experiment)
    sent = later.upload()
    client = later.client()
    assert sent[0] == top.id
    assert client.get_run(top.id).data.metrics == {"done": 1.0}
    assert parent_of(client, sent[1]) == top.id
    assert len(all_runs(later)) == 2


def test_upload_that_breaks_off_goes_on_where_it_was(
    lost: Tracker, tracker: Tracker, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = lost.begin("training")
    child = lost.begin("lightgbm", parent=top.id)
    for run in (child, top):
        (run.artifacts / "file").write_text(run.name)
        lost.finish(run)
    client = tracker.client()

    def broken(*_: object) -> None:
        raise OSError("the line is dead")

    with monkeypatch.context() as patch:
        patch.setattr(type(client), "log_artifacts", broken)
        patch.setattr(tracker, "answers", iter([True, True, False]).__next__)
        with pytest.raises(TrackingLostError, match="2 runs are kept"):
            tracker.upload()
    assert len(folders(tmp_path)) == 2

    later = Tracker(store, tmp_path / "kept", tracker._experiment)
    sent = later.upload()
    assert [client.get_run(run_id).info.run_name for run_id in sent] == ["training", "lightgbm"]
    assert parent_of(client, sent[1]) == sent[0]
    assert len(all_runs(later)) == 2


def test_children_wait_for_a_parent_that_is_still_going_on(
    lost: Tracker, tracker: Tracker, tmp_path: Path
) -> None:
    top = lost.begin("training")
    child = lost.begin("lightgbm", parent=top.id)
    lost.finish(child)
    assert [run.name for run in tracker.kept()] == ["lightgbm"]
    assert tracker.upload() == []
    assert len(folders(tmp_path)) == 2
    lost.finish(top)
    sent = tracker.upload()
    assert [parent_of(tracker.client(), run_id) for run_id in sent] == [None, sent[0]]


def test_child_finds_a_parent_that_was_uploaded_before_it(lost: Tracker, tracker: Tracker) -> None:
    top = lost.begin("training")
    lost.finish(top, "RUNNING")
    (sent,) = tracker.upload()
    lost.finish(lost.begin("lightgbm", parent=top.id))
    (child,) = tracker.upload()
    assert parent_of(tracker.client(), child) == sent


def test_run_of_a_process_that_died_is_sent_as_killed(lost: Tracker, tracker: Tracker) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    run = lost.begin("unlucky")
    assert tracker.kept() == []
    run.pid = int(gone.stdout)
    run.write()
    (sent,) = tracker.upload()
    info = tracker.client().get_run(sent).info
    assert (info.status, info.run_name) == ("KILLED", "unlucky")
    assert info.end_time >= run.start


def test_client_is_lost_for_good_once_it_was_lost(lost: Tracker, store: str) -> None:
    """A training that has lost its server keeps the rest, too: it must not tell half a story."""
    lost.finish(lost.begin("first"))
    lost.uri = store
    second = lost.begin("second")
    lost.finish(second)
    assert len(lost.kept()) == 2
    assert second.id.startswith("local-")
    with pytest.raises(TrackingLostError):
        lost.require_all_sent()


def test_only_servers_can_be_away(store: str, nobody: str, tmp_path: Path) -> None:
    assert Tracker(store, tmp_path, "x").answers()
    assert Tracker(str(tmp_path), tmp_path, "x").answers()
    assert not Tracker(nobody, tmp_path, "x").answers()
    assert not Tracker(f"{nobody}/", tmp_path, "x").answers()


def test_kept_of_a_folder_that_is_not_there(store: str, tmp_path: Path) -> None:
    assert Tracker(store, tmp_path / "none", "x").kept() == []
    assert Tracker(store, tmp_path / "none", "x").upload() == []


def test_run_is_written_whole_or_not_at_all(lost: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lost.begin("a")
    run.tags["bad"] = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        run.write()
    assert Run.read(run.folder).tags == {}
    assert run.pid == os.getpid()


def test_address_of_a_run() -> None:
    assert experiment_url("http://host:5000/", "3", "abc") == (
        "http://host:5000/#/experiments/3/runs/abc"
    )
    assert experiment_url("http://host:5000", "3") == "http://host:5000/#/experiments/3"
    assert experiment_url("sqlite:///x.db", "3", "abc") == ""


def test_flat() -> None:
    assert flat({"a": 1, "b": {"c": {"d": 2}, "e": [3]}, "f": {}}) == {
        "a": 1,
        "b.c.d": 2,
        "b.e": [3],
    }
    assert flat({"a": None}, "x.") == {"x.a": None}
