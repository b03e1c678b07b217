"""What stands before every operation of the API: sizes, pauses, keys, load, headers, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from prometheus_client import generate_latest
from starlette.types import Message

from serving import guard, problems
from serving.errors import ServingError
from serving.guard import (
    BATCH,
    BODY_LIMIT,
    CARD,
    JSON_BATCH_LIMIT,
    Guard,
    read_keys,
)
from serving.prediction_log import LogFullError
from serving.telemetry import Telemetry

KEY = "a key of a test"
DIGEST = sha256(KEY.encode()).hexdigest()
SECRET = "patient 987650012345"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        assert self.headers["content-type"] == problems.MEDIA_TYPE
        found = json.loads(self.body)
        assert found["status"] == self.status
        return str(found["detail"])


def guarded(**settings: Any) -> tuple[Guard, Telemetry]:
    """Routes that tell how much they read, behind the guard."""
    app = FastAPI()
    problems.install(app)

    @app.get("/livez")
    async def livez() -> str:
        return "ok"

    @app.get("/docs-of-ours")
    @app.get(CARD)
    @app.get("/v1/model/{name}")
    async def model(name: str = "") -> str:
        return name

    @app.post("/v1/predict")
    @app.post(BATCH)
    async def read(request: Request) -> int:
        return sum([len(piece) async for piece in request.stream()])

    @app.get("/v1/broken")
    async def broken() -> None:
        raise ValueError(SECRET)

    @app.get("/v1/full")
    async def full() -> None:
        raise LogFullError("no room")

    @app.get("/v1/cut")
    async def cut() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"half"
            raise ValueError(SECRET)

        return StreamingResponse(pieces())

    telemetry = Telemetry()
    usual = {"most": 9, "room": 2 * JSON_BATCH_LIMIT, "timeout": 5.0, "csv_limit": 1 << 20}
    chosen = {"keys": {}, **usual, **settings}
    return Guard(app, telemetry, **chosen), telemetry


async def ask(
    app: Guard,
    path: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    pieces: Iterable[bytes | float] = (),
) -> Answer:
    """One request; a number among the pieces of its body is a pause in seconds, then nothing."""
    sent: list[Message] = []
    rest = iter([*pieces, None, 3600.0])  # then it stays connected

    async def receive() -> Message:
        piece = next(rest)
        if isinstance(piece, float):
            await asyncio.sleep(piece)
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(n.lower().encode(), v.encode()) for n, v in (headers or {}).items()],
        "server": ("127.0.0.1", 1),
        "client": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    start = sent[0]
    names = [name.decode() for name, _ in start["headers"]]
    assert len(names) == len(set(names))
    return Answer(
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        b"".join(message.get("body", b"") for message in sent[1:]),
    )


def get(app: Guard, path: str, **headers: str) -> Answer:
    return asyncio.run(ask(app, path, headers=headers))


def post(app: Guard, path: str, pieces: Iterable[bytes | float], **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(ask(app, path, "POST", named, pieces))


def samples(telemetry: Telemetry, name: str) -> dict[str, float]:
    """What was counted, by its labels as /metrics writes them."""
    lines = generate_latest(telemetry.registry).decode().splitlines()
    found = (line.removeprefix(name).rsplit(" ", 1) for line in lines if line.startswith(name))
    return {labels: float(value) for labels, value in found if float(value)}


LIMITS = [
    ("/v1/predict", {}, BODY_LIMIT, "64 KiB"),
    ("/v1/predict", {"content_type": "text/csv"}, BODY_LIMIT, "64 KiB"),
    (BATCH, {"content_type": "application/json"}, JSON_BATCH_LIMIT, "32 MiB"),
    (BATCH, {"content_type": "text/csv; charset=utf-8"}, 1 << 20, "1 MiB"),
    (BATCH, {"content_type": "Text/CSV"}, 1 << 20, "1 MiB"),
]


@pytest.mark.parametrize(("path", "headers", "limit", "said"), LIMITS)
def test_a_body_has_a_bound_told_or_not(
    path: str, headers: dict[str, str], limit: int, said: str
) -> None:
    app, _ = guarded()
    for length, status in ((limit, 200), (limit + 1, 413)):
        body = bytes(length)
        halves = [body[: length // 2], body[length // 2 :]]
        told = post(app, path, halves, content_length=str(length), **headers)
        streamed = post(app, path, halves, **headers)
        assert told.status == streamed.status == status
        if status == 413:
            assert said in told.detail
            assert said in streamed.detail
            assert told.headers["connection"] == streamed.headers["connection"] == "close"
        else:
            assert told.body == streamed.body == str(limit).encode()


def test_a_length_that_is_none_does_not_help() -> None:
    app, _ = guarded()
    for length in ("-1", "0", "1e9", "²", ""):
        body = bytes(BODY_LIMIT + 1)
        assert post(app, "/v1/predict", [body], content_length=length).status == 413


def test_a_body_that_pauses_is_given_up() -> None:
    app, _ = guarded(timeout=0.05)
    answer = post(app, "/v1/predict", [b"half", 5.0])
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert "nothing came for 0.05 s" in answer.detail
    # As long as pieces come, all of them together may take longer.
    assert post(app, "/v1/predict", [b"a"] * 10).status == 200


def test_a_caller_who_leaves_is_no_fault_of_ours() -> None:
    app, telemetry = guarded()
    assert post(app, "/v1/predict", [b"half", 0.0]).status == 400
    ((labels, count),) = samples(telemetry, "http_requests_total").items()
    assert (labels, count) == ('{method="POST",route="/v1/predict",status="400"}', 1)


def test_only_the_right_key_opens() -> None:
    app, _ = guarded(keys={DIGEST: "ward 3", "0" * 64: "other"})
    for wrong in ({}, {"X-API-Key": ""}, {"X-API-Key": "wrong"}, {"X-API-Key": DIGEST}):
        answer = get(app, "/v1/model/x", **wrong)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "ApiKey")
        assert "X-API-Key" in answer.detail
        assert KEY not in answer.detail
    assert get(app, "/v1/model/x", **{"X-API-Key": KEY}).status == 200
    # Whether it lives is no secret.
    assert get(app, "/livez").status == 200
    # A body that is refused anyway is not read.
    assert post(app, "/v1/predict", [5.0], content_length="999999999").status == 401


def test_no_keys_ask_for_none() -> None:
    app, _ = guarded(keys=read_keys(""))
    assert get(app, "/v1/model/x").status == 200


def test_keys_are_read_as_the_settings_hold_them() -> None:
    assert read_keys("") == read_keys(" , ") == {}
    assert read_keys(f"ward 3:{DIGEST}") == {DIGEST: "ward 3"}
    assert read_keys(f" a:b:{DIGEST.upper()} ,c:{'0' * 64},") == {DIGEST: "a:b", "0" * 64: "c"}


@pytest.mark.parametrize(
    "text", [DIGEST, f":{DIGEST}", "ward:plain", f"ward:{DIGEST[1:]}", f"ward:{'g' * 64}", "ward:"]
)
def test_what_is_no_key_hash_is_refused(text: str) -> None:
    with pytest.raises(ServingError, match=r"^DIABETES_API_KEY_HASHES: expected name:sha256"):
        read_keys(text)


def test_too_many_at_once_are_told_to_come_again() -> None:
    app, telemetry = guarded(most=2)

    async def crowd() -> list[Answer]:
        slow = [ask(app, "/v1/predict", "POST", pieces=[b"a", 0.3]) for _ in range(2)]
        begun = [asyncio.create_task(each) for each in slow]
        await asyncio.sleep(0.05)
        refused = [await ask(app, "/v1/model/x"), await ask(app, "/livez")]
        return [*refused, *[await each for each in begun], await ask(app, "/v1/model/x")]

    refused, livez, *served, after = asyncio.run(crowd())
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert "2 requests are being served" in refused.detail
    assert livez.status == 200
    assert [answer.status for answer in served] == [400, 400]
    assert after.status == 200
    text = generate_latest(telemetry.registry).decode()
    assert "\nhttp_requests_shed_total 1.0\n" in text
    assert "\nhttp_requests_in_flight 0.0\n" in text


def test_requests_that_await_nothing_are_counted_all_the_same() -> None:
    """A prediction is answered in one go: nobody else gets a turn meanwhile."""
    app, telemetry = guarded(most=3)
    ended: list[int] = []

    async def one(number: int) -> Answer:
        answer = await ask(app, "/v1/predict", "POST", pieces=[b"x" * number])
        ended.append(number)
        return answer

    async def crowd() -> list[Answer]:
        return await asyncio.gather(*(one(number) for number in range(10)))

    answers = asyncio.run(crowd())
    assert [answer.status for answer in answers] == [200] * 3 + [503] * 7
    assert [answer.body for answer in answers[:3]] == [b"0", b"1", b"2"]
    assert ended[:3] == [0, 1, 2]  # as they came
    text = generate_latest(telemetry.registry).decode()
    assert "\nhttp_requests_shed_total 7.0\n" in text
    assert "\nhttp_requests_in_flight 0.0\n" in text


MIB = 1 << 20
AS_JSON, AS_CSV = {"content-type": "application/json"}, {"content-type": "text/csv"}
CHUNKED = {"transfer-encoding": "chunked"}


@pytest.mark.parametrize(
    ("headers", "several"),
    [
        ({**AS_JSON, "content-length": str(10 * MIB)}, 6),
        ({**AS_JSON, **CHUNKED}, 2),
        ({**AS_JSON, **CHUNKED, "content-length": "1"}, 2),
        ({**AS_JSON, "content-length": str(50 << 10)}, 20),
        # Of a CSV of any length no more than this is in memory at once.
        ({**AS_CSV, "content-length": str(500 * MIB)}, 16),
        ({**AS_CSV, **CHUNKED}, 16),
        ({**AS_CSV, "content-length": str(MIB)}, 20),
    ],
)
def test_batches_have_a_bound_of_what_they_hold(headers: dict[str, str], several: int) -> None:
    app, telemetry = guarded(most=50, room=64 * MIB, csv_limit=512 * MIB)

    async def crowd() -> list[Answer]:
        slow = [ask(app, BATCH, "POST", headers, [b"a", 0.3]) for _ in range(20)]
        batches = [asyncio.create_task(each) for each in slow]
        await asyncio.sleep(0.05)
        # There is room for others all the same.
        assert (await ask(app, "/v1/predict", "POST", pieces=[b"a"])).status == 200
        answers = [await each for each in batches]
        # And for a batch when those are done.
        assert (await ask(app, BATCH, "POST", headers, [b"a"])).status == 200
        return answers

    answers = asyncio.run(crowd())
    assert [answer.status for answer in answers] == [400] * several + [503] * (20 - several)
    for refused in answers[several:]:
        assert refused.headers["retry-after"] == "1"
        assert re.match(r"batches of \d+ MiB are being served; try again", refused.detail)
    assert samples(telemetry, "http_requests_shed_total").get("", 0) == 20 - several


def test_health_does_not_queue() -> None:
    app, _ = guarded(most=9)
    ended: list[str] = []

    async def one(path: str) -> None:
        assert (await ask(app, path)).status == 200
        ended.append(path)

    async def crowd() -> None:
        await asyncio.gather(*(one("/v1/model/x") for _ in range(9)), one("/livez"))

    asyncio.run(crowd())
    assert ended[0] == "/livez"


def test_who_is_refused_waits_and_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SHED_PAUSE", 1.0)
    app, telemetry = guarded(most=1)
    get(app, "/v1/model/x")  # FastAPI has work of its own at the first

    async def crowd() -> list[Answer]:
        first, *refused = [asyncio.create_task(ask(app, "/v1/model/x")) for _ in range(6)]
        served = await first
        # Five wait for their refusal, and there is room for one.
        after = await ask(app, "/v1/model/x")
        assert "\nhttp_requests_in_flight 0.0\n" in generate_latest(telemetry.registry).decode()
        assert not any(each.done() for each in refused)
        return [served, after, *await asyncio.gather(*refused)]

    statuses = [answer.status for answer in asyncio.run(crowd())]
    assert statuses == [200, 200, *[503] * 5]


def test_every_answer_has_the_safe_headers() -> None:
    app, _ = guarded(keys={DIGEST: "x"})
    key = {"X-API-Key": KEY}
    answers = {
        200: get(app, "/livez"),
        401: get(app, "/v1/model/x"),
        404: get(app, "/nowhere"),
        405: post(app, "/livez", []),
        413: post(app, "/v1/predict", [], content_length="999999999", **key),
        500: get(app, "/v1/broken", **key),
        503: get(app, "/v1/full", **key),
    }
    for status, answer in answers.items():
        assert answer.status == status
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        if status != 200:
            assert answer.detail
    card = get(app, CARD, **key).headers["content-security-policy"]
    assert "img-src data:" in card
    assert "script" not in card
    assert "content-security-policy" not in get(app, "/docs").headers


def test_a_failure_tells_nobody_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    app, telemetry = guarded()
    with caplog.at_level(logging.INFO):
        answer = get(app, "/v1/broken")
        cut = get(app, "/v1/cut")
    assert answer.status == 500
    assert SECRET not in answer.detail
    assert cut.body == b"half"
    assert caplog.text.count("ValueError") >= 2
    assert "in broken" in caplog.text  # where it was
    assert SECRET not in caplog.text
    # Callers of the second were told 200, and got half of it.
    assert samples(telemetry, "http_requests_total") == {
        '{method="GET",route="/v1/broken",status="500"}': 1,
        '{method="GET",route="/v1/cut",status="500"}': 1,
    }


def test_a_log_that_is_full_is_a_reason_to_come_again() -> None:
    app, _ = guarded()
    answer = get(app, "/v1/full")
    assert (answer.status, answer.detail, answer.headers["retry-after"]) == (503, "no room", "30")


def test_no_path_of_a_callers_becomes_a_label() -> None:
    app, telemetry = guarded(keys={DIGEST: "x"})
    for number in range(30):
        get(app, f"/made/up/{number}")
        get(app, f"/v1/model/{number}")
        get(app, f"/v1/model/{number}", **{"X-API-Key": KEY})
        asyncio.run(ask(app, f"/v1/{number}", method=f"METHOD{number}"))
    counted = samples(telemetry, "http_requests_total")
    assert counted == {
        '{method="GET",route="none",status="404"}': 30,
        '{method="GET",route="none",status="401"}': 30,
        '{method="GET",route="/v1/model/{name}",status="200"}': 30,
        '{method="other",route="none",status="401"}': 30,
    }
    seconds = samples(telemetry, "http_request_duration_seconds_count")
    assert seconds == {'{route="none"}': 90, '{route="/v1/model/{name}"}': 30}


def test_what_is_no_request_passes() -> None:
    app, _ = guarded()
    received: list[Message] = []

    async def lifespan() -> None:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None:
            received.append(message)

        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)

    asyncio.run(lifespan())
    assert [message["type"] for message in received] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
