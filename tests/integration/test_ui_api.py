"""The page's client of the API, against a fake on the loopback address."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ui import batch
from ui.api import Api, ApiError
from ui.words import LANGUAGES, words

ENGLISH, SPANISH = words("en"), words("es")


@dataclass
class FakeApi:
    """Answers with what a test has laid down, and remembers what it was asked."""

    url: str
    status: int = 200
    body: bytes = b"{}"
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    echo_rows: bool = False
    ready: bool = False


@pytest.fixture
def fake_api() -> Iterator[FakeApi]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fake.requests.append((self.path, dict(self.headers), sent))
            body = _rows_answered(sent) if fake.echo_rows else fake.body
            ready = fake.ready and self.path == "/readyz"
            self.send_response(200 if ready else fake.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake = FakeApi(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield fake
        server.shutdown()
        thread.join()


def _rows_answered(sent: bytes) -> bytes:
    rows = sent.decode().splitlines()[1:]
    answers = [
        f"{number},{row.split(',')[0]},id,0.25,80.0,true,," for number, row in enumerate(rows, 1)
    ]
    return "\n".join([",".join(batch.COLUMNS), *answers, ""]).encode()


def problem(fake: FakeApi, code: int, **said: Any) -> ApiError:
    fake.status, fake.body = code, json.dumps(said).encode()
    with pytest.raises(ApiError) as caught:
        Api(fake.url).explain({}, 0.2, "en")
    return caught.value


class TestApi:
    def test_nobody_answers(self) -> None:
        with pytest.raises(ApiError) as caught:
            Api("http://127.0.0.1:9").fields()
        assert caught.value.kind == "away"
        message = caught.value.message(ENGLISH, "http://there")
        assert "does not answer" in message
        assert "http://there" in message

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (401, "key"),
            (403, "key"),
            (413, "input"),
            (422, "input"),
            (429, "busy"),
            (500, "failed"),
            (503, "unready"),
        ],
    )
    def test_kind_of_a_problem(self, fake_api: FakeApi, status: int, kind: str) -> None:
        caught = problem(fake_api, status, title="A title", detail="The detail.", status=status)
        assert caught.kind == kind
        assert str(caught) == "The detail."
        for language in LANGUAGES:
            assert caught.message(words(language), "http://there")

    def test_too_many_callers_are_no_missing_model(self, fake_api: FakeApi) -> None:
        fake_api.ready = True
        assert problem(fake_api, 503, detail="full").kind == "busy"

    def test_fields_that_are_wrong(self, fake_api: FakeApi) -> None:
        errors = [{"field": "diag_1", "message": "expected an ICD-9 code"}]
        caught = problem(fake_api, 422, title="Invalid", errors=errors)
        assert caught.fields == {"diag_1": "expected an ICD-9 code"}
        assert caught.detail == "Invalid"

    def test_problem_without_json(self, fake_api: FakeApi) -> None:
        fake_api.status, fake_api.body = 502, b"<html>Bad gateway</html>"
        with pytest.raises(ApiError) as caught:
            Api(fake_api.url).model()
        assert caught.value.kind == "failed"
        assert "html" not in caught.value.message(ENGLISH)

    def test_answer_that_is_no_json(self, fake_api: FakeApi) -> None:
        fake_api.body = b"hello"
        with pytest.raises(ApiError, match="not JSON"):
            Api(fake_api.url).model()

    def test_question(self, fake_api: FakeApi) -> None:
        fake_api.body = b'{"probability": 0.5}'
        api = Api(f"{fake_api.url}/", "the key")
        assert api.explain({"age": "[70-80)"}, 0.1, "es") == {"probability": 0.5}
        ((path, headers, body),) = fake_api.requests
        assert path == "/v1/explain?alert_rate=0.1&language=es&top=8"
        assert headers["X-API-Key"] == "the key"
        assert json.loads(body) == {"age": "[70-80)"}

    def test_csv_goes_in_pieces_and_rows_keep_their_numbers(self, fake_api: FakeApi) -> None:
        fake_api.echo_rows = True
        rows = [["encounter_id", "age"], *([str(number), "[70-80)"] for number in range(1, 2502))]
        answered = list(Api(fake_api.url).predict_csv(rows, 0.2))
        assert [len(some) for some in answered] == [1000, 1000, 501]
        numbered = [(one["row"], one["encounter_id"]) for some in answered for one in some]
        assert numbered == [(str(number), str(number)) for number in range(1, 2502)]

    def test_csv_without_rows_asks_nothing(self, fake_api: FakeApi) -> None:
        assert list(Api(fake_api.url).predict_csv([["age"]], 0.2)) == []
        assert fake_api.requests == []
