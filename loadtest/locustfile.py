"""Users and options, as Locust reads them.

This file and verdict.py know Locust and nothing else of ours, so that both run in the cluster's Job
as they are. What is sent comes from a file of encounters, made before the load begins, so that
making them is not measured.
"""

from __future__ import annotations

import json
import logging
import random
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from typing import Any, ClassVar, TextIO

from gevent import GreenletExit  # type: ignore[import-untyped]
from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser

from loadtest.verdict import SHAPES, SHED, forget, in_words, missed, silence, users_at

BATCH = 50
PAGE_ROWS = 100
"""Of a CSV that a user of the page uploads."""
TIMEOUT = 10.0
"""Seconds without a connection, or without a byte of an answer, that are a failure."""
STOP_TIMEOUT = 25.0
"""Seconds for requests that are under way at the end; more than connection and answer may take."""

log = logging.getLogger("loadtest")


class Shared:
    """What all users of this process have in common; filled when Locust starts.

    Bodies are bytes already: on few cores, writing JSON for each request would be measured as well.
    """

    singles: ClassVar[list[bytes]] = []
    batches: ClassVar[list[bytes]] = []
    csv: bytes = b""
    users = count()
    headers: ClassVar[dict[str, str]] = {}
    interval = 0.0
    accept_shedding = False
    answered: ClassVar[TextIO | None] = None
    known = ""
    asked = 0
    ended = 0.0


def add_options(parser: LocustArgumentParser) -> None:
    """Our options beside Locust's own; each can be given by its variable, for the Job."""
    parser.add_argument("--api-key", default="", env_var="LOAD_API_KEY", is_secret=True)
    group = parser.add_argument_group("load test of the prediction API")
    group.add_argument("--encounters", default="encounters.json", env_var="LOAD_ENCOUNTERS")
    group.add_argument("--shape", choices=SHAPES, default="steady", env_var="LOAD_SHAPE")
    group.add_argument("--most-users", type=int, default=16, env_var="LOAD_USERS")
    group.add_argument("--seconds", type=float, default=60.0, env_var="LOAD_SECONDS")
    group.add_argument("--rate", type=float, default=0.0, env_var="LOAD_RATE")
    group.add_argument("--least-rps", type=float, default=250.0, env_var="LOAD_LEAST_RPS")
    group.add_argument("--most-p95-ms", type=float, default=150.0, env_var="LOAD_MOST_P95_MS")
    group.add_argument("--most-failures", type=int, default=0, env_var="LOAD_MOST_FAILURES")
    group.add_argument(
        "--accept-shedding", action="store_true", help="to be refused for want of room is well"
    )
    group.add_argument("--answered", default="", help="file for the id of each prediction")
    group.add_argument("--summary", default="", help="file for the figures and the verdict")


def prepare(environment: Environment, **_: Any) -> None:
    """Read the encounters and make bodies of them."""
    options = environment.parsed_options or Namespace()
    found = json.loads(Path(options.encounters).read_text(encoding="utf-8"))
    fields, rows = found["fields"], found["rows"]
    encounters = [dict(zip(fields, row, strict=True)) for row in rows]
    Shared.singles[:] = [json.dumps(one).encode() for one in encounters]
    Shared.batches[:] = [
        json.dumps({"encounters": encounters[begin : begin + BATCH]}).encode()
        for begin in range(0, len(encounters) - BATCH + 1, BATCH)
    ]
    lines = [fields, *rows[:PAGE_ROWS]]  # no value of the contract holds a comma
    Shared.csv = "".join(",".join(map(str, line)) + "\n" for line in lines).encode()
    Shared.users = count()
    Shared.headers = {"X-API-Key": options.api_key} if options.api_key else {}
    Shared.interval = options.most_users / options.rate if options.rate else 0.0
    Shared.accept_shedding = options.accept_shedding
    environment.stop_timeout = environment.stop_timeout or STOP_TIMEOUT
    if options.answered:
        Shared.answered = Path(options.answered).open("a", encoding="utf-8")  # noqa: SIM115


def note_end(**_: Any) -> None:
    """Users are told to stop: what is under way may still be answered, nothing more is asked."""
    Shared.ended = time.time()


