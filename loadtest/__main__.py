"""`python -m loadtest`: load on the prediction API, a report, and whether the objective was met."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest import data, memory
from loadtest.run import OBJECTIVES, SCENARIOS, SUMMARY, Load, LoadTestError, Objective, run
from loadtest.verdict import SHAPES, in_words
from services import processes
from services.web import API
from settings import Settings, settings

SECONDS, SOAK_SECONDS = 60, 600


def _parser(chosen: Settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    parser.add_argument("--scenario", choices=SCENARIOS, default="single")
    parser.add_argument("--shape", choices=SHAPES, default="steady")
    parser.add_argument("--users", type=_positive, default=16, help="at once, at most")
    parser.add_argument(
        "--seconds", type=_positive, help=f"default: {SECONDS}, of a soak {SOAK_SECONDS}"
    )
    parser.add_argument(
        "--rate", type=_positive, help="requests/s of all users (default: what they can)"
    )
    parser.add_argument("--url", type=_address, help="of the API (default: the one of make run)")
    parser.add_argument("--seed", type=int, default=data.SEED, help="of the encounters")
    parser.add_argument("--out", type=Path, default=chosen.state_dir / "load")
    told = "default: {}, of batch {}, of page {}".format
    for option, name, kind in (
        ("--least-rps", "least_rps", float),
        ("--most-p95-ms", "most_p95_ms", float),
        ("--most-failures", "most_failures", int),
    ):
        usual = [f"{getattr(OBJECTIVES[one], name):g}" for one in ("single", "batch", "page")]
        parser.add_argument(option, type=kind, help=told(*usual))
    parser.add_argument(
        "--write-encounters",
        type=Path,
        metavar="FILE",
        help=f"write the {data.JOB_COUNT} encounters of the cluster's Job, and end",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _address(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text} is no http(s) address")
    return text


def running(chosen: Settings) -> str:
    """DIABETES_API_URL; where it is not set, the API that `make run` started, if it runs."""
    if "api_url" in chosen.model_fields_set:
        return chosen.api_url
    for process in processes.find(chosen.state_dir, API.name):
        return f"http://127.0.0.1:{process.environ()[API.port_variable]}"
    return chosen.api_url


def as_text(found: dict[str, Any]) -> str:
    """A short table and the verdict."""
    lines = [
        f"requests   {found['requests']:>8,}   {found['requests_per_second']:,.0f} a second",
        f"failures   {found['failures']:>8,}",
        *(f"{name}        {found[f'{name}_ms']:>8,.0f} ms" for name in ("p50", "p95", "p99")),
        *(f"  {times:,} x {error}" for error, times in found["errors"].items()),
        *([f"memory     {found['memory']}"] if "memory" in found else []),
        in_words(found["missed"], found["seconds"]),
    ]
    return "\n".join(lines)


def soak(chosen: Settings, load: Load, objective: Objective, folder: Path) -> dict[str, Any]:
    """Run a load test and judge memory as well, where the service is that of `make run`.

    Raises:
        LoadTestError: the service does not answer, or Locust ended early.
    """
    look = memory.of_platform(chosen, load.url)
    if look is None:
        found = run(load, objective, folder)
        found["memory"] = "was not looked at: no API that make run started listens there"
    else:
        with memory.watching(look, load.seconds) as samples:
            found = run(load, objective, folder)
        first, last = memory.growth(samples, load.seconds)
        grown = last / first - 1
        found["memory"] = (
            f"{first:.0f} MiB (PSS) after the first minute, {last:.0f} at the end ({grown:+.1%})"
        )
        if abs(grown) > memory.MOST_GROWTH:
            found["missed"].append(f"memory {grown:+.1%}, wanted within 5 %")
    text = json.dumps(found, indent=1)
    (folder / SUMMARY).write_text(f"{text}\n", encoding="utf-8")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one load test.

    Returns:
        The exit code: 0 where the objective was met, 1 where it was not or where nothing could be
        measured, with one message on standard error.
    """
    chosen = settings()
    asked = _parser(chosen).parse_args(argv)
    if asked.write_encounters:
        data.write(asked.write_encounters, data.JOB_COUNT)
        return 0
    load = Load(
        url=(asked.url or running(chosen)).rstrip("/"),
        scenario=asked.scenario,
        shape=asked.shape,
        users=asked.users,
        seconds=asked.seconds or (SOAK_SECONDS if asked.shape == "soak" else SECONDS),
        key=chosen.api_key.get_secret_value(),
        seed=asked.seed,
        rate=asked.rate or 0,
    )
    objective = replace(
        OBJECTIVES[asked.scenario],
        **{
            name: getattr(asked, name)
            for name in ("least_rps", "most_p95_ms", "most_failures")
            if getattr(asked, name) is not None
        },
    )
    sys.stdout.write(
        f"{load.url}: {load.scenario}, {load.shape}, {load.users} users, {load.seconds} s ...\n"
        "What it is asked stays in its prediction log, where drift leaves it out; how to delete it "
        "is said at the end.\n"
    )
    sys.stdout.flush()
    try:
        if load.shape == "soak":
            found = soak(chosen, load, objective, asked.out)
        else:
            found = run(load, objective, asked.out)
    except LoadTestError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the report is not complete\n")
        return 130
    sys.stdout.write(f"{as_text(found)}\nReport: {asked.out / 'report.html'}\n")
    if found["forget"]:
        sys.stdout.write(f"Delete it from the data database with\n  {found['forget']}\n")
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    # As Ctrl-C, or Locust would go on without us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
