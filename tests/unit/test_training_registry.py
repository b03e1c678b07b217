"""A model that nobody has registered, told from one that this login may not read.

The client is a fake that answers as MLflow 3.17 with logins and workspaces does: 403 for either.
tests/cluster/test_mlflow_logins.py asks the real server.
"""

from __future__ import annotations

from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from training.registry import find_version


class Refusing:
    def __init__(self, *visible: str) -> None:
        self.visible = visible

    def get_model_version_by_alias(self, model: str, alias: str) -> Any:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    get_model_version = get_model_version_by_alias

    def search_registered_models(self, wanted: str, max_results: int) -> list[str]:
        assert wanted == "name = 'diabetes_readmission'"
        return list(self.visible)


@pytest.mark.parametrize("which", ["champion", "1"])
def test_model_that_is_not_registered_has_no_version(which: str) -> None:
    assert find_version(Refusing(), which) is None


def test_model_that_may_not_be_read_is_refused() -> None:
    with pytest.raises(MlflowException, match="Permission denied"):
        find_version(Refusing("diabetes_readmission"), "champion")
