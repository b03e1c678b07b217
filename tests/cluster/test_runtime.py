"""PostgreSQL, SeaweedFS and MLflow as real processes, with the flags and the environment of the
manifests, set up, backed up and restored by the commands of the manifests' Jobs.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import boto3
import botocore
import pytest
import requests
from botocore.config import Config

from services.processes import free_port
from tests.deploy.pods import Cluster
from tests.deploy.storage import process, wait_for
from tests.deploy.trio import API, DATABASES, USERS, Trio
from tests.manifests.manifests import find, render

# --- storage --------------------------------------------------------------------------------


def test_storage_refuses_who_has_no_login_or_a_wrong_one(trio: Trio) -> None:
    client = trio.storage()
    client.put_object(Bucket="mlflow", Key="secret", Body=b"secret")
    anonymous = boto3.session.Session().client(
        "s3",
        endpoint_url=trio.storage_url,
        region_name="us-east-1",
        config=Config(signature_version=botocore.UNSIGNED),
    )
    wrong = boto3.session.Session().client(
        "s3",
        endpoint_url=trio.storage_url,
        region_name="us-east-1",
        aws_access_key_id="adminuser",
        aws_secret_access_key="wrong",
    )
    for stranger in (anonymous, wrong):
        for attempt in (
            lambda stranger=stranger: stranger.list_buckets(),
            lambda stranger=stranger: stranger.list_objects_v2(Bucket="mlflow"),
            lambda stranger=stranger: stranger.get_object(Bucket="mlflow", Key="secret"),
            lambda stranger=stranger: stranger.put_object(Bucket="mlflow", Key="x", Body=b""),
            lambda stranger=stranger: stranger.delete_object(Bucket="mlflow", Key="secret"),
        ):
            with pytest.raises(botocore.exceptions.ClientError, match=r"AccessDenied|Signature"):
                attempt()
    assert client.get_object(Bucket="mlflow", Key="secret")["Body"].read() == b"secret"


def test_jobs_run_again_change_nothing(trio: Trio) -> None:
    for name in ("init-storage", "mlflow-migrate", "mlflow-users"):
        done = trio.job(name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("nothing to do")


# --- MLflow: who may, from where ------------------------------------------------------------


def test_every_named_host_is_let_in_and_no_other(trio: Trio) -> None:
    data = find(trio.cluster.objects, "ConfigMap", "platform")["data"]
    port = trio.address.rpartition(":")[2]
    named = f"{data['MLFLOW_CLUSTER_HOSTS']},{data['MLFLOW_ENTRY_HOSTS']}".split(",")
    assert len(named) > 6
    search = f"{API}/experiments/search?max_results=1"

    def status(host: str) -> int:
        return trio.call("GET", search, headers={"Host": host}).status_code

    for host in named:
        assert status(re.sub(":5000$", f":{port}", host)) == 200, host
    for host in ("evil.example", f"evil.example:{port}", "mlflow", "mlflow.evil.example:5000"):
        assert status(host) == 403, host
    # The probes name no host that is known, and log in nowhere.
    assert requests.get(f"{trio.url}/health", headers={"Host": "10.0.0.1"}, timeout=30).ok


def test_origins_of_the_ways_in_may_write_and_others_may_not(trio: Trio) -> None:
    data = find(trio.cluster.objects, "ConfigMap", "platform")["data"]

    def status(origin: str) -> int:
        path = f"{API}/experiments/search"
        body = {"max_results": 1}
        return trio.call("POST", path, json=body, headers={"Origin": origin}).status_code

    for origin in data["MLFLOW_ENTRY_ORIGINS"].split(","):
        assert status(origin) == 200, origin
    assert status("http://evil.example") == 403


def test_passwords_are_on_no_command_line_and_in_no_log(trio: Trio) -> None:
    server = trio.cluster.process("Deployment", "mlflow")
    said = [*server.command, trio.log.read_text()]
    for values in trio.cluster.secrets.values():
        for name, value in values.items():
            if name not in ("access-key", "basic_auth.ini", "url", "user"):
                assert not [text for text in said if value in text], name


def test_metrics_need_the_login_and_have_figures(trio: Trio) -> None:
    trio.call("GET", f"{API}/experiments/search?max_results=1")
    answer = trio.call("GET", "metrics", "metrics")
    assert answer.status_code == 200
    lines = answer.text.splitlines()
    (count,) = (
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith('mlflow_http_request_total{method="GET",status="200"}')
    )
    assert count > 0


LOAD = """
    import mlflow
    model = mlflow.sklearn.load_model("models:/of_this_test@champion")
    run = mlflow.get_run(mlflow.MlflowClient().get_model_version("of_this_test", "1").run_id)
    print(model.predict([[-9.0], [9.0]]).tolist(), run.data.params, run.data.metrics)
