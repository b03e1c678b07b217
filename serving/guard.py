"""What stands before every operation: load, keys, sizes, slow callers, headers, metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Mapping
from hashlib import sha256

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import problems
from serving.errors import ServingError
from serving.telemetry import Telemetry

BODY_LIMIT = 64 << 10
JSON_BATCH_LIMIT = 32 << 20
CSV_HELD = 4 << 20
"""About what a CSV and its answer have in memory, however long they are (see upload.py)."""
BATCH = "/v1/predict/batch"
SHED_PAUSE = 0.5
"""Seconds until a caller hears that there is no room."""

_GUARDED = "/v1/"
_DOCS = ("/docs", "/redoc")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_CSP = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
# The model card is one page with its style and pictures inside; nothing of it is a script.
_CARD_CSP = (
    b"content-security-policy",
    b"default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
)
CARD = "/v1/model/card"

log = logging.getLogger(__name__)


def read_keys(text: str) -> dict[str, str]:
    """Names by SHA-256 of the keys that are accepted.

    Args:
        text: `name:sha256`, comma-separated.

    Raises:
        ServingError: an entry is something else.
    """
    keys = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, digest = entry.rpartition(":")
        digest = digest.lower()
        if not name or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ServingError(
                "DIABETES_API_KEY_HASHES: expected name:sha256 entries, comma-separated; make one "
                "with python -m serving key NAME"
            )
        keys[digest] = name
    return keys


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what it guards.
        telemetry: where requests are counted.
        keys: names by SHA-256 of accepted keys; empty: no key is asked for.
        most: requests served at once.
        room: bytes of batches that are held in memory at once.
        timeout: seconds a caller may take between two pieces of a body.
        csv_limit: bytes of the largest CSV.
    """

    def __init__(
        self,
        app: ASGIApp,
        telemetry: Telemetry,
        keys: Mapping[str, str],
        most: int,
        room: int,
        timeout: float,
        csv_limit: int,
    ) -> None:
        self._app = app
        self._telemetry = telemetry
        self._keys = keys
        self._most = most
        self._room = room
        self._timeout = timeout
        self._csv_limit = csv_limit
        self._serving = 0
        self._held = 0
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        status = 500
        begun = False
        path = scope["path"]

        async def send_guarded(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message.get("headers", ()), *_headers(path)]
            await send(message)

        guarded = path.startswith(_GUARDED)
        held = self._memory(scope)
        crowd = self._crowd(held) if guarded else ""
        if not crowd:
            self._count(1, held)
        try:
            if crowd:
                await self._shed(crowd, scope, receive, send_guarded)
            elif guarded and (refusal := self._refusal(scope)):
                await refusal(scope, receive, send_guarded)
            else:
                if guarded:
                    await self._next()
                await self._app(scope, self._limited(scope, receive), send_guarded)
        except Exception as error:
            status = 500  # whatever an answer that was cut short began with
            # Where it was and of what type: its message could quote what the caller sent, and the
            # server would write that to the log. An answer that was cut short it sees by itself.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s failed: %s\n%s", _method(scope), type(error).__name__, frames)
            if not begun:
                raise
        finally:
            if not crowd:
                self._count(-1, -held)
            # The template, not the path: a caller could make up any number of those.
            route = getattr(scope.get("route"), "path", "none")
            self._telemetry.requests.labels(route, _method(scope), str(status)).inc()
            self._telemetry.seconds.labels(route).observe(time.perf_counter() - begin)

    async def _next(self) -> None:
        """Wait until it is this request's turn: one after the other, in the order they came.

        To score an encounter awaits nothing. A request that is all there would be answered before
        the next one is so much as read, so one at a time would be counted however many wait in
        their sockets, and none refused. Before each, the loop reads what has come meanwhile.
        """
        async with self._turn:
            await asyncio.sleep(0)

    def _crowd(self, held: int) -> str:
        """What leaves no room for a request that will hold so many bytes; empty: there is room."""
        if self._serving >= self._most:
            return f"{self._most} requests"
        if self._held + held > self._room:
            return f"batches of {self._held >> 20} MiB"
        return ""

    async def _shed(self, crowd: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse for want of room.

        Not at once: callers who ask again as soon as they are refused would take up most of the
        time, and what has been let in would be answered at a quarter of the usual rate.
        """
        self._telemetry.shed.inc()
        await asyncio.sleep(SHED_PAUSE)
        refusal = problems.response(
            503,
            f"{crowd} are being served; try again in a second",
            headers={"Retry-After": "1"},
        )
        await refusal(scope, receive, send)

    def _count(self, change: int, held: int) -> None:
        self._serving += change
        self._held += held
        self._telemetry.in_flight.set(self._serving)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = dict(scope["headers"])
        if self._keys and not self._known(headers):
            return problems.response(
                401,
                "a key is needed in the header X-API-Key; ask those who run the service",
                headers={"WWW-Authenticate": "ApiKey"},
            )
        length = headers.get(b"content-length", b"0")
        limit = self._limit(scope, headers)
        if length.isdigit() and int(length) > limit:
            return problems.response(413, _too_large(limit), headers={"Connection": "close"})
        return None

    def _known(self, headers: Mapping[bytes, bytes]) -> bool:
        digest = sha256(headers.get(b"x-api-key", b"")).hexdigest()
        # In constant time: how long it takes tells nothing of a key.
        return any(hmac.compare_digest(digest, known) for known in self._keys)

    def _limit(self, scope: Scope, headers: Mapping[bytes, bytes]) -> int:
        if scope["path"] != BATCH:
            return BODY_LIMIT
        return self._csv_limit if _is_csv(headers) else JSON_BATCH_LIMIT

    def _memory(self, scope: Scope) -> int:
        """Bytes that a batch holds while it is served; others hold next to nothing."""
        if scope["path"] != BATCH:
            return 0
        headers = dict(scope["headers"])
        most = CSV_HELD if _is_csv(headers) else JSON_BATCH_LIMIT
        length = headers.get(b"content-length", b"0")
        told = length.isdigit() and b"transfer-encoding" not in headers
        return min(int(length), most) if told else most

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        limit = self._limit(scope, dict(scope["headers"]))
        received = 0
        complete = False

        async def receive_limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the end of the connection, however late
                return await receive()
            try:
                async with asyncio.timeout(self._timeout):
                    message = await receive()
            except TimeoutError:
                raise problems.ProblemError(
                    408,
                    f"nothing came for {self._timeout:g} s; send the body without a pause",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.disconnect":  # nobody hears it; it is counted as theirs
                raise problems.ProblemError(400, "the connection ended before the body did")
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise problems.ProblemError(413, _too_large(limit), headers={"Connection": "close"})
            return message

        return receive_limited


def _headers(path: str) -> tuple[tuple[bytes, bytes], ...]:
    if path.startswith(_DOCS):  # FastAPI's page loads its script from elsewhere
        return _HEADERS
    return (*_HEADERS, _CARD_CSP if path == CARD else _CSP)


def _is_csv(headers: Mapping[bytes, bytes]) -> bool:
    return headers.get(b"content-type", b"").lower().startswith(b"text/csv")


def _method(scope: Scope) -> str:
    known = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")
    return scope["method"] if scope["method"] in known else "other"


def _too_large(limit: int) -> str:
    said = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
    return f"the body is larger than {said}; send less at once, many encounters as CSV"
