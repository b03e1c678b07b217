"""The synthetic data holds the contract, repeats itself, and resembles what it stands in for."""

from __future__ import annotations

import json
import math
import runpy
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from ingestion import synthetic
from ingestion.contract import DRUGS, HEADER, MISSING, SYNTHETIC_ID_FLOOR, row_pattern
from ingestion.synthetic import DEFAULT_ROWS, csv_blocks, risk, write_csv

Columns = dict[str, tuple[str, ...]]

FIT = Path(synthetic.__file__).parents[1] / "scripts" / "fit_marginals.py"
MARGINALS = json.loads(synthetic.MARGINALS_PATH.read_text(encoding="ascii"))
DEAD_OR_HOSPICE = {"11", "13", "14", "19", "20", "21"}


def text(rows: int, seed: int = synthetic.DEFAULT_SEED) -> bytes:
    return b"".join(csv_blocks(rows, seed))


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """The rows of a file of the default size, without header and line ends."""
    return text(DEFAULT_ROWS).split(b"\r\n")[1:-1]


@pytest.fixture(scope="module")
def columns(lines: list[bytes]) -> Columns:
    # Interned, as five million strings of their own would take 300 MB.
    rows = ([sys.intern(value) for value in line.decode("ascii").split(",")] for line in lines)
    return dict(zip(HEADER, zip(*rows, strict=True), strict=True))


def share(values: tuple[str, ...], wanted: str) -> float:
    return values.count(wanted) / len(values)


def test_every_line_holds_the_contract(lines: list[bytes]) -> None:
    assert len(lines) == DEFAULT_ROWS
    matches = row_pattern().fullmatch
    assert [line for line in lines if not matches(line)] == []


def test_file_is_written_as_the_publisher_writes() -> None:
    data = text(20)
    assert data.startswith(",".join(HEADER).encode("ascii") + b"\r\n")
    assert data.endswith(b"\r\n")
    assert data.count(b"\n") == data.count(b"\r\n") == 21


def test_same_arguments_give_the_same_bytes() -> None:
    assert text(12_345, seed=3) == text(12_345, seed=3)


def test_seed_matters() -> None:
    assert text(50, seed=1) != text(50, seed=2)


@pytest.mark.parametrize("rows", [1, 2_000, 10_000, 10_001])
def test_fewer_rows_are_a_prefix_of_more(rows: int) -> None:
    short, long = text(rows, seed=5), text(50_000, seed=5)
    assert long.startswith(short)
    assert short.count(b"\r\n") == rows + 1


def test_blocks_differ(lines: list[bytes]) -> None:
    def without_ids(block: list[bytes]) -> list[bytes]:
        return [line.split(b",", 2)[2] for line in block]

    assert without_ids(lines[:10_000]) != without_ids(lines[10_000:20_000])


def test_encounter_ids_are_unique_and_marked_as_synthetic(columns: Columns) -> None:
    assert len(set(columns["encounter_id"])) == DEFAULT_ROWS
    for name in ("encounter_id", "patient_nbr"):
        assert min(map(int, columns[name])) >= SYNTHETIC_ID_FLOOR