"""
LOADED = "[0, 1] {'kind': 'logistic'} {'auc': 0.75}"


def test_registered_model_is_loaded_by_who_may_only_read(
    trio: Trio, logged: dict[str, str]
) -> None:
    assert trio.python("serving", LOAD).splitlines()[-1] == LOADED


MULTIPART = """
    import hashlib, mlflow, os, sys
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name("large")
    experiment = found.experiment_id if found else client.create_experiment("large")
    run = client.create_run(experiment).info.run_id
    content = os.urandom(24 * 1024**2)
    open("large.bin", "wb").write(content)
    client.log_artifact(run, "large.bin")
    os.remove("large.bin")
    back = open(client.download_artifacts(run, "large.bin", os.getcwd()), "rb").read()
    assert back == content, "another artifact came back"
    print(client.get_run(run).info.artifact_uri)
"""


@pytest.mark.parametrize("by", ["server", "client"])
def test_artifact_of_many_parts_goes_up_and_down(trio: Trio, by: str) -> None:
    # By the manifests the server cuts it into parts; a client that reaches the storage may.
    variables = (
        {}
        if by == "server"
        else {
            "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "true",
            "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(8 * 1024**2),
            "MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE": str(8 * 1024**2),
        }
    )
    root = trio.python("pipeline", MULTIPART, **variables).splitlines()[-1]
    prefix = f"artifacts/{root.removeprefix('mlflow-artifacts:/')}/"
    (kept,) = trio.storage().list_objects_v2(Bucket="mlflow", Prefix=prefix)["Contents"]
    assert kept["Size"] == 24 * 1024**2
    assert kept["ETag"].strip('"').endswith("-3")  # parts of 8 MiB


def test_smoke_test_passes_and_leaves_nothing(trio: Trio) -> None:
    before = trio.storage().list_objects_v2(Bucket="mlflow")["KeyCount"]
    done = task(trio, "smoke-test").process("Job", "smoke-test").run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("MLflow works: a run with an artifact of 12 MiB logged,")
    assert trio.storage().list_objects_v2(Bucket="mlflow")["KeyCount"] == before


def test_smoke_test_says_when_artifacts_cannot_be_stored(trio: Trio) -> None:
    port = free_port(32000 + os.getpid() % 500)
    table = {
        pattern: re.sub(r"\b" + trio.address.rpartition(":")[2], str(port), text)
        for pattern, text in trio.cluster.table.items()
    }
    url = f"http://127.0.0.1:{port}"
    cluster = replace(trio.cluster, table=table)
    other = replace(trio, cluster=cluster, url=url, log=trio.log.with_suffix(".other.log"))
    other.start_mlflow(AWS_SECRET_ACCESS_KEY="wrong")
    try:
        job = task(other, "smoke-test")
        done = job.process("Job", "smoke-test", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1").run()
    finally:
        other.stop_mlflow()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: MLflow at {url} can't store an artifact: ")


def task(trio: Trio, name: str) -> Cluster:
    """A task that a script starts by itself, beside what runs."""
    maps = [item for item in trio.cluster.objects if item["kind"] == "ConfigMap"]
    return replace(trio.cluster, objects=[*render(f"tasks/{name}"), *maps])


def test_terminated_server_ends_in_time_and_a_new_one_knows_everything(
    trio: Trio, logged: dict[str, str]
) -> None:
    upload = "api/2.0/mlflow-artifacts/artifacts"
    uri = trio.call("GET", f"{API}/runs/get?run_id={logged['run']}").json()
    place = uri["run"]["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")

    def slowly() -> Iterator[bytes]:
        yield b"first half, "
        trio.mlflow.terminate()
        time.sleep(2)
        yield b"second half"

    # What is under way when the signal comes is brought to its end.
    assert trio.call("PUT", f"{upload}/{place}/slow.txt", data=slowly()).status_code == 200
    assert trio.stop_mlflow() < trio.grace("Deployment", "mlflow") - 5
    with pytest.raises(ProcessLookupError):
        os.killpg(trio.mlflow.pid, 0)  # nor is there a child of it
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{trio.url}/health", timeout=5)

    trio.start_mlflow()
    assert trio.call("GET", f"{upload}/{place}/slow.txt").text == "first half, second half"
    assert trio.python("serving", LOAD).splitlines()[-1] == LOADED
    for user in (*USERS, "admin"):
        assert trio.call("GET", f"{API}/users/current", user).json()["user"]["username"] == user


def test_server_refuses_tables_of_another_version_and_the_job_says_why(trio: Trio) -> None:
    ((head,),) = trio.rows("mlflow", "select version_num from alembic_version")
    trio.rows("mlflow", "update alembic_version set version_num = 'ffffffffffff'")
    try:
        done = trio.job("mlflow-migrate")
        server = trio.cluster.process("Deployment", "mlflow").run(timeout=60)
    finally:
        trio.rows("mlflow", f"update alembic_version set version_num = '{head}'")
    assert done.returncode == 1
    assert "error: the tables are of a newer MLflow than this image's" in done.stderr
    assert server.returncode != 0
    assert "ffffffffffff" in server.stderr


# --- backup and restore ---------------------------------------------------------------------


def backup(trio: Trio, use: str) -> None:
    for name in ("dump", "upload"):
        done = trio.cluster.process("CronJob", "postgres-backup", name, use=use).run()
        assert done.returncode == 0, done.stderr


def restore(trio: Trio, use: str) -> list[subprocess.CompletedProcess[str]]:
    """Containers of the restore, one after the other, until one fails."""
    done = []
    for name in ("fetch", "restore"):
        done.append(
            task(trio, "postgres-restore").process("Job", "postgres-restore", name, use=use).run()
        )
        if done[-1].returncode:
            break
    return done


FILL = """
create schema raw_data;
create table raw_data.encounters (id bigint generated always as identity primary key,
    patient text not null, at timestamptz not null default '2026-01-01', figures jsonb);
