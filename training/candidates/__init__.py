"""The kinds of model that compete. One file each; a new file is a new candidate.

A candidate's file trains and scores. The file is stored with every model it trains and is loaded
from there to score, so outside of type checking it imports third-party packages only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from training.errors import TrainingError
from training.inference import Encoder, Matrix, load_module

if TYPE_CHECKING:
    import optuna

    from training.data import Encounters

Report = Callable[[int, float], bool]
"""Called with (iteration, validation log loss); True means: stop, this trial is pruned."""


def never_stop(_iteration: int, _loss: float) -> bool:
    """A `Report` for trainings that nobody prunes."""
    return False


@dataclass(frozen=True, slots=True)
class Table:
    """Encoded encounters.

    Attributes:
        matrix: (rows, features) numbers, and codes of nominal values (NaN: rare or unknown).
        target: (rows,) 0 or 1.
        names: of the features.
        nominal: indices of the nominal features.
    """

    matrix: Matrix
    target: npt.NDArray[np.int8]
    names: tuple[str, ...]
    nominal: tuple[int, ...]

    @classmethod
    def of(cls, encounters: Encounters, encoder: Encoder) -> Table:
        """Encode encounters."""
        matrix = encounters.matrix(encoder)
        return cls(matrix, encounters.target, encoder.names, encoder.nominal)

    def take(self, rows: npt.NDArray[Any]) -> Table:
        """The rows at these positions."""
        return Table(self.matrix[rows], self.target[rows], self.names, self.nominal)


class Candidate(Protocol):
    """What a file in this folder has to define."""

    DEFAULTS: Mapping[str, Any]
    """Hyper-parameters of the first trial, known to be good."""

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Draw hyper-parameters to overlay `DEFAULTS` with."""

    def fit(
        self,
        train: Table,
        validation: Table | None,
        parameters: Mapping[str, Any],
        seed: int,
        threads: int,
        report: Report,
    ) -> tuple[Any, dict[str, Any]]:
        """Train; with `validation` stop when its log loss no longer falls.

        Returns:
            The model, and the parameters that give the same model without `validation` (the
            number of iterations included).
        """

    def save(self, model: Any, folder: Path) -> None:
        """Write the model into an empty folder, in a format of its library (no pickle)."""

    def load(self, folder: Path) -> Any:
        """Read what `save` wrote."""

    def margin(self, model: Any, matrix: Matrix) -> Matrix:
        """Log odds, (rows,), before calibration."""

    def contributions(self, model: Any, matrix: Matrix) -> Matrix:
        """Exact share of each feature in the log odds, and the base, (rows, features + 1)."""


FOLDER = Path(__file__).parent


def names(folder: Path = FOLDER) -> list[str]:
    """Every candidate by the name of its file, in alphabetical order."""
    return sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))


def file(name: str, folder: Path = FOLDER) -> Path:
    """The candidate's file.

    Raises:
        TrainingError: there is none of that name.
    """
    known = names(folder)
    if name not in known:
        raise TrainingError(f"no candidate {name}; known are {', '.join(known)}")
    return folder / f"{name}.py"


def load(path: Path) -> Candidate:
    """Import a candidate from its file, in this checkout or in a stored model.

    Raises:
        TrainingError: the file lacks something a candidate has to define.
    """
    module: ModuleType = load_module(path)
    wanted = ("DEFAULTS", "suggest", "fit", "save", "load", "margin", "contributions")
    if lacking := [name for name in wanted if not hasattr(module, name)]:
        raise TrainingError(f"{path} defines no {', '.join(lacking)} (see training/candidates)")
    return cast(Candidate, module)
