"""The page of results and its plot, from the figures alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.memory import MOST_GROWTH
from loadtest.run import OBJECTIVES, Objective
from loadtest.verdict import MOST_SILENT_SECONDS

_LINES = {"p50_ms": ("#239b56", "o"), "p95_ms": ("#1f4e79", "s"), "p99_ms": ("#c0392b", "^")}

_HEAD = """\
# The API under load

Locust on a service with a {models} model; where nothing else is said, `POST /v1/predict` with one
encounter a request. Client, service, PostgreSQL and MLflow share {cpu}, {cores} cores
({system}); nothing crosses a network. The prediction log is on.
"""

_SCENARIOS = {
    "single": "`/v1/predict` with one encounter",
    "explain": "`/v1/explain` with one encounter, five reasons",
    "batch": "`/v1/predict/batch`, JSON, 50 encounters",
    "page": "what the page asks: mostly reasons; model, fields, card, a CSV of 100 rows",
}

_METHOD = """\
## Run it

```bash
make load                                            # on the API that `make run` left running
make load OPTIONS="--scenario page --shape ramp"     # everything else: OPTIONS="--help"
.venv/bin/python -m loadtest.measure                 # this page: a service of its own, 40 minutes
.venv/bin/python -m loadtest.measure --only soak     # one part of it; the others stay as they are
```

