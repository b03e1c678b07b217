"""docs/experiments.md keeps its word: its candidate trains, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from settings import PROJECT_ROOT, Settings
from training import candidates
from training.__main__ import _parser
from training.candidates import Table, never_stop
from training.inference import sigmoid
from training.metrics import Scores

PAGE = (PROJECT_ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^python -m training (.*?)(?:  .*)?$", PAGE, re.MULTILINE)


def test_the_candidate_of_the_page_is_short_and_trains(tmp_path: Path) -> None:
    assert len(CODE.splitlines()) < 60
    (tmp_path / "scorecard.py").write_text(CODE, encoding="utf-8")
    module = candidates.load(candidates.file("scorecard", tmp_path))
    random = np.random.default_rng(1)
    matrix = np.column_stack(
        [random.poisson(2, 3000), random.normal(size=3000), random.integers(0, 5, 3000)]
    ).astype(float)
    matrix[:50, 2] = np.nan
    risk = sigmoid(0.5 * matrix[:, 0] - 2 + np.where(matrix[:, 2] == 3, 1.0, 0.0))
    target = (random.random(3000) < risk).astype(np.int8)
    table = Table(matrix, target, ("visits", "noise", "kind"), (2,))
    model, parameters = module.fit(table, None, module.DEFAULTS, 1, 1, never_stop)
    assert parameters == module.DEFAULTS
    module.save(model, tmp_path)
    again = module.load(tmp_path)
    margin = module.margin(again, matrix)
    assert np.array_equal(margin, module.margin(model, matrix))
    np.testing.assert_allclose(module.contributions(again, matrix).sum(axis=1), margin)
    assert Scores(target, sigmoid(margin)).auroc(np.ones(3000)) > 0.65
    # A value that no training row had is scored like any other.
    assert np.isfinite(module.margin(again, np.array([[99.0, -9.0, np.nan]]))).all()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_understood(command: str) -> None:
    words = shlex.split(command, comments=True)
    assert _parser(Settings()).parse_args(words).command == words[0]


def test_the_page_names_every_command() -> None:
    named = {shlex.split(command, comments=True)[0] for command in COMMANDS}
    named |= set(re.findall(r"`?python -m training (\w+)", PAGE))
    (choices,) = [
        action.choices
        for action in _parser(Settings())._actions
        if action.dest == "command" and action.choices
    ]
    assert set(choices) <= named
