"""`python -m training`: the steps of the DAG `diabetes_model_training`, and what people decide."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any

from settings import Settings, settings
from training import actions
from training.errors import TrainingError
from training.pipeline import Training
from training.plan import Spec


def _parser(chosen: Settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="search, choose, judge, register and promote")
    run.add_argument(
        "--candidates",
        default=chosen.training_candidates,
        help="names of files in training/candidates, comma-separated (default: all)",
    )
    run.add_argument("--trials", type=int, default=chosen.training_trials, help="in all")
    run.add_argument("--batches", type=int, default=0, help="of train, from the first (0: all)")
    run.add_argument("--seed", type=int, default=chosen.training_seed)
    run.add_argument("--classes", type=int, choices=(2, 3), default=2)
    run.add_argument("--force", action="store_true", help="even if the champion is made of this")
    run.add_argument("--no-learning-curve", action="store_true", help="leave the curve out")
    run.add_argument("--decided-by", default="command line", help="for ml.promotion_log")

    commands.add_parser("compare", help="list candidates' runs and versions, best first")
    register = commands.add_parser("register", help="judge and register the run of a candidate")
    register.add_argument("run_id")
    register.add_argument("--decided-by", default="command line")
    promote = commands.add_parser("promote", help="make a registered version the champion")
    promote.add_argument("version")
    promote.add_argument("--decided-by", required=True, help="your name, for ml.promotion_log")
    promote.add_argument(
        "--override-leak",
        action="store_true",
        help="answer by name for an AUROC that looks like a leak",
    )
    rollback = commands.add_parser("rollback", help="make the former champion the champion again")
    rollback.add_argument("--to", default="", help="a version (default: the former champion)")
    rollback.add_argument("--decided-by", required=True, help="your name, for ml.promotion_log")
    rollback.add_argument("--reason", required=True)
    freeze = commands.add_parser("freeze", help="freeze the validation set of comparisons anew")
    freeze.add_argument("--yes", action="store_true", required=True, help="the old one is lost")
    commands.add_parser("upload", help="send runs that were kept while MLflow was away")
    return parser


def _run(training: Training, arguments: argparse.Namespace, threads: int) -> Any:
    if arguments.command == "run":
        names = tuple(name for name in arguments.candidates.split(",") if name)
        spec = Spec(
            candidates=names,
            trials=arguments.trials,
            batches=arguments.batches,
            seed=arguments.seed,
            threads=threads,
            classes=arguments.classes,
            force=arguments.force,
        )
        return training.run(spec, learning_curve=not arguments.no_learning_curve)
    if arguments.command == "register":
        return training.register(arguments.run_id)
    if arguments.command == "compare":
        return actions.compare_runs(training)
    if arguments.command == "promote":
        return actions.promote(training, arguments.version, arguments.override_leak)
    if arguments.command == "rollback":
        return actions.rollback(training, arguments.to, arguments.reason)
    if arguments.command == "freeze":
        return actions.freeze(training)
    return {"sent": training.tracker.upload()}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its result goes to standard output as JSON (`compare`: as a table).

    Returns:
        The exit code: 0, or 1 with one message on standard error.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("mlflow", "alembic", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    chosen = settings()
    arguments = _parser(chosen).parse_args(argv)
    try:
        training = actions.open_training(chosen, decided_by=getattr(arguments, "decided_by", ""))
        with training.tracker.connected():
            result = _run(training, arguments, chosen.training_threads)
    except TrainingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    text = result if isinstance(result, str) else json.dumps(result, indent=2)
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
