"""Raw fields to features to probability: what a stored model does with whatever it is sent."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from training import candidates
from training.candidates import Table
from training.data import RARE, Encounters, fit_encoder
from training.inference import Encoder, FeatureQuery, Scorer, load_module, sigmoid

DEFINITION: dict[str, Any] = {
    "fields": [
        {"name": "race", "column": "race", "kind": "category"},
        {"name": "diag-1", "column": "diag_1", "kind": "icd9"},
        {"name": "number_inpatient", "column": "number_inpatient", "kind": "count"},
        {"name": "admission_type_id", "column": "admission_type_id", "kind": "code"},
    ],
    "features": [
        {"name": "race", "type": "text", "nominal": True},
        {"name": "diag_group", "type": "text", "nominal": True},
        {"name": "admission_type_id", "type": "integer", "nominal": True},
        {"name": "number_inpatient", "type": "double precision", "nominal": False},
        {"name": "is_v_code", "type": "integer", "nominal": False},
    ],
    "tables": {
        "icd9_lookup": {
            "columns": ["icd9_key", "icd9_group"],
            "key": "icd9_key",
            "rows": [["250", "Diabetes"], ["428", "Circulatory"], ["V45", "Supplementary"]],
        },
        "int_statistics": {"columns": ["median_visits", "most"], "key": None, "rows": [[0.5, 9]]},
    },
    "query": """
        select
            d.encounter_id,
            coalesce(d.race, 'Unknown') as race,
            coalesce(l.icd9_group, 'Other') as diag_group,
            coalesce(d.admission_type_id, 5) as admission_type_id,
            min(coalesce(d.number_inpatient, s.median_visits), s.most) as number_inpatient,
            case when d.diag_1 like 'V%' then 1 else 0 end as is_v_code
        from diabetes as d
        left join icd9_lookup as l on l.icd9_key = d.diag_1
        cross join int_statistics as s
        order by d.encounter_id
    """,
}
QUERY = FeatureQuery(DEFINITION)
FIELDS = tuple(QUERY.fields)
NOTHING = ("Unknown", "Other", 5, 0.5, 0)


def one(**fields: Any) -> tuple[Any, ...]:
    """Features of one encounter."""
    columns = {name.replace("diag_1", "diag-1"): [value] for name, value in fields.items()}
    (row,) = QUERY.rows(columns, 1)
    return row


def test_features_by_hand() -> None:
    assert QUERY.names == tuple(feature["name"] for feature in DEFINITION["features"])
    full = one(race="Asian", diag_1="428", number_inpatient=3, admission_type_id=1)
    assert full == ("Asian", "Circulatory", 1, 3, 0)
    assert one(number_inpatient=30)[3] == 9
    assert (one(diag_1="V45")[4], one(diag_1="v45")[4]) == (1, 0)


@pytest.mark.parametrize("missing", ["?", None, math.nan, np.float64("nan"), "", pd.NaT])
@pytest.mark.parametrize("field", FIELDS)
def test_every_form_of_missing_is_the_field_left_out(field: str, missing: Any) -> None:
    assert QUERY.rows({field: [missing]}, 1) == QUERY.rows({}, 1) == [NOTHING]


def test_none_the_text_is_a_value() -> None:
    assert one(race="None")[0] == "None"


def test_order_is_kept() -> None:
    names = [f"{number:03}" for number in np.random.default_rng(1).permutation(300)]
    assert [row[0] for row in QUERY.rows({"race": names}, 300)] == names


def test_nothing_is_left_of_a_call() -> None:
    QUERY.rows({"race": ["Asian", "Other"]}, 2)
    assert QUERY.rows({"race": ["Hispanic"]}, 1) == [("Hispanic", *NOTHING[1:])]
    with pytest.raises(ValueError, match="zip"):
        QUERY.rows({"race": ["Asian"]}, 2)
    assert QUERY.rows({}, 1) == [NOTHING]


def test_no_encounters_give_no_rows() -> None:
    assert QUERY.rows({}, 0) == QUERY.rows({"race": []}, 0) == []


def test_ids_and_outcome_are_accepted_and_ignored() -> None:
    extra: dict[str, list[Any]] = {
        "encounter_id": [7, 7],
        "patient_nbr": ["x", None],
        "readmitted": ["<30", "NO"],
    }
    assert QUERY.rows({"race": ["b", "a"], **extra}, 2) == QUERY.rows({"race": ["b", "a"]}, 2)


def test_unknown_fields_are_refused_by_name() -> None:
    expected = r"^unknown field Race, diag_1; known are race, diag-1, number_inpatient, admission"
    with pytest.raises(ValueError, match=expected):
        QUERY.rows({"race": ["a"], "diag_1": ["428"], "Race": ["a"]}, 1)


@pytest.mark.parametrize(
    "value", [3, 3.0, "3", " 3", "+3", np.int64(3), np.float64(3.0), np.int32(3)]
)
@pytest.mark.parametrize("field", ["number_inpatient", "admission_type_id"])
def test_whole_numbers_are_taken(field: str, value: Any) -> None:
    assert one(**{field: value}) == one(**{field: 3})


@pytest.mark.parametrize(
    "value",
    [
        3.5,
        "3.5",
        "3.0",  # text has to be written as the publisher writes a number
        "three",
        "1e3",
        "nan",
        math.inf,
        -math.inf,
        2**63,
        10**400,
        [3],
        {},
    ],
)
@pytest.mark.parametrize("field", ["number_inpatient", "admission_type_id"])
def test_what_is_no_whole_number_is_refused_with_its_place(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="expected an integer") as caught:
        QUERY.rows({field: [1, value]}, 2)
    assert str(caught.value) == f"row 1, field {field}: expected an integer, got {value!r}"


def test_codes_sent_as_numbers_are_their_text() -> None:
    assert one(diag_1=428)[1] == "Circulatory"


def test_threads_do_not_mix_their_encounters() -> None:
    def ask(thread: int) -> bool:
        names = [f"{thread} {row}" for row in range(40)]
        visits = [(thread + row) % 9 for row in range(40)]
        expected = [(name, "Other", 5, v, 0) for name, v in zip(names, visits, strict=True)]
        return all(
            QUERY.rows({"race": names, "number_inpatient": visits}, 40) == expected
            for _ in range(25)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_a_refused_call_in_one_thread_does_not_disturb_others() -> None:
    def ask(thread: int) -> bool:
        try:
            rows = QUERY.rows({"race": [str(thread)], "number_inpatient": [thread / 2]}, 1)
        except ValueError:
            return thread % 2 == 1
        return rows == [(str(thread), "Other", 5, thread / 2, 0)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, [row % 8 for row in range(400)]))


ENCODER = Encoder(("race", "visits", "code"), {"race": ["Caucasian", "Asian"], "code": [1, 7]})


def test_encoder_codes_nominal_values_and_keeps_numbers() -> None:
    found = ENCODER.matrix([["Asian", "Caucasian"], [2, 0.5], [7, 1]])
    assert found.tolist() == [[1.0, 2.0, 1.0], [0.0, 0.5, 0.0]]
    assert ENCODER.nominal == (0, 2)


@pytest.mark.parametrize("unseen", ["Other", "asian", None, math.nan, ""])
def test_unseen_values_are_nan(unseen: Any) -> None:
    assert np.isnan(ENCODER.matrix([[unseen], [1], [1]])[0, 0])


def test_integers_are_found_whatever_their_type() -> None:
    for codes in (np.array([7, 1], np.int32), np.array([7, 1], np.int64), [7.0, 1], [7, 1]):
        assert ENCODER.matrix([["Asian", "Asian"], [0, 0], codes])[:, 2].tolist() == [1.0, 0.0]


def test_encoder_comes_back_from_its_file() -> None:
    stored = json.dumps({"names": ENCODER.names, "vocabularies": ENCODER.vocabularies})
    again = Encoder(**json.loads(stored))
    columns: list[list[Any]] = [["Asian", "x"], [2, 3], [7, 3]]
    np.testing.assert_array_equal(again.matrix(columns), ENCODER.matrix(columns))
    assert (again.names, again.nominal) == (ENCODER.names, ENCODER.nominal)


def test_rare_values_get_no_code_and_the_commonest_come_first() -> None:
    races = ["b"] * RARE + ["c"] * (RARE + 5) + ["rare"] * (RARE - 1) + ["a"] * RARE
    rows = len(races)
    features = pd.DataFrame(
        {"race": pd.Categorical(races), "code": np.full(rows, 11, np.int32), "visits": 1}
    )
    some = np.arange(rows)
    train = Encounters(features, some.astype(np.int8), some.astype(object), some, some)
    encoder = fit_encoder(
        train,
        [
            {"name": "race", "nominal": True},
            {"name": "visits", "nominal": False},
            {"name": "code", "nominal": True},
        ],
    )
    assert encoder.vocabularies == {"race": ["c", "a", "b"], "code": [11]}
    json.dumps(encoder.vocabularies)
    found = train.matrix(encoder)
    assert found.shape == (rows, 3)
    assert np.isnan(found[:, 0]).sum() == RARE - 1


def test_sigmoid_of_extremes() -> None:
    given = np.array([-np.inf, -1e308, -1e4, -745.0, 0.0, 40.0, 1e4, 1e308, np.inf])
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(given)
    assert (found[:3] == 0).all()
    assert found[4] == 0.5
    assert (found[-3:] == 1).all()
    assert (np.diff(found) >= 0).all()
    middle = np.linspace(-30, 30, 61)
    np.testing.assert_allclose(sigmoid(middle), 1 / (1 + np.exp(-middle)), rtol=1e-14)


def test_modules_of_the_same_name_do_not_meet(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "candidate.py").write_text(f"WHERE = {folder!r}")
    loaded = [load_module(tmp_path / folder / "candidate.py") for folder in ("a", "b")]
    assert [module.WHERE for module in loaded] == ["a", "b"]


SCORING = {"slope": 0.9, "intercept": -0.2, "thresholds": {"0.1": 0.5, "0.2": 0.25}}


def raw(rows: int = 600) -> dict[str, list[Any]]:
    random = np.random.default_rng(41)
    return {
        "race": random.choice(["Caucasian", "Asian", "?"], rows).tolist(),
        "diag-1": random.choice(["250", "428", "V45", "999"], rows).tolist(),
        "number_inpatient": random.poisson(1, rows).tolist(),
        "admission_type_id": random.choice([1, 2, 3], rows).tolist(),
    }


@pytest.fixture(scope="module", params=candidates.names())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as training leaves it, of each candidate."""
    path: Path = tmp_path_factory.mktemp(request.param)
    rows = QUERY.rows(raw(), 600)
    vocabularies = {
        feature["name"]: sorted({row[at] for row in rows})
        for at, feature in enumerate(DEFINITION["features"])
        if feature["nominal"]
    }
    encoder = Encoder(QUERY.names, vocabularies)
    matrix = encoder.matrix(list(zip(*rows, strict=True)))
    risk = sigmoid(-1.5 + 0.8 * matrix[:, 3] + (matrix[:, 1] == 0))
    target = (np.random.default_rng(42).random(600) < risk).astype(np.int8)
    table = Table(matrix, target, encoder.names, encoder.nominal)
    candidate = candidates.load(candidates.file(request.param))
    count = "iterations" if request.param == "catboost" else "trees"
    parameters = {**candidate.DEFAULTS, count: 20}
    model, _ = candidate.fit(table, None, parameters, 1, 1, lambda _iteration, _loss: False)
    (path / "fitted").mkdir()
    candidate.save(model, path / "fitted")
    shutil.copy(candidates.file(request.param), path / "candidate.py")
    stored = {"names": encoder.names, "vocabularies": vocabularies}
    (path / "encoder.json").write_text(json.dumps(stored))
    (path / "features.json").write_text(json.dumps(DEFINITION))
    (path / "scoring.json").write_text(json.dumps(SCORING))
    return path


