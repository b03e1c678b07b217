"""What the prediction API does when what it stands on is killed, stops, swaps or lies."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
import requests

from ingestion.contract import HEADER
from ingestion.synthetic import csv_blocks
from services import processes
from services.mlflow_server import MlflowServer, client_environment
from services.postgres import Postgres, PostgresError, address
from tests.conftest import MLFLOW_PASSWORD
from tests.served import WARNINGS, Api, Registered, as_json, running_api, synthetic, wait_until
from tests.warehouse import Database

pytestmark = WARNINGS

NAME = "diabetes_readmission"
ENCOUNTERS = [{**as_json(row), "discharge_disposition_id": 1} for row in synthetic(100, seed=20)]


@dataclass(slots=True)
class Load:
    """Clients that ask one encounter after the other, each on a connection of its own.

    Attributes:
        answers: (number of the encounter, what came) of each answer with status 200.
        refused: (status, headers) of each other answer.
        broken: what went wrong with a request whose answer had begun, or that was lost.
        closed: requests that found their connection closed before an answer began.
    """

    url: str
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    refused: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    closed: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def work(self, first: int) -> None:
        session = requests.Session()
        number = first
        with session:
            while not self.stopping.is_set():
                number = (number + 1) % len(ENCOUNTERS)
                try:
                    answer = session.post(
                        f"{self.url}/v1/predict", json=ENCOUNTERS[number], timeout=60
                    )
                    if answer.status_code == 200:
                        self.answers.append((number, answer.json()))
                    else:
                        self.refused.append((answer.status_code, dict(answer.headers)))
                except requests.ConnectionError as error:
                    said = str(error)
                    if "without response" in said or "refused" in said or "reset by peer" in said:
                        self.closed += 1
                        return
                    self.broken.append(said)
                except (requests.RequestException, ValueError) as error:
                    self.broken.append(f"{type(error).__name__}: {error}")

    def wait_for(self, more: int) -> None:
        """Until so many more are answered."""
        many = len(self.answers)
        wait_until(lambda: len(self.answers) >= many + more)

    @property
    def ids(self) -> list[str]:
        return [answer["prediction_id"] for _, answer in list(self.answers)]


@contextmanager
def load(api: Api, clients: int = 4) -> Iterator[Load]:
    """Ask on, until the end of the block."""
    made = Load(api.url)
    threads = [
        threading.Thread(target=made.work, args=(place * 20,), daemon=True)
        for place in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        made.wait_for(20)
        yield made
    finally:
        made.stopping.set()
        for thread in threads:
            thread.join(60)


def spool(api: Api) -> list[Path]:
    return [*(api.state / "serving" / "spool").glob("*-*")]


def stored(database: Database) -> list[str]:
    found = database.rows("select prediction_id::text from inference.predictions")
    return [str(row[0]) for row in found]


def probability(url: str, encounter: dict[str, Any]) -> float:
    answer = requests.post(f"{url}/v1/predict", json=encounter, timeout=60)
    return float(answer.json()["probability"])


# MLflow


@pytest.fixture
def own_mlflow(reachable_tmp: Path, registered: Registered) -> Iterator[MlflowServer]:
    """A second server on the session's registry, to be killed."""
    state = reachable_tmp / "mlflow-to-be-killed"
    (state / "mlflow").mkdir(parents=True)
    kept = reachable_tmp / "mlflow-server" / "mlflow" / "artifacts"
    (state / "mlflow" / "artifacts").symlink_to(kept)
    database = address(registered.database.port, "mlflow", MLFLOW_PASSWORD)
    yield MlflowServer(state, f"postgresql+psycopg2://{database}")
    processes.stop(state)


def kill_mlflow(server: MlflowServer) -> None:
    for process in processes.find(server._state):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until(lambda: not processes.find(server._state))


