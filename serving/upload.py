"""A CSV as it comes in: cut into whole lines, scored side by side, answered in order."""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from serving import batch, records
from serving.prediction_log import LogFullError
from serving.problems import ProblemError

BLOCK_BYTES: Final = 200_000
"""About a thousand encounters: enough to be quick, little enough to be shared out."""
LINE_LIMIT: Final = 1 << 16
_IN_MEMORY = 4 << 20
_AHEAD = 4
"""Blocks that wait for each worker."""


class Upload:
    """One CSV.

    Callers send all of it before they read what comes back, so it is scored while it is received,
    and answers wait in a file of their own, of which only the first megabytes are in memory.

    Args:
        workers: who scores.
        job: with what.
        check: called before each block; raises where predictions can't be kept.
        count: called with each scored part.
    """

    def __init__(
        self,
        workers: batch.Workers,
        job: batch.Job,
        check: Callable[[], None],
        count: Callable[[batch.Result], None],
    ) -> None:
        self._workers = workers
        self._job = job
        self._check = check
        self._count = count
        self._header: records.Header | None = None
        self._row = 1
        self._running: deque[asyncio.Task[batch.Result]] = deque()
        self._waiting = tempfile.SpooledTemporaryFile(  # noqa: SIM115 (closed when answered)
            _IN_MEMORY
        )
        self._waiting.write(batch.CSV_HEADER)

    async def receive(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Take the whole upload; give the answer, in order, as it is ready.

        Raises:
            ProblemError: 422 for a header that is none of ours, 400 for something else than CSV.
            LogFullError: predictions can't be kept.
        """
        try:
            await self._receive(stream)
        except BaseException as error:
            self._give_up()
            if isinstance(error, (ProblemError, LogFullError)):
                # A caller that is still sending would not see an answer.
                async for _ in stream:
                    pass
            raise
        return self._answers()

    async def _receive(self, stream: AsyncIterator[bytes]) -> None:
        buffered = bytearray()
        async for chunk in stream:
            buffered += chunk
            if self._header is None:
                self._take_header(buffered, end=False)
            if self._header is not None and len(buffered) >= BLOCK_BYTES:
                whole = buffered.rfind(b"\n") + 1
                if whole:
                    await self._submit(bytes(buffered[:whole]))
                    del buffered[:whole]
                elif len(buffered) > LINE_LIMIT:
                    raise ProblemError(
                        400, f"a line of more than {LINE_LIMIT >> 10} KiB; this is no such CSV"
                    )
        if self._header is None:
            self._take_header(buffered, end=True)
        if buffered:
            await self._submit(bytes(buffered))
        elif self._row == 1:
            raise ProblemError(422, "the CSV has a header but no rows; send encounters below it")
        if self._waiting.tell() == len(batch.CSV_HEADER):
            # Before the answer begins: what fails at once is told by its status.
            self._waiting.write(await self._next())

    def _take_header(self, buffered: bytearray, *, end: bool) -> None:
        stop = buffered.find(b"\n")
        if stop < 0 and len(buffered) > LINE_LIMIT:
            raise ProblemError(400, "the first line does not end; send a CSV with a header")
        if stop < 0 and not end:
            return
        line = bytes(buffered if stop < 0 else buffered[: stop + 1])
        try:
            self._header = records.Header.read(line)
        except records.RecordsError as error:
            raise ProblemError(422, str(error), error.faults) from None
        del buffered[: len(line)]

    async def _submit(self, block: bytes) -> None:
        self._check()
        work = self._workers.run(batch.score_csv, self._job, self._header, self._row, block)
        self._running.append(asyncio.create_task(work))
        self._row += block.count(b"\n")
        while len(self._running) > _AHEAD * self._workers.count:
            self._waiting.write(await self._next())

    async def _next(self) -> bytes:
        """The answer to the block that was submitted first."""
        result = await self._running.popleft()
        self._count(result)
        return result.content

    async def _answers(self) -> AsyncIterator[bytes]:
        try:
            self._waiting.seek(0)
            while part := self._waiting.read(BLOCK_BYTES):
                yield part
            while self._running:
                yield await self._next()
        finally:
            self._give_up()

    def _give_up(self) -> None:
        for task in self._running:
            task.cancel()
        self._waiting.close()