def scored(folder: Path) -> tuple[Scorer, list[tuple[Any, ...]], Any]:
    scorer = Scorer(folder)
    rows = scorer.features(raw(), 600)
    return scorer, rows, scorer.matrix(rows)


def test_contributions_add_up_to_the_log_odds(folder: Path) -> None:
    scorer, _, matrix = scored(folder)
    matrix[:5, 0] = np.nan
    shares = scorer.contributions(matrix)
    log_odds = scorer.log_odds(matrix)
    assert shares.shape == (600, 6)
    tolerance = 1e-4 if "xgboost" in folder.name else 1e-8
    np.testing.assert_allclose(shares.sum(axis=1), log_odds, rtol=0, atol=tolerance)
    assert np.ptp(shares[:, -1]) <= tolerance
    assert np.ptp(log_odds) > 0.1
    np.testing.assert_array_equal(scorer.probabilities(matrix), sigmoid(log_odds))


def test_calibration_is_a_line_on_the_candidates_margin(folder: Path) -> None:
    scorer, _, matrix = scored(folder)
    candidate = candidates.load(folder / "candidate.py")
    margin = candidate.margin(candidate.load(folder / "fitted"), matrix)
    np.testing.assert_allclose(scorer.log_odds(matrix), 0.9 * margin - 0.2, rtol=1e-12)