def conclude(environment: Environment, **_: Any) -> None:
    """Judge the figures; the verdict is the exit code."""
    if Shared.answered:
        Shared.answered.close()
        Shared.answered = None
    options = environment.parsed_options or Namespace()
    total = environment.stats.total
    begin, now = environment.stats.start_time, time.time()
    # Not Locust's requests/s, which end with the last answer: a service that hangs has its best.
    seconds = max(options.seconds, now - begin)
    # Locust counts neither who still waited when it lost its patience nor who failed in our code.
    lost = Shared.asked - total.num_requests
    crashed = environment.runner.exceptions.values() if environment.runner else ()
    found = {
        "seconds": seconds,
        "requests": Shared.asked,
        "failures": total.num_failures + lost,
        "requests_per_second": total.num_requests / seconds,
        "p50_ms": total.get_response_time_percentile(0.5) or 0,
        "p95_ms": total.get_response_time_percentile(0.95) or 0,
        "p99_ms": total.get_response_time_percentile(0.99) or 0,
        "errors": {
            f"{error.name}: {error.error}": error.occurrences
            for error in environment.stats.errors.values()
        }
        | {f"in a user: {error['msg']}": error["count"] for error in crashed}
        | ({"not answered, or not understood": lost} if lost else {}),
        "silent_seconds": silence(total.num_reqs_per_sec, begin, Shared.ended or now),
        "ended": Shared.ended,
        "by_name": {
            entry.name: {
                "requests": entry.num_requests,
                "failures": entry.num_failures,
                "p95_ms": entry.get_response_time_percentile(0.95) or 0,
            }
            for entry in environment.stats.entries.values()
        },
    }
    found["forget"] = forget(Shared.known) if Shared.known else ""
    found["missed"] = missed(found, options.least_rps, options.most_p95_ms, options.most_failures)
    if options.summary:
        Path(options.summary).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if Shared.known:
        log.warning("to delete these and all load tests' predictions: %s", found["forget"])
    log.warning("%s", in_words(found["missed"], seconds))
    environment.process_exit_code = 1 if found["missed"] else 0


events.init_command_line_parser.add_listener(add_options)  # type: ignore[no-untyped-call]
events.test_start.add_listener(prepare)  # type: ignore[no-untyped-call]
events.test_stopping.add_listener(note_end)  # type: ignore[no-untyped-call]
events.quitting.add_listener(conclude)  # type: ignore[no-untyped-call]


class Shape(LoadTestShape):
    """The shape that the options ask for."""

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many a second may come or go."""
        environment = self.runner.environment if self.runner else None
        options = (environment and environment.parsed_options) or Namespace()
        second: float = self.get_run_time()  # type: ignore[no-untyped-call]
        users = users_at(options.shape, second, options.seconds, options.most_users)
        return None if users is None else (users, 100.0)


class Caller(FastHttpUser):
    """Asks again as soon as it has its answer, or when it is its turn (--rate).

    Each has its own order of encounters.
    """

    abstract = True
    connection_timeout = TIMEOUT
    network_timeout = TIMEOUT

    def on_start(self) -> None:
        """Shuffle, with a seed that is the user's number; begin somewhere in the interval."""
        order = random.Random(next(Shared.users))  # noqa: S311 - no secret
        self.singles = cycle(order.sample(Shared.singles, len(Shared.singles)))
        self.batches = cycle(order.sample(Shared.batches, len(Shared.batches)))
        time.sleep(order.random() * Shared.interval)
        self.turn = time.perf_counter()

    def wait_time(self) -> float:
        """Seconds until it is this user's turn; what it is late with follows at once."""
        self.turn += Shared.interval
        return max(0.0, self.turn - time.perf_counter())

    def ask(
        self,
        path: str,
        whole: Callable[[bytes], bool],
        body: bytes | None = None,
        kind: str = "application/json",
        ids: Callable[[Any], list[str]] | None = None,
    ) -> None:
        """Send, and tell a good answer from a bad one.

        Args:
            path: with its query, which the statistics leave out.
            whole: whether the body of an answer holds what was asked for.
            body: to POST; None: GET.
            kind: of the body.
            ids: takes the ids of logged predictions from an answer.
        """
        headers = Shared.headers if body is None else {**Shared.headers, "Content-Type": kind}
        if Shared.ended:
            raise StopUser
        Shared.asked += 1
        try:
            with self.client.request(
                "GET" if body is None else "POST",
                path,
                name=path.partition("?")[0],
                data=body,  # type: ignore[arg-type]  # bytes go as they are
                headers=headers,
                catch_response=True,
            ) as answer:
                judge(answer, whole, ids)
        except GreenletExit:
            # Where users become fewer, Locust ends those that wait for their turn; one may just
            # have asked. At the end nobody is, so there it has lost its patience.
            if not Shared.ended:
                Shared.asked -= 1
            raise