def test_mlflow_is_killed_and_comes_back(
    own_mlflow: MlflowServer, registered: Registered, tmp_path: Path
) -> None:
    uri = own_mlflow.start(56800)
    port = own_mlflow.wait_until_ready()
    mine = replace(registered, uri=uri)
    with running_api(tmp_path / "one", mine) as api:
        before = probability(api.url, ENCOUNTERS[0])
        with load(api, clients=2) as asked:
            kill_mlflow(own_mlflow)
            wait_until(lambda: "does not answer" in reason_of(api, mine), 5)
            asked.wait_for(100)
        assert (asked.broken, asked.refused, asked.closed) == ([], [], 0)
        assert api.get("/readyz").ok
        assert api.stop() == 0

    with running_api(tmp_path / "one", mine) as again:
        assert again.get("/v1/model").json()["source"] == "cache"
        assert probability(again.url, ENCOUNTERS[0]) == before
        assert again.metric(loads("swapped")) == 1

        with running_api(tmp_path / "empty", mine, wait=False, empty_cache=True) as empty:
            wait_until(lambda: "no version is in the cache" in empty.readiness())
            answer = empty.get("/readyz")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "MLflow at" in answer.json()["detail"]
            assert empty.post("/v1/predict", json={}).status_code == 503

            assert own_mlflow.start(port) == uri
            own_mlflow.wait_until_ready()
            empty.wait_until_ready()
            assert empty.get("/v1/model").json()["source"] == "registry"
            assert probability(empty.url, ENCOUNTERS[0]) == before
        wait_until(lambda: again.get("/v1/model").json()["source"] == "registry")


def reason_of(api: Api, registered: Registered) -> str:
    """What a service on the same registry hears of it now."""
    from serving.errors import RegistryError
    from serving.registry import Registry
    from settings import Settings

    try:
        Registry(Settings(MLFLOW_TRACKING_URI=registered.uri)).find("champion")
    except RegistryError as error:
        return str(error)
    return ""


def loads(result: str, alias: str = "champion") -> str:
    return f'model_loads_total{{alias="{alias}",result="{result}"}}'


# PostgreSQL


@dataclass(frozen=True, slots=True)
class OwnPostgres:
    """A server of a test's own, with the database of a prediction log."""

    server: Postgres
    database: Database

    def kill(self) -> None:
        pid = int((self.server.data / "postmaster.pid").read_text().splitlines()[0])
        children = psutil.Process(pid).children()
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs(children, timeout=20)

    def start(self) -> None:
        password = self.database.environment["DIABETES_DB_PASSWORD"]
        deadline = time.monotonic() + 60
        while True:
            try:
                assert self.server.start(self.database.port, password) == self.database.port
                return
            except PostgresError:  # the killed one's memory is still in use
                assert time.monotonic() < deadline
                time.sleep(0.5)

    @property
    def is_up(self) -> bool:
        try:
            psycopg2.connect(self.database.dsn, connect_timeout=2).close()
        except psycopg2.OperationalError:
            return False
        return True


@pytest.fixture
def own_postgres(reachable_tmp: Path, registered: Registered) -> Iterator[OwnPostgres]:
    state = reachable_tmp / "postgres-to-be-killed"
    server = Postgres(state)
    password = registered.database.environment["DIABETES_DB_PASSWORD"]
    port = server.start(56850, password)
    yield OwnPostgres(server, Database(port, "postgres"))
    server.stop()
    shutil.rmtree(state)


def test_postgres_is_killed_under_load_and_nothing_is_lost_or_twice(
    own_postgres: OwnPostgres, registered: Registered, tmp_path: Path
) -> None:
    mine = replace(registered, database=own_postgres.database)
    with running_api(tmp_path, mine) as api:
        order: list[str] = []
        with load(api) as asked:
            wait_until(lambda: api.metric("prediction_log_rows_total") > 100)
            for _ in range(2):
                own_postgres.kill()
                assert not own_postgres.is_up
                wait_until(lambda: api.metric("prediction_log_connected") == 0)
                asked.wait_for(300)
                assert spool(api)
                text = b"".join(csv_blocks(3000, 21))
                answer = api.post(
                    "/v1/predict/batch", data=text, headers={"content-type": "text/csv"}
                )
                lines = [*csv.DictReader(io.StringIO(answer.text))]
                assert len(lines) == 3000
                order += [line["prediction_id"] for line in lines if line["prediction_id"]]
                own_postgres.start()
                wait_until(lambda: api.metric("prediction_log_connected") == 1)
        assert (asked.broken, asked.refused, asked.closed) == ([], [], 0)
        wait_until(lambda: not spool(api), 60)
        found = stored(own_postgres.database)
        assert sorted(found) == sorted([*asked.ids, *order])
        assert len(set(found)) == len(found)
        assert api.metric("prediction_log_broken_files") == 0
        # In the order of the spool: of single requests, and of the blocks of CSVs.
        copied, of_csv = in_order(own_postgres.database), set(order)
        assert [number for number in copied if number in of_csv] == order
        single = [number for number in copied if number not in of_csv]
        assert single == sorted(single)  # ids sort by time
        assert "the database is away" in api.log.read_text()


