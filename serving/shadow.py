"""The challenger in the shadow of single requests: scored a little later, by the batch workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import uuid_utils

from serving import batch
from serving.telemetry import Telemetry

_SECONDS = 0.5
_MOST_WAITING = 20_000

log = logging.getLogger(__name__)


class Shadow:
    """Collects what was asked and has it scored, unseen by who asked.

    Args:
        workers: who scores.
        telemetry: where it is counted what was logged and what was left out.
    """

    def __init__(self, workers: batch.Workers, telemetry: Telemetry) -> None:
        self._workers = workers
        self._telemetry = telemetry
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._job: batch.Job | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Begin to score."""
        self._task = asyncio.create_task(self._work())

    def add(self, job: batch.Job, source: str, encounter: dict[str, Any]) -> None:
        """Have one encounter scored by the job's challenger; it is left out if too many wait."""
        if job.shadow is None:  # none is registered yet
            return
        if len(self._waiting) >= _MOST_WAITING:
            self._telemetry.shadow_dropped.inc()
            return
        self._job = job
        self._waiting.append((source, encounter))

    async def close(self) -> None:
        """Score what waits, and stop."""
        self._stopping.set()
        if self._task:
            await self._task
        await self._flush()

    async def _work(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _SECONDS)
            await self._flush()

    async def _flush(self) -> None:
        if not self._waiting or self._job is None:
            return
        waiting, self._waiting = self._waiting, []
        for source in sorted({source for source, _ in waiting}):
            asked = [encounter for of, encounter in waiting if of == source]
            ids = [str(uuid_utils.uuid7()) for _ in asked]
            try:
                logged = await self._workers.run(batch.score_shadow, self._job, source, asked, ids)
            except Exception:
                log.exception("the challenger scored nothing of %d requests", len(asked))
                self._telemetry.shadow_dropped.inc(len(asked))
            else:
                self._telemetry.spooled.inc(logged)
