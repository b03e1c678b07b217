"""`python -m loadtest.measure`: what the service bears, as docs/load/results.md tells.

On a service of its own (PostgreSQL, MLflow and a model trained for it, see loadtest/stand.py), with
the client on the same machine: a ramp to saturation and paced load up to there, five minutes of
steady load, a minute each of the other scenarios, an overload with what comes after it, and a soak
of ten minutes. Each part replaces its own figures in results.json, from which page and plot are
written; all parts together replace the file. Forty minutes in all.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg2

from bench.errors import BenchError
from bench.load import HOST, get, request
from bench.report import cpu_model, usable_cores
from bench.serving import IDLE_LOAD, PREDICT, Running, settle
from ingestion.errors import IngestionError
from loadtest import data, memory
from loadtest.page import write_page
from loadtest.probe import probing, recovery
from loadtest.run import OBJECTIVES, Load, LoadTestError, Objective, history, run
from loadtest.stand import Stand, stand
from loadtest.verdict import RAMP, SHED
from services.mlflow_server import MlflowError
from services.postgres import PostgresError
from settings import PROJECT_ROOT, settings
from training.candidates import names

OUT = PROJECT_ROOT / "docs" / "load"
STEADY_USERS = 16
PACED_USERS = 32
RATES = (50, 100, 250, 500, 750, 900)
"""Requests/s asked of PACED_USERS together."""
OVERLOAD_USERS = 256
"""Twice as many as the service takes at once by default (DIABETES_API_MOST_REQUESTS, 128)."""
RECOVERY_SECONDS = 5.0
CALM_SECONDS = 15.0
"""That are looked at after the overload."""
CANDIDATE = "catboost"
"""What the platform's champion is on the publisher's file."""
_ANY = Objective(0, float("inf"), sys.maxsize)
_SHED = "http_requests_shed_total"
_WARM, _LEAST_WARM = 10.0, 5.0
_STEP_SECONDS, _LEAST_STEP_SECONDS = 15.0, 4.0
_STEP_LOOKS = 3
_ROUNDS = 3
"""Of the ramp and of the paced load, whose steps are short."""
_FIGURES = ("rps", "p50_ms", "p95_ms", "p99_ms")

log = logging.getLogger("loadtest")


class Measurement:
    """One measurement.

    Args:
        stand: what the services run on.
        folder: for the files of Locust.
        factor: by which all durations are multiplied; for trying it out.
    """

    def __init__(self, stand: Stand, folder: Path, factor: float) -> None:
        self._stand = stand
        self._folder = folder
        self._factor = factor
        self._step_seconds = max(_LEAST_STEP_SECONDS, _STEP_SECONDS * factor)

    def ramp(self) -> dict[str, Any]:
        """Latency and requests/s for each number of users."""
        seconds = len(RAMP) * self._step_seconds
        requests = failures = 0
        steps: list[dict[str, float]] = []
        with self._warm("ramp") as api:
            for number in range(_ROUNDS):
                folder = self._folder / f"ramp-{number}"
                found = run(_load(api, "ramp", RAMP[-1], seconds), _ANY, folder)
                requests += found["requests"]
                failures += found["failures"]
                rows: dict[float, list[dict[str, float]]] = {}
                for row in history(folder):
                    rows.setdefault(row["users"], []).append(row)
                # Locust's figures are of the ten seconds before: a step's last are of it alone.
                steps += [
                    {
                        "users": users,
                        **{
                            name: statistics.median(row[name] for row in rows[users][-_STEP_LOOKS:])
                            for name in _FIGURES
                        },
                    }
                    for users in rows.keys() & set(RAMP)
                ]
        return {"requests": requests, "failures": failures, "steps": over_rounds("users", steps)}

    def paced(self) -> dict[str, Any]:
        """Latency where the same users ask for so many requests/s, up to more than there are."""
        with self._warm("paced") as api:
            load = _load(api, "steady", PACED_USERS, self._step_seconds)
            steps = [
                {
                    **run(replace(load, rate=rate), _ANY, self._folder / "paced"),
                    "rate": float(rate),
                }
                for rate in RATES * _ROUNDS
            ]
        return {
            "users": PACED_USERS,
            "requests": sum(found["requests"] for found in steps),
            "failures": sum(found["failures"] for found in steps),
            "steps": over_rounds(
                "rate", [{**found, "rps": found["requests_per_second"]} for found in steps]
            ),
        }

    def steady(self) -> dict[str, Any]:
        """Five minutes of single predictions, judged by the objective."""
        return self._judged("single", 300)

    def explain(self) -> dict[str, Any]:
        """A minute of predictions with reasons."""
        return self._judged("explain", 60)

    def batch(self) -> dict[str, Any]:
        """A minute of JSON batches."""
        return self._judged("batch", 60)

    def page(self) -> dict[str, Any]:
        """A minute of what the page asks."""
        return self._judged("page", 60)

    def _judged(self, scenario: str, seconds: float) -> dict[str, Any]:
        with self._warm(scenario, scenario) as api:
            load = _load(api, "steady", STEADY_USERS, seconds * self._factor, scenario=scenario)
            found = run(load, OBJECTIVES[scenario], self._folder / scenario)
            return {**found, "users": STEADY_USERS}

    def overload(self) -> dict[str, Any]:
        """More callers than the service takes; then what callers after them see."""
        folder = self._folder / "overload"
        folder.mkdir(parents=True, exist_ok=True)
        answered = folder / "answered.txt"
        answered.unlink(missing_ok=True)
        more = ["--accept-shedding", f"--answered={answered}"]
        with self._warm("overload") as api:
            load = _load(api, "steady", OVERLOAD_USERS, 60 * self._factor, more)
            wire = request(PREDICT, json.dumps(data.encounters(1)[0]).encode())
            shed_before = _shed(api)
            with probing(api.port, wire) as looks:
                found = run(load, _ANY, folder)
                time.sleep(max(0.0, found["ended"] + CALM_SECONDS - time.time()))
            shed_counted = _shed(api) - shed_before
            ids = answered.read_text(encoding="utf-8").split()
            lost = set(ids) - self._stand.logged(api)
        nothing = {"requests": 0, "failures": 0, "p95_ms": 0}
        shed, served = (found["by_name"].get(name, nothing) for name in (SHED, PREDICT))
        answers = served["requests"] - served["failures"]
        return {
            "users": OVERLOAD_USERS,
            "most_requests": settings().api_most_requests,
            "served": answers,
            "served_per_second": answers / found["seconds"],
            "served_p95_ms": served["p95_ms"],
            "shed": shed["requests"],
            "shed_p95_ms": shed["p95_ms"],
            "shed_seen": shed["requests"] + sum(look.status == 503 for look in looks),
            "shed_counted": shed_counted,
            "failures": found["failures"],
            "errors": found["errors"],
            "predictions": len(ids),
            "lost": len(lost),
            "recovered_after_seconds": recovery(
                looks, found["ended"], CALM_SECONDS, Objective().most_p95_ms
            ),
            "refused_after": sum(
                look.status != 200
                for look in looks
                if look.until >= found["ended"] + RECOVERY_SECONDS
            ),
        }

    def soak(self) -> dict[str, Any]:
        """Ten minutes, and the memory of the service's processes by the minute."""
        seconds = 600 * self._factor
        with (
            self._warm("soak") as api,
            memory.watching(lambda: memory.pss(api.tree), seconds) as samples,
        ):
            found = run(_load(api, "soak", STEADY_USERS, seconds), _ANY, self._folder / "soak")
        first, last = memory.growth(samples, seconds)
        return {
            "requests": found["requests"],
            "failures": found["failures"],
            "requests_per_second": found["requests_per_second"],
            "p95_ms": found["p95_ms"],
            "first_mib": first,
            "last_mib": last,
            "growth": last / first - 1,
            "samples": [(round(second), round(mib, 1)) for second, mib in samples[::6]],
        }

    @contextmanager
    def _warm(self, name: str, scenario: str = "single") -> Iterator[Running]:
        """A fresh service that has been asked for a while, and rests."""
        with self._stand.api(name) as api:
            seconds = max(_LEAST_WARM, _WARM * min(self._factor, 1))
            load = _load(api, "steady", STEADY_USERS, seconds, scenario=scenario)
            run(load, _ANY, self._folder / "warm")
            settle(api)
            yield api


