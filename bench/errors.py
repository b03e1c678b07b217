"""What can keep the benchmark from measuring."""

from __future__ import annotations


class BenchError(Exception):
    """A measured job failed or did not do its work; the message holds the end of its output."""
