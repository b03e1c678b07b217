"""How many users there are at a moment, and what of an objective was missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

RAMP = (1, 2, 4, 8, 16, 32, 64, 96)
SHAPES = ("steady", "soak", "ramp", "spike")
SHED = "shed"
"""What refused requests are counted as, where that is no failure."""
MOST_SILENT_SECONDS = 5
"""Without any answer, at a stretch. Who waits asks nothing else meanwhile, so a service that hangs
for a while is slow to as few requests as there are users, too few for a percentile to tell."""


def missed(
    found: Mapping[str, Any], least_rps: float, most_p95_ms: float, most_failures: int
) -> list[str]:
    """What of the objective was missed, one sentence each; nothing where all holds."""
    said = []
    if found["requests_per_second"] < least_rps:
        said.append(f"{found['requests_per_second']:.0f} requests/s, wanted {least_rps:g} or more")
    if found["p95_ms"] > most_p95_ms:
        said.append(f"p95 {found['p95_ms']:.0f} ms, wanted {most_p95_ms:g} or less")
    if found["failures"] > most_failures:
        said.append(f"{found['failures']} failures, wanted {most_failures} or fewer")
    if found["silent_seconds"] > MOST_SILENT_SECONDS:
        said.append(
            f"no answer for {found['silent_seconds']} s, wanted {MOST_SILENT_SECONDS} or less"
        )
    return said


def in_words(misses: Iterable[str], seconds: float) -> str:
    """The verdict in one line."""
    said = "; ".join(misses)
    return f"FAIL over {seconds:.0f} s: {said}" if said else f"PASS over {seconds:.0f} s"


def silence(answered: Iterable[int], begin: float, end: float) -> int:
    """The longest run of whole seconds in which nothing was answered.

    Args:
        answered: seconds (since the epoch) in which something was.
        begin: of the test, seconds since the epoch.
        end: of the test.
    """
    marks = sorted({int(begin), int(end), *answered})
    return max((later - earlier - 1 for earlier, later in pairwise(marks)), default=0)


def forget(prediction_id: str) -> str:
    """SQL that deletes what load tests left in the prediction log, all of them and nothing else.

    Args:
        prediction_id: of any prediction of a load test; all are of one made-up patient.
    """
    return (
        "delete from inference.predictions where patient_hash = (select patient_hash "
        f"from inference.predictions where prediction_id = '{prediction_id}');"
    )


def users_at(shape: str, second: float, seconds: float, most: int) -> int | None:
    """How many users ask at a moment of a test.

    Args:
        shape: `steady` and `soak`: all of them all the time; `ramp`: the steps of RAMP, up to
            `most`; `spike`: a quarter of them, all of them in the middle third, a quarter again.
        second: since the start.
        seconds: that the test takes.
        most: users.

    Returns:
        None when the test is over.
    """
    if second >= seconds:
        return None
    if shape == "ramp":
        steps = [users for users in RAMP if users < most] + [most]
        return steps[int(second / seconds * len(steps))]
    if shape == "spike" and not seconds / 3 <= second < 2 * seconds / 3:
        return max(1, most // 4)
    return most
