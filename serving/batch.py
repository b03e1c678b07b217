"""Batches: scored in processes of their own, so that single requests don't wait behind them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
import uuid_utils

from serving import records
from serving.model import Floats, Model, Scored
from serving.prediction_log import Entry, write_segment

CSV_HEADER = b"row,encounter_id,prediction_id,probability,percentile,alert,excluded,error\n"

_AT_ONCE = 1_000
"""Encounters of a JSON batch that are scored together."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Job:
    """What a batch is scored with.

    Attributes:
        model: folder of the version that answers.
        shadow: folder of the challenger that scores the same, unseen; None: none does.
        alert_rate: of the decision.
        spool: folder of the prediction log; None: nothing is logged.
        key: of the identifiers' hashes.
    """

    model: Path
    shadow: Path | None
    alert_rate: float
    spool: Path | None
    key: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """A scored part of a batch.

    Attributes:
        content: what the caller gets of it.
        version: that answered.
        scores: the probabilities, for the metrics.
        excluded: encounters that can't be readmitted.
        broken: rows that broke the contract.
        logged: predictions that were put into the spool, the challenger's too.
    """

    content: bytes
    version: str
    scores: Floats
    excluded: int
    broken: int
    logged: int


def score_csv(job: Job, header: records.Header, first_row: int, block: bytes) -> Result:
    """Score whole lines of a CSV.

    Args:
        job: with what.
        header: of the file.
        first_row: number of the block's first row, counted from 1.
        block: lines, each with its end.
    """
    model = _model(job.model)
    lines = block.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    columns, broken = _reader(header).read(lines)
    count = len(lines) - len(broken)
    ids = [str(uuid_utils.uuid7()) for _ in range(count)]
    encounters = columns.get("encounter_id") or [""] * count
    scored, logged = _score(job, model, "csv", columns, ids)
    threshold = model.scorer.threshold(job.alert_rate)
    answers = iter(
        zip(
            encounters,
            ids,
            scored.probability.tolist(),
            scored.percentile.tolist(),
            (scored.probability >= threshold).tolist(),
            strict=True,
        )
    )
    parts = []
    place = 0
    for offset in range(len(lines)):
        row = first_row + offset
        if offset in broken:
            message = broken[offset].replace('"', '""')
            parts.append(f'{row},,,,,,,"{message}"\n')
            continue
        encounter, number, probability, percentile, alert = next(answers)
        if place in scored.excluded:
            parts.append(f"{row},{encounter},,,,,{scored.excluded[place]},\n")
        else:
            said = "true" if alert else "false"
            parts.append(
                f"{row},{encounter},{number},{probability:.6f},{percentile:.1f},{said},,\n"
            )
        place += 1
    return Result(
        "".join(parts).encode(),
        model.version,
        _known(scored),
        excluded=len(scored.excluded),
        broken=len(broken),
        logged=logged,
    )


def score_json(job: Job, body: bytes) -> Result:
    """Score a JSON batch.

    Raises:
        RecordsError: it breaks the contract; nothing of it is scored.
    """
    model = _model(job.model)
    result = _score_encounters(job, model, records.read_batch(body))
    # The encounters as Python's objects took fifty times what they are; what is free stays with the
    # process otherwise.
    _trim()
    return result


def _score_encounters(job: Job, model: Model, encounters: Sequence[Mapping[str, Any]]) -> Result:
    answers: list[dict[str, Any]] = []
    scores = []
    logged = 0
    for first in range(0, len(encounters), _AT_ONCE):
        part = encounters[first : first + _AT_ONCE]
        ids = [str(uuid_utils.uuid7()) for _ in part]
        scored, written = _score(job, model, "batch", records.columns(part), ids)
        answers += predictions(model, scored, ids, job.alert_rate)
        scores.append(_known(scored))
        logged += written
    known = np.concatenate(scores)
    return Result(
        orjson.dumps({"model_version": model.version, "predictions": answers}),
        model.version,
        known,
        excluded=len(encounters) - len(known),
        broken=0,
        logged=logged,
    )


def score_shadow(
    job: Job, source: str, encounters: Sequence[Mapping[str, Any]], ids: Sequence[str]
) -> int:
    """Let the job's challenger alone score what single requests asked; return how many it logs."""
    assert job.shadow is not None  # noqa: S101  (nothing is collected for none)
    columns = records.columns(encounters)
    return _log(job, _model(job.shadow), "challenger", source, columns, ids)[1]


