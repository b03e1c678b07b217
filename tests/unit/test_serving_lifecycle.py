"""Which model answers: real model folders, and a registry that is a fake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import lifecycle
from serving.errors import ModelRefusedError, RegistryError
from serving.lifecycle import Keeper
from serving.model import Model
from tests.served import wait_until
from training import candidates
from training.candidates import Table
from training.inference import Encoder, FeatureQuery, Scorer, definition_sha256, sigmoid

DEFINITION: dict[str, Any] = {
    "fields": [
        {"name": "race", "column": "race", "kind": "category"},
        {"name": "number_inpatient", "column": "number_inpatient", "kind": "count"},
        {
            "name": "discharge_disposition_id",
            "column": "discharge_disposition_id",
            "kind": "code",
        },
    ],
    "features": [
        {"name": "race", "type": "text", "nominal": True},
        {"name": "number_inpatient", "type": "integer", "nominal": False},
    ],
    "tables": {
        "discharge_dispositions": {
            "columns": ["discharge_disposition_id", "description", "exclusion_reason"],
            "key": "discharge_disposition_id",
            "rows": [[1, "Home", None], [11, "Expired", "died"], [13, "Hospice", "hospice"]],
        },
    },
    "query": """
        select d.encounter_id, coalesce(d.race, 'Unknown') as race,
            coalesce(d.number_inpatient, 0) as number_inpatient
        from diabetes as d order by d.encounter_id
    """,
}
DEFINITION["sha256"] = definition_sha256(DEFINITION)
RAW: dict[str, list[Any]] = {
    "race": ["Asian", "Other", "?"] * 60,
    "number_inpatient": [0, 1, 2, 3, 4, 5] * 30,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a version as `Registry.fetch` leaves it, quickly fitted."""
    path: Path = tmp_path_factory.mktemp("version")
    files = path / "readmission"
    (files / "fitted").mkdir(parents=True)
    query = FeatureQuery(DEFINITION)
    rows = query.rows(RAW, 180)
    encoder = Encoder(query.names, {"race": ["Asian", "Other", "Unknown"]})
    matrix = encoder.matrix(list(zip(*rows, strict=True)))
    risk = sigmoid(-2 + 0.7 * matrix[:, 1])
    target = (np.random.default_rng(5).random(180) < risk).astype(np.int8)
    file = candidates.file("logistic_regression")
    candidate = candidates.load(file)
    table = Table(matrix, target, encoder.names, encoder.nominal)
    fitted, _ = candidate.fit(table, None, candidate.DEFAULTS, 1, 1, lambda *_: False)
    candidate.save(fitted, files / "fitted")
    shutil.copy(file, files / "candidate.py")
    shutil.copy(Path(candidates.__file__).parents[1] / "inference.py", files / "inference.py")
    scoring = {"slope": 1.0, "intercept": 0.0, "thresholds": {"0.2": 0.3}}
    records = [{"race": "Asian", "number_inpatient": number} for number in range(5)]
    for name, content in {
        "readmission/features.json": DEFINITION,
        "readmission/encoder.json": {"names": encoder.names, "vocabularies": encoder.vocabularies},
        "readmission/scoring.json": scoring,
        "readmission/reference.json": {"percentiles": np.linspace(0, 1, 101).tolist()},
        "evaluation.json": {"candidate": "logistic_regression"},
    }.items():
        (path / name).write_text(json.dumps(content))
    scorer = Scorer(files)
    columns = {name: [record[name] for record in records] for name in records[0]}
    answered = scorer.probabilities(scorer.matrix(scorer.features(columns, 5))).tolist()
    examples = {"records": records, "probabilities": answered}
    (files / "examples.json").write_text(json.dumps(examples))
    (path / "model_card.html").write_text("<p>card</p>")
    (path / "version.json").write_text(json.dumps(found("1")))
    return path


def found(version: str, run_id: str = "") -> dict[str, Any]:
    """What a registry says of a version."""
    return {
        "name": "diabetes_readmission",
        "alias": "champion",
        "version": version,
        "run_id": run_id or f"run of {version}",
        "tags": {"feature_sha256": DEFINITION["sha256"]},
    }