def test_encounter_id_tells_nothing_about_the_outcome(columns: Columns) -> None:
    ids = list(map(int, columns["encounter_id"]))
    assert auroc(ids, columns["readmitted"]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", [name for name in HEADER[2:] if name != "readmitted"])
def test_marginals_are_those_of_the_real_file(columns: Columns, name: str) -> None:
    seen, real = Counter(columns[name]), MARGINALS["columns"][name]
    assert seen.keys() <= real.keys()
    for value, count in real.items():
        # Eight deviations of a Poisson count: encounters of one patient agree in some columns.
        assert seen[value] == pytest.approx(count, abs=8 * math.sqrt(count) + 3), value
        assert seen[value] == pytest.approx(count, abs=max(0.01 * DEFAULT_ROWS, 0.2 * count))


def test_missing_values_are_as_common_as_in_the_real_file(columns: Columns) -> None:
    rates = {name: share(values, MISSING) for name, values in columns.items() if MISSING in values}
    assert rates == pytest.approx(
        {
            "race": 0.0223,
            "weight": 0.9686,
            "payer_code": 0.3956,
            "medical_specialty": 0.4908,
            "diag_1": 0.0002,
            "diag_2": 0.0035,
            "diag_3": 0.0140,
        },
        abs=0.005,
    )


def test_diagnoses_go_missing_together_and_are_counted(columns: Columns) -> None:
    diagnoses = list(zip(*(columns[name] for name in synthetic.DIAGNOSES), strict=True))
    without_second = [third for _, second, third in diagnoses if second == MISSING]
    assert without_second.count(MISSING) > 0.6 * len(without_second)
    for number, present in zip(columns["number_diagnoses"], diagnoses, strict=True):
        assert int(number) >= 3 - present.count(MISSING)


def test_readmission_rates_are_those_of_the_real_file(columns: Columns) -> None:
    real = MARGINALS["columns"]["readmitted"]
    assert real == {"<30": 11_357, ">30": 35_545, "NO": 54_864}
    for outcome, count in real.items():
        assert share(columns["readmitted"], outcome) == pytest.approx(
            count / DEFAULT_ROWS, abs=0.005
        )


def test_outcome_can_be_learnt_about_as_well_as_the_real_one(columns: Columns) -> None:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    best_possible = auroc([risk(row) for row in rows], columns["readmitted"])
    assert 0.69 < best_possible < 0.72  # the dead are in; without them 0.01 less


def test_inpatient_visits_are_the_strongest_predictor(columns: Columns) -> None:
    names = ("number_inpatient", "number_emergency", "number_diagnoses", "number_outpatient")
    by_column = {
        name: auroc(list(map(int, columns[name])), columns["readmitted"]) for name in names
    }
    assert max(by_column, key=lambda name: by_column[name]) == "number_inpatient"
    assert by_column["number_inpatient"] == pytest.approx(0.60, abs=0.03)
    assert by_column["number_outpatient"] == pytest.approx(0.50, abs=0.01)


def test_the_dead_are_never_readmitted(columns: Columns) -> None:
    left = zip(columns["discharge_disposition_id"], columns["readmitted"], strict=True)
    outcomes = Counter(outcome for disposition, outcome in left if disposition in DEAD_OR_HOSPICE)
    assert outcomes.keys() == {"NO"}


def test_medication_columns_agree(columns: Columns) -> None:
    drugs = zip(*(columns[name] for name in DRUGS), strict=True)
    rest = zip(columns["change"], columns["diabetesMed"], strict=True)
    for doses, (change, prescribed) in zip(drugs, rest, strict=True):
        given = len(doses) - doses.count("No")
        assert (prescribed == "Yes") == (given > 0)
        assert (change == "Ch") == (given > 1 or "Up" in doses or "Down" in doses)


def test_patients_return_as_often_as_in_the_real_file(columns: Columns) -> None:
    encounters = Counter(columns["patient_nbr"])
    assert len(encounters) == pytest.approx(71_518, rel=0.02)
    seen = Counter(encounters.values())
    for number, count in MARGINALS["encounters_per_patient"].items():
        assert seen[int(number)] == pytest.approx(count, abs=4 * math.sqrt(count) + 3), number
    assert max(seen) <= 40


def test_patients_keep_race_and_gender_and_nearly_age(columns: Columns) -> None:
    for name, lowest in (("race", 1.0), ("gender", 1.0), ("age", 0.97)):
        pairs = set(zip(columns["patient_nbr"], columns[name], strict=True))
        values = Counter(Counter(patient for patient, _ in pairs).values())
        assert values[1] >= lowest * values.total(), name
        assert values.keys() <= {1, 2}, name


def test_patients_stay_within_their_block(lines: list[bytes]) -> None:
    first, second = (
        {line.split(b",", 2)[1] for line in lines[start : start + synthetic.BLOCK_ROWS]}
        for start in (0, synthetic.BLOCK_ROWS)
    )
    assert first.isdisjoint(second)


def test_memory_does_not_grow_with_rows() -> None:
    def peak(blocks: int) -> int:
        stream = csv_blocks(synthetic.MAX_ROWS)
        tracemalloc.reset_peak()
        for _ in islice(stream, blocks):
            pass
        return tracemalloc.get_traced_memory()[1]

    next(csv_blocks(1))  # the tables, which stay
    tracemalloc.start()
    try:
        assert peak(10) < 1.1 * peak(3)
    finally:
        tracemalloc.stop()


def test_write_csv_writes_the_stream_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "diabetes.csv"
    write_csv(path, rows=10_500, seed=9)
    assert path.read_bytes() == text(10_500, seed=9)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_write_csv_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    def breaks(rows: int, seed: int) -> Iterator[bytes]:
        yield b"half of it"
        raise OSError("no space left on device")

    path = tmp_path / "diabetes.csv"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(synthetic, "csv_blocks", breaks)
    with pytest.raises(OSError, match="no space left"):
        write_csv(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("rows", [0, -1, 100_000_001])
def test_rows_out_of_range_are_refused_before_anything_happens(tmp_path: Path, rows: int) -> None:
    with pytest.raises(ValueError, match="rows must be from 1 to 100,000,000, got"):
        csv_blocks(rows)
    with pytest.raises(ValueError, match="rows must be"):
        write_csv(tmp_path / "folder" / "diabetes.csv", rows)
    assert list(tmp_path.iterdir()) == []


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        csv_blocks(10, seed=-1)


def test_marginals_are_small_and_name_their_source() -> None:
    assert synthetic.MARGINALS_PATH.stat().st_size < 60_000
    for word in ("CC BY 4.0", "296", "Clore", "Cios", "DeShazo", "Strack"):
        assert word in MARGINALS["source"]
    totals = {sum(counts.values()) for counts in MARGINALS["columns"].values()}
    assert totals == {DEFAULT_ROWS}


def test_fit_counts_what_was_generated(tmp_path: Path, columns: Columns) -> None:
    source, output = tmp_path / "diabetes.csv", tmp_path / "marginals.json"
    write_csv(source, rows=5_000)
    main = runpy.run_path(str(FIT))["main"]
    main([str(source), "--output", str(output)])
    fitted = json.loads(output.read_text(encoding="ascii"))
    assert fitted.keys() == MARGINALS.keys()
    for name, counts in fitted["columns"].items():
        assert counts == Counter(columns[name][:5_000])
    for part in ("regimens", "diagnoses"):
        assert fitted[part].keys() <= MARGINALS[part].keys()


def test_fit_refuses_a_broken_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "diabetes.csv", tmp_path / "marginals.json"
    source.write_bytes(text(3).replace(b"ale,", b"?,"))
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(FIT))["main"]([str(source), "--output", str(output)])
    assert "line 2 breaks the contract" in capsys.readouterr().err
    assert not output.exists()


def auroc(scores: list[float] | list[int], outcomes: tuple[str, ...]) -> float:
    """Chance that a score of `<30` exceeds one of the others; ties count half."""
    positives = Counter(s for s, o in zip(scores, outcomes, strict=True) if o == "<30")
    negatives = Counter(s for s, o in zip(scores, outcomes, strict=True) if o != "<30")
    won = below = 0.0
    for score in sorted(positives | negatives):
        won += positives[score] * (below + negatives[score] / 2)
        below += negatives[score]
    return won / (positives.total() * negatives.total())
