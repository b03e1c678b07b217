"""What sqlfluff's jinja templater doesn't know of dbt, so that linting needs no database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jinja2 import pass_context
from jinja2.runtime import Context

_PROJECT = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "dbt_project.yml").read_text(encoding="utf-8")
)


def var(name: str, default: Any = None) -> Any:
    """The project's variables as they are: models loop over them."""
    return _PROJECT["vars"].get(name, default)


class adapter:  # noqa: N801 - the name that macros use
    """Stands for the adapter object."""

    @staticmethod
    @pass_context
    def dispatch(context: Context, name: str, *_: str) -> Callable[..., Any]:
        """The macro for PostgreSQL, else the default one."""
        for prefix in ("postgres__", "default__"):
            if prefix + name in context:
                macro: Callable[..., Any] = context[prefix + name]
                return macro
        raise LookupError(f"no macro postgres__{name} or default__{name}")


class dbt:  # noqa: N801 - the name that macros use
    """Stands for dbt's cross-database macros, as PostgreSQL has them."""

    @staticmethod
    def type_string() -> str:
        return "text"

    @staticmethod
    def position(substring: str, string: str) -> str:
        return f"position({substring} in {string})"


class exceptions:
    """Stands for dbt's exceptions."""

    @staticmethod
    def raise_compiler_error(message: str) -> None:
        raise ValueError(message)


class target:  # noqa: N801 - the name that macros use
    """Stands for the connection."""

    schema = "public"
