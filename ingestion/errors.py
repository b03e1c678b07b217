"""What can go wrong between a file and the table, each as one message for a person."""

from __future__ import annotations


class IngestionError(Exception):
    """The input or its place is at fault; trying again with the same input cannot help."""


class SourceUnreachableError(IngestionError):
    """The source did not answer (or not wholly); trying again later can help."""
