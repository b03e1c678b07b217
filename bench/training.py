"""`python -m bench.training`: what training costs and what the champion is worth.

On a platform of its own and the real file (DIABETES_SOURCE): the DAG diabetes_model_training as
`make run` starts it, a single LightGBM run against the logistic regression as baseline, and the
same training once more by hand, which has to give the same champion. Test rows are read by the
champion alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from bench.dag import running_platform
from bench.errors import BenchError
from bench.report import cpu_model, usable_cores
from bench.usage import own_peak_mib, run, sampled
from services import processes
from services.airflow import Airflow
from services.platform import DAG_ID, TRAINING_DAG_ID
from services.state import Secrets
from settings import PROJECT_ROOT, settings

BASELINE = "logistic_regression"
ROUNDS = 3
_TIMEOUT = 3600.0
_SAMPLE_SECONDS = 0.5
_TARGETS: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    ("test AUROC >= 0.68", lambda found: found["test"]["auroc"]["value"] >= 0.68),
    ("test AUPRC >= 0.215", lambda found: found["test"]["auprc"]["value"] >= 0.215),
    ("test ECE <= 0.01", lambda found: found["test"]["ece"]["value"] <= 0.01),
    ("training DAG <= 600 s", lambda found: found["dag_seconds"] <= 600),
    ("single LightGBM run <= 30 s", lambda found: found["single"]["lightgbm"]["wall"] <= 30),
    ("peak memory < 2048 MiB", lambda found: found["peak_mib"] < 2048),
    ("same champion again, to 1e-6", lambda found: found["largest_difference"] <= 1e-6),
)

log = logging.getLogger("bench")


def single(candidate: str) -> dict[str, float]:
    """One training of a candidate with its defaults: read, encode, fit, score; in this process."""
    from training import candidates, data, features
    from training.candidates import Table, never_stop
    from training.inference import sigmoid
    from training.metrics import Scores, all_metrics

    dsn = settings().dsn
    wanted = features.read(dsn)["features"]
    begin = time.perf_counter()
    train, validation = data.read(dsn, "train", wanted), data.read(dsn, "validation", wanted)
    encoder = data.fit_encoder(train, wanted)
    learnt, judged = Table.of(train, encoder), Table.of(validation, encoder)
    module = candidates.load(candidates.file(candidate))
    chosen = settings()
    model, _ = module.fit(
        learnt,
        judged,
        module.DEFAULTS,
        chosen.training_seed,
        chosen.training_threads,
        never_stop,
    )
    metrics = all_metrics(Scores(judged.target, sigmoid(module.margin(model, judged.matrix))))
    return {"wall": time.perf_counter() - begin, "peak_mib": own_peak_mib(), **metrics}


def _largest_worker(state: Path) -> float:
    """Resident memory (MiB) of the largest process of a task."""
    largest = 0.0
    for process in processes.find(state, "scheduler"):
        with suppress(psutil.Error):  # it may end meanwhile
            largest = max(largest, process.memory_info().rss / (1 << 20))
    return largest


def _train_by_dag(state: Path, airflow: Airflow, csv: Path) -> dict[str, Any]:
    airflow.wait_for_dag(TRAINING_DAG_ID, newer_than=0)
    known = airflow.runs(TRAINING_DAG_ID)
    data_run = airflow.trigger(DAG_ID, {"source": str(csv), "full_refresh": False})
    for _ in airflow.follow(DAG_ID, data_run, _TIMEOUT):
        pass
    with sampled(lambda: _largest_worker(state), _SAMPLE_SECONDS) as memory:
        run_id = airflow.wait_for_scheduled_run(TRAINING_DAG_ID, known)
        tasks = [
            {"task": task.name, "seconds": task.seconds}
            for task in airflow.follow(TRAINING_DAG_ID, run_id, _TIMEOUT)
            if task.state == "success"
        ]
    found = airflow.call("GET", f"dags/{TRAINING_DAG_ID}/dagRuns/{run_id}")
    if found["state"] != "success":
        raise BenchError(f"the run of {TRAINING_DAG_ID} failed; see {state}/airflow/logs")
    begin, end = (datetime.fromisoformat(found[key]) for key in ("start_date", "end_date"))
    return {
        "dag_seconds": (end - begin).total_seconds(),
        "tasks": tasks,
        "peak_mib": max(memory, default=0.0),
    }


def _single_runs(environment: dict[str, str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for candidate in (BASELINE, "lightgbm"):
        command = [sys.executable, "-W", "ignore", "-m", "bench.training", "--single", candidate]
        rounds = [
            json.loads(run(command, environment).output.splitlines()[-1]) for _ in range(ROUNDS)
        ]
        found[candidate] = {
            name: statistics.median(each[name] for each in rounds) for name in rounds[0]
        }
        log.info("%s: %.1f s", candidate, found[candidate]["wall"])
    return found


def _champion(environment: dict[str, str], state: Path) -> dict[str, Any]:
    from training.actions import open_tracker
    from training.registry import find_version
    from training.tracking import download

    client = open_tracker(environment["MLFLOW_TRACKING_URI"], state).client()
    version = find_version(client, "champion")
    if version is None:
        raise BenchError("training made no champion")
    with tempfile.TemporaryDirectory() as folder:
        file = download(client, version.run_id, "evaluation.json", Path(folder))
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return facts


def _again(environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "training", "run", "--force"]
    said = run([*command, "--no-learning-curve"], environment).output
    answer: dict[str, Any] = json.loads(said[said.index("\n{\n") :])
    return answer


def _largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    if one["candidate"] != other["candidate"]:
        return float("inf")
    differences = [
        abs(float(found["value"]) - float(other[split][name]["value"]))
        for split in ("validation", "test")
        for name, found in one[split]["metrics"].items()
    ]
    return max(differences)


def measure(csv: Path) -> dict[str, Any]:
    """Measure everything; the platform is gone afterwards.

    Raises:
        BenchError: a run failed, or made no champion.
    """
    with (
        tempfile.TemporaryDirectory(prefix="diabetes-bench-") as name,
        running_platform(Path(name) / "platform", csv) as (state, airflow, port),
    ):
        Path(name).chmod(0o755)
        found = _train_by_dag(state, airflow, csv)
        log.info("DAG: %.0f s, largest task %.0f MiB", found["dag_seconds"], found["peak_mib"])
        environment = {
            "DIABETES_STATE_DIR": str(state),
            "DIABETES_DB_PORT": str(port),
            "DIABETES_DB_PASSWORD": Secrets(state)["diabetes"],
            "MLFLOW_TRACKING_URI": (state / "mlflow" / "url").read_text(),
        }
        champion = _champion(environment, state)
        found["single"] = _single_runs(environment)
        found["largest_difference"] = _largest_difference(champion, _again(environment))
    found["candidate"] = champion["candidate"]
    for split in ("validation", "test"):
        found[split] = champion[split]["metrics"]
    found["learning_curve"] = champion["learning_curve"]
    found["policy"] = champion["test"]["policy"]
    return found


def as_markdown(found: dict[str, Any]) -> str:
    """The results as a page."""
    baseline = found["single"][BASELINE]
    lines = [
        "# Training, measured",
        "",
        f"`python -m bench.training` on {cpu_model()}, {usable_cores()} cores.",
        "",
        "| target | |",
        "|---|---|",
        *(f"| {name} | {'met' if met(found) else '**MISSED**'} |" for name, met in _TARGETS),
        "",
        f"Champion: {found['candidate']}. 95 % patient-bootstrap intervals.",
        "",
        "| metric | validation | test |",
        "|---|---|---|",
    ]
    for name in found["test"]:
        cells = [
            f"{each['value']:.4f} [{each['low']:.4f}, {each['high']:.4f}]"
            for each in (found["validation"][name], found["test"][name])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The DAG, as the assets start it: {found['dag_seconds']:.0f} s; its largest task held "
        f"{found['peak_mib']:.0f} MiB. The same training by hand gave the same champion, metrics "
        f"within {found['largest_difference']:.1e}.",
        "",
        "| task | s |",
        "|---|---|",
        *(f"| {task['task']} | {task['seconds']:.1f} |" for task in found["tasks"]),
        "",
        f"One training with a candidate's defaults (tables to validation metrics, no start of "
        f"Python), median of {ROUNDS}:",
        "",
        "| candidate | s | ratio | peak MiB | validation AUROC |",
        "|---|---|---|---|---|",
    ]
    for name, one in found["single"].items():
        lines.append(
            f"| {name} | {one['wall']:.1f} | {one['wall'] / baseline['wall']:.2f}x | "
            f"{one['peak_mib']:.0f} | {one['auroc']:.4f} |"
        )
    lines += ["", "| batches | rows | AUROC on validation rows |", "|---|---|---|"]
    for point in found["learning_curve"]:
        lines.append(
            f"| 1 to {point['batches']} | {point['rows']:,} | {point['auroc']:.4f} "
            f"[{point['auroc_low']:.4f}, {point['auroc_high']:.4f}] |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure, print, and write docs/benchmarks/training/results.md and .json."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--single", default="", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=PROJECT_ROOT / "docs" / "benchmarks" / "training"
    )
    arguments = parser.parse_args()
    if arguments.single:
        print(json.dumps(single(arguments.single)))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    source = Path(settings().source)
    if not source.is_file():
        sys.stderr.write("error: set DIABETES_SOURCE to the real zip or csv\n")
        return 1
    found = measure(source)
    page = as_markdown(found)
    print(page)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.md").write_text(page, encoding="utf-8")
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
