"""`python -m loadtest.measure`: what the service bears, as docs/load/results.md tells.

On a service of its own (PostgreSQL, MLflow and a model trained for it, see loadtest/stand.py), with
the client on the same machine, four parts: a ramp to saturation, five minutes of steady load, an
overload with what comes after it, and a soak of ten minutes. Each part replaces its own figures in
results.json, from which page and plot are written. About 22 minutes in all.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg2

from bench.errors import BenchError
from bench.load import HOST, request
from bench.report import cpu_model, usable_cores
from bench.serving import IDLE_LOAD, PREDICT, Running, settle
from bench.usage import sampled
from ingestion.errors import IngestionError
from loadtest import data
from loadtest.page import write_page
from loadtest.probe import probing, recovery
from loadtest.run import Load, LoadTestError, Objective, history, run
from loadtest.stand import Stand, stand
from loadtest.verdict import RAMP, SHED
from services.mlflow_server import MlflowError
from services.postgres import PostgresError
from settings import PROJECT_ROOT, settings

OUT = PROJECT_ROOT / "docs" / "load"
STEADY_USERS = 16
OVERLOAD_USERS = 256
"""Twice as many as the service takes at once by default (DIABETES_API_MOST_REQUESTS, 128)."""
RECOVERY_SECONDS = 5.0
CALM_SECONDS = 15.0
"""That are looked at after the overload."""
_ANY = Objective(0, float("inf"), sys.maxsize)
_WARM, _LEAST_WARM = 20.0, 5.0
_STEP_LOOKS = 3
_SAMPLE_SECONDS = 5.0

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

    def ramp(self) -> dict[str, Any]:
        """Latency and requests/s for each number of users."""
        seconds = len(RAMP) * 20 * self._factor
        folder = self._folder / "ramp"
        with self._warm("ramp") as api:
            found = run(_load(api, "ramp", RAMP[-1], seconds), _ANY, folder)
        steps: dict[int, list[dict[str, float]]] = {}
        for row in history(folder):
            steps.setdefault(int(row["users"]), []).append(row)
        # Locust's figures are of the ten seconds before: a step's last are of that step only.
        return {
            "failures": found["failures"],
            "steps": [
                {
                    "users": users,
                    **{
                        name: statistics.median(row[name] for row in rows[-_STEP_LOOKS:])
                        for name in ("rps", "p50_ms", "p95_ms", "p99_ms")
                    },
                }
                for users, rows in sorted(steps.items())
                if users in RAMP
            ],
        }

    def steady(self) -> dict[str, Any]:
        """Five minutes of single predictions, judged by the objective."""
        with self._warm("steady") as api:
            load = _load(api, "steady", STEADY_USERS, 300 * self._factor)
            return {**run(load, Objective(), self._folder / "steady"), "users": STEADY_USERS}

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
            with probing(api.port, wire) as looks:
                found = run(load, _ANY, folder)
                time.sleep(max(0.0, found["ended"] + CALM_SECONDS - time.time()))
            ids = answered.read_text(encoding="utf-8").split()
            lost = set(ids) - self._stand.logged(api)
        shed = found["by_name"].get(SHED, {"requests": 0, "p95_ms": 0})
        served = found["by_name"].get(PREDICT, {"requests": 0, "p95_ms": 0})
        share = served["requests"] / found["requests"]
        return {
            "users": OVERLOAD_USERS,
            "most_requests": settings().api_most_requests,
            "served": served["requests"],
            "served_per_second": found["requests_per_second"] * share,
            "served_p95_ms": served["p95_ms"],
            "shed": shed["requests"],
            "shed_p95_ms": shed["p95_ms"],
            "failures": found["failures"],
            "errors": found["errors"],
            "predictions": len(ids),
            "lost": len(lost),
            "recovered_after_seconds": recovery(looks, found["ended"], Objective().most_p95_ms),
            "refused_after": sum(
                look.status != 200 for look in looks if look.at >= found["ended"] + RECOVERY_SECONDS
            ),
        }

    def soak(self) -> dict[str, Any]:
        """Ten minutes, and the memory of the service's processes by the minute."""
        with self._warm("soak") as api:
            samples: list[tuple[float, float]] = []
            begin = time.monotonic()

            def look() -> float:
                mib = api.memory()[0]
                samples.append((time.monotonic() - begin, mib))
                return mib

            with sampled(look, min(_SAMPLE_SECONDS, 10 * self._factor)):
                load = _load(api, "soak", STEADY_USERS, 600 * self._factor)
                found = run(load, _ANY, self._folder / "soak")
        first, last = growth(samples, 60 * self._factor, 600 * self._factor)
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
    def _warm(self, name: str) -> Iterator[Running]:
        """A fresh service that has been asked for a while, and rests."""
        with self._stand.api(name) as api:
            load = _load(
                api, "steady", STEADY_USERS, max(_LEAST_WARM, _WARM * min(self._factor, 1))
            )
            run(load, _ANY, self._folder / "warm")
            settle(api)
            yield api


def _load(api: Running, shape: str, users: int, seconds: float, more: Sequence[str] = ()) -> Load:
    return Load(f"http://{HOST}:{api.port}", "single", shape, users, seconds, "", more)


def growth(
    samples: Sequence[tuple[float, float]], minute: float, end: float
) -> tuple[float, float]:
    """Memory after the first minute, and in the last one.

    Each is the median of half a minute around it or more: a single look catches whatever is being
    copied to the log at that moment.

    Args:
        samples: second and MiB.
        minute: how long a minute is.
        end: second at which the load ended.
    """
    first = [mib for second, mib in samples if minute <= second < 1.5 * minute]
    last = [mib for second, mib in samples if end - minute <= second <= end]
    return statistics.median(first), statistics.median(last)


PARTS: dict[str, Callable[[Measurement], dict[str, Any]]] = {
    "ramp": Measurement.ramp,
    "steady": Measurement.steady,
    "overload": Measurement.overload,
    "soak": Measurement.soak,
}


def measure(parts: Sequence[str], factor: float, rows: int, out: Path, command: str) -> None:
    """Measure some parts, and write each as soon as it is there.

    Args:
        parts: keys of PARTS.
        factor: by which durations are multiplied.
        rows: of generated data to train on; 0: the source of the settings.
        out: folder of results.json, results.md and latency.svg.
        command: what was called, for the page.

    Raises:
        BenchError, LoadTestError, IngestionError, PostgresError, MlflowError: it could not be done.
    """
    file = out / "results.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="diabetes-load-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
        with stand(settings(), folder, rows) as made:
            measurement = Measurement(made, folder, factor)
            for number, part in enumerate(parts, start=1):
                log.info("%d of %d: %s ...", number, len(parts), part)
                about = {
                    "date": time.strftime("%Y-%m-%d"),
                    "command": command,
                    "seconds_factor": factor,
                    "load_before": round(before, 2),
                    "was_idle": before <= IDLE_LOAD,
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
        measure(parts, asked.seconds_factor, asked.rows, asked.out, command)
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