create index on raw_data.encounters (patient);
insert into raw_data.encounters (patient, figures)
    select 'ünï ' || n, jsonb_build_object('n', n, 'text', repeat(E'a\\tb\\n', n % 5))
    from generate_series(1, 20000) n;
create view raw_data.some as select * from raw_data.encounters where id < 10;
create function raw_data.twice(n integer) returns integer language sql as 'select 2 * n';
"""


@pytest.fixture(scope="module")
def filled(trio: Trio, logged: dict[str, str]) -> dict[str, dict[str, tuple[int, str]]]:
    """Content of all databases, after rows of every kind came into each."""
    for name in ("diabetes", "airflow"):
        trio.rows(name, FILL)
    content = {name: trio.content(name) for name in DATABASES}
    assert content["diabetes"]["raw_data.encounters"][0] == 20_000
    assert content["mlflow"]["public.model_versions"][0] >= 1
    assert content["mlflow"]["public.users"][0] == 4
    return content


def test_restore_brings_back_every_row_of_every_database(
    trio: Trio, filled: dict[str, dict[str, tuple[int, str]]]
) -> None:
    backup(trio, "backup")
    # A day of work, a migration and a mishap later.
    trio.rows("diabetes", "delete from raw_data.encounters where id % 2 = 0")
    trio.rows("diabetes", "update raw_data.encounters set patient = 'wrong'")
    trio.rows("diabetes", "create table raw_data.newer (number integer)")
    trio.rows("airflow", "drop schema raw_data cascade")
    trio.rows("mlflow", "update experiments set name = name || ' (changed)'")
    trio.rows("mlflow", "create schema newer; create table newer.more (number integer)")
    assert {name: trio.content(name) for name in DATABASES} != filled

    trio.stop_mlflow()  # as scripts/restore.sh does with all that write
    for done in restore(trio, "restore"):
        assert done.returncode == 0, done.stderr
    assert {name: trio.content(name) for name in DATABASES} == filled
    # The exporter's rights are part of the database.
    with closing(trio.connect("diabetes", "reader")) as connection:
        cursor = connection.cursor()
        cursor.execute("select count(*) from raw_data.encounters")
        assert cursor.fetchone() == (20_000,)
    # Not rows alone: identities go on, views and functions work, owners are owners.
    (fresh,) = trio.rows(
        "diabetes", "insert into raw_data.encounters (patient) values ('next') returning id"
    )
    assert fresh == (20_001,)
    assert trio.rows("diabetes", "select count(*), raw_data.twice(2) from raw_data.some") == [
        (9, 4)
    ]
    trio.rows("diabetes", "delete from raw_data.encounters where patient = 'next'")
    trio.start_mlflow()
    assert trio.python("serving", LOAD).splitlines()[-1] == LOADED


def test_damaged_dump_is_refused_before_anything_is_touched(
    trio: Trio, filled: dict[str, dict[str, tuple[int, str]]]
) -> None:
    backup(trio, "backup-to-damage")
    trio.rows("diabetes", "create table raw_data.since (number integer)")
    before = {name: trio.content(name) for name in DATABASES}
    client = trio.storage()
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="backups")["Contents"]]
    (damaged,) = (key for key in sorted(keys)[-4:] if key.endswith("diabetes.dump"))
    body = bytearray(client.get_object(Bucket="backups", Key=damaged)["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket="backups", Key=damaged, Body=bytes(body))
    try:
        done = restore(trio, "restore-damaged")
        assert [step.returncode for step in done] == [1]
        assert f"error: backups/{damaged} is damaged: expected" in done[0].stderr
        assert {name: trio.content(name) for name in DATABASES} == before
    finally:
        trio.rows("diabetes", "drop table raw_data.since")
        for key in sorted(keys)[-4:]:
            client.delete_object(Bucket="backups", Key=key)


def test_restore_that_fails_half_way_leaves_the_database_as_it_was(
    trio: Trio, filled: dict[str, dict[str, tuple[int, str]]]
) -> None:
    trio.rows("diabetes", "create table raw_data.last (number integer)")
    backup(trio, "backup-unfit")
    dump = trio.cluster.folder / "backup-unfit" / "backup" / "diabetes.dump"
    assert dump.exists()
    before = trio.content("diabetes")
    use = trio.cluster.folder / "restore-unfit" / "backup"
    use.mkdir(parents=True)
    content = dump.read_bytes()
    (use / "diabetes.dump").write_bytes(content[: len(content) - len(content) // 3])
    job = task(trio, "postgres-restore")
    done = job.process("Job", "postgres-restore", "restore", use="restore-unfit").run()
    assert done.returncode != 0
    assert trio.content("diabetes") == before


def test_dump_that_fails_ends_the_backup_before_anything_is_uploaded(trio: Trio) -> None:
    process = trio.cluster.process(
        "CronJob", "postgres-backup", "dump", use="backup-failing", AIRFLOW_PASSWORD="wrong"
    )
    done = process.run()
    assert done.returncode != 0
    assert "password authentication failed" in done.stderr


# --- the exporters --------------------------------------------------------------------------


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


@contextmanager
def exporter(
    trio: Trio, name: str, kind: str = "Deployment", without: str = "", **variables: str
) -> Iterator[tuple[str, Path]]:
    """A pod of what watches, started as its manifest says: its address and its log.

    Args:
        trio: the rest.
        name, kind: of the object.
        without: a Secret that is not there.
        variables: to set otherwise than the manifest.
    """
    port = free_port(33000 + os.getpid() % 500)
    known = {key: value for key, value in trio.cluster.secrets.items() if key != without}
    cluster = replace(
        trio.cluster,
        secrets=known,
        table={
            **trio.cluster.table,
            r"^--web\.listen-address=:\d+$": f"--web.listen-address=127.0.0.1:{port}",
            r"^--statsd\.listen-udp=:\d+$": f"--statsd.listen-udp=127.0.0.1:{port}",
        },
        appended={"alertmanager": [f"--web.listen-address=127.0.0.1:{port}"]},
    )
    if name == "pipeline-exporter":
        variables |= {"DIABETES_EXPORTER_HOST": "127.0.0.1", "DIABETES_EXPORTER_PORT": str(port)}
    pod = cluster.process(kind, name, **variables)
    log = cluster.folder / f"{name}-{port}.log"
    spec = find(cluster.objects, kind, name)["spec"]["template"]["spec"]
    probe = spec["containers"][0]["readinessProbe"]["httpGet"]["path"]
    url = f"http://127.0.0.1:{port}"
    with process(pod.command, pod.environment, log) as running:
        wait_for(running, lambda: requests.get(f"{url}{probe}", timeout=10).ok, log)
        yield url, log
        running.terminate()
        running.wait(spec["terminationGracePeriodSeconds"] - 5)


def figures(url: str) -> set[str]:
    return set(requests.get(f"{url}/metrics", timeout=30).text.splitlines())


def test_pipeline_exporter_reads_as_the_reader(trio: Trio) -> None:
    trio.rows("diabetes", "create schema if not exists clean_data")
    trio.rows("diabetes", "create table clean_data.batch_info as select generate_series(1, 7)")
    try:
        with exporter(trio, "pipeline-exporter") as (url, _):
            found = figures(url)
            # Nobody is called airflow-api-server here.
            assert found >= {"pipeline_database_up 1.0", "pipeline_batches 7.0"}
            assert "airflow_api_up 0.0" in found
        with exporter(trio, "pipeline-exporter", without="airflow-monitoring") as (url, _):
            found = figures(url)
            assert "pipeline_batches 7.0" in found
            assert not any("airflow_api_up" in line for line in found)
        wrong = {"DIABETES_DB_PASSWORD": "wrong"}
        with exporter(trio, "pipeline-exporter", **wrong) as (url, log):
            found = figures(url)
            assert "pipeline_database_up 0.0" in found
            assert not any(line.startswith("pipeline_batches") for line in found)
            assert "password authentication failed" in log.read_text()
    finally:
        trio.rows("diabetes", "drop schema clean_data cascade")


@needs("prometheus-postgres-exporter")
def test_postgres_exporter_logs_in_and_sees_every_database(trio: Trio) -> None:
    with exporter(trio, "postgres-exporter") as (url, log):
        found = figures(url)
        password = trio.cluster.secrets["monitoring-credentials"]["monitoring-password"]
        assert password not in log.read_text()
    assert "pg_up 1" in found
    for name in DATABASES:
        assert any(line.startswith("pg_stat_database_xact_commit") and name in line
                   for line in found)  # fmt: skip
        assert any(line.startswith("pg_database_size_bytes") and name in line for line in found)


@needs("statsd_exporter")
def test_statsd_exporter_knows_what_airflow_sends(trio: Trio) -> None:
    with exporter(trio, "statsd-exporter") as (url, _):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            port = int(url.rpartition(":")[2])
            sender.sendto(b"airflow.ti_failures,dag_id=diabetes:1|c\n", ("127.0.0.1", port))
        deadline = time.monotonic() + 20
        wanted = re.compile(r'airflow_task_failures_total\{.*\bdag_id="diabetes".*\} 1')
        while not any(map(wanted.fullmatch, found := figures(url))):
            assert time.monotonic() < deadline, sorted(found)
            time.sleep(0.1)


@needs("prometheus-alertmanager")
def test_alertmanager_keeps_its_silences(trio: Trio) -> None:
    silence = {
        "matchers": [{"name": "alertname", "value": "ApiDown", "isRegex": False}],
        "startsAt": "2026-01-01T00:00:00Z",
        "endsAt": "2099-01-01T00:00:00Z",
        "createdBy": "test",
        "comment": "kept",
    }
    with exporter(trio, "alertmanager", "StatefulSet") as (url, _):
        answer = requests.post(f"{url}/api/v2/silences", json=silence, timeout=30)
        assert answer.ok, answer.text
    with exporter(trio, "alertmanager", "StatefulSet") as (url, _):
        (kept,) = requests.get(f"{url}/api/v2/silences", timeout=30).json()
        assert kept["comment"] == "kept"
        receivers = requests.get(f"{url}/api/v2/receivers", timeout=30).json()
        assert {receiver["name"] for receiver in receivers} >= {"on-call", "tickets"}
