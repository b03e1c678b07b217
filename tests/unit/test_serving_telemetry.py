"""Metrics: that they add up, and that no label can grow without end."""

from __future__ import annotations

import numpy as np
import pytest
from prometheus_client import Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving import registry, telemetry
from serving.telemetry import Scores, Telemetry, Values


def samples(made: Telemetry, name: str) -> dict[tuple[str, ...], float]:
    """Values of a sample by its labels' values, as a scraper reads them."""
    text = generate_latest(made.registry).decode()
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_whole_batches_are_counted_as_one_by_one() -> None:
    scores = np.random.default_rng(1).random(5_000)
    # On the bounds as well: they belong to the bucket that they end.
    scores[: len(telemetry._SCORES)] = telemetry._SCORES
    made = Telemetry()
    one_by_one = Histogram(
        "expected", "", registry=made.registry, buckets=telemetry._SCORES.tolist()
    )
    for score in scores.tolist():
        one_by_one.observe(score)
    for part in np.array_split(scores, 7):
        made.scores.add("3", part)
    made.scores.add("3", np.array([]))
    expected = samples(made, "expected_bucket")
    found = samples(made, "prediction_probability_bucket")
    by_bound = {labels[0]: value for labels, value in found.items()}
    assert by_bound == {labels[0]: value for labels, value in expected.items()}
    assert samples(made, "prediction_probability_count") == {("3",): 5_000}
    assert samples(made, "prediction_probability_sum")["3",] == pytest.approx(scores.sum())


def test_the_oldest_version_is_forgotten() -> None:
    made = Telemetry()
    for version in range(1, 9):
        made.scores.add(str(version), np.array([0.1, 0.9]))
    made.scores.add("8", np.array([0.5]))
    counts = samples(made, "prediction_probability_count")
    assert counts == {("4",): 2, ("5",): 2, ("6",): 2, ("7",): 2, ("8",): 3}


def test_nothing_was_scored_yet() -> None:
    (family,) = Scores().collect()
    assert family.samples == []


def test_an_alias_serves_one_version() -> None:
    made = Telemetry()
    made.served("champion", "1", "a" * 64)
    made.served("challenger", "2", "b" * 64)
    made.served("champion", "2", "b" * 64)
    assert samples(made, "model_info") == {
        ("challenger", "bbbbbbbbbbbb", "2"): 1,
        ("champion", "bbbbbbbbbbbb", "2"): 1,
    }
    assert set(samples(made, "model_loaded_timestamp_seconds")) == {("champion",), ("challenger",)}


def test_the_age_of_a_version_ends_with_it() -> None:
    made = Telemetry()
    made.served("champion", "1", "a" * 64, 1_000.5)
    made.served("challenger", "2", "b" * 64)
    trained = "model_trained_timestamp_seconds"
    assert samples(made, trained) == {("champion",): 1_000.5}
    made.served("champion", "2", "b" * 64, 2_000.5)
    assert samples(made, trained) == {("champion",): 2_000.5}
    # Of a copy in the cache that does not say when it was registered.
    made.served("champion", "3", "c" * 64)
    assert samples(made, trained) == {}


@pytest.mark.parametrize(
    ("told", "seconds"),
    [(1_700_000_000_500, 1_700_000_000.5), ("1700000000500", 1_700_000_000.5)],
)
def test_milliseconds_of_the_registry_become_seconds(told: object, seconds: float) -> None:
    assert registry._seconds(told) == seconds


@pytest.mark.parametrize("told", [None, "", "yesterday", []])
def test_a_registry_that_does_not_say_when(told: object) -> None:
    assert registry._seconds(told) is None


def test_what_rules_look_at_is_there_before_its_first_case() -> None:
    made = Telemetry()
    routes = {"/v1/predict", "/v1/explain", "/v1/predict/batch"}
    assert samples(made, "http_requests_total") == {
        ("POST", route, status): 0 for route in routes for status in ("200", "500", "503")
    }
    assert samples(made, "http_request_duration_seconds_count") == {(route,): 0 for route in routes}
    sources, results = ("single", "explain", "batch", "csv"), ("scored", "excluded", "broken")
    assert samples(made, "prediction_rows_total") == {
        (result, source): 0 for result in results for source in sources
    }
    assert samples(made, "prediction_log_spooled_rows_total") == {(): 0}


def test_values_are_read_when_they_are_asked_for() -> None:
    made, value = Telemetry(), [1.0]
    made.registry.register(Values(lambda: [("of_a_test", "A value", value[0])]))
    value[0] = 2.0
    assert samples(made, "of_a_test") == {(): 2.0}
