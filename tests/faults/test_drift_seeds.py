"""Drift over twenty seeds: no unshifted load is flagged, each shifted one is, where it shifted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.test_drift import (
    Platform,
    checked_platform,
    test_shifted_rows_are_flagged_where_they_shifted_whatever_the_seed,
    test_unshifted_rows_are_not_flagged_whatever_the_seed,
)

__all__ = [
    "test_shifted_rows_are_flagged_where_they_shifted_whatever_the_seed",
    "test_unshifted_rows_are_not_flagged_whatever_the_seed",
]


@pytest.fixture(scope="module")
def platform(server_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """As in the quick lane, with twenty of each."""
    with checked_platform(server_port, tmp_path_factory.mktemp("drift"), 20) as made:
        yield made
