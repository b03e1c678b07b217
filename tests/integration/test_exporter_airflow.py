"""The pipeline's exporter and Airflow's REST API, against a fake on the loopback address."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from monitoring import __main__ as cli
from monitoring.exporter import Source
from monitoring.exporter_airflow import AirflowReader
from settings import settings
from tests.unit.test_exporter import run, values


def test_a_taken_port_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIABETES_DB_PORT", "1")
    settings.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["exporter", "--port", str(port)]) == 1
        assert cli.main(["exporter", "--port", "99999"]) == 1
    settings.cache_clear()
    said = capsys.readouterr().err
    assert f"error: can't listen on 127.0.0.1:{port}: " in said
    assert "Traceback" not in said


class FakeAirflow(BaseHTTPRequestHandler):
    """Airflow's REST API, as far as the exporter asks; `dags` and `tokens` are the test's."""

    dags: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    logins: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.tokens:
            self._say(401, {})
            return
        token = self.tokens[min(len(self.logins), len(self.tokens) - 1)]
        self.logins.append(token)
        self._say(201, {"access_token": token})

    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {self.tokens[-1]}":
            self._say(401, {})
        elif self.path.startswith("/api/v2/dags?"):
            self._say(200, {"dags": [{"dag_id": name} for name in self.dags]})
        else:
            self._say(200, {"dag_runs": [run("success", 1)]})

    def _say(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def airflow(**attributes: Any) -> Iterator[tuple[str, type[FakeAirflow]]]:
    handler = type("Handler", (FakeAirflow,), {"logins": [], **attributes})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_only_our_dags_and_not_without_end() -> None:
    names = ("diabetes_a", "somebody_elses", *(f"diabetes_{number}" for number in range(50)))
    with airflow(dags=names, tokens=("t",)) as (url, _):
        found = values(AirflowReader(f"{url}/", "admin", "x").read())
    told = {key[1] for key in found}
    assert len(told) == 20
    assert "somebody_elses" not in told


def test_an_expired_token_is_renewed_once() -> None:
    with airflow(dags=("diabetes_a",), tokens=("old", "new")) as (url, handler):
        reader = AirflowReader(url, "admin", "x")
        assert values(reader.read())["dag_run_success", "diabetes_a"] == 1
        assert handler.logins == ["old", "new"]
        reader.read()
        assert handler.logins == ["old", "new"]


def test_a_refused_login_means_down_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with airflow() as (url, _):
        reader = AirflowReader(url, "admin", "wrong")
        with pytest.raises(requests.HTTPError, match="401"):
            reader.read()
        source = Source("Airflow", ("airflow_api_up", "Help"), reader.read)
        source.refresh()
        source.refresh()
    assert values(source.metrics()) == {("airflow_api_up",): 0.0}
    assert caplog.text.count("can't be read") == 1
    assert "wrong" not in caplog.text
