"""The inputs of drift: reference as rows, hashes as the prediction log writes them."""

from __future__ import annotations

import math
from hashlib import blake2b

from monitoring.drift import SCORE, encounter_hash, reference_rows
from serving.prediction_log import _HASH_BYTES, _hash

REFERENCE = {
    "features": {
        "age": {"edges": [50.0, 70.0], "shares": [0.2, 0.3, 0.5]},
        "race": {
            "levels": ["Caucasian", "Asian", "other"],
            "rest": ["Amish", "Hispanic"],
            "shares": [0.9, 0.08, 0.02],
        },
    },
    "score": {"edges": [0.1], "shares": [0.4, 0.6]},
}


def test_numbers_become_intervals_without_a_gap() -> None:
    rows = [row for row in reference_rows(REFERENCE) if row[0] in ("age", SCORE)]
    assert rows == [
        ("age", 0, "interval", -math.inf, 50.0, None, 0.2),
        ("age", 1, "interval", 50.0, 70.0, None, 0.3),
        ("age", 2, "interval", 70.0, math.inf, None, 0.5),
        (SCORE, 0, "interval", -math.inf, 0.1, None, 0.4),
        (SCORE, 1, "interval", 0.1, math.inf, None, 0.6),
    ]


def test_levels_that_are_counted_in_other_are_known_too() -> None:
    rows = [row for row in reference_rows(REFERENCE) if row[0] == "race"]
    assert [(row[1], row[2], row[5], row[6]) for row in rows] == [
        (0, "level", "Caucasian", 0.9),
        (1, "level", "Asian", 0.08),
        (2, "level", "Amish", 0.0),
        (3, "level", "Hispanic", 0.0),
        (4, "other", None, 0.02),
    ]


def test_level_named_other_is_not_the_references_rest() -> None:
    found = {"levels": ["other", "a", "other"], "shares": [0.5, 0.4, 0.1]}
    rows = reference_rows({"features": {"f": found}, "score": REFERENCE["score"]})
    assert [row[2:3] + row[5:] for row in rows if row[0] == "f"] == [
        ("level", "other", 0.5),
        ("level", "a", 0.4),
        ("other", None, 0.1),
    ]


def test_encounters_are_hashed_as_in_the_prediction_log() -> None:
    key = b"only for tests"
    keyed = blake2b(key=key, digest_size=_HASH_BYTES)
    for encounter in (1, 2278392, 10**12):
        # A caller may send it as a number or, in a CSV, as text.
        assert encounter_hash(key, encounter) == _hash(keyed, encounter)
        assert encounter_hash(key, encounter) == _hash(keyed, str(encounter))
