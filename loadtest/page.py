"""The page of results and its plot, from the figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LINES = {"p50_ms": ("#239b56", "o"), "p95_ms": ("#1f4e79", "s"), "p99_ms": ("#c0392b", "^")}

_HEAD = """\
# The API under load

Locust, `POST /v1/predict` with one encounter a request. Client, service, PostgreSQL and MLflow
share {cpu}, {cores} cores ({system}); nothing crosses a network. The prediction log is on.
"""

_METHOD = """\
## Run it

```bash
make load                                            # on the API that `make run` left running
make load OPTIONS="--scenario page --shape ramp"     # everything else: OPTIONS="--help"
.venv/bin/python -m loadtest.measure                 # this page: a service of its own, 22 minutes
.venv/bin/python -m loadtest.measure --only soak     # one part of it; the others stay as they are
```

`make load` says PASS or FAIL and ends with 0 or 1; `report.html`, Locust's CSV files and
`summary.json` are in `.run/load`. Another API is named by DIABETES_API_URL or `--url`, a key by
DIABETES_API_KEY. In the cluster `kubectl apply -k infra/k8s/tasks/load-test` does the same: the Job
fails where the objective is missed.

| `--scenario` | a user asks, again and again | objective, unless told otherwise |
|---|---|---|
| `single` | `/v1/predict` with one encounter | >= 250 requests/s, p95 <= 150 ms, no failure |
| `explain` | `/v1/explain` with one encounter, five reasons | the same |
| `batch` | `/v1/predict/batch`, JSON, 50 encounters | >= 5 requests/s, p95 <= 2 s, no failure |
| `page` | what the page asks: mostly reasons; model, fields, card, a CSV of 100 rows | >= 100 \
requests/s, p95 <= 500 ms, no failure |

| `--shape` | users at once |
|---|---|
| `steady`, `soak` | `--users`, from the first second to the last |
| `ramp` | 1, 2, 4, 8, ... up to `--users`, each for as long |
| `spike` | a quarter of `--users`, in the middle third all of them, a quarter again |

## How it is measured

- Encounters are drawn from the marginals of the real file (`ingestion/synthetic.py`) with a fixed
  seed, and are bytes before the load begins. Users ask again as soon as they are answered, so
  requests/s are what client and service together manage, not what was asked for.
- `loadtest.measure` trains one LightGBM model and starts a fresh service for each part, which is
  asked for 20 s before anything counts. Failures are answers other than 200 and broken connections.
- Steady: five minutes. Latency is Locust's, from a request's first byte to the answer's last, with
  Locust's waiting for the CPU in it; its percentiles are rounded to two digits. What a caller waits
  for the CPU between an answer and its next request is in no percentile, so the table has the mean
  of the whole round beside them: users / requests/s, which no latency's mean can be above.
- Ramp: 20 s a step; percentiles are those of a step's last ten seconds.
- Overload: one minute of twice as many users as the service takes at once
  (`DIABETES_API_MOST_REQUESTS`, left at its default), who take no heed of `Retry-After`. A 503 with
  `Retry-After` counts as shed, one without it as a failure; it is given after half a second on
  purpose, so that callers who take no heed do not use up the CPU. Beside them, and for 15 s after
  the last of them, one calm caller asks 30 times a second or so: the service has recovered after
  the last second in which that caller was refused, or waited longer than the objective (p95). Then
  the id of every prediction that was answered is looked up in `inference.predictions`.
- Soak: ten minutes. Memory is the proportional set (PSS) of the service and all its children, the
  median from 60 s to 90 s held against that of the last minute.