def predictions(
    model: Model, scored: Scored, ids: Sequence[str], alert_rate: float
) -> list[dict[str, Any]]:
    """What callers get of each encounter."""
    threshold = model.scorer.threshold(alert_rate)
    answers = []
    for place, (number, probability, percentile) in enumerate(
        zip(ids, scored.probability.tolist(), scored.percentile.tolist(), strict=True)
    ):
        excluded = scored.excluded.get(place)
        answers.append(
            {
                "prediction_id": number,
                "probability": None if excluded else probability,
                "percentile": None if excluded else round(percentile, 1),
                "alert": None if excluded else probability >= threshold,
                "alert_rate": alert_rate,
                "threshold": threshold,
                "excluded": excluded,
                "model_version": model.version,
            }
        )
    return answers


def entry(
    model: Model,
    scored: Scored,
    ids: Sequence[str],
    *,
    role: str,
    source: str,
    columns: Mapping[str, Sequence[Any]],
) -> Entry:
    """What is logged of scored encounters: all but the excluded, who got no prediction."""
    kept = [place for place in range(len(ids)) if place not in scored.excluded]
    none = [None] * len(ids)
    encounters, patients = (columns.get(name) or none for name in records.IDENTIFIERS)
    every = len(kept) == len(ids)

    def of_kept(values: Sequence[Any]) -> Sequence[Any]:
        return values if every else [values[place] for place in kept]

    return Entry(
        ids=of_kept(ids),
        version=model.version,
        role=role,
        source=source,
        encounters=of_kept(encounters),
        patients=of_kept(patients),
        probability=of_kept(scored.probability.tolist()),
        rows=of_kept(scored.rows),
    )


def without_identifiers(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """What a model may see."""
    return {name: found for name, found in columns.items() if name not in records.IDENTIFIERS}


def _score(
    job: Job, model: Model, source: str, columns: Mapping[str, Sequence[Any]], ids: Sequence[str]
) -> tuple[Scored, int]:
    """Score and log; the challenger too, where there is one, under ids of its own."""
    of_challenger = 0
    if job.shadow:
        others = [str(uuid_utils.uuid7()) for _ in ids]
        shadow = _model(job.shadow)
        _, of_challenger = _log(job, shadow, "challenger", source, columns, others)
    scored, logged = _log(job, model, "champion", source, columns, ids)
    return scored, logged + of_challenger


def _log(
    job: Job,
    model: Model,
    role: str,
    source: str,
    columns: Mapping[str, Sequence[Any]],
    ids: Sequence[str],
) -> tuple[Scored, int]:
    """Scores, and the number of those that were put into the spool."""
    scored = model.score(without_identifiers(columns), len(ids))
    if not job.spool or not ids:
        return scored, 0
    made = entry(model, scored, ids, role=role, source=source, columns=columns)
    write_segment(job.spool, made.lines(job.key))
    return scored, len(made.ids)


def _known(scored: Scored) -> Floats:
    probability = scored.probability
    return probability[~np.isnan(probability)] if scored.excluded else probability


@lru_cache(maxsize=3)
def _model(folder: Path) -> Model:
    return Model(folder)


@lru_cache(maxsize=8)
def _reader(header: records.Header) -> records.CsvReader:
    return records.CsvReader(header)


def _trim() -> None:
    """Give free memory back to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def warm(folder: Path) -> None:
    """Load a version before the first batch needs it."""
    _model(folder)


class Workers:
    """The processes that score batches.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        context = multiprocessing.get_context("forkserver")
        # Children are forked from a process that has these: quick to start, most memory shared.
        context.set_forkserver_preload(["serving.batch", "pandas", "catboost"])
        self._context = context
        self._pool = self._make()

    def _make(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.count, self._context, _end_with_parent)

    async def run(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        """Run a function of this module in one of the processes.

        A process that dies (of a signal, of memory) is replaced, and its work tried once more.
        """
        loop = asyncio.get_running_loop()
        pool = self._pool
        try:
            return await loop.run_in_executor(pool, work, *arguments)
        except BrokenProcessPool:
            if pool is self._pool:
                # The pool ends those that are left by SIGTERM, which they leave to the service: it
                # would wait for them for ever.
                for process in multiprocessing.active_children():
                    process.kill()
                self._pool = self._make()
                pool.shutdown(wait=False)
            return await loop.run_in_executor(self._pool, work, *arguments)

    async def warm(self, folder: Path) -> None:
        """Let the processes load a version; one that is quick may take another's turn."""
        await asyncio.gather(*(self.run(warm, folder) for _ in range(self.count)))

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a new process: leave signals to the service, and end when it has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