def test_an_encounter_scores_alone_as_it_does_among_many(folder: Path) -> None:
    scorer, _, matrix = scored(folder)
    matrix[:3, 0] = np.nan
    together = scorer.log_odds(matrix), scorer.contributions(matrix)
    for few in [slice(row, row + 1) for row in range(20)] + [slice(0, 64), slice(0, 65)]:
        apart = scorer.log_odds(matrix[few]), scorer.contributions(matrix[few])
        for one, other in zip(apart, together, strict=True):
            np.testing.assert_allclose(one, other[few], rtol=0, atol=1e-12)


def test_no_encounters_score_as_nothing(folder: Path) -> None:
    scorer = Scorer(folder)
    matrix = scorer.matrix(scorer.features({}, 0))
    assert matrix.shape == (0, 5)
    assert scorer.probabilities(matrix).shape == (0,)
    assert scorer.contributions(matrix).shape == (0, 6)
    assert scorer.reasons([], matrix, 5) == []


def test_an_encounter_of_unknown_values_only_is_scored(folder: Path) -> None:
    scorer = Scorer(folder)
    columns: dict[str, list[Any]] = {
        "race": ["Martian"],
        "diag-1": ["000"],
        "admission_type_id": [77],
    }
    matrix = scorer.matrix(scorer.features(columns, 1))
    assert np.isnan(matrix[0, [0, 2]]).all()
    assert 0 < scorer.probabilities(matrix)[0] < 1