"""

Row = tuple[str, str, str, bool]


def write_page(folder: Path, found: Mapping[str, Any]) -> None:
    """Write results.md and, where there is a ramp, latency.svg.

    Args:
        folder: of the page.
        found: what `loadtest.measure` measured, by part; parts that are not there are left out.
    """
    parts = {part: found[part] for part in (*_PARTS, "ramp") if part in found}
    rows = [row for part in _PARTS if part in found for row in _PARTS[part](found[part])]
    lines = [
        _HEAD.format(**found["machine"]),
        "| | measured | has to be | |",
        "|---|---|---|---|",
        *(
            f"| {name} | {measured} | {wanted} | {'ok' if held else '**MISSED**'} |"
            for name, measured, wanted, held in rows
        ),
        "",
        *(_told(part, made) for part, made in parts.items()),
        "",
    ]
    if "ramp" in found:
        lines += _ramp(found["ramp"]["steps"])
        _plot(folder / "latency.svg", found["ramp"]["steps"])
    (folder / "results.md").write_text("\n".join([*lines, _METHOD]), encoding="utf-8")


def _told(part: str, made: Mapping[str, Any]) -> str:
    said = f"- {part}: {made['date']}, `{made['command']}`; model of {made['data']}"
    said += f"; load average before the start {made['load_before']}"
    if not made["was_idle"]:
        said += ". **The machine was not idle**"
    if made["seconds_factor"] != 1:
        said += f". **Only {made['seconds_factor']:g} of the time: for trying it out**"
    return f"{said}."


def _steady(made: Mapping[str, Any]) -> list[Row]:
    rps, p95 = made["requests_per_second"], made["p95_ms"]
    failures = f"{made['failures']:,} of {made['requests']:,}"
    return [
        (f"steady, {made['users']} users", f"{rps:.0f} requests/s", ">= 250", rps >= 250),
        ("steady, p95", f"{p95:.0f} ms", "<= 150 ms", p95 <= 150),
        ("steady, failures", failures, "0", made["failures"] == 0),
    ]


def _overload(made: Mapping[str, Any]) -> list[Row]:
    after, refused = made["recovered_after_seconds"], made["refused_after"]
    return [
        (
            f"overload, {made['users']} users, limit {made['most_requests']}",
            f"{made['shed']:,} shed (503, Retry-After; p95 {made['shed_p95_ms']:.0f} ms), "
            f"{made['served']:,} answered "
            f"({made['served_per_second']:.0f}/s, p95 {made['served_p95_ms']:.0f} ms)",
            "sheds",
            made["shed"] > 0,
        ),
        ("overload, other failures", f"{made['failures']:,}", "0", made["failures"] == 0),
        (
            "overload, recovered after",
            f"{after:.0f} s; {refused} refused later than 5 s",
            "<= 5 s; 0",
            after <= 5 and refused == 0,
        ),
        (
            "overload, answered predictions that are not in the log",
            f"{made['lost']:,} of {made['predictions']:,}",
            "0",
            made["lost"] == 0 and made["predictions"] > 0,
        ),
    ]


def _soak(made: Mapping[str, Any]) -> list[Row]:
    failures = f"{made['failures']:,} of {made['requests']:,}"
    return [
        (
            "soak, memory (PSS) after the first minute and at the end",
            f"{made['first_mib']:.0f} and {made['last_mib']:.0f} MiB ({made['growth']:+.1%})",
            "within 5 %",
            abs(made["growth"]) <= 0.05,
        ),
        ("soak, failures", failures, "0", made["failures"] == 0),
    ]


_PARTS = {"steady": _steady, "overload": _overload, "soak": _soak}


def _ramp(steps: Sequence[Mapping[str, float]]) -> list[str]:
    most = max(steps, key=lambda step: step["rps"])
    return [
        "## Latency against requests/s",
        "",
        "![Latency against requests/s up to saturation](latency.svg)",
        "",
        "A point is a number of users, written above it. To the right there is more throughput, "
        "upwards more waiting. Where the lines turn upwards without going right any more, the "
        "service is saturated: more users get the same requests/s and wait longer. Inside the "
        f"dashed lines the objective holds. Most requests/s: {most['rps']:.0f}, with "
        f"{most['users']:.0f} users.",
        "",
        "| users | requests/s | p50 ms | p95 ms | p99 ms | a round, ms |",
        "|---|---|---|---|---|---|",
        *(
            f"| {step['users']:.0f} | {step['rps']:.0f} | {step['p50_ms']:.0f} "
            f"| {step['p95_ms']:.0f} | {step['p99_ms']:.0f} "
            f"| {1000 * step['users'] / step['rps']:.1f} |"
            for step in steps
        ),
        "",
    ]


def _plot(file: Path, steps: Sequence[Mapping[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    # Without a date and with fixed ids the SVG differs only where the figures do.
    with plt.rc_context({"svg.hashsalt": "load", "svg.fonttype": "none", "font.size": 9}):
        drawing, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
        for name, (colour, marker) in _LINES.items():
            axes.plot(
                [step["rps"] for step in steps],
                [step[name] for step in steps],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.4,
                label=name.removesuffix("_ms"),
            )
        for step in steps:
            axes.annotate(
                f"{step['users']:.0f}",
                (step["rps"], step["p99_ms"]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color="#7f8c8d",
            )
        axes.axhline(150, color="#1f4e79", linestyle="--", linewidth=1, label="p95 at most")
        axes.axvline(250, color="#7f8c8d", linestyle="--", linewidth=1, label="requests/s at least")
        axes.set_title("One encounter a request; numbers: users at once")
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("requests/s")
        axes.set_ylabel("latency, ms")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="major", color="#d5d8dc", linewidth=0.6)
        axes.legend(fontsize=8, frameon=False)
        drawing.savefig(file, metadata={"Date": None})
        plt.close(drawing)