def over_rounds(step: str, looks: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """The steps of all rounds: medians, and between which requests/s lay.

    Args:
        step: what tells a step of a round, `users` or `rate`.
        looks: one a step of each round: requests/s (`rps`) and percentiles in milliseconds.
    """
    steps: dict[float, list[Mapping[str, float]]] = {}
    for look in looks:
        steps.setdefault(look[step], []).append(look)
    return [
        {
            step: key,
            **{name: statistics.median(look[name] for look in found) for name in _FIGURES},
            "least_rps": min(look["rps"] for look in found),
            "most_rps": max(look["rps"] for look in found),
        }
        for key, found in sorted(steps.items())
    ]


def _load(
    api: Running,
    shape: str,
    users: int,
    seconds: float,
    more: Sequence[str] = (),
    scenario: str = "single",
) -> Load:
    return Load(f"http://{HOST}:{api.port}", scenario, shape, users, seconds, "", more)


def _shed(api: Running) -> int:
    for line in get(api.port, "/metrics").decode().splitlines():
        if line.startswith(f"{_SHED} "):
            return int(float(line.rsplit(" ", 1)[1]))
    raise BenchError(f"the service does not tell {_SHED}")


PARTS: dict[str, Callable[[Measurement], dict[str, Any]]] = {
    "ramp": Measurement.ramp,
    "paced": Measurement.paced,
    "steady": Measurement.steady,
    "explain": Measurement.explain,
    "batch": Measurement.batch,
    "page": Measurement.page,
    "overload": Measurement.overload,
    "soak": Measurement.soak,
}


def measure(
    parts: Sequence[str], factor: float, rows: int, candidate: str, out: Path, command: str
) -> None:
    """Measure some parts, and write each as soon as it is there.

    Args:
        parts: keys of PARTS.
        factor: by which durations are multiplied.
        rows: of generated data to train on; 0: the source of the settings.
        candidate: kind of model to train.
        out: folder of results.json, results.md and latency.svg.
        command: what was called, for the page.

    Raises:
        BenchError, LoadTestError, IngestionError, PostgresError, MlflowError: it could not be done.
    """
    file = out / "results.json"
    is_kept = file.exists() and set(parts) != set(PARTS)
    found = json.loads(file.read_text(encoding="utf-8")) if is_kept else {}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="diabetes-load-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
        with stand(settings(), folder, candidate, rows) as made:
            measurement = Measurement(made, folder, factor)
            for number, part in enumerate(parts, start=1):
                log.info("%d of %d: %s ...", number, len(parts), part)
                about = {
                    "date": time.strftime("%Y-%m-%d"),
                    "command": command,
                    "seconds_factor": factor,
                    "load_before": round(before, 2),
                    "was_idle": before <= IDLE_LOAD,
                    "model": candidate,
                    "data": made.data,
                }
                found[part] = {**about, **PARTS[part](measurement)}
                found["machine"] = {
                    "cpu": cpu_model(),
                    "cores": usable_cores(),
                    "system": platform.platform(),
                }
                out.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                write_page(out, found)
                short = {k: v for k, v in found[part].items() if k not in ("samples", *about)}
                log.info("%s: %s", part, short)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Leave through every `finally`, which ends the services; no second signal cuts that short."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts asked for, and write results.json, results.md and latency.svg.

    Returns:
        The exit code: 0 when all was measured, whatever the figures; 1 with one message when not;
        2 for wrong arguments; 130 after Ctrl-C or SIGTERM.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m loadtest.measure", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--seconds-factor", type=float, default=1.0, help="for trying it out")
    parser.add_argument("--rows", type=int, default=0, help="generate so many to train on")
    parser.add_argument("--candidate", choices=names(), default=CANDIDATE, help="to train")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(arguments)
    parts = asked.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    if not asked.seconds_factor > 0 or asked.rows < 0:
        parser.error("--seconds-factor has to be more than 0, and --rows not less")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    command = shlex.join(["python", "-m", "loadtest.measure", *arguments])
    try:
        measure(parts, asked.seconds_factor, asked.rows, asked.candidate, asked.out, command)
    except (
        BenchError,
        LoadTestError,
        IngestionError,
        PostgresError,
        MlflowError,
        OSError,
        psycopg2.Error,
    ) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the parts before this one are written\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