`make load` says PASS or FAIL over how many seconds, and ends with 0 or 1; `report.html`, Locust's
CSV files and `summary.json` are in `.run/load`. Another API is named by DIABETES_API_URL or
`--url`, a key by DIABETES_API_KEY. In the cluster `kubectl apply -k infra/k8s/tasks/load-test`
makes a Job that fails where the objective is missed; it leaves its log and no report
([operations.md](../operations.md#scaling)).

**A load test on a platform that is in use ends up in its prediction log** (`inference.predictions`;
a minute is some 50,000 rows). All of it is of one made-up patient, by whom drift leaves it out, and
the test ends with the SQL that finds him by one of its predictions, and deletes what load tests
left, a challenger's scores among it, and nothing else:

```sql
delete from inference.predictions where patient_hash = (
    select patient_hash from inference.predictions where prediction_id = 'one of the load test');
```

Run it some seconds after the end, when the log has been copied. `loadtest.measure` has a database
of its own and leaves nothing.

| `--scenario` | a user asks, again and again | objective, unless told otherwise |
|---|---|---|
{scenarios}

| `--shape` | users at once |
|---|---|
| `steady` | `--users`, from the first second to the last; 60 s, which is a quick look |
| `soak` | the same for 600 s; memory is judged too, where the API is that of `make run` |
| `ramp` | 1, 2, 4, 8, ... up to `--users`, each for as long |
| `spike` | a quarter of `--users`, in the middle third all of them, a quarter again |

Users ask again as soon as they are answered; with `--rate` for so many requests/s together.

## How it is measured

- Encounters are drawn from the marginals of the real file (`ingestion/synthetic.py`) with a fixed
  seed, and are bytes before the load begins. Users ask again as soon as they are answered, so
  requests/s are what client and service together manage; only in the paced part, what was asked
  for.
- `loadtest.measure` trains one model and starts a fresh service for each part, which is asked for
  10 s before anything counts.
- Failures are answers other than 200, those that break off or lack what was asked for (a
  probability, the reasons, as many predictions as encounters), connections that break, 10 s without
  a byte, and whatever is not answered 25 s after the end. Requests/s are over the whole test, from
  its start until the last user has its answer. A test also fails if nothing was answered for more
  than 5 s at a stretch: a service that hangs is slow to only as many requests as there are users.
- Steady: five minutes. Latency is Locust's, from a request's first byte to the answer's last, with
  Locust's waiting for the CPU in it; its percentiles are rounded to two digits. What a caller waits
  for the CPU between an answer and its next request is in no percentile, so the table has the mean
  of the whole turn beside them: users / requests/s, which no latency's mean can be above.
- Ramp: 15 s a step; figures are those of a step's last ten seconds. Paced: 15 s a rate, 32 users
  who begin spread over their interval; who is late asks again at once, so that a rate which is too
  much for the service becomes what the service can. Both: medians over three rounds.
- Explain, batch, page: one minute each.
- Overload: one minute of twice as many users as the service takes at once
  (`DIABETES_API_MOST_REQUESTS`, left at its default), who take no heed of `Retry-After`. A 503 with
  `Retry-After: 1` that says how many are being served counts as shed, any other (the log is full)
  as a failure; it is given after half a second on purpose, so that callers who take no heed do not
  use up the CPU. Beside them, and for 15 s after they were told to stop, one calm caller asks 30
  times a second or so: the service has recovered after the last second in which that caller was
  refused, waited longer than the objective's p95, or was still waiting. Then the id of every
  prediction that was answered is looked up in `inference.predictions`.
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
    parts = {part: found[part] for part in _PARTS if part in found}
    rows = [row for part in _PARTS if part in found for row in _PARTS[part](found[part])]
    told: dict[str, list[str]] = {}
    for part, made in parts.items():
        told.setdefault(_told(made), []).append(part)
    models = " and ".join(sorted({made["model"] for made in parts.values()}))
    lines = [
        _HEAD.format(models=models, **found["machine"]),
        "| | measured | has to be | |",
        "|---|---|---|---|",
        *(
            f"| {name} | {measured} | {wanted} | {'ok' if held else '**MISSED**'} |"
            for name, measured, wanted, held in rows
        ),
        "",
        *(f"- {', '.join(which)}: {said}" for said, which in told.items()),
        "",
    ]
    ramp, paced = (found[part]["steps"] if part in found else [] for part in ("ramp", "paced"))
    if ramp or paced:
        lines += [
            "## Latency against requests/s",
            "",
            "![Latency against requests/s up to saturation](latency.svg)",
            "",
            *(_paced(paced, found["paced"]["users"]) if paced else []),
            *(_ramp(ramp) if ramp else []),
        ]
        _plot(folder / "latency.svg", ramp, paced)
    scenarios = "\n".join(
        f"| `{name}` | {asked} | {_objective(OBJECTIVES[name])} |"
        for name, asked in _SCENARIOS.items()
    )
    method = _METHOD.format(scenarios=scenarios)
    (folder / "results.md").write_text("\n".join([*lines, method]), encoding="utf-8")


def _told(made: Mapping[str, Any]) -> str:
    said = f"{made['date']}, `{made['command']}`; {made['model']} model of {made['data']}"
    said += f"; load average before the start {made['load_before']}"
    if not made["was_idle"]:
        said += ". **The machine was not idle**"
    if made["seconds_factor"] != 1:
        said += f". **Only {made['seconds_factor']:g} of the time: for trying it out**"
    return f"{said}."


def _objective(objective: Objective) -> str:
    return (
        f">= {objective.least_rps:g} requests/s, p95 <= {objective.most_p95_ms:g} ms, no failure, "
        "never 5 s without an answer"
    )


def _judged(part: str, objective: Objective) -> Callable[[Mapping[str, Any]], list[Row]]:
    def rows(made: Mapping[str, Any]) -> list[Row]:
        rps, p95 = made["requests_per_second"], made["p95_ms"]
        least, most = objective.least_rps, objective.most_p95_ms
        return [
            (
                f"{part}, {made['users']} users",
                f"{rps:.0f} requests/s",
                f">= {least:g}",
                rps >= least,
            ),
            (f"{part}, p95", f"{p95:.0f} ms", f"<= {most:g} ms", p95 <= most),
            (
                f"{part}, longest without an answer",
                f"{made['silent_seconds']} s",
                f"<= {MOST_SILENT_SECONDS} s",
                made["silent_seconds"] <= MOST_SILENT_SECONDS,
            ),
            _failures(part, made),
        ]

    return rows


def _failures(part: str, made: Mapping[str, Any]) -> Row:
    measured = f"{made['failures']:,} of {made['requests']:,}"
    return (f"{part}, failures", measured, "0", made["failures"] == 0)


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
        (
            "overload, refusals that callers saw, and that the service counted",
            f"{made['shed_seen']:,} and {made['shed_counted']:,}",
            "equal",
            made["shed_seen"] == made["shed_counted"],
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
    return [
        (
            "soak, memory (PSS) after the first minute and at the end",
            f"{made['first_mib']:.0f} and {made['last_mib']:.0f} MiB ({made['growth']:+.1%})",
            "within 5 %",
            abs(made["growth"]) <= MOST_GROWTH,
        ),
        _failures("soak", made),
    ]


_PARTS: Mapping[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "steady": _judged("steady", OBJECTIVES["single"]),
    **{part: _judged(part, OBJECTIVES[part]) for part in ("explain", "batch", "page")},
    "overload": _overload,
    "soak": _soak,
    "ramp": lambda made: [_failures("ramp", made)],
    "paced": lambda made: [_failures("paced", made)],
}


def _paced(steps: Sequence[Mapping[str, float]], users: int) -> list[str]:
    return [
        f"Up to saturation (open points): {users} users who ask for a rate together. Where fewer "
        "requests/s come out than were asked for, it is more than client and service can.",
        "",
        "| asked for | requests/s | of the rounds | p50 ms | p95 ms | p99 ms |",
        "|---|---|---|---|---|---|",
        *(
            f"| {step['rate']:.0f} | {step['rps']:.0f} "
            f"| {step['least_rps']:.0f} to {step['most_rps']:.0f} | {step['p50_ms']:.0f} "
            f"| {step['p95_ms']:.0f} | {step['p99_ms']:.0f} |"
            for step in steps
        ),
        "",
    ]


def _ramp(steps: Sequence[Mapping[str, float]]) -> list[str]:
    most = max(steps, key=lambda step: step["rps"])
    return [
        "At saturation (full points): users who ask again at once, their number written above. "
        "Where the line turns upwards without going right any more, more users get the same "
        "requests/s and wait longer. Inside the dashed lines the objective holds. Most requests/s: "
        f"{most['rps']:.0f}, with {most['users']:.0f} users.",
        "",
        "| users | requests/s | of the rounds | p50 ms | p95 ms | p99 ms | a turn, ms |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {step['users']:.0f} | {step['rps']:.0f} "
            f"| {step['least_rps']:.0f} to {step['most_rps']:.0f} | {step['p50_ms']:.0f} "
            f"| {step['p95_ms']:.0f} | {step['p99_ms']:.0f} "
            f"| {1000 * step['users'] / step['rps']:.1f} |"
            for step in steps
        ),
        "",
    ]


def _plot(
    file: Path, ramp: Sequence[Mapping[str, float]], paced: Sequence[Mapping[str, float]]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    # Without a date and with fixed ids the SVG differs only where the figures do.
    with plt.rc_context({"svg.hashsalt": "load", "svg.fonttype": "none", "font.size": 9}):
        drawing, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
        for name, (colour, marker) in _LINES.items():
            for steps, fill in ((paced, "white"), (ramp, colour)):
                axes.plot(
                    [step["rps"] for step in steps],
                    [step[name] for step in steps],
                    color=colour,
                    marker=marker,
                    markerfacecolor=fill,
                    markersize=5,
                    linewidth=1.4,
                    label=name.removesuffix("_ms") if steps is (ramp or paced) else None,
                )
        for step in ramp:
            axes.annotate(
                f"{step['users']:.0f}",
                (step["rps"], step["p99_ms"]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color="#7f8c8d",
            )
        axes.axhline(
            OBJECTIVES["single"].most_p95_ms,
            color="#1f4e79",
            linestyle="--",
            linewidth=1,
            label="p95 at most",
        )
        axes.axvline(
            OBJECTIVES["single"].least_rps,
            color="#7f8c8d",
            linestyle="--",
            linewidth=1,
            label="requests/s at least",
        )
        axes.set_title("One encounter a request; open: paced; full: as fast as so many users can")
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
