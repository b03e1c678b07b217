"""`python -m ingestion`: the same functions as the DAG's tasks, by hand."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg2
from pydantic import ValidationError

from ingestion.errors import IngestionError
from ingestion.load import load, validate
from ingestion.source import Source, obtain
from ingestion.synthetic import DEFAULT_ROWS, DEFAULT_SEED, write_csv
from settings import Settings, settings


def _parser(defaults: Settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ingestion", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--source",
        default=defaults.source,
        help="path to a zip or csv, a URL, or synthetic[:rows[:seed]] (default: DIABETES_SOURCE, "
        "else the publisher's zip)",
    )
    limit = argparse.ArgumentParser(add_help=False)
    limit.add_argument(
        "--reject-limit-percent",
        type=_percent,
        default=defaults.reject_limit_percent,
        help="share of broken rows from which nothing is loaded (default: %(default)s)",
    )

    commands.add_parser("download", parents=[source], help="fetch the source into the cache")
    commands.add_parser(
        "validate", parents=[source, limit], help="check the source against the contract"
    )
    run = commands.add_parser(
        "load", parents=[source, limit], help="load the source into raw_data.diabetes"
    )
    run.add_argument(
        "--full-refresh",
        action="store_true",
        help="also remove the encounters that the source does not hold",
    )
    synthesize = commands.add_parser("synthesize", help="write a synthetic CSV")
    synthesize.add_argument("path", type=Path)
    synthesize.add_argument("--rows", type=int, default=DEFAULT_ROWS)
    synthesize.add_argument("--seed", type=int, default=DEFAULT_SEED)
    return parser


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 100, got {text}")
    return value


def _run(arguments: argparse.Namespace, chosen: Settings) -> dict[str, Any]:
    if arguments.command == "synthesize":
        write_csv(arguments.path, rows=arguments.rows, seed=arguments.seed)
        return {"path": str(arguments.path), "rows": arguments.rows, "seed": arguments.seed}
    source = Source.parse(arguments.source)
    if arguments.command == "download" and source.kind == "synthetic":
        raise IngestionError(f"{source.text}: nothing to download; write a file with synthesize")
    expected = chosen.expected_sha256(arguments.source)
    with tempfile.TemporaryDirectory(prefix="diabetes-") as folder:
        path = obtain(source, Path(folder), chosen.cache_dir, expected)
        if arguments.command == "download":
            return {"path": str(path)}
        if arguments.command == "validate":
            return asdict(
                validate(
                    path,
                    reject_limit_percent=arguments.reject_limit_percent,
                    expected_sha256=expected,
                )
            )
        return asdict(
            load(
                path,
                chosen.dsn,
                source=arguments.source,
                run_id="command line",
                reject_limit_percent=arguments.reject_limit_percent,
                expected_sha256=expected,
                full_refresh=arguments.full_refresh,
            )
        )


def main(argv: list[str] | None = None) -> int:
    """Run one command; its result goes to standard output as JSON.

    Returns:
        The exit code: 0, or 1 with one message on standard error.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        chosen = settings()
        arguments = _parser(chosen).parse_args(argv)
        result = _run(arguments, chosen)
    except ValidationError as error:
        return _fail(
            "; ".join(
                f"DIABETES_{str(wrong['loc'][0]).upper()}: {wrong['msg']}"
                for wrong in error.errors()
            )
        )
    except (IngestionError, ValueError, OSError) as error:
        return _fail(str(error))
    except psycopg2.Error as error:
        return _fail(
            f"the database at {chosen.db_host}:{chosen.db_port} can't be used: "
            f"{str(error).strip()}; start it with make run, or set DIABETES_DB_*"
        )
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")  # libpq's messages have many lines
    return 1


if __name__ == "__main__":
    sys.exit(main())