def in_order(database: Database) -> list[str]:
    """Ids file by file as they were copied, each in a transaction; those of a file by time."""
    found = database.rows(
        "select prediction_id::text from inference.predictions "
        "order by xmin::text::bigint, prediction_id"
    )
    return [str(row[0]) for row in found]


def test_a_full_log_refuses_and_recovers(
    own_postgres: OwnPostgres, registered: Registered, tmp_path: Path
) -> None:
    mine = replace(registered, database=own_postgres.database)
    with running_api(tmp_path, mine, DIABETES_PREDICTION_LOG_LIMIT_MIB="1") as api:
        assert api.post("/v1/predict", json=ENCOUNTERS[0]).status_code == 200
        wait_until(lambda: not spool(api))
        own_postgres.kill()
        batch = {"encounters": ENCOUNTERS}
        answered = []
        while (answer := api.post("/v1/predict/batch", json=batch)).status_code == 200:
            answered += [each["prediction_id"] for each in answer.json()["predictions"]]
            assert len(answered) < 50_000
        assert len(answered) > 500
        text = b"age\n" + b"?\n" * 400_000
        for refusal in (
            answer,
            api.post("/v1/predict", json=ENCOUNTERS[0]),
            api.post("/v1/explain", json=ENCOUNTERS[0]),
            api.post("/v1/predict/batch", data=text, headers={"content-type": "text/csv"}),
        ):
            assert refusal.status_code == 503
            assert refusal.headers["retry-after"] == "30"
            assert "wait for the database" in refusal.json()["detail"]
        assert api.get("/readyz").ok
        own_postgres.start()
        wait_until(lambda: api.post("/v1/predict", json=ENCOUNTERS[0]).ok, 60)
        wait_until(lambda: not spool(api))
        assert set(answered) <= set(stored(own_postgres.database))
        assert len(set(stored(own_postgres.database))) == len(stored(own_postgres.database))


def test_a_spool_that_can_not_be_written_refuses_and_recovers(
    registered: Registered, tmp_path: Path
) -> None:
    text = b"age\n?\n"
    with running_api(tmp_path, registered) as api:

        def ask() -> list[requests.Response]:
            return [
                api.post("/v1/predict", json={}),
                api.post("/v1/predict/batch", json={"encounters": [{}]}),
                api.post("/v1/predict/batch", data=text, headers={"content-type": "text/csv"}),
            ]

        assert [answer.status_code for answer in ask()] == [200, 200, 200]
        wait_until(lambda: not spool(api))
        folder = tmp_path / "serving" / "spool"
        folder.rename(tmp_path / "elsewhere")
        for refusal in ask():
            assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "30")
            assert "the prediction log can't be written" in refusal.json()["detail"]
            assert str(tmp_path) not in refusal.text
        (tmp_path / "elsewhere").rename(folder)
        assert [answer.status_code for answer in ask()] == [200, 200, 200]


# models


@pytest.fixture
def alias(registered: Registered, request: pytest.FixtureRequest) -> Iterator[str]:
    """An alias of the test's own, on the champion: others go on with theirs."""
    name = f"of-{request.node.name.partition('[')[0].replace('_', '-')}"
    registered.client.set_registered_model_alias(NAME, name, registered.champion)
    yield name
    registered.client.delete_registered_model_alias(NAME, name)