def judge(
    answer: Any,
    whole: Callable[[bytes], bool],
    ids: Callable[[Any], list[str]] | None,
) -> None:
    """Tell Locust whether it is an answer; without a status it knows that there was none.

    Bodies are searched, not parsed: the client's CPU is the service's.
    """
    status = answer.status_code
    if status == 200:
        if broken := answer.request_meta["exception"]:  # the status came before the rest
            answer.failure(f"broke off: {broken!r}")
        elif not whole(answer.content or b""):
            answer.failure("200 without what was asked for")
        else:
            if ids and (Shared.answered or not Shared.known):
                found = ids(answer.json())
                Shared.known = Shared.known or next(iter(found), "")
                if Shared.answered:
                    Shared.answered.writelines(f"{one}\n" for one in found)
            answer.success()
    elif status == 503 and Shared.accept_shedding and is_shed(answer):
        answer.request_meta["name"] = SHED
        answer.success()
    elif status:
        answer.failure(f"status {status}")


def is_shed(answer: Any) -> bool:
    """Whether a 503 is for want of room; where the log is full there is one as well."""
    return answer.headers.get("Retry-After") == "1" and b"requests are being served" in (
        answer.content or b""
    )


def is_prediction(body: bytes) -> bool:
    """Whether there is a probability, or a reason why there is none."""
    return b'"probability":' in body and (
        b'"probability":null' not in body or b'"excluded":null' not in body
    )


def is_explanation(body: bytes) -> bool:
    """Whether a prediction has its reasons."""
    return is_prediction(body) and (b'"contribution":' in body or b'"excluded":null' not in body)


def is_batch(body: bytes) -> bool:
    """Whether every encounter of a batch has its prediction."""
    return body.count(b'"probability":') == BATCH


def is_csv(body: bytes) -> bool:
    """Whether every line of the CSV has its own, and none an error, which is the eighth column."""
    return body.count(b"\n") == Shared.csv.count(b"\n") and b",,,,,,," not in body


def holding(part: bytes) -> Callable[[bytes], bool]:
    """Whether something is in a body."""
    return lambda body: part in body


def id_of_one(answer: Any) -> list[str]:
    """The id, where there was a prediction: one for the dead or the discharged is not made."""
    return [] if answer["excluded"] else [answer["prediction_id"]]


def ids_of_batch(answer: Any) -> list[str]:
    """The ids of all predictions of a batch."""
    return [number for one in answer["predictions"] for number in id_of_one(one)]


class Single(Caller):
    """One encounter a request."""

    @task
    def predict(self) -> None:
        """POST /v1/predict."""
        self.ask("/v1/predict", is_prediction, next(self.singles), ids=id_of_one)


class Batch(Caller):
    """A JSON batch a request."""

    @task
    def predict(self) -> None:
        """POST /v1/predict/batch."""
        self.ask("/v1/predict/batch", is_batch, next(self.batches), ids=ids_of_batch)


class Explain(Caller):
    """One encounter with its reasons."""

    @task
    def explain(self) -> None:
        """POST /v1/explain."""
        self.ask("/v1/explain?top=5", is_explanation, next(self.singles), ids=id_of_one)


class Page(Caller):
    """What the Streamlit page asks (ui/api.py), about as often as somebody who looks around."""

    @task(10)
    def explain(self) -> None:
        """A form that was sent."""
        query = "alert_rate=0.2&language=en&top=8"
        self.ask(f"/v1/explain?{query}", is_explanation, next(self.singles), ids=id_of_one)

    @task(3)
    def model(self) -> None:
        """The header of each page."""
        self.ask("/v1/model", holding(b'"version":'))

    @task(1)
    def fields(self) -> None:
        """The form, when the page is opened."""
        self.ask("/v1/fields", holding(b'"fields":'))

    @task(1)
    def evaluation(self) -> None:
        """The page of the model, with its card."""
        self.ask("/v1/model/evaluation", holding(b'"metrics":'))
        self.ask("/v1/model/card", holding(b"</html>"))

    @task(1)
    def upload(self) -> None:
        """A CSV."""
        self.ask("/v1/predict/batch?alert_rate=0.2", is_csv, Shared.csv, "text/csv")
