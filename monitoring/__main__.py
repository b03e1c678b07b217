"""`python -m monitoring exporter`: the pipeline's metrics for Prometheus."""

from __future__ import annotations

import argparse
import logging
import sys

from settings import settings


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 1 with one message on standard error.
    """
    chosen = settings()
    parser = argparse.ArgumentParser(prog="python -m monitoring", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    exporter = commands.add_parser("exporter", help="answer Prometheus until SIGTERM or Ctrl-C")
    exporter.add_argument("--host", default=chosen.exporter_host, help="address to listen on")
    exporter.add_argument("--port", type=int, default=chosen.exporter_port, help="port there")
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Its own tries again are none of the reader's business.
    logging.getLogger("urllib3").setLevel(logging.ERROR)

    from monitoring.exporter import ExporterError, serve

    try:
        serve(chosen, arguments.host, arguments.port)
    except ExporterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