def test_the_champion_is_swapped_under_load(
    registered: Registered, alias: str, tmp_path: Path
) -> None:
    old, new = registered.champion, registered.other
    with running_api(tmp_path, registered, DIABETES_API_ALIAS=alias) as api:
        expected = {old: [probability(api.url, encounter) for encounter in ENCOUNTERS]}
        with load(api, clients=8) as asked:
            registered.client.set_registered_model_alias(NAME, alias, new)
            wait_until(lambda: asked.answers[-1][1]["model_version"] == new)
            asked.wait_for(200)
        expected[new] = [probability(api.url, encounter) for encounter in ENCOUNTERS]
        assert (asked.broken, asked.refused, asked.closed) == ([], [], 0)
        assert api.metric(loads("swapped", alias)) == 2
        assert expected[old] != expected[new]
        versions = [answer["model_version"] for _, answer in asked.answers]
        assert {*versions} == {old, new}
        # Clients note their answers side by side: at the swap itself their order may differ by one.
        assert versions[:20] == [old] * 20
        assert sum(a != b for a, b in itertools.pairwise(versions)) <= 2 * 8
        for number, answer in asked.answers:
            assert answer["probability"] == expected[answer["model_version"]][number]
        info = [line for line in api.get("/metrics").text.splitlines() if "model_info{" in line]
        assert len(info) == 1
        assert f'model_version="{new}"' in info[0]


def flip_example(model: Path) -> None:
    examples = json.loads((model / "examples.json").read_text())
    examples["probabilities"][0] = 1 - examples["probabilities"][0]
    (model / "examples.json").write_text(json.dumps(examples))


