"""The features of a model, taken from dbt: one SQLite query over raw fields, and what it needs.

The chain staging -> ... -> features is read from dbt's compiled manifest, joined into one `WITH`
query, freed of every column that no feature needs (ids, split and outcome among them) and
translated to SQLite. Statistics and lookup tables are read from the database beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
from psycopg2.extensions import parse_dsn

from ingestion.contract import FIELDS, Field
from settings import PROJECT_ROOT
from training.errors import TrainingError
from training.inference import definition_sha256

if TYPE_CHECKING:
    from sqlglot import exp

PROJECT = PROJECT_ROOT / "dbt_diabetes"
FEATURES_MODEL = "int_encounters__features"
TRAIN_MODEL = "diabetes_train"
SOURCE = "diabetes"

RAW_FIELDS: tuple[Field, ...] = tuple(
    field for field in FIELDS if field.kind != "id" and field.name != "readmitted"
)
"""What a caller of a model may send: the publisher's header without ids and outcome."""

_KEYS = {"int_icd9_lookup": "icd9_key", "int_statistics": None}


def read(dsn: str) -> dict[str, Any]:
    """Read the definition of the features from dbt and the database.

    Args:
        dsn: connection string (libpq) of the data database.

    Returns:
        `fields` (name, column, kind of each raw field), `features` (name, type, nominal),
        `query` (SQLite), `tables` (columns, key and rows of statistics and lookups) and `sha256`
        of all that determines a feature but the statistics' values.

    Raises:
        TrainingError: dbt can't compile, or a table is missing or empty.
    """
    manifest = _compile(dsn)
    nodes = {
        node["name"]: node
        for node in manifest["nodes"].values()
        if node["resource_type"] in ("model", "seed")
    }
    names = {node["unique_id"]: name for name, node in nodes.items()}
    chain, shipped = _walk(nodes, names)
    features = [
        {"name": name, "type": column["data_type"], "nominal": _is_nominal(column)}
        for name, column in nodes[TRAIN_MODEL]["columns"].items()
        if _meta(column).get("role") == "feature"
    ]
    query = _query(nodes, chain, shipped, [feature["name"] for feature in features])
    tables = _tables(dsn, nodes, shipped)
    definition = {"query": query, "features": features, "tables": tables}
    return {
        "fields": [
            {"name": field.name, "column": field.column, "kind": field.kind} for field in RAW_FIELDS
        ],
        **definition,
        "sha256": definition_sha256(definition),
    }


def _compile(dsn: str) -> dict[str, Any]:
    connection = parse_dsn(dsn)
    variables = {
        "DIABETES_DB_HOST": connection["host"],
        "DIABETES_DB_PORT": connection["port"],
        "DIABETES_DB_USER": connection["user"],
        "DIABETES_DB_PASSWORD": connection.get("password", ""),
        "DIABETES_DB_NAME": connection["dbname"],
    }
    with tempfile.TemporaryDirectory(prefix="diabetes-features-") as folder:
        command = [
            str(Path(sys.executable).with_name("dbt")),
            "--quiet",
            "--log-path",
            folder,
            "compile",
            "--no-populate-cache",
            "--select",
            f"+{FEATURES_MODEL}",
            "--target-path",
            folder,
        ]
        done = subprocess.run(
            command,
            cwd=PROJECT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stdout + done.stderr)[-3000:]
            raise TrainingError(f"dbt can't compile the features:\n{said}")
        manifest: dict[str, Any] = json.loads((Path(folder) / "manifest.json").read_text())
        return manifest


def _meta(node: Mapping[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = node.get("config", {}).get("meta", {})
    return meta


def _is_nominal(column: Mapping[str, Any]) -> bool:
    return column["data_type"] == "text" or bool(_meta(column).get("nominal"))


def _walk(nodes: Mapping[str, Any], names: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Models to join, parents first, and tables whose rows go with the model."""
    chain: list[str] = []
    shipped: list[str] = []

    def visit(name: str) -> None:
        if name in chain or name in shipped:
            return
        node = nodes[name]
        if node["resource_type"] == "seed" or _meta(node).get("ships_with_model"):
            shipped.append(name)
            return
        for parent in node["depends_on"]["nodes"]:
            if parent in names:
                visit(names[parent])
        chain.append(name)

    visit(FEATURES_MODEL)
    return chain, sorted(shipped)


def _query(
    nodes: Mapping[str, Any], chain: list[str], shipped: list[str], features: list[str]
) -> str:
    import sqlglot
    from sqlglot import exp
    from sqlglot.optimizer.pushdown_projections import pushdown_projections
    from sqlglot.optimizer.qualify import qualify

    query = exp.select("encounter_id", *features).from_(chain[-1])
    for name in chain:
        body = sqlglot.parse_one(nodes[name]["compiled_code"], read="postgres")
        for table in body.find_all(exp.Table):
            table.set("db", None)
            table.set("catalog", None)
            table.set("this", exp.to_identifier(table.name))
        query = query.with_(name, as_=body)
    schema: dict[str, object] = {
        SOURCE: {field.column: field.sql_type for field in FIELDS}
        | {"first_load_id": "integer", "last_load_id": "integer"}
    }
    for name in shipped:
        schema[name] = {
            column: settings["data_type"] or "text"
            for column, settings in nodes[name]["columns"].items()
        }
    qualified = qualify(query, schema=schema, dialect="postgres", quote_identifiers=False)
    pruned = pushdown_projections(qualified).transform(_spell_out)
    return f"{pruned.sql('sqlite', pretty=True, comments=False)}\nORDER BY encounter_id"


def _spell_out(node: exp.Expression) -> exp.Expression:
    """What SQLite is slow at, in its own basic operations; the meaning stays.

    `x in ('a', 'b')` becomes `x = 'a' or x = 'b'`: for a list SQLite builds a table, once a query,
    and two dozen of them cost a single encounter four times what its features do. `nullif(x, y)`
    becomes `case`: a call costs more than a comparison, and every text field has one.
    """
    from sqlglot import exp

    if isinstance(node, exp.Nullif):
        same = node.this.copy().eq(node.expression.copy())
        return exp.case().when(same, exp.null()).else_(node.this.copy())
    listed = node.expressions if isinstance(node, exp.In) else []
    if listed and all(isinstance(value, exp.Literal) for value in listed):
        return exp.paren(exp.or_(*(node.this.copy().eq(value) for value in listed)))
    return node


def _tables(dsn: str, nodes: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    tables = {}
    try:
        with closing(psycopg2.connect(dsn)) as connection:
            cursor = connection.cursor()
            for name in names:
                columns = list(nodes[name]["columns"])
                cursor.execute(
                    f"select {', '.join(columns)} from {nodes[name]['relation_name']} order by 1"
                )
                rows = [[_plain(value) for value in row] for row in cursor.fetchall()]
                if not rows:
                    raise TrainingError(f"{nodes[name]['relation_name']} is empty; run dbt build")
                key = _KEYS[name] if name in _KEYS else _seed_key(nodes[name])
                tables[name] = {"columns": columns, "key": key, "rows": rows}
    except psycopg2.Error as error:
        raise TrainingError(
            f"the statistics or lookups of the features can't be read: {str(error).strip()}; "
            "run the DAG diabetes_data_processing (or dbt build) first"
        ) from error
    return tables


def _seed_key(node: Mapping[str, Any]) -> str:
    """First column of a seed, which its tests hold to be unique."""
    return str(next(iter(node["columns"])))


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else value
