"""Users and options, as Locust reads them.

This file and verdict.py know Locust and nothing else of ours, so that both run in the cluster's Job
as they are. What is sent comes from a file of encounters, made before the load begins, so that
making them is not measured.
"""

from __future__ import annotations

import json
import logging
import random
from argparse import Namespace
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from typing import Any, ClassVar, TextIO

from locust import FastHttpUser, LoadTestShape, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.verdict import SHAPES, SHED, missed, users_at

BATCH = 50
PAGE_ROWS = 100
"""Of a CSV that a user of the page uploads."""

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
    accept_shedding = False
    answered: ClassVar[TextIO | None] = None


def add_options(parser: LocustArgumentParser) -> None:
    """Our options beside Locust's own; each can be given by its variable, for the Job."""
    parser.add_argument("--api-key", default="", env_var="LOAD_API_KEY", is_secret=True)
    group = parser.add_argument_group("load test of the prediction API")
    group.add_argument("--encounters", default="encounters.json", env_var="LOAD_ENCOUNTERS")
    group.add_argument("--shape", choices=SHAPES, default="steady", env_var="LOAD_SHAPE")
    group.add_argument("--most-users", type=int, default=16, env_var="LOAD_USERS")
    group.add_argument("--seconds", type=float, default=60.0, env_var="LOAD_SECONDS")
    group.add_argument("--least-rps", type=float, default=250.0, env_var="LOAD_LEAST_RPS")
    group.add_argument("--most-p95-ms", type=float, default=150.0, env_var="LOAD_MOST_P95_MS")
    group.add_argument("--most-failures", type=int, default=0, env_var="LOAD_MOST_FAILURES")
    group.add_argument(
        "--accept-shedding", action="store_true", help="503 with Retry-After is well"
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
        for begin in range(0, len(encounters), BATCH)
    ]
    lines = [fields, *rows[:PAGE_ROWS]]  # no value of the contract holds a comma
    Shared.csv = "".join(",".join(map(str, line)) + "\n" for line in lines).encode()
    Shared.users = count()
    Shared.headers = {"X-API-Key": options.api_key} if options.api_key else {}
    Shared.accept_shedding = options.accept_shedding
    if options.answered:
        Shared.answered = Path(options.answered).open("a", encoding="utf-8")  # noqa: SIM115


def conclude(environment: Environment, **_: Any) -> None:
    """Judge the figures; the verdict is the exit code."""
    if Shared.answered:
        Shared.answered.close()
        Shared.answered = None
    options = environment.parsed_options or Namespace()
    total = environment.stats.total
    found = {
        "requests": total.num_requests,
        "failures": total.num_failures,
        "requests_per_second": total.total_rps,
        "p50_ms": total.get_response_time_percentile(0.5) or 0,
        "p95_ms": total.get_response_time_percentile(0.95) or 0,
        "p99_ms": total.get_response_time_percentile(0.99) or 0,
        "errors": {
            f"{error.name}: {error.error}": error.occurrences
            for error in environment.stats.errors.values()
        },
        "ended": total.last_request_timestamp or 0,
        "by_name": {
            entry.name: {
                "requests": entry.num_requests,
                "p95_ms": entry.get_response_time_percentile(0.95) or 0,
            }
            for entry in environment.stats.entries.values()
        },
    }
    found["missed"] = missed(found, options.least_rps, options.most_p95_ms, options.most_failures)
    if options.summary:
        Path(options.summary).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    log.warning("%s", f"FAIL: {'; '.join(found['missed'])}" if found["missed"] else "PASS")
    environment.process_exit_code = 1 if found["missed"] else 0


events.init_command_line_parser.add_listener(add_options)  # type: ignore[no-untyped-call]
events.test_start.add_listener(prepare)  # type: ignore[no-untyped-call]
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
    """Asks again as soon as it has its answer; each has its own order of encounters."""

    abstract = True
    wait_time = constant(0)
    connection_timeout = 10.0
    network_timeout = 60.0

    def on_start(self) -> None:
        """Shuffle, with a seed that is the user's number."""
        order = random.Random(next(Shared.users))  # noqa: S311 - no secret
        self.singles = cycle(order.sample(Shared.singles, len(Shared.singles)))
        self.batches = cycle(order.sample(Shared.batches, len(Shared.batches)))

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        kind: str = "application/json",
        ids: Callable[[Any], list[str]] | None = None,
    ) -> None:
        """Send, and tell a good answer from a bad one.

        Args:
            path: with its query, which the statistics leave out.
            body: to POST; None: GET.
            kind: of the body.
            ids: takes the ids of logged predictions from an answer.
        """
        with self.client.request(
            "GET" if body is None else "POST",
            path,
            name=path.partition("?")[0],
            data=body,  # type: ignore[arg-type]  # bytes go as they are
            headers=Shared.headers if body is None else {**Shared.headers, "Content-Type": kind},
            catch_response=True,
        ) as answer:
            if answer.status_code == 200:
                if Shared.answered and ids:
                    Shared.answered.writelines(f"{one}\n" for one in ids(answer.json()))
                answer.success()
            elif answer.status_code == 503 and Shared.accept_shedding:
                if answer.headers.get("Retry-After"):
                    answer.request_meta["name"] = SHED
                    answer.success()
                else:
                    answer.failure("503 without Retry-After")
            elif answer.status_code:
                answer.failure(f"status {answer.status_code}")
            # Without a status there was no answer; what Locust says of that is said already.


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
        self.ask("/v1/predict", next(self.singles), ids=id_of_one)


class Batch(Caller):
    """A JSON batch a request."""

    @task
    def predict(self) -> None:
        """POST /v1/predict/batch."""
        self.ask("/v1/predict/batch", next(self.batches), ids=ids_of_batch)


class Explain(Caller):
    """One encounter with its reasons."""

    @task
    def explain(self) -> None:
        """POST /v1/explain."""
        self.ask("/v1/explain?top=5", next(self.singles), ids=id_of_one)


class Page(Caller):
    """What the Streamlit page asks (ui/api.py), about as often as somebody who looks around."""

    @task(10)
    def explain(self) -> None:
        """A form that was sent."""
        query = "alert_rate=0.2&language=en&top=8"
        self.ask(f"/v1/explain?{query}", next(self.singles), ids=id_of_one)

    @task(3)
    def model(self) -> None:
        """The header of each page."""
        self.ask("/v1/model")

    @task(1)
    def fields(self) -> None:
        """The form, when the page is opened."""
        self.ask("/v1/fields")

    @task(1)
    def evaluation(self) -> None:
        """The page of the model, with its card."""
        self.ask("/v1/model/evaluation")
        self.ask("/v1/model/card")

    @task(1)
    def upload(self) -> None:
        """A CSV."""
        self.ask("/v1/predict/batch?alert_rate=0.2", Shared.csv, "text/csv")