def truncate(model: Path) -> None:
    largest = max((model / "fitted").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def exit_silently(model: Path) -> None:
    append(model, "import os; os._exit(0)")


def exit_with_one(model: Path) -> None:
    append(model, "import os; os._exit(1)")


def segfault(model: Path) -> None:
    append(model, "import ctypes; ctypes.string_at(0)")


def raise_at_import(model: Path) -> None:
    append(model, "raise RuntimeError('of a test')")


def append(model: Path, line: str) -> None:
    with (model / "candidate.py").open("a") as file:
        file.write(f"\n{line}\n")


def leave_out(model: Path) -> None:
    (model / "scoring.json").unlink()


def nothing(model: Path) -> None:
    """As it was."""


@dataclass(frozen=True, slots=True)
class Original:
    """What MLflow has of the champion: the model's folder, and the files of its run."""

    model: Path
    of_run: Path


@pytest.fixture(scope="module")
def original(registered: Registered, tmp_path_factory: pytest.TempPathFactory) -> Original:
    import mlflow

    folder = tmp_path_factory.mktemp("original")
    version = registered.client.get_model_version(NAME, registered.champion)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in client_environment(registered.uri).items():
            monkeypatch.setenv(name, value)
        mlflow.set_tracking_uri(registered.uri)
        model = mlflow.artifacts.download_artifacts(
            f"models:/{NAME}/{registered.champion}", dst_path=str(folder / "model")
        )
        for file in ("evaluation.json", "card/model_card.html"):
            mlflow.artifacts.download_artifacts(
                f"runs:/{version.run_id}/{file}", dst_path=str(folder / "run")
            )
    found = {path.name: path for path in (folder / "run").rglob("*") if path.is_file()}
    (folder / "of_run" / "card").mkdir(parents=True)
    found["evaluation.json"].rename(folder / "of_run" / "evaluation.json")
    found["model_card.html"].rename(folder / "of_run" / "card" / "model_card.html")
    return Original(Path(model), folder / "of_run")


@contextmanager
def copied_version(
    registered: Registered,
    original: Original,
    folder: Path,
    spoil: Callable[[Path], None],
    tags: dict[str, str],
) -> Iterator[str]:
    """A copy of the champion, spoilt and registered; its number."""
    client = registered.client
    model = shutil.copytree(original.model, folder / "copy")
    (found,) = model.glob("artifacts/*/features.json")
    spoil(found.parent)
    version = client.get_model_version(NAME, registered.champion)
    run = client.create_run(client.get_run(version.run_id).info.experiment_id)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in client_environment(registered.uri).items():
            monkeypatch.setenv(name, value)
        client.log_artifacts(run.info.run_id, str(original.of_run))
        client.log_artifacts(run.info.run_id, str(model), "model")
        client.set_terminated(run.info.run_id)
    made = client.create_model_version(
        NAME,
        f"{run.info.artifact_uri}/model",
        run.info.run_id,
        tags={**version.tags, **tags},
    )
    yield str(made.version)
    client.delete_model_version(NAME, made.version)


FOLLOWED = "of-corrupt-versions"


@pytest.fixture(scope="module")
def follower(registered: Registered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API on an alias of this module's, to be given corrupt versions."""
    registered.client.set_registered_model_alias(NAME, FOLLOWED, registered.champion)
    state = tmp_path_factory.mktemp("follower")
    with running_api(state, registered, DIABETES_API_ALIAS=FOLLOWED) as running:
        yield running
    registered.client.delete_registered_model_alias(NAME, FOLLOWED)


def move(registered: Registered, api: Api, version: str) -> None:
    """Give a sound version to the follower."""
    registered.client.set_registered_model_alias(NAME, FOLLOWED, version)
    wait_until(lambda: api.get("/readyz").json()["model_version"] == version, 60)


@pytest.mark.parametrize(
    ("spoil", "tags", "said"),
    [
        (flip_example, {}, "self-test failed; example 0 scores"),
        (nothing, {"feature_sha256": "0" * 64}, "and the registry 000000000000"),
        (truncate, {}, "version"),  # some libraries die of it, others say so
        (leave_out, {}, "scoring.json"),
        (raise_at_import, {}, "RuntimeError: of a test"),
        (exit_silently, {}, "ended with 0"),
        (exit_with_one, {}, "ended with 1"),
        (segfault, {}, "ended with -11"),
    ],
)
def test_a_corrupt_version_is_refused_and_the_old_goes_on(
    registered: Registered,
    original: Original,
    follower: Api,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    tags: dict[str, str],
    said: str,
) -> None:
    move(registered, follower, registered.champion)
    before = probability(follower.url, ENCOUNTERS[0])
    refused = follower.metric(loads("refused", FOLLOWED))
    place = follower.log.stat().st_size
    with copied_version(registered, original, tmp_path, spoil, tags) as number:
        registered.client.set_registered_model_alias(NAME, FOLLOWED, number)
        wait_until(lambda: follower.metric(loads("refused", FOLLOWED)) > refused, 60)
        ready = follower.get("/readyz")
        assert ready.json() == {"status": "ok", "model_version": registered.champion}
        assert probability(follower.url, ENCOUNTERS[0]) == before
        log = follower.log.read_text()[place:]
        assert f"version {number} is refused, version {registered.champion} goes on" in log
        assert said in log
        assert not [*(follower.state / "serving" / "models").glob(f"{number}*")]
        # It is not tried again; what comes after it is.
        move(registered, follower, registered.other)
        assert follower.metric(loads("refused", FOLLOWED)) == refused + 1
        assert follower.metric(loads("failed", FOLLOWED)) == 0


def test_an_unspoilt_copy_is_served(
    registered: Registered, original: Original, follower: Api, tmp_path: Path
) -> None:
    move(registered, follower, registered.champion)
    before = probability(follower.url, ENCOUNTERS[0])
    with copied_version(registered, original, tmp_path, nothing, {}) as number:
        move(registered, follower, number)
        assert probability(follower.url, ENCOUNTERS[0]) == before
        move(registered, follower, registered.champion)


# the service itself


def test_sigterm_under_load_answers_what_has_begun(registered: Registered, tmp_path: Path) -> None:
    with running_api(tmp_path, registered) as api:
        before = len(stored(registered.database))
        slow = begun_request(api)
        with load(api, clients=8) as asked:
            api.process.terminate()
            time.sleep(0.2)  # the head was sent before the signal, the body comes after it
            status, body = complete(slow)
            code = api.process.wait(30)
        assert code == 0
        assert (asked.broken, asked.refused) == ([], [])
        assert status == 200
        ids = {*asked.ids, body["prediction_id"]}
        assert {*stored_of(registered, [*ids])} == ids
        # Whoever found the connection closed had asked nothing of the service: it scored no more.
        assert len(stored(registered.database)) - before == len(ids)
        assert not spool(api)


BODY = json.dumps(ENCOUNTERS[0]).encode()


def begun_request(api: Api) -> socket.socket:
    """A request whose head and half of whose body were sent."""
    connection = socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])))
    connection.settimeout(30)
    connection.sendall(
        b"POST /v1/predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(BODY)}\r\n\r\n".encode()
        + BODY[:50]
    )
    wait_until(lambda: api.metric("http_requests_in_flight") >= 2)
    return connection


