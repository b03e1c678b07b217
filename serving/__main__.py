"""`python -m serving`: run the prediction API, or make a key for it."""

from __future__ import annotations

import argparse
import logging
import secrets
import signal
import sys
from hashlib import sha256

from serving.errors import ServingError
from settings import Settings, settings


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 1 with one message on standard error.
    """
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="serve until SIGTERM or Ctrl-C (the default)")
    key = commands.add_parser("key", help="make a key; its hash goes to DIABETES_API_KEY_HASHES")
    key.add_argument("name", help="whose it is")
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if arguments.command == "key":
        if "," in arguments.name or not arguments.name.strip() or not arguments.name.isprintable():
            key.error("a name without commas is needed")
        made = secrets.token_urlsafe(32)
        digest = sha256(made.encode()).hexdigest()
        sys.stdout.write(f"key   {made}\nhash  {arguments.name}:{digest}\n")
        return 0
    try:
        run(settings())
    except ServingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def run(chosen: Settings) -> None:
    """Serve until a signal comes; requests that have begun are answered first.

    Raises:
        ServingError: the service can't start.
    """
    import uvicorn

    from serving.app import create_app

    # When all is answered uvicorn sends itself the signal once more, to be ended by it: to end as
    # asked is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        create_app(chosen),
        host=chosen.api_host,
        port=chosen.api_port,
        lifespan="on",
        # Paths of ours hold no identifier, but a caller's could.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=60,
    )


if __name__ == "__main__":
    sys.exit(main())
