"""A CSV as it comes in, scored by workers that are fakes: they answer what the test wants."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import upload
from serving.batch import CSV_HEADER, Job, Result
from serving.upload import BLOCK_BYTES, Upload

JOB = Job(Path("model"), None, 0.2, None, b"")
LINE = b"[70-80)\n"


class FakeWorkers:
    """Answers each block by `size` bytes that name its first row."""

    count = 2

    def __init__(self, size: int) -> None:
        self.size = size

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Result:
        _, _, first_row, block = arguments
        await asyncio.sleep(0.001 if first_row == 1 else 0)  # the first is not the first to be done
        content = b"%d\n" % first_row
        scores = np.full(block.count(b"\n"), 0.5)
        return Result(content.rjust(self.size), "1", scores, excluded=0, broken=0, logged=0)


async def sent(blocks: int) -> AsyncIterator[bytes]:
    yield b"age\n"
    for _ in range(blocks):
        yield LINE * (BLOCK_BYTES // len(LINE))


async def answered(
    size: int, blocks: int, count: Callable[[Result], None] = lambda result: None
) -> tuple[int, list[int]]:
    """Bytes of the answer after its header, and the first rows of its blocks in order."""
    made = Upload(FakeWorkers(size), JOB, lambda: None, count)  # type: ignore[arg-type]
    length, rows, head, tail = 0, [], b"", b""
    async for part in await made.receive(sent(blocks)):
        if len(head) < len(CSV_HEADER):
            cut = len(CSV_HEADER) - len(head)
            head, part = head + part[:cut], part[cut:]
        length += len(part)
        *lines, tail = (tail[-20:] + part).split(b"\n")
        rows += [int(line[-10:]) for line in lines]
    assert head == CSV_HEADER
    return length, rows


def test_answers_keep_the_order_of_the_rows() -> None:
    counted: list[Result] = []
    length, rows = asyncio.run(answered(100, 30, counted.append))
    lines = BLOCK_BYTES // len(LINE)
    assert rows == [1 + block * lines for block in range(30)]
    assert length == 30 * 100
    assert sum(len(result.scores) for result in counted) == 30 * lines


def test_an_answer_of_any_length_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak() -> int:
        tracemalloc.start()
        length, _ = asyncio.run(answered(1 << 20, 80))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert length == 80 << 20
        return found

    assert peak() < 40 << 20
    # The gate can fail: all of it in memory is more.
    monkeypatch.setattr(upload, "_IN_MEMORY", 1 << 30)
    assert peak() > 80 << 20