def complete(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Send the rest, and read the whole answer."""
    with connection:
        connection.sendall(BODY[50:])
        received = b""
        while b"\r\n\r\n" not in received or not received.endswith(b"}"):
            piece = connection.recv(65536)
            assert piece, received
            received += piece
    head, _, content = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


def stored_of(registered: Registered, ids: Sequence[str]) -> list[str]:
    query = "select prediction_id::text from inference.predictions "
    found = registered.database.rows(query + "where prediction_id = any(%s::uuid[])", list(ids))
    return [str(row[0]) for row in found]


def test_sigterm_during_a_csv_answers_all_of_it(registered: Registered, tmp_path: Path) -> None:
    text = b"".join(csv_blocks(20_000, 22))
    with running_api(tmp_path, registered) as api:
        asked = threading.Event()

        def parts() -> Iterator[bytes]:
            for start in range(0, len(text), 500_000):
                if start >= 1_000_000 and not asked.is_set():
                    wait_until(lambda: api.metric("http_requests_in_flight") == 2)
                    api.process.terminate()
                    asked.set()
                yield text[start : start + 500_000]

        answer = requests.post(
            f"{api.url}/v1/predict/batch",
            data=parts(),
            headers={"content-type": "text/csv"},
            timeout=120,
        )
        assert api.process.wait(30) == 0
    assert asked.is_set()
    lines = [*csv.DictReader(io.StringIO(answer.text))]
    assert [line["row"] for line in lines] == [str(row + 1) for row in range(20_000)]
    ids = [line["prediction_id"] for line in lines if line["prediction_id"]]
    assert len(ids) > 19_000
    assert sorted(stored_of(registered, ids)) == sorted(ids)


def test_sigkill_under_load_loses_no_answered_prediction(
    registered: Registered, tmp_path: Path
) -> None:
    with running_api(tmp_path, registered) as api:
        workers = psutil.Process(api.process.pid).children(recursive=True)
        assert workers
        with load(api, clients=8) as asked:
            api.process.kill()
            api.process.wait()
        assert len(asked.answers) > 20
        assert spool(api)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert alive == []
    with running_api(tmp_path, registered) as again:
        wait_until(lambda: not spool(again))
        assert again.metric("prediction_log_broken_files") == 0
    assert sorted(stored_of(registered, asked.ids)) == sorted(asked.ids)


def test_a_killed_worker_is_replaced_and_the_csv_is_complete(
    registered: Registered, tmp_path: Path
) -> None:
    text = b"".join(csv_blocks(12_000, 23))
    with running_api(tmp_path, registered, DIABETES_API_BATCH_WORKERS="2") as api:
        wait_until(lambda: len(batch_workers(api)) == 2)
        killed: list[int] = []

        def parts() -> Iterator[bytes]:
            for start in range(0, len(text), 500_000):
                if start >= 1_000_000 and not killed:
                    killed.append(busy(api))
                    os.kill(killed[0], signal.SIGKILL)
                yield text[start : start + 500_000]

        answer = requests.post(
            f"{api.url}/v1/predict/batch",
            data=parts(),
            headers={"content-type": "text/csv"},
            timeout=120,
        )
        assert killed
        assert killed[0] not in batch_workers(api)
        lines = [*csv.DictReader(io.StringIO(answer.text))]
        assert [line["row"] for line in lines] == [str(row + 1) for row in range(12_000)]
        column = HEADER.index("encounter_id")
        sent = [line.split(",")[column] for line in text.decode().splitlines()[1:]]
        assert [line["encounter_id"] for line in lines] == sent
        assert not [line for line in lines if line["error"]]
        ids = [line["prediction_id"] for line in lines if line["prediction_id"]]
        wait_until(lambda: not spool(api), 60)
        assert sorted(stored_of(registered, ids)) == sorted(ids)
        assert probability(api.url, ENCOUNTERS[0])
        # Nobody is left of the broken pool, and nothing hinders the end.
        assert len(batch_workers(api)) == 2
        assert api.stop() == 0


def batch_workers(api: Api) -> list[int]:
    """Processes that the fork server has made."""
    below = psutil.Process(api.process.pid).children(recursive=True)
    return [process.pid for process in below if process.ppid() != api.process.pid]


def busy(api: Api) -> int:
    """A worker that is scoring."""
    found: list[psutil.Process] = []

    def works() -> bool:
        for number in batch_workers(api):
            process = psutil.Process(number)
            if process.cpu_percent(0.1) > 20:
                found.append(process)
        return bool(found)

    wait_until(works)
    return found[0].pid