def test_reasons_are_the_strongest_contributions(folder: Path) -> None:
    scorer, rows, matrix = scored(folder)
    shares = scorer.contributions(matrix)
    for row, reasons in enumerate(scorer.reasons(rows[:50], matrix[:50], 3)):
        assert len(reasons) == 3
        sizes = [abs(reason["contribution"]) for reason in reasons]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == pytest.approx(np.abs(shares[row, :-1]).max())
        for reason in reasons:
            at = scorer.feature_names.index(reason["feature"])
            assert reason["value"] == str(rows[row][at])
            assert reason["contribution"] == pytest.approx(shares[row, at])
    assert scorer.reasons(rows[:2], matrix[:2], 0) == [[], []]
    assert [len(each) for each in scorer.reasons(rows[:2], matrix[:2], 99)] == [5, 5]


def test_later_readmission_shares_what_is_left(folder: Path, tmp_path: Path) -> None:
    scorer, _, matrix = scored(folder)
    assert scorer.later(matrix) is None
    three = shutil.copytree(folder, tmp_path / "three")
    shutil.copytree(three / "fitted", three / "fitted_later")
    later = Scorer(three).later(matrix)
    assert later is not None
    soon = scorer.probabilities(matrix)
    assert ((later > 0) & (soon + later < 1)).all()


def test_thresholds_are_those_chosen_on_validation(folder: Path) -> None:
    scorer = Scorer(folder)
    assert (scorer.threshold(0.1), scorer.threshold(0.2)) == (0.5, 0.25)
    assert scorer.threshold(0.1 + 0.2 - 0.1) == 0.25  # as floats add up
    for rate in itertools.chain([0.15, 0, 1], [math.nan]):
        with pytest.raises(ValueError, match=r"no threshold for an alert rate of .*0\.1, 0\.2"):
            scorer.threshold(rate)
