"""What a result depends on beside data and seed."""

from __future__ import annotations

import ast
import subprocess
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest

from settings import PROJECT_ROOT
from training import candidates, environment


def file(folder: Path, text: str) -> Path:
    path = folder / f"file{len(list(folder.iterdir()))}.py"
    path.write_text(text)
    return path


def test_requirements_are_the_third_party_imports_pinned(tmp_path: Path) -> None:
    first = file(
        tmp_path,
        "from __future__ import annotations\n"
        "import json, os.path\n"
        "import numpy as np\n"
        "from sklearn.linear_model import LogisticRegression\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    import optuna\n"
        "    from training.inference import Matrix\n",
    )
    second = file(tmp_path, "import numpy.typing\nimport pandas\nimport not_installed_anywhere\n")
    assert environment.requirements(first, second) == [
        f"{name}=={version(name)}" for name in ("numpy", "pandas", "scikit-learn")
    ]
    assert environment.requirements() == []


def test_requirement_is_the_distribution_that_holds_all_of_it(tmp_path: Path) -> None:
    path = file(tmp_path, "import mlflow\nimport xgboost\n")
    assert environment.requirements(path) == [
        f"mlflow=={version('mlflow')}",
        f"xgboost-cpu=={version('xgboost-cpu')}",
    ]


@pytest.mark.parametrize("name", candidates.names())
def test_a_model_requires_its_library(name: str) -> None:
    folder = PROJECT_ROOT / "training"
    found = environment.requirements(
        folder / "model_code.py", folder / "inference.py", candidates.file(name)
    )
    library = {"logistic_regression": "scikit-learn", "xgboost": "xgboost-cpu"}.get(name, name)
    names = {one.split("==")[0] for one in found}
    assert {library, "mlflow", "numpy", "pandas"} <= names
    others = {"catboost", "lightgbm", "scikit-learn", "xgboost-cpu", "optuna"} - {library}
    assert not others & names


def test_files_of_a_model_import_at_their_top_only() -> None:
    """Requirements would not know of an import within a function."""
    folder = PROJECT_ROOT / "training"
    files = [folder / "model_code.py", folder / "inference.py"]
    for path in files + [candidates.file(name) for name in candidates.names()]:
        within = [
            each
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            for each in ast.walk(node)
            if isinstance(each, ast.Import | ast.ImportFrom)
        ]
        assert within == [], path


def test_lock_lists_what_is_installed() -> None:
    lines = environment.lock().splitlines()
    assert lines[0].startswith("python==3.11.")
    assert lines[1:] == sorted(set(lines[1:]))
    assert f"numpy=={version('numpy')}" in lines
    assert environment.lock_sha256() == sha256(environment.lock().encode()).hexdigest()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