class FakeRegistry:
    """Stands for MLflow: has copies of one model, of which some are spoilt.

    Attributes:
        alias: number of the version that is to be served; None: none has it.
        away: whether it does not answer at all.
        broken_download: whether downloads break off.
        fetched: versions in the order in which they were downloaded.
        spoil: what is done to a version's folder, by number.
        runs: ids of runs, where they are not the usual ones, by number.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.alias: str | None = "1"
        self.away = False
        self.broken_download = False
        self.fetched: list[str] = []
        self.spoil: dict[str, Callable[[Path], None]] = {}
        self.runs: dict[str, str] = {}

    def find(self, alias: str, timeout: float = 5) -> dict[str, Any] | None:
        if self.away:
            raise RegistryError("the fake is away")
        return found(self.alias, self.runs.get(self.alias, "")) if self.alias else None

    def fetch(self, said: dict[str, Any], folder: Path) -> None:
        if self.away or self.broken_download:
            raise RegistryError("the download broke off")
        self.fetched.append(said["version"])
        shutil.copytree(self._folder, folder)
        (folder / "version.json").write_text(json.dumps(said))
        if spoil := self.spoil.get(said["version"]):
            spoil(folder)


@pytest.fixture
def registry(made: Path) -> FakeRegistry:
    return FakeRegistry(made)


def keeper(registry: FakeRegistry, cache: Path) -> tuple[Keeper, list[str]]:
    """A keeper and the outcomes that it told."""
    cache.mkdir(exist_ok=True)
    outcomes: list[str] = []
    return Keeper(registry, "champion", cache, outcomes.append), outcomes  # type: ignore[arg-type]


def served(kept: Keeper) -> str | None:
    return kept.model.version if kept.model else None


def test_the_version_of_the_alias_is_served(registry: FakeRegistry, tmp_path: Path) -> None:
    kept, outcomes = keeper(registry, tmp_path)
    assert kept.model is None
    assert "alias champion" in kept.reason
    swaps: list[tuple[str | None, str]] = []

    def on_swap(model: Model) -> None:
        swaps.append((served(kept), model.version))  # told before it takes over

    kept.refresh(on_swap)
    kept.refresh(on_swap)
    assert (served(kept), kept.source) == ("1", "registry")
    registry.alias = "2"
    kept.refresh(on_swap)
    assert swaps == [(None, "1"), ("1", "2")]
    assert outcomes == ["swapped", "swapped"]
    assert registry.fetched == ["1", "2"]
    assert kept.loaded_at > 0
    # Back again: it is still in the cache.
    registry.alias = "1"
    kept.refresh()
    assert served(kept) == "1"
    assert registry.fetched == ["1", "2"]


def edit(folder: Path, file: str, **changed: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def wrong_tag(folder: Path) -> None:
    edit(folder, "version.json", tags={"feature_sha256": "0" * 64})


def no_tag(folder: Path) -> None:
    edit(folder, "version.json", tags={})


def wrong_sha256(folder: Path) -> None:
    edit(folder, "readmission/features.json", sha256="0" * 64)


def other_query(folder: Path) -> None:
    query = DEFINITION["query"].replace("'Unknown'", "'Missing'")
    edit(folder, "readmission/features.json", query=query)


def flipped_example(folder: Path) -> None:
    path = folder / "readmission" / "examples.json"
    examples = json.loads(path.read_text())
    examples["probabilities"][3] += 1e-6
    path.write_text(json.dumps(examples))


def nan_example(folder: Path) -> None:
    path = folder / "readmission" / "examples.json"
    examples = json.loads(path.read_text())
    examples["probabilities"][3] = float("nan")
    path.write_text(json.dumps(examples))


def no_examples(folder: Path) -> None:
    edit(folder, "readmission/examples.json", records=[], probabilities=[])


def too_few_expected(folder: Path) -> None:
    edit(folder, "readmission/examples.json", probabilities=[0.5])


def other_scoring(folder: Path) -> None:
    edit(folder, "readmission/scoring.json", slope=1.01)


def falling_percentiles(folder: Path) -> None:
    edit(folder, "readmission/reference.json", percentiles=[1.0, 0.5] + [1.0] * 99)


def too_few_percentiles(folder: Path) -> None:
    edit(folder, "readmission/reference.json", percentiles=[0.1, 0.5])


def corrupt_json(folder: Path) -> None:
    (folder / "readmission" / "encoder.json").write_text('{"names": ["race"')


def missing_file(folder: Path) -> None:
    (folder / "readmission" / "scoring.json").unlink()


def no_fitted(folder: Path) -> None:
    shutil.rmtree(folder / "readmission" / "fitted")


def no_code(folder: Path) -> None:
    (folder / "readmission" / "candidate.py").write_text("not python at all")


def no_facts(folder: Path) -> None:
    (folder / "evaluation.json").unlink()


SPOILT: dict[Callable[[Path], None], str] = {
    wrong_tag: "the registry 000000000000",
    no_tag: "the registry nothing",
    wrong_sha256: "but it says 000000000000",
    other_query: "its feature SQL has SHA-256",
    flipped_example: "self-test failed; example 3 scores",
    nan_example: "self-test failed; example 3 scores",
    no_examples: "no examples to test it with",
    too_few_expected: "no examples to test it with",
    other_scoring: "self-test failed",
    falling_percentiles: "holds no percentiles",
    too_few_percentiles: "holds no percentiles",
    corrupt_json: "can't be loaded: JSONDecodeError",
    missing_file: "can't be loaded: FileNotFoundError",
    no_fitted: "can't be loaded: ",
    no_code: "can't be loaded: SyntaxError",
    no_facts: "can't be loaded: FileNotFoundError",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_version_is_refused_once_and_the_next_one_is_not(
    registry: FakeRegistry, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    kept, outcomes = keeper(registry, tmp_path)
    kept.refresh()
    registry.alias, registry.spoil["2"] = "2", spoil
    for _ in range(3):
        kept.refresh()
        assert served(kept) == "1"
        assert SPOILT[spoil] in kept.reason
    assert outcomes == ["swapped", "refused"]
    assert registry.fetched == ["1", "2"]
    assert not (tmp_path / "2").exists()
    registry.alias = "3"
    kept.refresh()
    assert served(kept) == "3"
    # Nor is it tried when the alias comes back to it.
    registry.alias = "2"
    kept.refresh()
    assert (served(kept), registry.fetched) == ("3", ["1", "2", "3"])


def test_a_spoilt_first_version_leaves_nothing_served(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    registry.spoil["1"] = missing_file
    kept, outcomes = keeper(registry, tmp_path)
    kept.refresh()
    assert (kept.model, outcomes) == (None, ["refused"])
    assert "FileNotFoundError" in kept.reason
    assert [*tmp_path.iterdir()] == []


def test_a_download_that_breaks_off_is_tried_again(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.broken_download = True
    kept, outcomes = keeper(registry, tmp_path)
    kept.refresh()
    kept.refresh()
    assert (served(kept), kept.reason) == (None, "the download broke off")
    registry.broken_download = False
    kept.refresh()
    assert (served(kept), outcomes) == ("1", ["failed", "failed", "swapped"])


def test_nobody_has_the_alias(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.alias = None
    kept, outcomes = keeper(registry, tmp_path)
    kept.refresh()
    assert (served(kept), outcomes) == (None, [])
    assert "no version of the registered model has the alias champion" in kept.reason
    registry.alias = "1"
    kept.refresh()
    registry.alias = None
    kept.refresh()
    assert served(kept) == "1"


def test_without_a_registry_the_cache_is_served_until_it_is_back(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    first, _ = keeper(registry, tmp_path)
    first.refresh()
    registry.alias = "2"
    first.refresh()

    registry.away = True
    kept, outcomes = keeper(registry, tmp_path)
    kept.refresh()
    assert (served(kept), kept.source, outcomes) == ("2", "cache", ["swapped"])
    kept.refresh()
    assert outcomes == ["swapped"]
    registry.away = False
    kept.refresh()
    assert (served(kept), kept.source, outcomes) == ("2", "registry", ["swapped"])
    assert registry.fetched == ["1", "2"]
    # Away later: it goes on.
    registry.away = True
    kept.refresh()
    assert (served(kept), kept.source) == ("2", "registry")
    assert kept.reason == "the fake is away"


def test_without_registry_and_cache_it_says_why(registry: FakeRegistry, tmp_path: Path) -> None:
    registry.away = True
    kept, outcomes = keeper(registry, tmp_path)
    kept.refresh()
    assert (kept.model, outcomes) == (None, [])
    assert kept.reason == "no version is in the cache, and the fake is away"


@pytest.mark.parametrize("pointer", ["", "{", "[]", "{}", "null", '{"version": null}'])
def test_a_broken_pointer_is_no_version(
    registry: FakeRegistry, tmp_path: Path, pointer: str
) -> None:
    first, _ = keeper(registry, tmp_path)
    first.refresh()
    for name in ("champion.json", "challenger.json"):
        (tmp_path / name).write_text(pointer)
    registry.away = True
    kept, _ = keeper(registry, tmp_path)
    kept.refresh()
    assert kept.model is None
    assert "no version is in the cache" in kept.reason
    registry.away = False
    kept.refresh()
    assert served(kept) == "1"


@pytest.mark.parametrize("spoil", [missing_file, flipped_example, shutil.rmtree])
def test_a_broken_copy_is_not_served_and_fetched_anew(
    registry: FakeRegistry, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    first, _ = keeper(registry, tmp_path)
    first.refresh()
    spoil(tmp_path / "1")
    registry.away = True
    kept, outcomes = keeper(registry, tmp_path)
    kept.refresh()
    assert kept.model is None
    assert "and the cached copy is broken: " in kept.reason
    registry.away = False
    kept.refresh()
    assert (served(kept), outcomes, registry.fetched) == ("1", ["swapped"], ["1", "1"])


def test_another_registrys_version_of_the_same_number_is_not_served(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    first, _ = keeper(registry, tmp_path)
    first.refresh()
    registry.runs["1"] = "of another registry"
    kept, _ = keeper(registry, tmp_path)
    kept.refresh()
    assert kept.model is not None
    assert kept.model.about["run_id"] == "of another registry"
    assert registry.fetched == ["1", "1"]


def test_old_versions_leave_the_cache(registry: FakeRegistry, tmp_path: Path) -> None:
    kept, _ = keeper(registry, tmp_path)
    (tmp_path / "challenger.json").write_text('{"version": "1"}')
    for version in range(1, 8):
        registry.alias = str(version)
        kept.refresh()
    # The one that is served, the one that another alias serves, and two more.
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert {"7", "1"} <= folders
    assert len(folders) == 2 + lifecycle._KEPT


def test_it_follows_the_alias_until_it_is_closed(registry: FakeRegistry, tmp_path: Path) -> None:
    kept, _ = keeper(registry, tmp_path)
    kept.follow(0.01, lambda model: None)
    wait_until(lambda: served(kept) == "1")
    registry.alias = "2"
    wait_until(lambda: served(kept) == "2")
    # Whatever goes wrong, it goes on.
    registry.alias, registry.spoil["3"] = "3", lambda folder: 1 / 0  # type: ignore[assignment]
    wait_until(lambda: "3" in registry.fetched)
    registry.alias = "4"
    wait_until(lambda: served(kept) == "4")
    kept.close()
    assert kept._thread is not None
    kept._thread.join(5)
    assert not kept._thread.is_alive()


def test_a_model_scores_and_tells_who_can_not_come_back(made: Path) -> None:
    model = Model(made)
    columns: dict[str, list[Any]] = {
        "race": ["Asian", "?", None, "Other"],
        "number_inpatient": [3, 3, 3, "3"],
        "discharge_disposition_id": [1, 11, 13, "11"],
    }
    scored = model.score(columns, 4)
    assert scored.excluded == {1: "died", 2: "hospice", 3: "died"}
    assert np.isnan(scored.probability).tolist() == [False, True, True, True]
    assert np.isnan(scored.percentile).tolist() == [False, True, True, True]
    assert scored.percentile[0] == pytest.approx(100 * scored.probability[0])
    shares = model.shares(scored.rows)
    log_odds = np.log(scored.probability[0] / (1 - scored.probability[0]))
    assert shares[0].sum() == pytest.approx(log_odds)
    assert model.feature_names == ("race", "number_inpatient")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="can't be loaded: FileNotFoundError"):
        Model(tmp_path / "nowhere")
