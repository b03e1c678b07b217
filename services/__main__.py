"""`python -m services run | up | down | docs`: what `make` calls."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ingestion.errors import IngestionError
from services.airflow import AirflowError
from services.dbt import DbtError
from services.mlflow_server import MlflowError
from services.observability import ObservabilityError
from services.platform import Platform
from services.postgres import PostgresError
from services.web import WebError
from settings import PROJECT_ROOT, settings
from training.errors import TrainingError


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 with one message on standard error, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m services", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="start everything, run the pipeline, show the result")
    commands.add_parser("up", help="start all services, and nothing more")
    commands.add_parser("down", help="stop all services; data stay")
    docs = commands.add_parser("docs", help="build dbt's documentation as one static page")
    docs.add_argument("--page", type=Path, default=PROJECT_ROOT / "site" / "dbt.html")
    arguments = parser.parse_args(argv)

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    # Its retries are told by our own messages.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        platform = Platform(settings())
        if arguments.command == "run":
            return 0 if platform.run() else 1
        if arguments.command == "up":
            platform.up()
        elif arguments.command == "down":
            platform.down()
        else:
            platform.write_static_docs(arguments.page)
    except (
        IngestionError,
        PostgresError,
        DbtError,
        AirflowError,
        MlflowError,
        ObservabilityError,
        TrainingError,
        WebError,
    ) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What was started goes on; make down stops it.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
